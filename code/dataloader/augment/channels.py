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
    """x -> mean + factor * (x - mean) + shift * std, clamped to [0, 1], with the same factor and shift for all channels
    of an image.

    factor: in [1 - contrast, 1 + contrast]; shift: in [-1, 1] * SHIFT * brightness; mean, std: one number per channel;
    groups: 1, or the number of channels for a separate factor and shift each; prob: probability of the operation.
    """

    brightness: float
    contrast: float
    mean: tuple
    std: tuple
    groups: int = 1
    prob: float = 0.8

    @property
    def columns(self):
        return 2 * self.groups

    def sample(self, n, generator):
        """Sample n x 2G float32, G groups: the factors, then the shifts; 1 and 0 for no change."""
        numbers = 2 * torch.rand(n, 2 * self.groups, generator=generator) - 1
        apply = (torch.rand(n, 1, generator=generator) < self.prob).float()
        factors, shifts = (apply * numbers).chunk(2, 1)
        return torch.cat((1 + self.contrast * factors, SHIFT * self.brightness * shifts), 1)

    def on_cpu(self, x, draws):
        mean, std = (x.new_tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        factors, shifts = draws[..., None, None].chunk(2, 1)
        return (mean + factors * (x - mean) + shifts * std).clamp(0, 1)

    on_gpu = on_cpu
