"""The initial backbone as a teacher of the one that is trained (`distill_weight`).

Pretrained weights describe a large image better than a small one. Before the backbone is trained, the initial weights
compute the features of each training image: of its center crop, without augmentation, at `distill_size` px. Averaged
with those of the `distill_neighbors` nearest images they are the targets of all views of the image. So the trained
backbone learns, at its own smaller size, what the initial weights know of the larger image, and which images resemble
it. (Knowledge distillation: Hinton et al., arXiv 1503.02531. Accuracy as a function of image size: Touvron et al.,
arXiv 1906.06423. Experiments: results/LOG.md.)
"""

import copy

import torch
from torch.nn.functional import cosine_similarity, normalize, softmax

from config import OPTIONS, PREPROCESSING
from dataloader.cache import cache_file
from dataloader.load_dataset import eval_loader, select
from dataloader.loading.sampler import rank_slice
from loss.negative_cosine import negative_cosine
from metric.knn import topk_neighbors
from model.weights import copy_weights
from protocols.features import eval_mode, extract_features
from runtime.console import first_line
from runtime.device import explain_oom, get_device, is_oom
from runtime.distributed import all_gather_rows, convert_sync_batchnorm, first_failure, rank, world_size
from runtime.errors import UserError, WorkError
from runtime.messages import log, progress, warn
from runtime.options import replace_args
from runtime.tensors import channels_last, evenly_spaced, to_device

DEFAULT_SIZE = 224  # px, for --distill_size=0: the size that most weights were trained at
MIN_STD = 1e-3  # a feature with a smaller standard deviation is divided by this
TEMPERATURE = 0.1  # of the weights of neighbors
CHUNK = 4096  # rows whose neighbors are searched together
MEASURED = 500  # training images whose similarity to the targets is measured after an epoch
TARGETS_FILE = 'targets.pt'  # in the folder of a run that is not finished


class Teacher:
    """Targets of the training images, in half precision in memory: N x d.

    weight: of the distillation loss beside SimSiam's. args: of the run. backbone: the one that is trained; start: its
    initial weights. dataset: ImageDataset of train. folder: of the run; a resumed run reads the targets from it.
    Raises WorkError if the initial weights give infinite features, or memory is short.
    """

    def __init__(self, args, backbone, start, dataset, folder):
        path, fingerprint = folder / TARGETS_FILE, describe_targets(args, dataset)
        self.dataset, self.rows = dataset, evenly_spaced(len(dataset), MEASURED)
        self.weight, self.device = args.distill_weight, get_device(args)
        content = cache_file.load(path, fingerprint)
        if first_failure('' if content is not None else 'a rank has not got the file'):
            initial = copy.deepcopy(backbone)
            copy_weights(initial, start)
            self.features = compute_targets(args, initial, dataset)
            self.start_similarity = self.similarity(args, initial)
            if not rank():
                content = {'features': self.features, 'start_similarity': self.start_similarity}
                cache_file.save(path, {'mark': fingerprint, 'content': content})
        else:
            log(f'distillation: the targets of {len(dataset)} images are read from {path.name}')
            self.features, self.start_similarity = content['features'], content['start_similarity']
        self.norm = torch.nn.BatchNorm1d(self.features.shape[1], eps=MIN_STD**2, affine=False, device=self.device)
        if world_size() > 1:
            convert_sync_batchnorm(self.norm)

    def targets(self, rows):
        """Return the targets of the training images with these row numbers, N x d, on the device."""
        return to_device(self.features[rows], self.device).float()

    def loss(self, features, targets):
        """The distillation loss, without its weight: 1 - cosine similarity of features, standardized over the views of
        the batch, and targets; the mean over batch and views. features: a list of N x d, one per view; targets:
        N x d."""
        standardized = self.norm(torch.cat(features)).chunk(len(features))
        return sum(1 + negative_cosine(each, targets) for each in standardized) / len(features)

    def similarity(self, args, backbone):
        """Compute the cosine similarity of standardized features and targets of up to MEASURED evenly spaced images,
        of their center crops at image_size. Returns n, on the CPU."""
        images = select(self.dataset, self.rows)
        features, _ = extract_features(args, backbone, eval_loader(args, images), 'similarity to the targets')
        return cosine_similarity(standardize(features), self.targets(self.rows)).cpu()

    def measure(self, args, backbone):
        """Compare `similarity` of the backbone with that of the initial weights. Returns (mean, mean gain, its standard
        error, paired by image)."""
        similarity = self.similarity(args, backbone)
        gain = similarity - self.start_similarity
        return similarity.mean().item(), gain.mean().item(), gain.std().item() / len(gain) ** 0.5


