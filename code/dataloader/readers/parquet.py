"""Reader of images in Parquet files, as the Hugging Face hub stores them."""

import functools
import hashlib
import io
import os
import threading
from collections import OrderedDict

from dataloader.loading.decode import open_image
from runtime.console import printable
from runtime.errors import WorkError
from runtime.files import stat_fingerprint

CACHE_BYTES = 128 * 2**20  # row groups that a process keeps: one image needs its whole row group


class Parquet:
    """files: paths. column: name of the image column, bytes or a struct of bytes and path. names, file_index, groups,
    rows: of each image its name, the number of its file, its row group and its row there."""

    def __init__(self, files, column, names, file_index, groups, rows):
        self.files, self.column, self.names = files, column, names
        self.file_index, self.groups, self.rows = file_index, groups, rows  # N each, int64 arrays

    def open(self, index):
        """Open image `index` (decode.open_image, a context manager). Raises WorkError."""
        path = self.files[self.file_index[index]]
        name = f'{path}: {self.names[index]}'
        try:
            cell = read_group(path, int(self.groups[index]), self.column)[int(self.rows[index])]
        except Exception as error:  # pyarrow raises various types on damaged files
            raise WorkError(f'cannot read the file {printable(path)}: {str(error).splitlines()[0]}') from None
        content, image_path = (cell.get('bytes'), cell.get('path')) if isinstance(cell, dict) else (cell, None)
        if content is None and image_path:
            image_path = os.path.join(os.path.dirname(path), image_path)
            return open_image(image_path, image_path)
        return open_image(io.BytesIO(content or b''), name)

    def select(self, rows):
        rows = rows.numpy() if hasattr(rows, 'numpy') else rows
        picked = (self.file_index[rows], self.groups[rows], self.rows[rows])
        return Parquet(self.files, self.column, self.names.select(rows), *picked)

    def digest(self):
        digest = hashlib.blake2b(stat_fingerprint(self.files).encode(), digest_size=16)
        for part in (self.file_index, self.groups, self.rows):
            digest.update(part.tobytes())
        return digest.hexdigest()


class GroupCache:
    """A cache of the most recently used row groups, at most CACHE_BYTES, but at least one."""

    def __init__(self):
        self.lock, self.groups, self.size = threading.Lock(), OrderedDict(), 0

    def get(self, key, read):
        """Return the images of the group `key`, from the cache or from read()."""
        with self.lock:
            if key in self.groups:
                self.groups.move_to_end(key)
                return self.groups[key][0]
            images, size = read()
            self.groups[key] = images, size
            self.size += size
            while self.size > CACHE_BYTES and len(self.groups) > 1:
                self.size -= self.groups.popitem(last=False)[1][1]
            return images


@functools.cache
def cache_of_process(_):
    return GroupCache()


def read_group(path, group, column):
    """Return the values of a column in one row group, as a list, cached for the next image of the group."""

    def read():
        table = open_parquet(path, os.getpid()).read_row_group(group, columns=[column], use_threads=False)
        return table.column(0).to_pylist(), table.nbytes

    return cache_of_process(os.getpid()).get((str(path), group), read)


@functools.cache
def open_parquet(path, _):
    """Open a file. The second argument is the process id: forked processes must not share a file position."""
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(path)
