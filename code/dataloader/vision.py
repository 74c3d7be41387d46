"""Augmentation: two random views of an image (paper section 3, MoCo v2), a batch at a time on the device.

Every image has its own draw.

The order is the reference's: random resized crop, flip, colour jitter, grayscale, blur, normalise. (The reference
flips last; a flip commutes with all that stands between.) Every random number comes from a CPU generator, so a seed
fixes the views whatever the device.

Images come either whole, N x 3 x H x W uint8, or as crops that the workers already cut and resized,
N x V x 3 x S x S uint8 (V views of one image; see load_dataset.py), where the whole images are too large to move.
"""

import functools
import math

import numpy as np
import torch
from torch.nn.functional import pad

from config import AUGMENTATIONS

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, per channel
GRAY = (0.299, 0.587, 0.114)  # luma of ITU-R 601
REACH = 6  # pixels that a blur sees on each side: three times the largest sigma
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


def centre_box(height, width, crop_ratio):
    """The evaluation crop as (top, left, height, width), in pixels of the image, fractional."""
    side = min(height, width) * crop_ratio
    return (height - side) / 2, (width - side) / 2, side, side


def draw_crops(n, height, width, augmentation, generator):
    """Random resized crops of n images of height x width pixels, as torchvision's RandomResizedCrop draws them.

    Of ten candidates the first that fits is taken; the fallback is the largest centre crop within the ratio's bounds.
    Returns boxes, n x 4 float (top, left, height, width; whole numbers), and flips, n bool; both on the CPU.
    """
    (low, high), (thin, wide) = augmentation['scale'], augmentation['ratio']
    drawn = torch.rand(n, 41, generator=generator).numpy()  # numpy: an image alone is a tenth of torch's overhead
    area = height * width * (low + (high - low) * drawn[:, :10])
    ratio = np.exp(math.log(thin) + (math.log(wide) - math.log(thin)) * drawn[:, 10:20])
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
    every, first = np.arange(n), fits.argmax(1)  # the first True of a row
    w, h, top, left = w[every, first], h[every, first], drawn[every, 20 + first], drawn[every, 30 + first]
    boxes = np.stack((np.floor(top * (height - h + 1)), np.floor(left * (width - w + 1)), h, w), 1)
    unfit = ~fits[every, first]
    if unfit.any():
        w, h = min(width, round(height * wide)), min(height, round(width / thin))
        boxes[unfit] = (height - h) // 2, (width - w) // 2, h, w
    return torch.from_numpy(boxes), torch.from_numpy(drawn[:, 40] < augmentation['flip'])


def crop_resize(x, boxes, flips, size, inside=True):
    """Cut every image's box and resize it to size x size, antialiased bilinear as PIL and torchvision do it.

    A resize is linear and separable, so each image's is two small matrices, rows and columns: one batched product
    each, whatever the boxes. A flip only turns the columns' matrix round. inside: pixels beyond the box count for
    nothing (crop, then resize) or do count (resize the whole, then crop). x: N x 3 x H x W; returns N x 3 x S x S.
    """
    height, width = x.shape[-2:]
    top, left, h, w = boxes.to(x.device, x.dtype).unbind(1)
    rows = resize_matrix(top, h, height, size, inside)
    columns = resize_matrix(left, w, width, size, inside, flips.to(x.device))
    return separable(x, rows, columns)


def separable(x, rows, columns):
    """Every image's own linear map of its rows and of its columns.

    x: N x 3 x H x W; rows: N x S x H; columns: N x S x W. Returns N x 3 x S x S.
    """
    n, channels, height, width = x.shape
    x = torch.bmm(x.reshape(n, channels * height, width), columns.transpose(1, 2))  # one product for all channels
    return rows[:, None] @ x.view(n, channels, height, -1)


