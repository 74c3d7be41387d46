"""Images that were decoded and made smaller once, in one file on disk that is mapped into memory."""

import contextlib
import functools

import numpy as np
from PIL import Image


class MemmapReader:
    """flat: the file of the pixels, image after image, height x width x 3 each. index: N x (offset, height, width)."""

    def __init__(self, names, flat, index):
        self.names, self.memmap_path, self.index = names, flat, index
        memmap(flat)  # now: another run may make it anew, and what is open stays as it is

    @contextlib.contextmanager
    def opened(self, index):
        offset, height, width = self.index[index].tolist()
        yield Image.fromarray(memmap(self.memmap_path)[offset : offset + 3 * height * width].reshape(height, width, 3))

    def select(self, rows):
        return MemmapReader(self.names.select(rows), self.memmap_path, self.index[rows])

    def digest(self):
        raise TypeError('what is a cache already needs none')


@functools.cache
def memmap(path):
    return np.memmap(path, np.uint8, mode='r')
