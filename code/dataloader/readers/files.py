"""Reader of image files in a folder."""

import hashlib
import os

from dataloader.loading.decode import open_image


class Files:
    """names: a sources.path_array.PathArray of paths, relative to `folder` or absolute."""

    def __init__(self, folder, names):
        self.folder, self.names = os.fsencode(folder), names

    def open(self, index):
        """Open image `index` (decode.open_image, a context manager). Raises WorkError."""
        path = os.path.join(self.folder, self.names.bytes_at(index))
        return open_image(path, path)

    def select(self, rows):
        """Return a reader of the images with these row numbers, in this order."""
        return Files(self.folder, self.names.select(rows))

    def digest(self):
        """Return a digest of names, sizes, mtimes and ctimes. The ctime detects files of equal size that were exchanged
        with their mtimes preserved."""
        digest = hashlib.blake2b(digest_size=16)
        for index in range(len(self.names)):
            name = self.names.bytes_at(index)
            try:
                status = os.stat(os.path.join(self.folder, name))
                state = f'{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}'
            except OSError:  # a broken link
                state = 'gone'
            digest.update(name + f'\0{state}\n'.encode())
        return digest.hexdigest()
