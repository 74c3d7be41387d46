"""Scan a folder: its images at any depth, and counts of all other files."""

import os
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from dataloader.loading.decode import is_image
from dataloader.sources.path_array import PathArray
from runtime.console import printable
from runtime.errors import UserError

# Names of system files and folders, lower case. Names that begin with a dot are skipped as well.
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
    """The images of a folder: first those directly in it, then folder by folder, sorted. Names are relative to it."""

    names: PathArray
    folders: list  # names of the direct subfolders, sorted
    counts: list  # images in each of them
    other_files: Counter  # what is no image: ending (str) to count
    skipped_folders: list = field(default_factory=list)  # system folders, and links to a parent folder

    @property
    def num_root_images(self):
        """Number of images directly in the folder; they come first."""
        return len(self.names) - sum(self.counts)


def scan_images(folder, progress=iter):
    """Scan a folder. Returns a FolderScan. progress: wraps the iteration over the direct subfolders. Links are
    followed, except to a parent folder. Raises UserError if a folder cannot be read.
    """
    result = FolderScan(PathArray(), [], [], Counter())
    top = os.fsencode(os.path.realpath(folder))
    parents = {inode(os.path.realpath(top))}
    above = top
    while (up := os.path.dirname(above)) != above:
        above = up
        parents.add(inode(above))
    data, lengths = bytearray(), []
    below = scan_folder(top, b'', result)
    append_paths(below[0], b'', data, lengths)
    for name in progress(sorted(below[1], key=os.fsdecode)):
        before = len(lengths)
        scan_tree(top + b'/' + name, name + b'/', parents, result, data, lengths)
        result.folders.append(os.fsdecode(name))
        result.counts.append(len(lengths) - before)
    result.names = PathArray.from_buffer(data, np.cumsum(lengths, dtype=np.int64))
    return result


def scan_tree(path, prefix, parents, result, data, lengths):
    """Add the images under `path` (bytes), whose names begin with `prefix`. parents: inodes of the parent folders."""
    todo = [(path, prefix, parents)]  # no recursion: folders can be nested deeper than Python's stack
    while todo:
        path, prefix, parents = todo.pop()
        me = inode(path)
        if me in parents:
            result.skipped_folders.append(f'{printable(prefix)} (a link to a folder that holds it)')
            continue
        files, folders = scan_folder(path, prefix, result)
        append_paths(files, prefix, data, lengths)
        inner = parents | {me} if folders else parents
        for name in sorted(folders, key=os.fsdecode, reverse=True):
            todo.append((path + b'/' + name, prefix + name + b'/', inner))


def list_folder(folder):
    """Return (images, folders) directly in a folder (a Path), names as bytes."""
    return scan_folder(os.fsencode(folder), b'', FolderScan(PathArray(), [], [], Counter()))


def scan_folder(path, prefix, result):
    """(image files, folders) right in `path`, names as bytes; the rest is counted in `result`."""
    files, folders = [], []
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                name = entry.name
                kind = entry_kind(entry)
                if name[0] == 46 or name.lower() in SYSTEM_NAMES:  # a dot
                    record_skipped(name, prefix, kind == 'folder', result)
                elif kind == 'file':
                    files.append(name) if is_image(name) else result.other_files.update([file_extension(name)])
                elif kind == 'folder':
                    folders.append(name)
                elif kind == 'lost' and is_image(name):
                    files.append(name)  # a broken link: reported when it is read
                else:
                    result.other_files['(neither file nor folder)'] += 1
    except OSError as error:
        raise UserError(f'the folder {printable(path)} cannot be read: {error.strerror}') from None
    return files, folders


def entry_kind(entry):
    """Return 'file', 'folder', 'lost' (a broken or circular link) or 'other' (a pipe, a device)."""
    try:
        return 'file' if entry.is_file() else 'folder' if entry.is_dir() else 'lost' if entry.is_symlink() else 'other'
    except OSError:
        return 'lost'


def record_skipped(name, prefix, is_folder, result):
    """Count a hidden or system file, or list such a folder."""
    if is_folder:
        result.skipped_folders.append(printable(prefix + name) + '/')
    else:
        result.other_files['(hidden)'] += 1


def append_paths(files, prefix, data, lengths):
    """Append sorted names to the buffer `data` and to `lengths`."""
    files.sort()
    data += b''.join([prefix + name for name in files])
    before = len(prefix)
    lengths.extend([before + len(name) for name in files])


def file_extension(name):
    """Return the ending of a file name (bytes) as text."""
    dot = name.rfind(b'.')
    return printable(name[dot:].lower()) if dot > 0 else '(no ending)'


def inode(path):
    status = os.stat(path)
    return status.st_dev, status.st_ino
