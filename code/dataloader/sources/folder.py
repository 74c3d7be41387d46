"""What lies in a folder: its images at any depth, and everything else, counted."""

import os
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from dataloader.loading.decode import is_image
from dataloader.sources.path_array import PathArray
from runtime.console import printable
from runtime.errors import UserError

# What systems put beside people's files, lower case; so is whatever begins with a dot.
SYSTEM_NAMES = {
    b'@eadir',
    b'@recycle',
    b'@recently-snapshot',
    b'@tmp',
    b'#recycle',
    b'#snapshot',
    b'lost+found',
    b'__macosx',
    b'__pycache__',
    b'$recycle.bin',
    b'system volume information',
    b'thumbs.db',
    b'desktop.ini',
}


@dataclass
class FolderScan:
    """The images of a folder: those that lie in it, then folder by folder, sorted. Names are relative to it."""

    names: PathArray
    folders: list  # of the folders right below, sorted by name (str)
    counts: list  # images in each of them
    others: Counter  # what is no image: ending (str) to count
    passed: list = field(default_factory=list)  # what was not gone into: folders of systems, links that lead back

    @property
    def num_root_images(self):
        """The number of images that lie in the folder itself; they come first."""
        return len(self.names) - sum(self.counts)


def scan(folder, progress=iter):
    """FolderScan of a folder. progress: wraps the iteration over the folders right below it. Raises UserError where a
    folder may not be read.

    Links are followed, but for those that lead to a folder which holds them.
    """
    found = FolderScan(PathArray(), [], [], Counter())
    top = os.fsencode(os.path.realpath(folder))
    parents = {inode(os.path.realpath(top))}
    above = top
    while (up := os.path.dirname(above)) != above:
        above = up
        parents.add(inode(above))
    data, lengths = bytearray(), []
    below = scan_folder(top, b'', found)
    append_paths(below[0], b'', data, lengths)
    for name in progress(sorted(below[1], key=os.fsdecode)):
        before = len(lengths)
        scan_tree(top + b'/' + name, name + b'/', parents, found, data, lengths)
        found.folders.append(os.fsdecode(name))
        found.counts.append(len(lengths) - before)
    found.names = PathArray.from_buffer(data, np.cumsum(lengths, dtype=np.int64))
    return found


def scan_tree(path, prefix, parents, found, data, lengths):
    """Add the images under `path` (bytes), whose names begin with `prefix`. parents: identities of what holds it."""
    todo = [(path, prefix, parents)]  # no recursion: folders can lie deeper than Python's stack
    while todo:
        path, prefix, parents = todo.pop()
        me = inode(path)
        if me in parents:
            found.passed.append(f'{printable(prefix)} (a link to a folder that holds it)')
            continue
        files, folders = scan_folder(path, prefix, found)
        append_paths(files, prefix, data, lengths)
        inner = parents | {me} if folders else parents
        for name in sorted(folders, key=os.fsdecode, reverse=True):
            todo.append((path + b'/' + name, prefix + name + b'/', inner))


def list_folder(folder):
    """(images, folders) right in a folder (a Path): names as bytes."""
    return scan_folder(os.fsencode(folder), b'', FolderScan(PathArray(), [], [], Counter()))


def scan_folder(path, prefix, found):
    """(image files, folders) right in `path`, names as bytes; the rest is counted in `found`."""
    files, folders = [], []
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                name = entry.name
                kind = entry_kind(entry)
                if name[0] == 46 or name.lower() in SYSTEM_NAMES:  # a dot
                    record_skipped(name, prefix, kind == 'folder', found)
                elif kind == 'file':
                    files.append(name) if is_image(name) else found.others.update([file_extension(name)])
                elif kind == 'folder':
                    folders.append(name)
                elif kind == 'lost' and is_image(name):
                    files.append(name)  # a link that leads nowhere: whoever reads it will say so
                else:
                    found.others['(neither file nor folder)'] += 1
    except OSError as error:
        raise UserError(f'the folder {printable(path)} may not be read: {error.strerror}') from None
    return files, folders


def entry_kind(entry):
    """file, folder, lost (a link that leads nowhere or in a circle), or other: a pipe would be waited for."""
    try:
        return 'file' if entry.is_file() else 'folder' if entry.is_dir() else 'lost' if entry.is_symlink() else 'other'
    except OSError:
        return 'lost'


def record_skipped(name, prefix, is_folder, found):
    """Note what belongs to the system, or is hidden."""
    if is_folder:
        found.passed.append(printable(prefix + name) + '/')
    else:
        found.others['(hidden)'] += 1


def append_paths(files, prefix, data, lengths):
    """Add these names, sorted, to the bytes and lengths of all."""
    files.sort()
    data += b''.join([prefix + name for name in files])
    before = len(prefix)
    lengths.extend([before + len(name) for name in files])


def file_extension(name):
    """The ending of a file's name (bytes), for people."""
    dot = name.rfind(b'.')
    return printable(name[dot:].lower()) if dot > 0 else '(no ending)'


def inode(path):
    status = os.stat(path)
    return status.st_dev, status.st_ino
