"""Images in tar archives, read where they lie."""

import errno
import functools
import hashlib
import io
import os
import threading
from pathlib import Path

from dataloader.loading.decode import open_image
from runtime.console import printable
from runtime.errors import WorkError
from runtime.files import stat_fingerprint

try:
    import resource
except ImportError:  # Windows
    resource = None

READING = threading.Lock()


class Tar:
    """archives: paths. Of each image: its name, the number of its archive, where its bytes begin there, how many."""

    def __init__(self, archives, names, which, offsets, sizes):
        self.archives, self.names = archives, names
        self.archive_index, self.offsets, self.sizes = which, offsets, sizes  # N each, int64 arrays

    def opened(self, index):
        archive = self.archives[self.archive_index[index]]
        wanted = int(self.sizes[index])
        try:
            found = read_at(open_fd(archive), wanted, int(self.offsets[index]))
        except OSError as error:
            raise WorkError(f'cannot read the archive {printable(archive)}: {error.strerror}') from None
        name = f'{archive}: {self.names[index]}'
        if len(found) < wanted:
            raise WorkError(f'cannot read the image {printable(name)}: the archive has changed or is cut short')
        return open_image(io.BytesIO(found), name)

    def select(self, rows):
        rows = rows.numpy() if hasattr(rows, 'numpy') else rows
        return Tar(
            self.archives, self.names.select(rows), self.archive_index[rows], self.offsets[rows], self.sizes[rows]
        )

    def digest(self):
        digest = hashlib.blake2b(stat_fingerprint(self.archives).encode(), digest_size=16)
        for part in (self.archive_index, self.offsets, self.sizes):
            digest.update(part.tobytes())
        return digest.hexdigest()


def read_at(file, count, offset):
    """Bytes of an open file from an offset on: by position where the system has that, so that processes and threads may
    share the file; on Windows one thread at a time."""
    if hasattr(os, 'pread'):
        return os.pread(file, count, offset)
    with READING:
        os.lseek(file, offset, os.SEEK_SET)
        return os.read(file, count)


@functools.cache
def open_fd(archive):
    """An open archive: read by position, so processes and threads may share it. There may be thousands of them: where
    the usual limit of open files is reached, it is raised as far as it may be."""
    flags = os.O_RDONLY | getattr(os, 'O_BINARY', 0)
    try:
        return os.open(Path(archive), flags)
    except OSError as error:
        if resource is None:
            raise
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        if error.errno != errno.EMFILE:
            raise
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        return os.open(Path(archive), flags)
