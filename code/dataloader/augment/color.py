"""Color jitter and grayscale. On a CPU an operation runs on the images that it changes, on a GPU on all of them."""

from dataclasses import dataclass

import numpy as np
import torch

from dataloader.augment.batch import apply_to_subset

GRAY = (0.299, 0.587, 0.114)  # luma of ITU-R 601
# Positions on the hue circle where red, green and blue have their minimum or maximum (see `hue`).
HUE_PHASE = torch.tensor((1 / 2, 1 / 3, 2 / 3)).view(3, 1, 1)


@dataclass(frozen=True)
class ColorJitter:
    """Random brightness, contrast, saturation and hue, in random order.

    The factors of the first three are in [1 - strength, 1 + strength]; the hue shift is in [-strength, strength], in
    turns of the color circle. prob: probability of the operation.
    """

    brightness: float
    contrast: float
    saturation: float
    hue: float
    prob: float = 0.8

    columns = 8

    def sample(self, n, generator):
        """Sample n x 8 float32: the four factors (for hue: turns), and the position of each in the order, or 4 for
        none."""
        strengths = torch.tensor((self.brightness, self.contrast, self.saturation, self.hue))
        factors = 1 + strengths * (2 * torch.rand(n, 4, generator=generator) - 1)
        factors[:, 3] -= 1  # turns, not a factor
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
        """Compute all four operations for all images at each position, and select. This compiles into few kernels.
        Three of the four are one operation: interpolation between a base (black, the mean gray, the gray image) and the
        image.
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
                torch.where(is_hue, hue_gpu(x, factors[:, 3, None, None]), x),
            )
        return x

    def torchvision(self, v2):
        jitter = v2.ColorJitter(self.brightness, self.contrast, self.saturation, self.hue)
        return v2.RandomApply([jitter], self.prob)


@dataclass(frozen=True)
class RandomGrayscale:
    """Convert images to grayscale with probability prob; the three channels become the luma."""

    prob: float = 0.2

    columns = 1

    def sample(self, n, generator):
        """Sample n x 1 float32: 1 for an image that becomes gray, else 0."""
        return (torch.rand(n, 1, generator=generator) < self.prob).float()

    def on_cpu(self, x, draws):
        return apply_to_subset(x, draws[:, 0].numpy() > 0, to_grayscale, draws[:, 0])

    def on_gpu(self, x, draws):
        return torch.where(draws[..., None, None] > 0, luma(x), x)

    def torchvision(self, v2):
        return v2.RandomGrayscale(self.prob)


def luma(x):
    """Return the luma, N x 1 x S x S, of x, N x 3 x S x S."""
    red, green, blue = x.split(1, 1)
    return (GRAY[0] * red).add_(green, alpha=GRAY[1]).add_(blue, alpha=GRAY[2])


# These functions overwrite x and return it: allocating memory takes as long as the arithmetic.
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
    """Shift the hue in HSV space; value and saturation stay. hue_shift: N x 1 x 1 x 1, in turns, in [-1/2, 1/2].

    Each channel is low + chroma * clamp(|6 t - 3| - 1, 0, 1) of the hue t, shifted by a third of a turn between
    channels; here the constants are moved out of the clamp.
    """
    red, green, blue = x.unbind(1)
    high, low = torch.maximum(red, green), torch.minimum(red, green)
    torch.maximum(high, blue, out=high)
    torch.minimum(low, blue, out=low)
    # The hue in sixths of a turn, times chroma: +-(1 + g + b - r) of the color scaled to [0, 1], + if green > blue. One
    # expression, because torch.where would take as long as everything else.
    work = green - blue
    angle = (green + blue).sub_(red).add_(high).sub_(low, alpha=2)
    torch.copysign(angle, work, out=angle)
    chroma = (high - low).mul_(6)  # 0 for gray, whose angle is 0 as well
    angle.div_(torch.clamp(chroma, min=1e-8, out=work)).add_(1 + hue_shift[:, 0]).frac_()
    # Green and blue have their maximum at 1/3 and 2/3, within the turn; red has it at 0, so its minimum is used.
    low.sub_(chroma, alpha=1 / 6)
    high.add_(chroma, alpha=1 / 6)
    torch.sub(angle[:, None], HUE_PHASE, out=x).abs_().clamp_(1 / 6, 1 / 3)
    torch.addcmul(low, chroma, red, out=red)
    torch.addcmul(high, chroma, green, value=-1, out=green)
    torch.addcmul(high, chroma, blue, value=-1, out=blue)
    return x


def hue_gpu(x, hue_shift):
    """`hue` for a GPU, without in-place operations, which torch.compile does not trace. hue_shift: N x 1 x 1."""
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
