"""The recipes of augmentation: which operations a view goes through, in this order, and how strong they are.

A recipe is a RandomResizedCrop and the operations after it. To add a recipe, add a line to AUGMENTATIONS and its name
to `augmentation` and `warmup_augmentation` in config.py. To add an operation, write a class like RandomGrayscale
(color.py) and put it in a recipe. It has

    prob                  the share of the views that it changes; where that is 0 it is left out
    columns               how many numbers `sample` draws for a view
    sample(n, generator)  what is random of n views: n x columns float32, on the CPU, from the CPU's generator
    on_cpu(x, draws)      the views changed; x: N x 3 x S x S in [0, 1], may be overwritten; draws: of sample
    on_gpu(x, draws)      the same for all views at once, in new memory, with no step that depends on what was drawn
    torchvision(v2)       the reference: a transform of torchvision.transforms.v2 (handed in: few need it imported) of a
                          PIL image, whose values are 0 to 255
"""

from dataclasses import dataclass, replace

from dataloader.augment.blur import GaussianBlur
from dataloader.augment.channels import ChannelJitter, IntensityJitter
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
    # For training with labels (paper, appendix A).
    'crop': (RandomResizedCrop(scale=(0.08, 1.0)),),
}


@dataclass(frozen=True)
class Augmentation:
    """A recipe, and what the options say of it."""

    crop: RandomResizedCrop
    operations: tuple  # after the crop, in this order
    size: int  # side of a view, in pixels
    interpolation: str  # 'bilinear' or 'bicubic', of the crop's resize
    mean: object  # `mean` and `std`
    std: object
    levels: tuple | None = None  # of decode.level_range

    @property
    def changes_pixels(self):
        """Whether a view is more than a crop."""
        return any(operation.prob for operation in self.operations)


def get_augmentation(args, name):
    """The recipe `name` of AUGMENTATIONS under the options: `blur_prob` in place of a blur's own probability, and
    `crop_scale` as the smallest crop of 'crop'."""
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
    """The operations for images whose channels are not red, green and blue, or that are jittered channel by channel:
    of ColorJitter brightness and contrast alone; no hue, saturation and grayscale."""
    mean, std = (channel_values(name, getattr(args, name)) for name in ('mean', 'std'))
    found = []
    for operation in operations:
        if isinstance(operation, ColorJitter):
            strengths = operation.brightness, operation.contrast, mean, std
            if args.jitter == 'channel':
                found.append(ChannelJitter(*strengths, args.num_channels, operation.prob))
            else:
                found.append(IntensityJitter(*strengths, operation.prob))
        elif not isinstance(operation, RandomGrayscale):
            found.append(operation)
    return tuple(found)


def describe_augmentation(args):
    """What becomes of an augmentation's colours where channels are none, in a line; '' where they are."""
    if args.jitter == 'channel':
        return 'augmentation: a gain and an offset for each channel (`jitter=channel`); no hue, saturation, grayscale'
    if channel_numbers(args.channels):
        return 'augmentation: brightness and contrast of all channels alike; no hue, saturation, grayscale'
    return ''
