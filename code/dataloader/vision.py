"""Two-view augmentation (paper section 3, MoCo v2), a batch at a time on the device, every image with its own draw.

The order is the reference's: random resized crop, flip, colour jitter, grayscale, blur, normalise. (The reference
flips last; a flip commutes with all that stands between.) Every random number comes from a CPU generator, so a seed
fixes the views whatever the device.

Images come either whole, N x 3 x H x W uint8, or as crops that the workers already cut and resized,
N x V x 3 x S x S uint8 (V views of one image; see load_dataset.py), where the whole images are too large to move.
"""

import math

import torch
from torch.nn.functional import pad

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, per channel
GRAY = (0.299, 0.587, 0.114)  # luma of ITU-R 601


def two_views(images, size, augmentation, blur_prob, generator):
    """Two independently distorted views of every image.

    images: N x 3 x H x W uint8, or N x 2 x 3 x S x S uint8 (already cropped). size: S. augmentation: a row of
    config.AUGMENTATIONS. generator: CPU generator. Returns two normalised float tensors, N x 3 x S x S.
    """
    crops = images.unbind(1) if images.ndim == 5 else (images, images)
    return tuple(distort(crop, images.ndim == 4, size, augmentation, blur_prob, generator) for crop in crops)


def distort(images, whole, size, augmentation, blur_prob, generator):
    """One distorted view of every image: N x 3 x H x W uint8 to normalised N x 3 x S x S float."""
    x = images.float() / 255
    if whole:
        boxes, flips = draw_crops(len(x), *x.shape[-2:], augmentation, generator)
        x = crop_resize(x, boxes, flips, size)
    draws = draw_colours(len(x), augmentation, blur_prob, generator)
    return normalise(recolour(x, draws))


def plain_view(images, size, crop_ratio):
    """The view for evaluation: resize so that the centre crop of `size` covers `crop_ratio` of the shorter side.

    images: N x 3 x H x W uint8, or N x 1 x 3 x S x S (already cropped). Returns normalised N x 3 x S x S float.
    """
    if images.ndim == 5:
        return normalise(images[:, 0].float() / 255)
    x, (height, width) = images.float() / 255, images.shape[-2:]
    if (height, width) != (size, size) or crop_ratio != 1:
        box = torch.tensor([centre_box(height, width, crop_ratio)]).expand(len(x), 4)
        x = crop_resize(x, box, torch.zeros(len(x), dtype=torch.bool), size, inside=False)
    return normalise(x)


