"""Augmentation: random views of images (paper section 3, MoCo v2), a batch at a time on the device.

An augmentation is a random resized crop and a list of operations (augment/augmentations.py). All random parameters of a
batch are sampled first, as one table with a row per view; the views are a function of images and table. (The reference
flips last, ours with the crop; a flip commutes with the operations between.)

Images are either whole, N x 3 x H x W uint8, or crops that the dataloader workers have cut and resized, N x V x C x S x
S (V views of each image; see load_dataset.py).
"""

import functools

import torch

from dataloader.augment.crop import center_box, crop_resize
from dataloader.loading.decode import level_range
from runtime.options import channel_values, pixel_levels
from runtime.tensors import to_device

L2_BYTES = 2**20  # cache of one CPU core


def random_views(images, augmentation, generator, count=2, shard=None, compiled=False):
    """Make `count` random views of every image. Returns a tuple of normalized float tensors, N x C x S x S.

    images: N x 3 x H x W uint8, or N x count x C x S x S, cropped already. augmentation: augmentations.Augmentation.
    generator: a CPU generator. shard: (first, total): the images are rows first to first + N - 1 of a batch of `total`,
    and get the random parameters of these rows. compiled: use torch.compile on a GPU.
    """
    uncropped, (first, total) = images.ndim == 4, shard or (0, len(images))
    draws = sample(count * total, augmentation, generator, images.shape[-2:] if uncropped else None).view(
        count, total, -1
    )
    return apply_params(images, draws[:, first : first + len(images)].flatten(0, 1), augmentation, count, compiled)


def apply_params(images, draws, augmentation, count, compiled=False):
    """random_views with a given table of random parameters (from `sample`), the first views of all images first."""
    mean_std = mean_and_std(augmentation.mean, augmentation.std, images.device)
    if images.device.type == 'cpu':
        images = images.repeat(count, 1, 1, 1) if images.ndim == 4 else images.transpose(0, 1).flatten(0, 1)
        return augment_cpu(images, draws, augmentation, lambda x: normalize(x, mean_std)).chunk(count)
    run = cached_compile(augment_gpu) if compiled else augment_gpu
    return run(images, to_device(draws, images.device), augmentation, mean_std, count)


def sample(n, augmentation, generator, sides=None):
    """Sample the random parameters of n views: n x columns float32 on the CPU, the columns of the crop first, then
    those of each operation. generator: a CPU generator, so that the views do not depend on the device. sides: (height,
    width) of whole images; None for cropped ones."""
    crop = augmentation.crop
    boxes = crop.sample(n, *sides, generator) if sides else torch.zeros(n, crop.columns)
    return torch.cat([boxes, *(operation.sample(n, generator) for operation in augmentation.operations)], 1)


def split_draws(draws, augmentation):
    """Split a table from `sample` into (boxes, flips, [(operation, its parameters), ...]). Operations with probability
    0 are left out."""
    operations = augmentation.operations
    crop, *rest = draws.split([augmentation.crop.columns, *(operation.columns for operation in operations)], 1)
    pairs = zip(operations, rest, strict=True)
    return crop[:, :4], crop[:, 4], [(operation, part) for operation, part in pairs if operation.prob]


