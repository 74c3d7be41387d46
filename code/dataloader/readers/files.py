"""Images as files in a folder."""

import hashlib
import os

from dataloader.loading.decode import open_image


class Files:
    """names: sources.path_array.PathArray, relative to `folder` or absolute."""

    def __init__(self, folder, names):
        self.folder, self.names = os.fsencode(folder), names

    def opened(self, index):
        """Image `index` as PIL has it, its pixels perhaps not read yet; a context. Raises WorkError."""
        path = os.path.join(self.folder, self.names.bytes_at(index))
        return open_image(path, path)

    def select(self, rows):
        """The images of these row numbers, in this order."""
        return Files(self.folder, self.names.select(rows))

    def digest(self):
        """What changes when an image does: of names, sizes and times. The time of change is one of them, which no copy
        or move sets: files of one size that are exchanged have times of writing as before."""
        digest = hashlib.blake2b(digest_size=16)
        for index in range(len(self.names)):
            name = self.names.bytes_at(index)
            try:
                status = os.stat(os.path.join(self.folder, name))
                known = f'{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}'
            except OSError:  # a link that leads nowhere
                known = 'gone'
            digest.update(name + f'\0{known}\n'.encode())
        return digest.hexdigest()
