"""Reader of decoded images of one size, in memory or on a GPU."""

import contextlib

from PIL import Image

from dataloader.loading.arrays import ArrayImage


class Memory:
    """pixels: N x C x H x W. is_rgb8: whether they are 8-bit red, green and blue; else they have the channels and type
    of the pixel format."""

    def __init__(self, names, pixels, is_rgb8=True):
        self.names, self.pixels, self.is_rgb8 = names, pixels, is_rgb8

    @contextlib.contextmanager
    def open(self, index):
        pixels = self.pixels[index].cpu()
        yield Image.fromarray(pixels.permute(1, 2, 0).numpy()) if self.is_rgb8 else ArrayImage(pixels.numpy(), 'array')

    def select(self, rows):
        return Memory(self.names.select(rows), self.pixels[rows.to(self.pixels.device)], self.is_rgb8)

    def digest(self):
        raise TypeError('images in memory are not cached')
