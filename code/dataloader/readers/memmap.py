"""Reader of images that were decoded and resized into one file, which is memory-mapped."""

import contextlib
import functools

import numpy as np
from PIL import Image

from dataloader.loading.arrays import ArrayImage


class MemmapReader:
    """path: the file of the pixels, one image after the other: H x W x 3 uint8 if pixel_format.is_rgb8, else C x H x W
    of its dtype. index: N x 3, (offset in values, height, width)."""

    def __init__(self, names, path, index, pixel_format):
        self.names, self.memmap_path, self.index, self.pixel_format = names, path, index, pixel_format
        memmap(path, pixel_format.dtype)  # open it now: another run may replace the file later

    @contextlib.contextmanager
    def open(self, index):
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
        raise TypeError('a cache is not cached again')


@functools.cache
def memmap(path, dtype):
    return np.memmap(path, dtype, mode='r')
