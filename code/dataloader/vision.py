"""Augmentation: two random views of an image (paper section 3, MoCo v2), a batch at a time on the device.

Every image has its own draw.

An augmentation is a random resized crop and a list of operations (augment/recipes.py). What is random is drawn first,
as one table, and the views are a function of images and table. (The reference flips last, ours with the crop; a flip
commutes with all that stands between.)

Images come either whole, N x 3 x H x W uint8, or as crops that the workers already cut and resized,
N x V x 3 x S x S uint8 (V views of one image; see load_dataset.py), where the whole images are too large to move.
"""

import functools

import torch

from dataloader.augment.crop import center_box, crop_resize
from dataloader.loading.decode import level_range
from runtime.options import channel_values, pixel_levels
from runtime.tensors import to_device

L2_BYTES = 2**20  # of one core's cache


def random_views(images, augmentation, generator, count=2, place=None, compiled=False):
    """`count` independently distorted views of every image.

    images: N x 3 x H x W uint8, or N x count x 3 x S x S uint8, cropped already. augmentation: of recipes, for views of
    S pixels. generator: CPU generator. place: (first, total), the images are a part of `total`, from the first on, and
    get the random numbers that they would get in the whole. compiled: on a GPU, fuse all of it into few kernels with
    torch.compile. Returns a tuple of normalised float tensors, N x 3 x S x S.
    """
    uncropped, (first, total) = images.ndim == 4, place or (0, len(images))
    draws = sample(count * total, augmentation, generator, images.shape[-2:] if uncropped else None).view(
        count, total, -1
    )
    return apply_params(images, draws[:, first : first + len(images)].flatten(0, 1), augmentation, count, compiled)


def apply_params(images, draws, augmentation, count, compiled=False):
    """make_views, by a table of draws (of `sample`), view after view."""
    mean_std = mean_and_std(augmentation.mean, augmentation.std, images.device)
    if images.device.type == 'cpu':
        images = images.repeat(count, 1, 1, 1) if images.ndim == 4 else images.transpose(0, 1).flatten(0, 1)
        return augment_cpu(images, draws, augmentation, lambda x: normalize(x, mean_std)).chunk(count)
    run = cached_compile(augment_gpu) if compiled else augment_gpu
    return run(images, to_device(draws, images.device), augmentation, mean_std, count)


def sample(n, augmentation, generator, sides=None):
    """All that is random in n views of images: n x columns float32 on the CPU, first the crop's columns, then those of
    each operation; from the CPU's generator, so that a seed fixes the views whatever the device. sides: height and
    width of whole images; None for what is cropped already."""
    crop = augmentation.crop
    boxes = crop.sample(n, *sides, generator) if sides else torch.zeros(n, crop.columns)
    return torch.cat([boxes, *(operation.sample(n, generator) for operation in augmentation.operations)], 1)


def split_draws(draws, augmentation):
    """(boxes, flips, [(operation, its draws), ...]) of a table of `sample`; without operations that change nothing."""
    operations = augmentation.operations
    crop, *rest = draws.split([augmentation.crop.columns, *(operation.columns for operation in operations)], 1)
    pairs = zip(operations, rest, strict=True)
    return crop[:, :4], crop[:, 4], [(operation, part) for operation, part in pairs if operation.prob]


