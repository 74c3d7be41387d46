"""Images of one size, decoded, in memory (of a GPU where they fit)."""

import contextlib

from PIL import Image

from dataloader.loading.arrays import ArrayImage


class Memory:
    """pixels: N x C x H x W. is_rgb8: whether these are red, green and blue of 8 bits; else they are the channels and
    of the type that the images are wanted with (pixel_format.PixelFormat)."""

    def __init__(self, names, pixels, is_rgb8=True):
        self.names, self.pixels, self.is_rgb8 = names, pixels, is_rgb8

    @contextlib.contextmanager
    def opened(self, index):
        pixels = self.pixels[index].cpu()
        yield Image.fromarray(pixels.permute(1, 2, 0).numpy()) if self.is_rgb8 else ArrayImage(pixels.numpy(), 'array')

    def select(self, rows):
        return Memory(self.names.select(rows), self.pixels[rows.to(self.pixels.device)], self.is_rgb8)

    def digest(self):
        raise TypeError('what is in memory already needs no cache')