def augment_cpu(images, draws, augmentation, output_fn):
    """Make one view of every image on a CPU; each operation runs only on the images that it changes.

    images: N x 3 x H x W uint8, to be cropped, or N x C x S x S. draws: from `sample`. output_fn: applied to the views
    in [0, 1] at the end: normalize or to_uint8. Large views are processed in chunks that fit into the cache of a core;
    small ones as one batch, which all cores share.
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
        for operation, params in operations:
            x = operation.on_cpu(x, params[part])
        views.append(output_fn(x))
    return torch.cat(views) if len(views) > 1 else views[0]


def augment_gpu(images, draws, augmentation, mean_std, count):
    """Make the views on a GPU. Every operation runs on every image, so that the control flow does not depend on the
    parameters and everything is one graph. mean_std: from mean_and_std. Returns `count` channels_last tensors."""
    boxes, flips, operations = split_draws(draws, augmentation)
    if images.ndim == 4:
        cubic = augmentation.interpolation == 'bicubic'
        x = crop_resize((images / 255).repeat(count, 1, 1, 1), boxes, flips, augmentation.size, cubic=cubic)
    else:
        x = to_unit(images.transpose(0, 1).flatten(0, 1), augmentation.levels)
    for operation, params in operations:
        x = operation.on_gpu(x, params)
    x = (x - mean_std[0]) / mean_std[1]
    return x.contiguous(memory_format=torch.channels_last).chunk(count)


@functools.cache
def cached_compile(function):
    return torch.compile(function)


@functools.cache
def mean_and_std(mean, std, device):
    """Return mean and std as one tensor, 2 x C x 1 x 1 (C is 1 for one number for all channels), cached per device."""
    values = [torch.tensor(channel_values(*each)) for each in (('mean', mean), ('std', std))]
    return torch.stack(torch.broadcast_tensors(*values)).view(2, -1, 1, 1).to(device)


def mean_std_of_args(args, device):
    """mean_and_std from the options."""
    return mean_and_std(args.mean, args.std, device)


@functools.cache
def torchvision_views(augmentation):
    """Build the reference augmentation from torchvision's transforms: a function of (PIL image, seed, count) that
    returns count x 3 x S x S uint8 views."""
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
    """Make the evaluation view: a center crop that covers crop_ratio of the shorter side, resized to image_size.

    images: N x 3 x H x W uint8, or N x 1 x C x S x S of any type, cropped already. args: has image_size, crop_ratio,
    interpolation, mean, std and white_level of config.Config. Returns normalized N x C x S x S float.
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
    """Subtract the mean and divide by the standard deviation of each channel, in place. x: N x C x S x S in [0, 1];
    mean_std: from mean_and_std."""
    mean, std = mean_std
    return x.sub_(mean).div_(std)


def to_unit(images, levels):
    """Convert pixels of any type to floats: black is 0, white is 1 (decode.level_range), values beyond are clamped."""
    if images.dtype == torch.uint8:
        return images.float().div_(255)
    black, white = level_range(levels, str(images.dtype).removeprefix('torch.'))
    values = images.double() if images.dtype in (torch.int32, torch.uint32) else images.float()
    return (values - black).div_(white - black).clamp_(0, 1).float()


def normalize_pixels(images, mean_std, levels):
    """Convert pixels of any type to normalized floats. images: N x C x S x S; levels: see to_unit."""
    mean, std = mean_std
    if images.dtype != torch.uint8:
        return normalize(to_unit(images, levels), mean_std)
    return images.float().mul_(1 / (255 * std)).sub_(mean / std)


def normalize_worker_views(views, args):
    """Normalize views that dataloader workers have augmented, N x V x C x S x S, uint8 or floats in [0, 1]. args: has
    mean and std of config.Config. Returns a tuple of V normalized N x C x S x S tensors."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the workers use the other cores
    mean_std = mean_std_of_args(args, views.device)
    normalized = tuple(normalize_pixels(view, mean_std, (0.0, 1.0)) for view in views.unbind(1))
    torch.set_num_threads(threads)
    return normalized


def to_uint8(x):
    """Round values in [0, 1] to uint8; x is overwritten. (PIL rounds like this after every operation.)"""
    return x.mul_(255).round_().to(torch.int16).to(torch.uint8)  # a direct .to(torch.uint8) takes three times as long


def denormalize(x, args):
    """Invert normalize; the result is clamped to [0, 1]."""
    mean, std = mean_std_of_args(args, x.device)
    return (x * std + mean).clamp(0, 1)


def to_picture(x, args):
    """Convert normalized views, N x C x S x S, to RGB in [0, 1] for display, N x 3 x S x S.

    If the channels are not red, green and blue, the first three are shown, from 2.5 standard deviations below the mean
    to 2.5 above it. With two channels blue is black; one channel is shown in gray.
    """
    if args.channels in ('auto', 'rgb'):
        return denormalize(x, args)
    x = (x[:, :3] / 5 + 0.5).clamp(0, 1)
    if x.shape[1] == 1:
        return x.expand(-1, 3, -1, -1)
    return torch.cat((x, torch.zeros_like(x[:, :1])), 1) if x.shape[1] == 2 else x
