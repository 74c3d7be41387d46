"""The initial backbone as a teacher of the one that is trained (`distill_weight`).

Pretrained weights describe a large image better than a small one. The teacher sees each training image once, whole and
without augmentation, at `distill_size` px, before the first step. Its features are the targets of all views of the
image: the trained backbone learns at its own, smaller size what the initial weights know of the larger image, and
SimSiam does not move it away from them. (Knowledge distillation: Hinton et al., arXiv 1503.02531. Accuracy over the
size of an image: Touvron et al., arXiv 1906.06423. The experiments are in results/LOG.md.)
"""

import copy

import torch

from dataloader.load_dataset import eval_loader
from loss.negative_cosine import negative_cosine
from model.weights import copy_weights
from protocols.features import eval_mode, extract_features
from runtime.console import first_line
from runtime.device import get_device
from runtime.distributed import rank
from runtime.errors import UserError
from runtime.messages import log
from runtime.options import replace_args
from runtime.tensors import channels_last, to_device

DEFAULT_SIZE = 224  # px, for --distill_size=0: the size that most weights were trained at
MIN_STD = 1e-3  # features that vary less are noise, and are not enlarged beyond this


class Teacher:
    """Targets of the training images: N x d, standardized by the mean and standard deviation, d each, over the images.

    args: of the run. backbone: the one that is trained; start: its initial weights. dataset: ImageDataset of train.
    """

    def __init__(self, args, backbone, start, dataset):
        backbone = copy.deepcopy(backbone)
        copy_weights(backbone, start)
        args = replace_args(args, image_size=find_teacher_size(args, backbone))
        dataset = copy.copy(dataset)
        dataset.args = args
        log(f'distillation: the targets are features of {len(dataset)} whole images of {args.image_size} px')
        features, _ = extract_features(args, backbone, eval_loader(args, dataset), 'targets')
        self.weight, self.mean, self.std = args.distill_weight, features.mean(0), features.std(0).clamp(min=MIN_STD)
        self.features = ((features - self.mean) / self.std).half().cpu()  # half of the memory

    def targets(self, rows):
        """Return the targets of the training images with these row numbers, N x d, on the device."""
        return to_device(self.features[rows], self.mean.device).float()

    def loss(self, features, targets):
        """The weighted distillation loss: 1 - cosine similarity of standardized features and targets, mean over batch
        and views. features: a list of N x d, one per view; targets: N x d."""
        distances = [1 + negative_cosine((each - self.mean) / self.std, targets) for each in features]
        return self.weight * sum(distances) / len(distances)


@torch.no_grad()
def find_teacher_size(args, backbone):
    """Return the side of the images that the teacher sees, in pixels: --distill_size, or the default, or image_size for
    networks that accept only this (ViT). Raises UserError if --distill_size is not accepted."""
    wanted = args.distill_size or max(args.image_size, DEFAULT_SIZE)
    image = torch.zeros(1, args.num_channels, wanted, wanted, device=get_device(args))
    with eval_mode(backbone):
        try:
            backbone(channels_last(image))
            return wanted
        except (AssertionError, RuntimeError, ValueError) as error:  # a network raises what it likes
            reason = f'{args.backbone} does not accept images of {wanted} px ({first_line(error)})'
    if args.distill_size:
        raise UserError(f'--distill_size={wanted}: {reason}; try --distill_size={args.image_size}')
    if not rank():
        log(f'{reason}: its targets are of {args.image_size} px')
    return args.image_size
