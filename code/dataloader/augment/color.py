"""Color jitter and grayscale: each operation as a CPU does it, on the images that it is for, and as a GPU does."""

from dataclasses import dataclass

import numpy as np
import torch

from dataloader.augment.batch import apply_to_subset

GRAY = (0.299, 0.587, 0.114)  # luma of ITU-R 601
# Where on the circle the waves of red, green and blue (hue) have their valley or peak.
HUE_PHASE = torch.tensor((1 / 2, 1 / 3, 2 / 3)).view(3, 1, 1)


@dataclass(frozen=True)
class ColorJitter:
    """Brightness, contrast and saturation times a random factor, the hue turned, in random order.

    The first three factors are within 1 - strength and 1 + strength; the hue turns by as much as its strength either
    way, in turns of the color circle. prob: of jittering an image at all.
    """

    brightness: float
    contrast: float
    saturation: float
    hue: float
    prob: float = 0.8

    columns = 8

    def sample(self, n, generator):
        """n x 8 float32: the four factors (of the hue: turns), and the place of each in the order, or 4 (never)."""
        strengths = torch.tensor((self.brightness, self.contrast, self.saturation, self.hue))
        factors = 1 + strengths * (2 * torch.rand(n, 4, generator=generator) - 1)
        factors[:, 3] -= 1  # a turn, not a factor
        op_order = torch.rand(n, 4, generator=generator).argsort(1)
        apply = torch.rand(n, generator=generator) < self.prob
        return torch.cat((factors, op_order.masked_fill(~apply[:, None], 4).float()), 1)

    def on_cpu(self, x, draws):
        op_order = draws[:, 4:].numpy()
        for position in range(4):
            mask = op_order == position
            for kind in np.flatnonzero(mask.any(0)):
                x = apply_to_subset(x, mask[:, kind], (brightness, contrast, saturation, hue)[kind], draws[:, kind])
        return x

    def on_gpu(self, x, draws):
        """More arithmetic, but no step depends on what was drawn, so it compiles into a few kernels. Three of the four
        operations are one: the way from a base (black, the mean grey, each pixel's grey) towards the image, and beyond.
        """
        factors, op_order = draws.split(4, 1)
        for position in range(4):
            is_brightness, is_contrast, is_saturation, is_hue = (op_order == position)[..., None, None, None].unbind(1)
            gray = luma(x)
            base = torch.where(is_contrast, gray.mean((2, 3), keepdim=True), gray * is_saturation)
            factor = ((op_order[:, :3] == position) * factors[:, :3]).sum(1)[:, None, None, None]
            moved = torch.lerp(base, x, factor).clamp(0, 1)
            x = torch.where(
                is_brightness | is_contrast | is_saturation,
                moved,
                torch.where(is_hue, hue_all(x, factors[:, 3, None, None]), x),
            )
        return x

    def torchvision(self, v2):
        jitter = v2.ColorJitter(self.brightness, self.contrast, self.saturation, self.hue)
        return v2.RandomApply([jitter], self.prob)


@dataclass(frozen=True)
class RandomGrayscale:
    """Every channel the luma."""

    prob: float = 0.2

    columns = 1

    def sample(self, n, generator):
        """n x 1 float32: 1 for an image that becomes gray."""
        return (torch.rand(n, 1, generator=generator) < self.prob).float()

    def on_cpu(self, x, draws):
        return apply_to_subset(x, draws[:, 0].numpy() > 0, to_grayscale, draws[:, 0])

    def on_gpu(self, x, draws):
        return torch.where(draws[..., None, None] > 0, luma(x), x)

    def torchvision(self, v2):
        return v2.RandomGrayscale(self.prob)


def luma(x):
    """N x 3 x S x S to N x 1 x S x S."""
    red, green, blue = x.split(1, 1)
    return (GRAY[0] * red).add_(green, alpha=GRAY[1]).add_(blue, alpha=GRAY[2])


# Each of these overwrites x (new memory costs as much as the arithmetic) and returns it.
def to_grayscale(x, _):
    return x.copy_(luma(x))


def brightness(x, factor):
    return x.mul_(factor).clamp_(0, 1)


def contrast(x, factor):
    mean = luma(x.mean((2, 3), keepdim=True))
    return x.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 1)


def saturation(x, factor):
    return torch.lerp(luma(x), x, factor, out=x).clamp_(0, 1)


def hue(x, hue_shift):
    """Turn the hue in HSV space, with value and saturation kept. hue_shift: N x 1 x 1 x 1, of the circle, in [-1/2,
    1/2].

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
    angle.div_(torch.clamp(chroma, min=1e-8, out=work)).add_(1 + hue_shift[:, 0]).frac_()
    # The waves of green and blue, with peaks at 1/3 and 2/3, lie within one turn; red's, with its peak at 0, does not.
    low.sub_(chroma, alpha=1 / 6)
    high.add_(chroma, alpha=1 / 6)
    torch.sub(angle[:, None], HUE_PHASE, out=x).abs_().clamp_(1 / 6, 1 / 3)
    torch.addcmul(low, chroma, red, out=red)
    torch.addcmul(high, chroma, green, value=-1, out=green)
    torch.addcmul(high, chroma, blue, value=-1, out=blue)
    return x


def hue_all(x, hue_shift):
    """`hue` for a GPU: in new memory, for torch.compile does not trace out=, and fuses this. hue_shift: N x 1 x 1."""
    red, green, blue = x.unbind(1)
    high, low = x.amax(1), x.amin(1)
    angle = torch.copysign(green + blue - red + high - 2 * low, green - blue)
    chroma = 6 * (high - low)
    angle = (angle / chroma.clamp(min=1e-8) + (1 + hue_shift)).frac()
    low, high = low - chroma / 6, high + chroma / 6
    red = low + chroma * (angle - 1 / 2).abs().clamp(1 / 6, 1 / 3)
    green = high - chroma * (angle - 1 / 3).abs().clamp(1 / 6, 1 / 3)
    blue = high - chroma * (angle - 2 / 3).abs().clamp(1 / 6, 1 / 3)
    return torch.stack((red, green, blue), 1)