def resize_matrix(start, length, side, size, inside, flips=None):
    """Weights that take an axis of `side` pixels, cut to [start, start + length), to `size` pixels, where flips turned.

    start, length, flips: N. Returns N x size x side, rows that sum to 1. The filter is a triangle as wide as the larger
    of one source and one target pixel.
    """
    span = (length / size)[:, None]
    ticks = torch.arange(size, device=start.device, dtype=start.dtype)[None] + 0.5
    if flips is not None:
        ticks = ticks + flips[:, None] * (size - 2 * ticks)
    pixels = torch.arange(side, device=start.device, dtype=start.dtype) + 0.5
    centres = (start[:, None] + ticks * span)[:, :, None]
    weights = (pixels - centres).abs_().mul_(-1 / span.clamp(min=1)[:, :, None]).add_(1).clamp_(min=0)
    if inside:
        begin, end = start[:, None], (start + length)[:, None]
        weights *= ((pixels > begin) & (pixels < end)).to(weights)[:, None]
    return weights.div_(weights.sum(2, keepdim=True))


def draw_colours(n, augmentation, blur_prob, generator):
    """Each image's colour jitter, grayscale and blur.

    Returns a dict of CPU tensors: factors, n x 4 (brightness, contrast, saturation: factors; hue: turns of the colour
    circle); order, n x 4, the place of each of the four, or 4 (never) for an image that is not jittered; gray, n bool;
    sigma, n, in pixels, 0 for no blur.
    """
    jitter = torch.tensor(augmentation['jitter'])
    factors = 1 + jitter * (2 * torch.rand(n, 4, generator=generator) - 1)
    factors[:, 3] -= 1  # a turn, not a factor
    order = torch.rand(n, 4, generator=generator).argsort(1)
    apply = torch.rand(n, generator=generator) < augmentation['jitter_prob']
    gray = torch.rand(n, generator=generator) < augmentation['gray_prob']
    low, high = augmentation['sigma']
    sigma = low + (high - low) * torch.rand(n, generator=generator)
    blurred = torch.rand(n, generator=generator) < blur_prob
    return {
        'factors': factors,
        'order': order.masked_fill(~apply[:, None], 4),
        'gray': gray,
        'sigma': sigma * blurred,
    }


def recolour(x, factors, order, gray, sigma):
    """Jitter, grayscale and blur, each image by its own draw (draw_colours), each operation on the images it is for.

    x: N x 3 x S x S in [0, 1], overwritten; the rest on the CPU. Returns the same shape.
    """
    order = order.numpy()
    for place in range(4):
        turn = order == place
        for kind in np.flatnonzero(turn.any(0)):
            x = on_chosen(x, turn[:, kind], (brightness, contrast, saturation, hue)[kind], factors[:, kind])
    x = on_chosen(x, gray.numpy(), make_gray, gray)
    return on_chosen(x, sigma.numpy() > 0, blur, sigma)


def on_chosen(x, chosen, operation, parameter):
    """x with the chosen images put through `operation`, each with its parameter. chosen: N bool (numpy)."""
    rows = np.flatnonzero(chosen)
    if not len(rows):
        return x
    parameter = parameter[:, None, None, None]
    if len(rows) == len(x):
        return operation(x, parameter)
    rows = torch.from_numpy(rows)
    return x.index_copy_(0, rows, operation(x[rows], parameter[rows]))


def recolour_all(x, factors, order, gray):
    """Jitter and grayscale for a GPU: every operation on every image, then the choice of what each image is for.

    More arithmetic, but no step depends on what was drawn, so it compiles into a few kernels. Three of the four
    operations are one: the way from a base (black, the mean grey, each pixel's grey) towards the image, and beyond.
    """
    for place in range(4):
        is_brightness, is_contrast, is_saturation, is_hue = (order == place)[..., None, None, None].unbind(1)
        grey = luma(x)
        base = torch.where(is_contrast, grey.mean((2, 3), keepdim=True), grey * is_saturation)
        factor = ((order[:, :3] == place) * factors[:, :3]).sum(1)[:, None, None, None]
        moved = torch.lerp(base, x, factor).clamp(0, 1)
        turned = hue(x.clone(), factors[:, 3, None, None, None])
        x = torch.where(is_brightness | is_contrast | is_saturation, moved, torch.where(is_hue, turned, x))
    return torch.where(gray[:, None, None, None], luma(x), x)


def luma(x):
    """N x 3 x S x S to N x 1 x S x S."""
    red, green, blue = x.split(1, 1)
    return GRAY[0] * red + GRAY[1] * green + GRAY[2] * blue


# Each of these overwrites x (new memory costs as much as the arithmetic) and returns it.
def make_gray(x, _):
    return x.copy_(luma(x))


def brightness(x, factor):
    return x.mul_(factor).clamp_(0, 1)


