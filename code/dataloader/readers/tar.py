"""Reader of images in tar archives, without unpacking."""

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
    """archives: paths. names, archive_index, offsets, sizes: of each image its name, the number of its archive, and the
    offset and number of its bytes there."""

    def __init__(self, archives, names, archive_index, offsets, sizes):
        self.archives, self.names = archives, names
        self.archive_index, self.offsets, self.sizes = archive_index, offsets, sizes  # N each, int64 arrays

    def open(self, index):
        archive = self.archives[self.archive_index[index]]
        size = int(self.sizes[index])
        try:
            content = read_at(open_fd(archive), size, int(self.offsets[index]))
        except OSError as error:
            raise WorkError(f'cannot read the archive {printable(archive)}: {error.strerror}') from None
        name = f'{archive}: {self.names[index]}'
        if len(content) < size:
            raise WorkError(f'cannot read the image {printable(name)}: the archive has changed or is cut short')
        return open_image(io.BytesIO(content), name)

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
    """Read `count` bytes of an open file at an offset. pread needs no file position, so processes and threads can share
    the file; on Windows a lock serializes threads."""
    if hasattr(os, 'pread'):
        return os.pread(file, count, offset)
    with READING:
        os.lseek(file, offset, os.SEEK_SET)
        return os.read(file, count)


@functools.cache
def open_fd(archive):
    """Open an archive and keep it open. There may be thousands; at the limit of open files, the soft limit is raised to
    the hard one."""
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