def augment_cpu(images, draws, augmentation, output_fn):
    """One distorted view of every image, on a CPU: each operation on the images that it is for.

    images: N x 3 x H x W uint8, to be cropped, or of S x S; draws: of `sample`. output_fn: what to do with the colors
    in [0, 1] at last: normalise them, or to_uint8. A CPU core is fastest on what stays in its cache, so large views go
    through all operations one or a few at a time; of small ones the whole batch, which all cores share.
    """
    size, views = augmentation.size, []
    step = max(1, L2_BYTES // (12 * size**2)) if size > 96 else len(images)
    boxes, flips, operations = split_draws(draws, augmentation)
    uncropped, cubic = bool(boxes[:, 2].any()), augmentation.interpolation == 'bicubic'
    for start in range(0, len(images), step):
        part = slice(start, start + step)
        if uncropped:
            x = crop_resize(images[part].float(), boxes[part], flips[part], size, cubic=cubic, white=255).div_(255)
        else:
            x = to_unit(images[part], augmentation.levels)
        for operation, drawn in operations:
            x = operation.on_cpu(x, drawn[part])
        views.append(output_fn(x))
    return torch.cat(views) if len(views) > 1 else views[0]


def augment_gpu(images, draws, augmentation, mean_std, count):
    """make_views on a GPU, from its table of draws: every operation on every image, so that nothing depends on what
    was drawn and all of it is one graph. mean_std: of mean_and_std. Returns the views, each in channels_last."""
    boxes, flips, operations = split_draws(draws, augmentation)
    if images.ndim == 4:
        cubic = augmentation.interpolation == 'bicubic'
        x = crop_resize((images / 255).repeat(count, 1, 1, 1), boxes, flips, augmentation.size, cubic=cubic)
    else:
        x = to_unit(images.transpose(0, 1).flatten(0, 1), augmentation.levels)
    for operation, drawn in operations:
        x = operation.on_gpu(x, drawn)
    x = (x - mean_std[0]) / mean_std[1]
    return x.contiguous(memory_format=torch.channels_last).chunk(count)


@functools.cache
def cached_compile(function):
    return torch.compile(function)


@functools.cache
def mean_and_std(mean, std, device):
    """`mean` and `std`, 2 x C x 1 x 1 (C is 1 where a number is for all channels), on the device: copied there once."""
    values = [torch.tensor(channel_values(*each)) for each in (('mean', mean), ('std', std))]
    return torch.stack(torch.broadcast_tensors(*values)).view(2, -1, 1, 1).to(device)


def mean_std_of_args(args, device):
    """mean_and_std of the options."""
    return mean_and_std(args.mean, args.std, device)


@functools.cache
def torchvision_views(augmentation):
    """The reference: torchvision's transforms, one image at a time, as a function of (PIL image, seed, count) to its
    views, count x 3 x S x S uint8."""
    from torchvision.transforms import v2

    crop = augmentation.crop
    steps = [crop.torchvision(v2, augmentation.size, augmentation.interpolation)]
    steps += [operation.torchvision(v2) for operation in augmentation.operations]
    transform = v2.Compose([*steps, v2.RandomHorizontalFlip(crop.flip), v2.ToImage()])

    def views(image, seed, count):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return torch.stack([transform(image) for _ in range(count)])

    return views


def eval_view(images, args):
    """The view for evaluation: resize so that the centre crop of image_size covers crop_ratio of the shorter side.

    images: N x 3 x H x W uint8, or N x 1 x C x S x S of any type (already cropped). args: with image_size, crop_ratio,
    interpolation, mean, std and white_level of config.Config. Returns normalised N x C x S x S float.
    """
    mean_std, size = mean_std_of_args(args, images.device), args.image_size
    if images.ndim == 5:
        return normalize_pixels(images[:, 0], mean_std, pixel_levels(args.white_level))
    x, (height, width) = images.float().div_(255), images.shape[-2:]
    if (height, width) != (size, size) or args.crop_ratio != 1:
        box = to_device(torch.tensor([center_box(height, width, args.crop_ratio)]), x.device).expand(len(x), 4)
        x = crop_resize(x, box, None, size, clip_to_box=False, cubic=args.interpolation == 'bicubic')
    return normalize(x, mean_std)


def normalize(x, mean_std):
    """Colours in [0, 1], less the mean, divided by the standard deviation of each channel, in place. x: N x 3 x S x S;
    mean_std: of mean_and_std."""
    mean, std = mean_std
    return x.sub_(mean).div_(std)


def to_unit(images, levels):
    """Pixels of any type as floats in [0, 1]: 0 is black, 1 is white (decode.level_range), what lies beyond is cut."""
    if images.dtype == torch.uint8:
        return images.float().div_(255)
    black, white = level_range(levels, str(images.dtype).removeprefix('torch.'))
    values = images.double() if images.dtype in (torch.int32, torch.uint32) else images.float()
    return (values - black).div_(white - black).clamp_(0, 1).float()


def normalize_pixels(images, mean_std, levels):
    """Pixels of any type to the floats of normalize. images: N x C x S x S; levels: of to_unit."""
    mean, std = mean_std
    if images.dtype != torch.uint8:
        return normalize(to_unit(images, levels), mean_std)
    return images.float().mul_(1 / (255 * std)).sub_(mean / std)


def normalize_worker_views(views, args):
    """Views that the workers have distorted, N x V x C x S x S, uint8 or floats in [0, 1], as make_views gives them.
    args: with mean and std of config.Config."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the workers have the other cores, and a thread that waits for one of them is slow
    mean_std = mean_std_of_args(args, views.device)
    found = tuple(normalize_pixels(view, mean_std, (0.0, 1.0)) for view in views.unbind(1))
    torch.set_num_threads(threads)
    return found


def to_uint8(x):
    """Colours in [0, 1], overwritten, to whole grey levels, uint8. (PIL rounds so after every operation.)"""
    return x.mul_(255).round_().to(torch.int16).to(torch.uint8)  # torch's way straight there takes three times as long


def denormalize(x, args):
    """The inverse of normalize, clamped to [0, 1]."""
    mean, std = mean_std_of_args(args, x.device)
    return (x * std + mean).clamp(0, 1)


def to_picture(x, args):
    """Normalized views as red, green and blue in [0, 1], for people: N x C x S x S to N x 3 x S x S.

    Of channels that are no colours the first three, from 2.5 standard deviations below the mean to as many above: the
    pixels of an instrument may use a small part of their range. Of two the third is black, one is gray.
    """
    if args.channels in ('auto', 'rgb'):
        return denormalize(x, args)
    x = (x[:, :3] / 5 + 0.5).clamp(0, 1)
    if x.shape[1] == 1:
        return x.expand(-1, 3, -1, -1)
    return torch.cat((x, torch.zeros_like(x[:, :1])), 1) if x.shape[1] == 2 else x
