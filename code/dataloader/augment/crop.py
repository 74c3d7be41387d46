"""Random resized crops, and how a box of each image is resized, a batch at a time."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from dataloader.augment.batch import apply_separable


@dataclass(frozen=True)
class RandomResizedCrop:
    """Cut a random box, resize it to the view, and perhaps flip it (a flip only turns the resize round).

    scale: share of the image's area; ratio: width to height; flip: probability.
    """

    scale: tuple = (0.2, 1.0)
    ratio: tuple = (3 / 4, 4 / 3)
    flip: float = 0.5

    columns = 5  # of `sample`

    def sample(self, n, height, width, generator):
        """Crops of n images of height x width pixels, as torchvision's RandomResizedCrop draws them: n x 5 float32 on
        the CPU: top, left, height and width, which are whole numbers, and 1 for a flip.

        Of ten candidates the first that fits is taken; the fallback is the largest centre crop within the ratio.
        """
        (low, high), (thin, wide) = self.scale, self.ratio
        drawn = torch.rand(n, 41, generator=generator).numpy()  # numpy: an image alone is a tenth of torch's overhead
        area = height * width * (low + (high - low) * drawn[:, :10])
        ratio = np.exp(math.log(thin) + (math.log(wide) - math.log(thin)) * drawn[:, 10:20])
        w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
        fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
        every, first = np.arange(n), fits.argmax(1)  # the first True of a row
        w, h, top, left = w[every, first], h[every, first], drawn[every, 20 + first], drawn[every, 30 + first]
        flips = drawn[:, 40] < self.flip
        boxes = np.stack((np.floor(top * (height - h + 1)), np.floor(left * (width - w + 1)), h, w, flips), 1)
        fallback = ~fits[every, first]
        if fallback.any():
            w, h = min(width, round(height * wide)), min(height, round(width / thin))
            boxes[fallback, :4] = (height - h) // 2, (width - w) // 2, h, w
        return torch.from_numpy(boxes).float()

    def torchvision(self, v2, size, interpolation):
        """The reference, without the flip."""
        return v2.RandomResizedCrop(size, self.scale, self.ratio, v2.InterpolationMode(interpolation))


def center_box(height, width, crop_ratio):
    """The evaluation crop as (top, left, height, width), in pixels of the image, fractional."""
    side = min(height, width) * crop_ratio
    return (height - side) / 2, (width - side) / 2, side, side


def crop_resize(x, boxes, flips, size, clip_to_box=True, cubic=False, white=1.0):
    """Cut every image's box and resize it to size x size, antialiased bilinear or bicubic as PIL and torchvision do.

    A resize is linear and separable, so each image's is two small matrices, rows and columns: one batched product
    each, whatever the boxes. A flip only turns the columns' matrix round. clip_to_box: pixels beyond the box count for
    nothing (crop, then resize) or do count (resize the whole, then crop). x: N x 3 x H x W; boxes: N x 4; flips: N, or
    None; on x's device; white: the largest value of x. Returns N x 3 x S x S; of a cubic filter, which overshoots,
    clamped to [0, white].
    """
    height, width = x.shape[-2:]
    top, left, h, w = boxes.to(x.dtype).unbind(1)
    rows = resize_weights(top, h, height, size, clip_to_box, cubic=cubic)
    columns = resize_weights(left, w, width, size, clip_to_box, flips, cubic)
    x = apply_separable(x, rows, columns)
    return x.clamp(0, white) if cubic else x


def resize_weights(start, length, side, size, clip_to_box, flips=None, cubic=False):
    """Weights that take an axis of `side` pixels, cut to [start, start + length), to `size` pixels, where flips turned.

    start, length, flips: N. Returns N x size x side, rows that sum to 1. The filter is a triangle as wide as the larger
    of one source and one target pixel, or Keys' cubic with a = -1/2, as in PIL, of twice that width.
    """
    pixels_per_output = (length / size)[:, None]
    output_centers = torch.arange(size, device=start.device, dtype=start.dtype)[None] + 0.5
    if flips is not None:
        output_centers = output_centers + flips[:, None] * (size - 2 * output_centers)
    pixels = torch.arange(side, device=start.device, dtype=start.dtype) + 0.5
    if clip_to_box:  # the others are too far away to count
        begin, end = start[:, None], (start + length)[:, None]
        pixels = pixels.where((pixels > begin) & (pixels < end), math.inf)[:, None]
    centers = (start[:, None] + output_centers * pixels_per_output)[:, :, None]
    weights = (pixels - centers).abs_().mul_(-1 / pixels_per_output.clamp(min=1)[:, :, None])
    weights = keys_cubic(-weights) if cubic else weights.add_(1).clamp_(min=0)
    return weights.div_(weights.sum(2, keepdim=True))


def keys_cubic(x):
    """Keys' cubic filter with a = -1/2 at the distances x >= 0."""
    x = x.clamp(max=2)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, far)
