"""Random resized crops, and resizing of one box per image for a whole batch."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from dataloader.augment.batch import apply_separable


@dataclass(frozen=True)
class RandomResizedCrop:
    """Crop a random box, resize it to the view size, and flip it horizontally at random.

    scale: range of the box's share of the image area; ratio: range of width / height; flip: probability.
    """

    scale: tuple = (0.2, 1.0)
    ratio: tuple = (3 / 4, 4 / 3)
    flip: float = 0.5

    columns = 5

    def sample(self, n, height, width, generator):
        """Sample boxes for n images of height x width pixels, with the distribution of torchvision's RandomResizedCrop.
        Returns n x 5 float32 on the CPU: top, left, height and width (whole numbers), and 1 for a flip.

        The first of ten candidates that fits is taken; otherwise the largest center crop within the ratio.
        """
        (low, high), (thin, wide) = self.scale, self.ratio
        drawn = torch.rand(n, 41, generator=generator).numpy()  # for one image NumPy has a tenth of torch's overhead
        area = height * width * (low + (high - low) * drawn[:, :10])
        ratio = np.exp(math.log(thin) + (math.log(wide) - math.log(thin)) * drawn[:, 10:20])
        w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
        fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
        every, first = np.arange(n), fits.argmax(1)  # argmax: the first candidate that fits
        w, h, top, left = w[every, first], h[every, first], drawn[every, 20 + first], drawn[every, 30 + first]
        flips = drawn[:, 40] < self.flip
        boxes = np.stack((np.floor(top * (height - h + 1)), np.floor(left * (width - w + 1)), h, w, flips), 1)
        fallback = ~fits[every, first]
        if fallback.any():
            w, h = min(width, round(height * wide)), min(height, round(width / thin))
            boxes[fallback, :4] = (height - h) // 2, (width - w) // 2, h, w
        return torch.from_numpy(boxes).float()

    def torchvision(self, v2, size, interpolation):
        """Return torchvision's transform, without the flip."""
        return v2.RandomResizedCrop(size, self.scale, self.ratio, v2.InterpolationMode(interpolation))


def center_box(height, width, crop_ratio):
    """Return the box of the evaluation crop, (top, left, height, width), in fractional pixels of the image."""
    side = min(height, width) * crop_ratio
    return (height - side) / 2, (width - side) / 2, side, side


def crop_resize(x, boxes, flips, size, clip_to_box=True, cubic=False, white=1.0):
    """Resize one box of each image to size x size, with PIL's and torchvision's antialiased bilinear or bicubic filter.

    Resizing is linear and separable: two small matrices per image, for rows and columns, and two batched products. A
    flip reverses the matrix of the columns. x: N x C x H x W; boxes: N x 4; flips: N, or None; all on one device.
    clip_to_box: True ignores pixels outside the box (crop, then resize), False uses them (resize, then crop). white:
    the largest value of x; the result of the bicubic filter is clamped to [0, white]. Returns N x C x S x S.
    """
    height, width = x.shape[-2:]
    top, left, h, w = boxes.to(x.dtype).unbind(1)
    rows = resize_weights(top, h, height, size, clip_to_box, cubic=cubic)
    columns = resize_weights(left, w, width, size, clip_to_box, flips, cubic)
    x = apply_separable(x, rows, columns)
    return x.clamp(0, white) if cubic else x


def resize_weights(start, length, side, size, clip_to_box, flips=None, cubic=False):
    """Return the matrices that resize the interval [start, start + length) of an axis of `side` pixels to `size`
    pixels, reversed if flips is 1.

    start, length, flips: N. Returns N x size x side; rows sum to 1. The filter is a triangle, or Keys' cubic with a =
    -1/2 as in PIL, scaled to the larger of a source and a target pixel.
    """
    pixels_per_output = (length / size)[:, None]
    output_centers = torch.arange(size, device=start.device, dtype=start.dtype)[None] + 0.5
    if flips is not None:
        output_centers = output_centers + flips[:, None] * (size - 2 * output_centers)
    pixels = torch.arange(side, device=start.device, dtype=start.dtype) + 0.5
    if clip_to_box:  # an infinite distance gives pixels outside the box the weight 0
        begin, end = start[:, None], (start + length)[:, None]
        pixels = pixels.where((pixels > begin) & (pixels < end), math.inf)[:, None]
    centers = (start[:, None] + output_centers * pixels_per_output)[:, :, None]
    weights = (pixels - centers).abs_().mul_(-1 / pixels_per_output.clamp(min=1)[:, :, None])
    weights = keys_cubic(-weights) if cubic else weights.add_(1).clamp_(min=0)
    return weights.div_(weights.sum(2, keepdim=True))


def keys_cubic(x):
    """Evaluate Keys' cubic filter with a = -1/2 at the distances x >= 0."""
    x = x.clamp(max=2)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, far)
