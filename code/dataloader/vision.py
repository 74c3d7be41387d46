"""Augmentation: two random views of an image (paper section 3, MoCo v2), a batch at a time on the device.

Every image has its own draw.

The order is the reference's: random resized crop, flip, colour jitter, grayscale, blur, normalise. (The reference
flips last; a flip commutes with all that stands between.) Every random number comes from a CPU generator, so a seed
fixes the views whatever the device.

Images come either whole, N x 3 x H x W uint8, or as crops that the workers already cut and resized,
N x V x 3 x S x S uint8 (V views of one image; see load_dataset.py), where the whole images are too large to move.
"""

import functools

import torch
from torch.nn.functional import pad

from config import AUGMENTATIONS
from dataloader.colours import REACH, blur_all, draw_colours, recolour, recolour_all
from dataloader.geometry import centre_box, crop_resize, draw_crops

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, per channel
CACHE_BYTES = 2**20  # of one core's cache


def random_views(
    images, size, augmentation, blur_prob, generator, count=2, distorted=False, compiled=False, part=(0, 1)
):
    """`count` independently distorted views of every image.

    images: N x 3 x H x W uint8, or N x count x 3 x S x S uint8: already cropped, or (distorted) all but normalised.
    size: S. augmentation: a row of config.AUGMENTATIONS. generator: CPU generator. compiled: on a GPU, fuse the
    colours into few kernels with torch.compile. part: (i, n), the images are the i-th of n equal parts of a batch, and
    get the random numbers that they would get in the whole. Returns a tuple of normalised float tensors, N x 3 x S x S.
    """
    whole = images.ndim == 4
    if distorted and not whole:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the workers have the other cores, and a thread that waits for one of them is slow
        views = tuple(normalise_bytes(view) for view in images.unbind(1))
        torch.set_num_threads(threads)
        return views
    images = images.repeat(count, 1, 1, 1) if whole else images.transpose(0, 1).flatten(0, 1)
    mine = None
    if part[1] > 1:  # the rows of this part among those of the whole batch
        mine = torch.arange(len(images)).view(count, -1)
        mine = (mine + mine[:, :1] * (part[1] - 1) + part[0] * mine.shape[1]).flatten()
    views = distort(images, whole, size, augmentation, blur_prob, generator, normalise, compiled, part[1], mine)
    return views.chunk(count)


