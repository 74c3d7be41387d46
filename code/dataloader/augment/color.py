"""Colour jitter, grayscale and blur, every image by its own draw.

On a CPU each operation on the images that it is for, on a GPU all of them on all.
"""

import math

import numpy as np
import torch
from torch.nn.functional import pad

from dataloader.augment.geometry import separable

GRAY = (0.299, 0.587, 0.114)  # luma of ITU-R 601
# Where on the circle the waves of red, green and blue (hue) have their valley or peak.
WAVES = torch.tensor((1 / 2, 1 / 3, 2 / 3)).view(3, 1, 1)
REACH = 6  # pixels that a blur sees on each side: three times the largest sigma


def draw_colours(n, row, generator):
    """Each image's colour jitter, grayscale and blur.

    row: of recipes.distortion. Returns CPU tensors: factors, n x 4 (brightness, contrast, saturation: factors;
    hue: turns of the colour circle); order, n x 4, the place of each of the four, or 4 (never) for an image that is not
    jittered; gray, n bool; sigma, n, in pixels, 0 for no blur.
    """
    jitter = torch.tensor(row['jitter'])
    factors = 1 + jitter * (2 * torch.rand(n, 4, generator=generator) - 1)
    factors[:, 3] -= 1  # a turn, not a factor
    order = torch.rand(n, 4, generator=generator).argsort(1)
    apply = torch.rand(n, generator=generator) < row['jitter_prob']
    gray = torch.rand(n, generator=generator) < row['gray_prob']
    low, high = row['sigma']
    sigma = low + (high - low) * torch.rand(n, generator=generator)
    blurred = torch.rand(n, generator=generator) < row['blur_prob']
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
    rows = torch.from_numpy(rows)  # x[rows] would take nine times as long
    return x.index_copy_(0, rows, operation(x.index_select(0, rows), parameter[rows]))


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
        x = torch.where(
            is_brightness | is_contrast | is_saturation,
            moved,
            torch.where(is_hue, hue_all(x, factors[:, 3, None, None]), x),
        )
    return torch.where(gray[:, None, None, None], luma(x), x)


def luma(x):
    """N x 3 x S x S to N x 1 x S x S."""
    red, green, blue = x.split(1, 1)
    return (GRAY[0] * red).add_(green, alpha=GRAY[1]).add_(blue, alpha=GRAY[2])


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
    angle.div_(torch.clamp(chroma, min=1e-8, out=work)).add_(1 + turns[:, 0]).frac_()
    # The waves of green and blue, with peaks at 1/3 and 2/3, lie within one turn; red's, with its peak at 0, does not.
    low.sub_(chroma, alpha=1 / 6)
    high.add_(chroma, alpha=1 / 6)
    torch.sub(angle[:, None], WAVES, out=x).abs_().clamp_(1 / 6, 1 / 3)
    torch.addcmul(low, chroma, red, out=red)
    torch.addcmul(high, chroma, green, value=-1, out=green)
    torch.addcmul(high, chroma, blue, value=-1, out=blue)
    return x


def hue_all(x, turns):
    """`hue` for a GPU: in new memory, for torch.compile does not trace out=, and fuses this. turns: N x 1 x 1."""
    red, green, blue = x.unbind(1)
    high, low = x.amax(1), x.amin(1)
    angle = torch.copysign(green + blue - red + high - 2 * low, green - blue)
    chroma = 6 * (high - low)
    angle = (angle / chroma.clamp(min=1e-8) + (1 + turns)).frac()
    low, high = low - chroma / 6, high + chroma / 6
    red = low + chroma * (angle - 1 / 2).abs().clamp(1 / 6, 1 / 3)
    green = high - chroma * (angle - 1 / 3).abs().clamp(1 / 6, 1 / 3)
    blue = high - chroma * (angle - 2 / 3).abs().clamp(1 / 6, 1 / 3)
    return torch.stack((red, green, blue), 1)


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
    matrix = x.new_zeros(len(x), side, side).scatter_add(2, source.expand(len(x), -1, -1), weight)
    same = torch.eye(side, device=x.device)
    matrix = torch.where(sigma[:, None, None] > 0, matrix, same)
    return separable(x, matrix, matrix)


def gaussian(sigma, reach):
    """Weights of the distances 0 to `reach` pixels, N x (reach + 1); both sides together sum to 1."""
    distance = torch.arange(reach + 1, device=sigma.device)
    weight = torch.exp(-0.5 * (distance / sigma[:, None]) ** 2)
    return weight / (2 * weight.sum(1, keepdim=True) - 1)  # distance 0, whose weight is 1, counts once
