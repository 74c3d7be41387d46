"""Images in Parquet files, as the Hugging Face hub has them, read where they lie."""

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

CACHE_BYTES = 128 * 2**20  # of images that a process keeps: a row group is read as a whole, for one of its images


class Parquet:
    """files: paths. column: of the images, a struct of bytes and path, or bytes. Of each image: its name, the number of
    its file, its row group there, its row in that."""

    def __init__(self, files, column, names, file_index, groups, rows):
        self.files, self.column, self.names = files, column, names
        self.file_index, self.groups, self.rows = file_index, groups, rows  # N each, int64 arrays

    def opened(self, index):
        """Image `index` as decode.open_image has it. Raises WorkError."""
        path = self.files[self.file_index[index]]
        name = f'{path}: {self.names[index]}'
        try:
            found = read_group(path, int(self.groups[index]), self.column)[int(self.rows[index])]
        except Exception as error:  # of pyarrow, on damaged bytes
            raise WorkError(f'cannot read the file {printable(path)}: {str(error).splitlines()[0]}') from None
        content, beside = (found.get('bytes'), found.get('path')) if isinstance(found, dict) else (found, None)
        if content is None and beside:
            beside = os.path.join(os.path.dirname(path), beside)
            return open_image(beside, beside)
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
    """The images of the row groups that were asked for last, up to CACHE_BYTES, but one at least."""

    def __init__(self):
        self.lock, self.groups, self.size = threading.Lock(), OrderedDict(), 0

    def get(self, key, read):
        """The images of the group `key`, from here or from `read`."""
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
    """The values of a column in one row group, a list. What was read is kept for the next image of the group."""

    def read():
        table = open_parquet(path, os.getpid()).read_row_group(group, columns=[column], use_threads=False)
        return table.column(0).to_pylist(), table.nbytes

    return cache_of_process(os.getpid()).get((str(path), group), read)


@functools.cache
def open_parquet(path, _):
    """An open file, one for each process: its position is its own."""
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(path)