def distort(images, whole, size, augmentation, blur_prob, generator, finish, compiled=False, parts=1, mine=None):
    """One distorted view of every image, N x 3 x H x W uint8 to N x 3 x S x S.

    finish: what to do with the colours in [0, 1] at last: normalise or to_bytes. parts, mine: draw for N x parts images
    and take these rows of it (of several processes, each draws for all).
    """
    drawn, mine = len(images) * parts, slice(None) if mine is None else mine
    if whole:
        boxes, flips = (draw[mine] for draw in draw_crops(drawn, *images.shape[-2:], augmentation, generator))
    draws = draw_colours(drawn, augmentation, blur_prob, generator)
    draws = {name: draw[mine] for name, draw in draws.items()}
    if images.device.type != 'cpu':
        x = crop_resize(images / 255, boxes, flips, size) if whole else images / 255
        if not has_colours(augmentation, blur_prob):
            return finish(x)
        draws = {name: draw.to(x.device, non_blocking=True) for name, draw in draws.items()}
        sigma = draws.pop('sigma')
        x = (compiled_once(recolour_all) if compiled else recolour_all)(x, **draws)
        return finish(blur_all(x, sigma) if blur_prob else x)
    # A CPU core is fastest on what stays in its cache, so large views go through all operations one or a few at a time;
    # of small ones the whole batch, which all cores share.
    views, step = [], max(1, CACHE_BYTES // (12 * size**2)) if size > 96 else len(images)
    for start in range(0, len(images), step):
        part = slice(start, start + step)
        x = images[part].float().div_(255)
        if whole:
            x = crop_resize(x, boxes[part], flips[part], size)
        views.append(finish(recolour(x, **{name: draw[part] for name, draw in draws.items()})))
    return torch.cat(views) if len(views) > 1 else views[0]


def has_colours(augmentation, blur_prob):
    """Whether anything but the crop and the flip is random."""
    return bool(augmentation['jitter_prob'] or augmentation['gray_prob'] or blur_prob)


@functools.cache
def compiled_once(function):
    return torch.compile(function, dynamic=True)


@functools.cache
def torchvision_views(size, augmentation, blur_prob):
    """The reference: torchvision's transforms, one image at a time.

    augmentation: its name. Returns a function of (PIL image, seed, count) to its views, count x 3 x S x S uint8.
    """
    from torchvision.transforms import v2

    a = AUGMENTATIONS[augmentation]
    transform = v2.Compose([
        v2.RandomResizedCrop(size, a['scale'], a['ratio']),
        v2.RandomApply([v2.ColorJitter(*a['jitter'])], a['jitter_prob']),
        v2.RandomGrayscale(a['gray_prob']),
        v2.RandomApply([v2.GaussianBlur(2 * REACH + 1, a['sigma'])], blur_prob),
        v2.RandomHorizontalFlip(a['flip']),
        v2.ToImage(),
    ])  # fmt: skip

    def views(image, seed, count):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return torch.stack([transform(image) for _ in range(count)])

    return views


def plain_view(images, size, crop_ratio):
    """The view for evaluation: resize so that the centre crop of `size` covers `crop_ratio` of the shorter side.

    images: N x 3 x H x W uint8, or N x 1 x 3 x S x S (already cropped). Returns normalised N x 3 x S x S float.
    """
    if images.ndim == 5:
        return normalise_bytes(images[:, 0])
    x, (height, width) = images.float().div_(255), images.shape[-2:]
    if (height, width) != (size, size) or crop_ratio != 1:
        box = torch.tensor([centre_box(height, width, crop_ratio)]).expand(len(x), 4)
        x = crop_resize(x, box, torch.zeros(len(x), dtype=torch.bool), size, inside=False)
    return normalise(x)


def normalise(x):
    """Colours in [0, 1] to zero mean and unit variance over ImageNet, in place. x: N x 3 x S x S."""
    return x.sub_(x.new_tensor(MEAN).view(3, 1, 1)).div_(x.new_tensor(STD).view(3, 1, 1))


def normalise_bytes(images):
    """uint8 colours to the floats of normalise. images: N x 3 x S x S."""
    std = torch.tensor(STD, device=images.device).view(3, 1, 1)
    return images.float().mul_(1 / (255 * std)).sub_(torch.tensor(MEAN, device=images.device).view(3, 1, 1) / std)


def to_bytes(x):
    """Colours in [0, 1], overwritten, to whole grey levels, uint8. (PIL rounds so after every operation.)"""
    return x.mul_(255).round_().to(torch.int16).to(torch.uint8)  # torch's way straight there takes three times as long


def denormalise(x):
    """The inverse of normalise, clamped to [0, 1]: for pictures."""
    return (x * x.new_tensor(STD).view(3, 1, 1) + x.new_tensor(MEAN).view(3, 1, 1)).clamp(0, 1)


def picture(rows, path, zoom_to=64):
    """Save views as a grid, one row per tensor of `rows` (each N x 3 x S x S in [0, 1]), enlarged to be seen.

    Returns the grid, 3 x height x width in [0, 1].
    """
    from torchvision.utils import make_grid, save_image

    zoom = max(1, round(zoom_to / rows[0].shape[-1]))
    grid = make_grid(torch.cat(rows).cpu(), nrow=len(rows[0]), padding=1, pad_value=1)
    grid = pad(grid, (1, 1, 1, 1), value=1).repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
    save_image(grid, path)
    return grid