def normalise(x):
    """Colours in [0, 1] to zero mean and unit variance over ImageNet. x: N x 3 x S x S."""
    return (x - x.new_tensor(MEAN).view(3, 1, 1)) / x.new_tensor(STD).view(3, 1, 1)


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
    area, ratio, top, left = torch.rand(4, n, 10, generator=generator)
    flips = torch.rand(n, generator=generator) < augmentation['flip']
    area = height * width * (low + (high - low) * area)
    ratio = torch.exp(math.log(thin) + (math.log(wide) - math.log(thin)) * ratio)
    w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
    first = fits.int().argmax(1, keepdim=True)  # the first True of a row
    w, h, top, left = (t.gather(1, first)[:, 0] for t in (w, h, top, left))
    fallback_w, fallback_h = min(width, round(height * wide)), min(height, round(width / thin))
    none = ~fits.any(1)
    w, h = w.masked_fill(none, fallback_w), h.masked_fill(none, fallback_h)
    top = torch.where(none, (height - h) // 2, (top * (height - h + 1)).floor())
    left = torch.where(none, (width - w) // 2, (left * (width - w + 1)).floor())
    return torch.stack((top, left, h, w), 1), flips


def crop_resize(x, boxes, flips, size, inside=True):
    """Cut every image's box and resize it to size x size, antialiased bilinear as PIL and torchvision do it.

    A resize is linear and separable, so each image's is two small matrices, rows and columns: one batched product
    each, whatever the boxes. A flip only turns the columns' matrix round. inside: pixels beyond the box count for
    nothing (crop, then resize) or do count (resize the whole, then crop). x: N x 3 x H x W; returns N x 3 x S x S.
    """
    height, width = x.shape[-2:]
    top, left, h, w = boxes.to(x.device, x.dtype).unbind(1)
    rows = resize_matrix(top, h, height, size, inside)
    columns = resize_matrix(left, w, width, size, inside)
    columns = torch.where(flips.to(x.device)[:, None, None], columns.flip(1), columns)
    return separable(x, rows, columns)


def separable(x, rows, columns):
    """Every image's own linear map of its rows and of its columns.

    x: N x 3 x H x W; rows: N x S x H; columns: N x S x W. Returns N x 3 x S x S.
    """
    n, channels, height, width = x.shape
    x = torch.bmm(x.reshape(n, channels * height, width), columns.transpose(1, 2))  # one product for all channels
    return rows[:, None] @ x.view(n, channels, height, -1)


def resize_matrix(start, length, side, size, inside):
    """Weights that take an axis of `side` pixels, cut to [start, start + length), to `size` pixels.

    start, length: N. Returns N x size x side, rows that sum to 1. The filter is a triangle as wide as the larger of
    one source and one target pixel.
    """
    span = (length / size)[:, None, None]
    ticks = torch.arange(size, device=start.device, dtype=start.dtype)[:, None] + 0.5
    pixels = torch.arange(side, device=start.device, dtype=start.dtype) + 0.5
    weights = (1 - (pixels - (start[:, None, None] + ticks * span)).abs() / span.clamp(min=1)).clamp(min=0)
    if inside:
        begin, end = start[:, None, None], (start + length)[:, None, None]
        weights = weights * ((pixels > begin) & (pixels < end))
    return weights / weights.sum(2, keepdim=True)


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


def recolour(x, draws):
    """Jitter, grayscale and blur, each image by its own draw. x: N x 3 x S x S in [0, 1]; returns the same shape."""
    x, factors = x.clone(), draws['factors'].to(x.device, non_blocking=True)
    for place in range(4):
        for kind, operation in enumerate((brightness, contrast, saturation, hue)):
            # The images whose `place`-th operation is this one: found on the CPU, so that a GPU is not waited for.
            which = (draws['order'][:, kind] == place).nonzero()[:, 0].to(x.device, non_blocking=True)
            if len(which):
                x.index_copy_(0, which, operation(x[which], factors[which, kind].view(-1, 1, 1, 1)))
    which = draws['gray'].nonzero()[:, 0].to(x.device, non_blocking=True)
    if len(which):
        x.index_copy_(0, which, luma(x[which]).expand(-1, 3, -1, -1))
    which = draws['sigma'].nonzero()[:, 0]
    if len(which):
        sigma = draws['sigma'][which].to(x.device, non_blocking=True)
        which = which.to(x.device, non_blocking=True)
        x.index_copy_(0, which, blur(x[which], sigma))
    return x


def luma(x):
    """N x 3 x S x S to N x 1 x S x S."""
    red, green, blue = x.split(1, 1)
    return GRAY[0] * red + GRAY[1] * green + GRAY[2] * blue


def brightness(x, factor):
    return (x * factor).clamp(0, 1)


def contrast(x, factor):
    return torch.lerp(luma(x).mean((2, 3), keepdim=True), x, factor).clamp(0, 1)


def saturation(x, factor):
    return torch.lerp(luma(x), x, factor).clamp(0, 1)


def hue(x, turns):
    """Turn the hue in HSV space, with value and saturation kept."""
    high, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    chroma = high - low
    red, green, blue = ((x - low) / chroma.clamp(min=1e-8)).split(1, 1)  # grey: all 0, and chroma keeps it so
    sector = torch.where(
        red >= torch.maximum(green, blue), green - blue, torch.where(green >= blue, 2 + blue - red, 4 + red - green)
    )
    corner = (x.new_tensor((5, 3, 1)).view(3, 1, 1) + sector + 6 * turns) % 6
    return high - chroma * torch.minimum(corner, 4 - corner).clamp(0, 1)


def blur(x, sigma):
    """Gaussian blur, the border continued outwards. x: N x 3 x S x S; sigma: N, pixels."""
    side = x.shape[-1]
    reach = min(6, side)  # three times the largest sigma
    offsets = torch.arange(-reach, reach + 1, device=x.device)
    weights = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    weights = weights / weights.sum(1, keepdim=True)
    target = (torch.arange(side, device=x.device)[:, None] + offsets).clamp(0, side - 1)
    matrix = x.new_zeros(len(x), side, side)
    matrix.scatter_add_(2, target.expand(len(x), -1, -1), weights[:, None].expand(-1, side, -1))
    return separable(x, matrix, matrix)


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
