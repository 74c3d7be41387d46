"""The augmentations: the operations of each, in order, with their strengths.

An augmentation is a RandomResizedCrop followed by operations. To add one, add a line to AUGMENTATIONS and its name to
`augmentation` and `warmup_augmentation` in config.py. To add an operation, write a class like RandomGrayscale
(color.py) and use it in an augmentation. It has

    prob                  probability of changing a view; operations with 0 are left out
    columns               how many random numbers `sample` returns for a view
    sample(n, generator)  the random parameters of n views: n x columns float32, from a CPU generator
    on_cpu(x, draws)      the changed views; x: N x C x S x S in [0, 1], may be overwritten; draws: from sample
    on_gpu(x, draws)      the same, not in place, without control flow that depends on draws
    torchvision(v2)       the reference: a transform of torchvision.transforms.v2 (passed in, as importing it is slow)
                          for PIL images

"""

from dataclasses import dataclass, replace

from dataloader.augment.blur import GaussianBlur
from dataloader.augment.channels import IntensityJitter
from dataloader.augment.color import ColorJitter, RandomGrayscale
from dataloader.augment.crop import RandomResizedCrop
from runtime.options import channel_numbers, channel_values, pixel_levels

AUGMENTATIONS = {
    # MoCo v2 (arXiv 2003.04297), the paper's (section 3).
    'moco': (
        RandomResizedCrop(scale=(0.2, 1.0)),
        ColorJitter(0.4, 0.4, 0.4, 0.1, prob=0.8),
        RandomGrayscale(prob=0.2),
        GaussianBlur(sigma=(0.1, 2.0), prob=0.5),
    ),
    # SimCLR (arXiv 2002.05709, appendix A) at strength 1.
    'simclr': (
        RandomResizedCrop(scale=(0.08, 1.0)),
        ColorJitter(0.8, 0.8, 0.8, 0.2, prob=0.8),
        RandomGrayscale(prob=0.2),
        GaussianBlur(sigma=(0.1, 2.0), prob=0.5),
    ),
    # For distillation: colors and scale stay near those of the images that the targets are of (results/LOG.md).
    'mild': (
        RandomResizedCrop(scale=(0.5, 1.0)),
        ColorJitter(0.2, 0.2, 0.2, 0.02, prob=0.8),
    ),
    # For training with labels (paper, appendix A).
    'crop': (RandomResizedCrop(scale=(0.08, 1.0)),),
}


@dataclass(frozen=True)
class Augmentation:
    """An augmentation with the options that belong to it."""

    crop: RandomResizedCrop
    operations: tuple  # after the crop, in this order
    size: int  # side of a view, in pixels
    interpolation: str  # 'bilinear' or 'bicubic', for the crop
    mean: object  # the option `mean`
    std: object  # the option `std`
    levels: tuple | None = None  # see decode.level_range

    @property
    def changes_pixels(self):
        """Whether any operation besides the crop changes views."""
        return any(operation.prob for operation in self.operations)


def get_augmentation(args, name):
    """Return the Augmentation `name` of AUGMENTATIONS with the options: `blur_prob` replaces the probability of a blur,
    `crop_scale` the smallest crop of 'crop'."""
    crop, *operations = AUGMENTATIONS[name]
    if name == 'crop':
        crop = replace(crop, scale=(args.crop_scale, 1.0))
    operations = tuple(
        replace(operation, prob=args.blur_prob) if isinstance(operation, GaussianBlur) else operation
        for operation in operations
    )
    if channel_numbers(args.channels) or args.jitter == 'channel':
        operations = replace_color_operations(operations, args)
    levels = pixel_levels(args.white_level)
    return Augmentation(crop, operations, args.image_size, args.interpolation, args.mean, args.std, levels)


def replace_color_operations(operations, args):
    """Replace color operations, for images whose channels are not red, green and blue, or with `jitter=channel`:
    ColorJitter becomes brightness and contrast; saturation, hue and grayscale are removed. Returns the operations."""
    mean, std = (channel_values(name, getattr(args, name)) for name in ('mean', 'std'))
    replaced = []
    for operation in operations:
        if isinstance(operation, ColorJitter):
            groups = args.num_channels if args.jitter == 'channel' else 1
            strengths = operation.brightness, operation.contrast
            replaced.append(IntensityJitter(*strengths, mean, std, groups, operation.prob))
        elif not isinstance(operation, RandomGrayscale):
            replaced.append(operation)
    return tuple(replaced)


def describe_augmentation(args):
    """Describe the replacement of color operations in a line; '' if there is none."""
    if args.jitter == 'channel':
        return 'augmentation: a gain and an offset for each channel (`jitter=channel`); no hue, saturation, grayscale'
    if channel_numbers(args.channels):
        return 'augmentation: brightness and contrast of all channels alike; no hue, saturation, grayscale'
    return ''
