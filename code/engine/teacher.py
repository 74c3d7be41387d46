"""The initial backbone as a teacher of the one that is trained (`distill_weight`).

Pretrained weights describe a large image better than a small one. Before the backbone is trained, the initial weights
compute the features of each training image: of its center crop, without augmentation, at `distill_size` px. Averaged
with those of the `distill_neighbors` nearest images they are the targets of all views of the image. So the trained
backbone learns, at its own smaller size, what the initial weights know of the larger image, and which images resemble
it. (Knowledge distillation: Hinton et al., arXiv 1503.02531. Accuracy over the size of an image: Touvron et al., arXiv
1906.06423. Experiments: results/LOG.md.)
"""

import copy

import torch
from torch.nn.functional import normalize, softmax

from dataloader.cache import cache_file
from dataloader.load_dataset import eval_loader
from loss.negative_cosine import negative_cosine
from metric.knn import topk_neighbors
from model.weights import copy_weights
from protocols.features import eval_mode, extract_features
from runtime.checkpoints.saved_options import PREPROCESSING
from runtime.console import first_line
from runtime.device import explain_oom, get_device, is_oom
from runtime.distributed import convert_sync_batchnorm, first_failure, rank, world_size
from runtime.errors import UserError, WorkError
from runtime.messages import log
from runtime.options import replace_args
from runtime.tensors import channels_last, to_device

DEFAULT_SIZE = 224  # px, for --distill_size=0: the size that most weights were trained at
MIN_STD = 1e-3  # a feature with a smaller standard deviation is divided by this
TEMPERATURE = 0.1  # of the weights of neighbors
TARGETS_FILE = 'targets.pt'  # in the folder of a run that is not finished


class Teacher:
    """Targets of the training images, in half precision in memory: N x d.

    distance: the last unweighted loss, on the device. args: of the run. backbone: the one that is trained; start: its
    initial weights. dataset: ImageDataset of train. folder: of the run; a resumed run reads the targets from it.
    Raises WorkError if the initial weights give infinite features, or memory is short.
    """

    def __init__(self, args, backbone, start, dataset, folder):
        path, fingerprint = folder / TARGETS_FILE, describe_targets(args, dataset)
        self.features = cache_file.load(path, fingerprint)
        if first_failure('' if self.features is not None else 'a rank has not got the file'):
            self.features = compute_targets(args, backbone, start, dataset)
            if not rank():
                cache_file.save(path, {'mark': fingerprint, 'content': self.features})
        else:
            log(f'distillation: the targets of {len(dataset)} images are read from {path.name}')
        self.weight, self.device = args.distill_weight, get_device(args)
        self.norm = torch.nn.BatchNorm1d(self.features.shape[1], eps=MIN_STD**2, affine=False, device=self.device)
        if world_size() > 1:
            convert_sync_batchnorm(self.norm)

    def targets(self, rows):
        """Return the targets of the training images with these row numbers, N x d, on the device."""
        return to_device(self.features[rows], self.device).float()

    def loss(self, features, targets):
        """The weighted distillation loss: 1 - cosine similarity of features, standardized over the views of the batch,
        and targets; the mean over batch and views. features: a list of N x d, one per view; targets: N x d."""
        standardized = self.norm(torch.cat(features)).chunk(len(features))
        mean = sum(1 + negative_cosine(each, targets) for each in standardized) / len(features)
        self.distance = mean.detach()
        return self.weight * mean


def describe_targets(args, dataset):
    """Return what the targets of a run depend on, as text: its options and images. Its initial weights never change."""
    options = {name: getattr(args, name) for name in (*PREPROCESSING, 'distill_size', 'distill_neighbors')}
    return f'{options} {dataset.names.digest(dataset.labels.numpy().tobytes())}'


def compute_targets(args, backbone, start, dataset):
    """Compute the targets of Teacher, N x d, float16, on the CPU."""
    initial = copy.deepcopy(backbone)
    copy_weights(initial, start)
    # On a CPU bfloat16 would be benchmarked anew for the larger images.
    amp = 'off' if get_device(args).type == 'cpu' else args.amp
    teacher_args = replace_args(args, image_size=args.distill_size, amp=amp)
    images = copy.copy(dataset)
    images.args = teacher_args
    log(f'distillation: the targets are features of {len(images)} images at {args.distill_size} px')
    with explain_oom('the targets of the distillation', '--distill_weight=0 trains without them'):
        try:
            features, _ = extract_features(teacher_args, initial, eval_loader(teacher_args, images), 'targets')
        except WorkError as error:
            raise WorkError(f'the initial weights at --distill_size={args.distill_size}: {error}') from None
        return make_targets(features, args.distill_neighbors).half().cpu()


def make_targets(features, k):
    """Standardize features, N x d, over the images, scale each row to unit length, and average it with the mean of its
    k nearest other rows, weighted by exp(cosine / TEMPERATURE). k=0: no neighbors. Returns N x d."""
    own = normalize((features - features.mean(0)) / features.std(0, correction=0).clamp(min=MIN_STD), dim=1)
    k = min(k, len(own) - 1)
    if k < 1:
        return own
    cosine, rows = topk_neighbors(own, own, k + 1)
    cosine[rows == torch.arange(len(own), device=rows.device)[:, None]] = -torch.inf  # the image itself
    shares = softmax(cosine / TEMPERATURE, dim=1)
    return (own + sum(share[:, None] * own[row] for share, row in zip(shares.T, rows.T, strict=True))) / 2


@torch.no_grad()
def set_distill_size(args, model):
    """Resolve --distill_size=0: 224 px, or image_size if that is larger, or image_size for networks that accept only
    this (ViT) or are made for small images (stem=cifar). Returns args. Raises UserError if the network does not accept
    images of --distill_size."""
    if not (args.init_from and args.distill_weight):
        return args
    default = args.image_size if args.stem == 'cifar' else max(args.image_size, DEFAULT_SIZE)
    size = args.distill_size or default
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