def contrast(x, factor):
    mean = luma(x.mean((2, 3), keepdim=True))
    return x.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 1)


def saturation(x, factor):
    return torch.lerp(luma(x), x, factor, out=x).clamp_(0, 1)


def hue(x, turns):
    """Turn the hue in HSV space, with value and saturation kept. turns: N x 1 x 1 x 1, of the circle, in [-1/2, 1/2].

    Each channel is a wave of the hue t, the three a third of a turn apart: low + chroma x clamp(|6 t - 3| - 1, 0, 1),
    here with the constants taken out of the clamp.
    """
    red, green, blue = x.unbind(1)
    high, low = torch.maximum(red, green), torch.minimum(red, green)
    torch.maximum(high, blue, out=high)
    torch.minimum(low, blue, out=low)
    # In sixths, times chroma: +-(1 + g + b - r) of the colour stretched to [0, 1], + where green is above blue. As one
    # expression, for a choice (torch.where) takes as long as all the rest.
    work = green - blue
    angle = (green + blue).sub_(red).add_(high).sub_(low, alpha=2)
    torch.copysign(angle, work, out=angle)
    chroma = (high - low).mul_(6)  # 0 for grey, whose angle is 0 too
    angle.mul_(torch.clamp(chroma, min=1e-8, out=work).reciprocal_()).add_(1 + turns[:, 0]).frac_()
    # The waves of green and blue, with peaks at 1/3 and 2/3, lie within one turn; red's, with its peak at 0, does not.
    low.sub_(chroma, alpha=1 / 6)
    high.add_(chroma, alpha=1 / 6)
    torch.addcmul(low, chroma, torch.sub(angle, 1 / 2, out=work).abs_().clamp_(1 / 6, 1 / 3), out=red)
    torch.addcmul(high, chroma, torch.sub(angle, 1 / 3, out=work).abs_().clamp_(1 / 6, 1 / 3), value=-1, out=green)
    torch.addcmul(high, chroma, angle.sub_(2 / 3).abs_().clamp_(1 / 6, 1 / 3), value=-1, out=blue)
    return x


def blur(x, sigma):
    """Gaussian blur, the border mirrored. x: N x 3 x S x S; sigma: N or N x 1 x 1 x 1, pixels, above 0; on the CPU.

    Sums of shifted images, an axis after the other, as far as the largest sigma reaches.
    """
    reach = min(math.ceil(3 * sigma.max().item()), x.shape[-1] - 1)
    weight = gaussian(sigma.flatten(), reach)[..., None, None, None]
    for axis in (2, 3):
        side = x.shape[axis]
        wide = pad(x, (0, 0, reach, reach) if axis == 2 else (reach, reach, 0, 0), mode='reflect')
        x.mul_(weight[:, 0])
        for i in range(1, reach + 1):
            x.addcmul_(wide.narrow(axis, reach - i, side), weight[:, i])
            x.addcmul_(wide.narrow(axis, reach + i, side), weight[:, i])
    return x


def blur_all(x, sigma):
    """`blur` for a GPU, where sigma is 0 nothing changes: two products with a matrix of each image's weights."""
    side = x.shape[-1]
    reach = min(REACH, side - 1)
    weight = gaussian(sigma.clamp(min=0.1), reach)
    weight = torch.cat((weight[:, 1:].flip(1), weight), 1)[:, None].expand(-1, side, -1)
    source = torch.arange(side, device=x.device)[:, None] + torch.arange(-reach, reach + 1, device=x.device)
    source = (side - 1) - (source.abs() - (side - 1)).abs()  # mirrored at both ends
    matrix = x.new_zeros(len(x), side, side).scatter_add_(2, source.expand(len(x), -1, -1), weight)
    same = torch.eye(side, device=x.device)
    matrix = torch.where(sigma[:, None, None] > 0, matrix, same)
    return separable(x, matrix, matrix)


def gaussian(sigma, reach):
    """Weights of the distances 0 to `reach` pixels, N x (reach + 1); both sides together sum to 1."""
    distance = torch.arange(reach + 1, device=sigma.device)
    weight = torch.exp(-0.5 * (distance / sigma[:, None]) ** 2)
    return weight / (2 * weight.sum(1, keepdim=True) - 1)  # distance 0, whose weight is 1, counts once


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
