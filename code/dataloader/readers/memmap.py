"""Images that were decoded and made smaller once, in one file on disk that is mapped into memory."""

import contextlib
import functools

import numpy as np
from PIL import Image

from dataloader.loading.arrays import ArrayImage


class MemmapReader:
    """path: the file of the pixels, image after image: height x width x 3 uint8 each (is_rgb8), or channels x height x
    width of dtype. index: N x (offset in values, height, width)."""

    def __init__(self, names, path, index, pixel_format):
        self.names, self.memmap_path, self.index, self.pixel_format = names, path, index, pixel_format
        memmap(path, pixel_format.dtype)  # now: another run may make it anew, and what is open stays as it is

    @contextlib.contextmanager
    def opened(self, index):
        offset, height, width = self.index[index].tolist()
        count = self.pixel_format.count
        values = memmap(self.memmap_path, self.pixel_format.dtype)[offset : offset + count * height * width]
        if self.pixel_format.is_rgb8:
            yield Image.fromarray(values.reshape(height, width, 3))
        else:
            yield ArrayImage(np.array(values).reshape(count, height, width), 'array')

    def select(self, rows):
        return MemmapReader(self.names.select(rows), self.memmap_path, self.index[rows], self.pixel_format)

    def digest(self):
        raise TypeError('what is a cache already needs none')


@functools.cache
def memmap(path, dtype):
    return np.memmap(path, dtype, mode='r')
