"""Brightness and contrast of images whose channels are no colours: of all channels alike, or of each its own."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class IntensityJitter:
    """Brightness and contrast times a random factor each, in random order, the same for all channels of an image.

    Both factors are within 1 - strength and 1 + strength. prob: of jittering an image at all.
    """

    brightness: float
    contrast: float
    prob: float = 0.8

    columns = 3

    def sample(self, n, generator):
        """n x 3 float32: the two factors, 1 for none, and whether contrast comes first."""
        strengths = torch.tensor((self.brightness, self.contrast))
        factors = 1 + strengths * (2 * torch.rand(n, 2, generator=generator) - 1)
        contrast_first = (torch.rand(n, 1, generator=generator) < 0.5).float()
        apply = torch.rand(n, 1, generator=generator) < self.prob
        return torch.cat((factors.where(apply, torch.ones(())), contrast_first), 1)

    def on_cpu(self, x, draws):
        return self.on_gpu(x, draws)

    def on_gpu(self, x, draws):
        brightness, contrast, contrast_first = draws[..., None, None, None].unbind(1)
        first = adjust_contrast(adjust_brightness(x, brightness), contrast)
        other = adjust_brightness(adjust_contrast(x, contrast), brightness)
        return torch.where(contrast_first > 0, other, first)

    def torchvision(self, v2):
        return v2.RandomApply([v2.ColorJitter(self.brightness, self.contrast)], self.prob)


@dataclass(frozen=True)
class ChannelJitter:
    """Each channel its own gain and offset: gain x + offset, cut to [0, 1].

    gain: within 1 - gain and 1 + gain; offset: within -offset and offset; prob: of jittering an image at all.
    """

    gain: float
    offset: float
    channels: int
    prob: float = 0.8

    @property
    def columns(self):
        return 2 * self.channels

    def sample(self, n, generator):
        """n x 2C float32: the gains, then the offsets."""
        drawn = 2 * torch.rand(n, 2 * self.channels, generator=generator) - 1
        apply = (torch.rand(n, 1, generator=generator) < self.prob).float()
        gains, offsets = (apply * drawn).chunk(2, 1)
        return torch.cat((1 + self.gain * gains, self.offset * offsets), 1)

    def on_cpu(self, x, draws):
        return self.on_gpu(x, draws)

    def on_gpu(self, x, draws):
        gains, offsets = draws[..., None, None].chunk(2, 1)
        return (x * gains + offsets).clamp(0, 1)

    def torchvision(self, v2):
        raise NotImplementedError('torchvision has no such transform')


def adjust_brightness(x, factor):
    return (x * factor).clamp(0, 1)


def adjust_contrast(x, factor):
    """From the mean of each image, over all its channels, towards it or away."""
    mean = x.mean((1, 2, 3), keepdim=True)
    return torch.lerp(mean, x, factor).clamp(0, 1)
