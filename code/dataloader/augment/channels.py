"""Brightness and contrast for images whose channels are not red, green and blue.

Both are relative to each channel's standard deviation over the dataset. An instrument may use a small part of its
range; a factor on the pixel values would then shift an image by many times the variation between images. torchvision
has no such transform, so `augment_backend=worker` is refused with these operations.
"""

from dataclasses import dataclass

import torch

SHIFT = 1.9  # ImageNet's mean in its standard deviations: a brightness factor of 1 + s shifts the mean by s times this


@dataclass(frozen=True)
class IntensityJitter:
    """x -> mean + factor * (x - mean) + shift * std, with the same factor and shift for all channels of an image.

    factor: in [1 - contrast, 1 + contrast]; shift: in [-1, 1] * SHIFT * brightness; mean, std: one number per channel;
    prob: probability of the operation.
    """

    brightness: float
    contrast: float
    mean: tuple
    std: tuple
    prob: float = 0.8

    columns = 2

    def sample(self, n, generator):
        """Sample n x 2 float32: factor and shift; 1 and 0 for no change."""
        return draw_affine(n, 1, self, generator)

    def on_cpu(self, x, draws):
        return apply_affine(x, draws, self)

    def on_gpu(self, x, draws):
        return apply_affine(x, draws, self)


@dataclass(frozen=True)
class ChannelJitter:
    """IntensityJitter with a separate factor and shift for each channel."""

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
        """Sample n x 2C float32: the factors, then the shifts."""
        return draw_affine(n, self.channels, self, generator)

    def on_cpu(self, x, draws):
        return apply_affine(x, draws, self)

    def on_gpu(self, x, draws):
        return apply_affine(x, draws, self)


def draw_affine(n, channels, jitter, generator):
    """Sample factors and shifts of a jitter, n x (2 * channels) float32."""
    drawn = 2 * torch.rand(n, 2 * channels, generator=generator) - 1
    apply = (torch.rand(n, 1, generator=generator) < jitter.prob).float()
    factors, shifts = (apply * drawn).chunk(2, 1)
    return torch.cat((1 + jitter.contrast * factors, SHIFT * jitter.brightness * shifts), 1)


def apply_affine(x, draws, jitter):
    """Apply factors and shifts, N x 2 or N x 2C, to x, N x C x S x S."""
    mean, std = (x.new_tensor(values).view(1, -1, 1, 1) for values in (jitter.mean, jitter.std))
    factors, shifts = draws[..., None, None].chunk(2, 1)
    return mean + factors * (x - mean) + shifts * std
