"""Images of one size, decoded, in memory (of a GPU where they fit)."""

import contextlib

from PIL import Image


class Memory:
    """pixels: N x 3 x H x W uint8."""

    def __init__(self, names, pixels):
        self.names, self.pixels = names, pixels

    @contextlib.contextmanager
    def opened(self, index):
        yield Image.fromarray(self.pixels[index].permute(1, 2, 0).cpu().numpy())

    def select(self, rows):
        return Memory(self.names.select(rows), self.pixels[rows.to(self.pixels.device)])

    def digest(self):
        raise TypeError('what is in memory already needs no cache')