def describe_targets(args, dataset):
    """Return what the targets of a run depend on, as text: its options and images. Its initial weights never change."""
    names = (*PREPROCESSING, 'distill_size', 'distill_neighbors', 'cache_short_side')
    options = {name: getattr(args, name) for name in names}
    return f'{options} {MEASURED} {dataset.pixel_format.key()} {dataset.folder} {dataset.digest()}'


def compute_targets(args, initial, dataset):
    """Compute the targets of Teacher, N x d, float16, on the CPU. initial: the initial backbone."""
    # On a CPU --amp=auto would benchmark bfloat16 once more, for the larger images.
    amp = 'off' if get_device(args).type == 'cpu' else args.amp
    teacher_args = replace_args(args, image_size=args.distill_size, amp=amp)
    images = copy.copy(dataset)
    images.args = teacher_args
    log(f'distillation: the targets are features of {len(images)} images at {args.distill_size} px')
    with explain_oom('the targets of the distillation', '--distill_neighbors=0 needs less, --distill_weight=0 none'):
        try:
            features, _ = extract_features(teacher_args, initial, eval_loader(teacher_args, images), 'targets')
        except WorkError as error:
            raise WorkError(f'the initial weights at --distill_size={args.distill_size}: {error}') from None
        return make_targets(features, args.distill_neighbors)


def standardize(features):
    """Subtract the mean over the images from features, N x d, and divide by the standard deviation."""
    return (features - features.mean(0)) / features.std(0, correction=0).clamp(min=MIN_STD)


def make_targets(features, k):
    """Standardize features, N x d, over the images, scale each row to unit length, and average it with the mean of its
    k nearest other rows, weighted by exp(cosine / TEMPERATURE). k=0: no neighbors. Returns N x d, float16, on the CPU.
    Every rank averages a part of the rows."""
    unit = normalize(standardize(features), dim=1)
    k = min(k, len(unit) - 1)
    if k < 1:
        return unit.half().cpu()
    numbers = rank_slice(torch.arange(len(unit), device=unit.device)).split(CHUNK)
    parts = [average_with_neighbors(unit, rows, k).half() for rows in progress(numbers, 'nearest images')]
    return all_gather_rows(torch.cat(parts) if parts else unit[:0].half(), len(unit)).cpu()


def average_with_neighbors(unit, rows, k):
    """make_targets for some row numbers. unit: rows of unit length, N x d."""
    cosine, neighbors = topk_neighbors(unit[rows], unit, k + 1)
    cosine[neighbors == rows[:, None]] = -torch.inf  # the image itself
    weights = softmax(cosine / TEMPERATURE, dim=1)
    means = sum(weight[:, None] * unit[row] for weight, row in zip(weights.T, neighbors.T, strict=True))
    return (unit[rows] + means) / 2


@torch.no_grad()
def set_distill_size(args, model):
    """Resolve --distill_size=0: 224 px, or image_size if that is larger, or image_size for networks that accept only
    this (ViT) or are made for small images (stem=cifar). Returns args. Raises UserError if the network does not accept
    images of --distill_size."""
    if not (args.init_from and args.distill_weight):
        return args
    default = args.image_size if args.stem == 'cifar' else max(args.image_size, DEFAULT_SIZE)
    size = args.distill_size or default
    warn_small_targets(args, size)
    image = torch.zeros(1, args.num_channels, size, size)
    with eval_mode(model.backbone):
        try:
            model.backbone(channels_last(image))
            return replace_args(args, distill_size=size)
        except Exception as error:  # networks raise various types
            if is_oom(error):
                raise
            reason = f'{args.backbone} does not accept images of {size} px ({first_line(error)})'
    if args.distill_size:
        raise UserError(f'--distill_size={size}: {reason}; try --distill_size={args.image_size}')
    if not rank():
        log(f'{reason}: the targets of the distillation are of {args.image_size} px')
    return replace_args(args, distill_size=args.image_size)


def warn_small_targets(args, size):
    """Warn if targets of `size` px know no more than the views do. Raises UserError for a size that no network sees
    anything in."""
    if size < OPTIONS['image_size'].metadata['low']:
        raise UserError(
            f'--distill_size={size} is too small: 0, or at least {OPTIONS["image_size"].metadata["low"]} px'
        )
    if size < args.image_size:
        warn(f'--distill_size={size}: the targets are of smaller images than the views')
    if 0 < args.cache_short_side < size:
        warn(
            f'--cache_short_side={args.cache_short_side}: the targets, of {size} px, are of smaller images, enlarged; '
            f'--cache_short_side={size} or more, or 0, keeps what they show'
        )
