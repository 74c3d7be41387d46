"""Gaussian blur with a standard deviation per image."""

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from dataloader.augment.batch import apply_separable, apply_to_subset

BLUR_RADIUS = 6  # pixels on each side: three times the largest sigma


@dataclass(frozen=True)
class GaussianBlur:
    """Blur with a random standard deviation. sigma: its range, in pixels of the view; prob: probability of blurring."""

    sigma: tuple = (0.1, 2.0)
    prob: float = 0.5

    columns = 1

    def sample(self, n, generator):
        """Sample n x 1 float32: sigma in pixels, 0 for no blur."""
        low, high = self.sigma
        sigma = low + (high - low) * torch.rand(n, 1, generator=generator)
        return sigma * (torch.rand(n, 1, generator=generator) < self.prob)

    def on_cpu(self, x, draws):
        return apply_to_subset(x, draws[:, 0].numpy() > 0, blur, draws[:, 0])

    def on_gpu(self, x, draws):
        return blur_gpu(x, draws[:, 0])

    def torchvision(self, v2):
        return v2.RandomApply([v2.GaussianBlur(2 * BLUR_RADIUS + 1, self.sigma)], self.prob)


def blur(x, sigma):
    """Blur images on a CPU; x is overwritten. The border is reflected. x: N x C x S x S; sigma: N or N x 1 x 1 x 1, in
    pixels, above 0.

    A sum of shifted images along each axis, up to three times the largest sigma.
    """
    radius = min(math.ceil(3 * sigma.max().item()), x.shape[-1] - 1)
    weight = gaussian(sigma.flatten(), radius)[..., None, None, None]
    for axis in (2, 3):
        side = x.shape[axis]
        wide = pad(x, (0, 0, radius, radius) if axis == 2 else (radius, radius, 0, 0), mode='reflect')
        x.mul_(weight[:, 0])
        for i in range(1, radius + 1):
            x.addcmul_(wide.narrow(axis, radius - i, side), weight[:, i])
            x.addcmul_(wide.narrow(axis, radius + i, side), weight[:, i])
    return x


def blur_gpu(x, sigma):
    """Blur images on a GPU, by two matrix products per image. sigma: N; images with sigma 0 are unchanged."""
    side = x.shape[-1]
    radius = min(BLUR_RADIUS, side - 1)
    weight = gaussian(sigma.clamp(min=0.1), radius)
    weight = torch.cat((weight[:, 1:].flip(1), weight), 1)[:, None].expand(-1, side, -1)
    source = torch.arange(side, device=x.device)[:, None] + torch.arange(-radius, radius + 1, device=x.device)
    source = (side - 1) - (source.abs() - (side - 1)).abs()  # reflected at both ends
    matrix = x.new_zeros(len(x), side, side).scatter_add(2, source.expand(len(x), -1, -1), weight)
    same = torch.eye(side, device=x.device)
    matrix = torch.where(sigma[:, None, None] > 0, matrix, same)
    return apply_separable(x, matrix, matrix)


def gaussian(sigma, radius):
    """Return Gaussian weights of the distances 0 to `radius` pixels, N x (radius + 1); both sides together sum to 1."""
    distance = torch.arange(radius + 1, device=sigma.device)
    weight = torch.exp(-0.5 * (distance / sigma[:, None]) ** 2)
    return weight / (2 * weight.sum(1, keepdim=True) - 1)  # distance 0, whose weight is 1, counts once
