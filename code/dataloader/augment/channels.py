"""Brightness and contrast of images whose channels are no colors: of all channels alike, or of each its own.

Both are in units of each channel's standard deviation over the dataset: an instrument may use a small part of its
range, where a factor of the pixels themselves would move an image by many times what tells it from others.
torchvision has no such transform: `augment_backend=worker` is refused where these are used.
"""

from dataclasses import dataclass

import torch

# ImageNet's mean in its standard deviations: what a brightness factor of 1 + s moves a photograph's mean by is s of it.
SHIFT = 1.9


@dataclass(frozen=True)
class IntensityJitter:
    """x to mean + contrast x (x - mean) + shift x std, contrast and shift the same for all channels of an image.

    contrast: within 1 - contrast and 1 + contrast; the shift within SHIFT x brightness either way; mean, std: a number
    a channel; prob: of jittering an image at all.
    """

    brightness: float
    contrast: float
    mean: tuple
    std: tuple
    prob: float = 0.8

    columns = 2

    def sample(self, n, generator):
        """n x 2 float32: the factor of contrast, and the shift in standard deviations; 1 and 0 for none."""
        return draw_affine(n, 1, self, generator)

    def on_cpu(self, x, draws):
        return apply_affine(x, draws, self)

    def on_gpu(self, x, draws):
        return apply_affine(x, draws, self)


@dataclass(frozen=True)
class ChannelJitter:
    """IntensityJitter with a factor and a shift of its own for each channel."""

    brightness: float
    contrast: float
    mean: tuple
    std: tuple
    channels: int
    prob: float = 0.8

    @property
    def columns(self):
        return 2 * self.channels

    def sample(self, n, generator):
        """n x 2C float32: the factors, then the shifts."""
        return draw_affine(n, self.channels, self, generator)

    def on_cpu(self, x, draws):
        return apply_affine(x, draws, self)

    def on_gpu(self, x, draws):
        return apply_affine(x, draws, self)


def draw_affine(n, channels, jitter, generator):
    """n x 2 channels float32: factors and shifts of a jitter."""
    drawn = 2 * torch.rand(n, 2 * channels, generator=generator) - 1
    apply = (torch.rand(n, 1, generator=generator) < jitter.prob).float()
    factors, shifts = (apply * drawn).chunk(2, 1)
    return torch.cat((1 + jitter.contrast * factors, SHIFT * jitter.brightness * shifts), 1)


def apply_affine(x, draws, jitter):
    """x, N x C x S x S, by factors and shifts, N x 2 or N x 2C."""
    mean, std = (x.new_tensor(values).view(1, -1, 1, 1) for values in (jitter.mean, jitter.std))
    factors, shifts = draws[..., None, None].chunk(2, 1)
    return mean + factors * (x - mean) + shifts * std
