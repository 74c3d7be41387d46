"""What lies in a folder: its images at any depth, and everything else, counted."""

import os
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from dataloader.loading.decode import is_image
from dataloader.sources.path_array import Names
from errors import UserError
from runtime.console import shown

# What systems put beside people's files, lower case; so is whatever begins with a dot.
OF_SYSTEMS = {
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
class Found:
    """The images of a folder: those that lie in it, then folder by folder, sorted. Names are relative to it."""

    names: Names
    folders: list  # of the folders right below, sorted by name (str)
    counts: list  # images in each of them
    others: Counter  # what is no image: ending (str) to count
    passed: list = field(default_factory=list)  # what was not gone into: folders of systems, links that lead back

    @property
    def loose(self):
        """The number of images that lie in the folder itself; they come first."""
        return len(self.names) - sum(self.counts)


def scan(folder, progress=iter):
    """Found of a folder. progress: wraps the iteration over the folders right below it. Raises UserError where a folder
    may not be read.

    Links are followed, but for those that lead to a folder which holds them.
    """
    found = Found(Names(), [], [], Counter())
    top = os.fsencode(os.path.realpath(folder))
    parents = {identity(os.path.realpath(top))}
    above = top
    while (up := os.path.dirname(above)) != above:
        above = up
        parents.add(identity(above))
    data, lengths = bytearray(), []
    below = listing(top, b'', found)
    take(below[0], b'', data, lengths)
    for name in progress(sorted(below[1], key=os.fsdecode)):
        before = len(lengths)
        walk(top + b'/' + name, name + b'/', parents, found, data, lengths)
        found.folders.append(os.fsdecode(name))
        found.counts.append(len(lengths) - before)
    found.names = Names.of(data, np.cumsum(lengths, dtype=np.int64))
    return found


def walk(path, prefix, parents, found, data, lengths):
    """Add the images under `path` (bytes), whose names begin with `prefix`. parents: identities of what holds it."""
    todo = [(path, prefix, parents)]  # no recursion: folders can lie deeper than Python's stack
    while todo:
        path, prefix, parents = todo.pop()
        me = identity(path)
        if me in parents:
            found.passed.append(f'{shown(prefix)} (a link to a folder that holds it)')
            continue
        files, folders = listing(path, prefix, found)
        take(files, prefix, data, lengths)
        inner = parents | {me} if folders else parents
        for name in sorted(folders, key=os.fsdecode, reverse=True):
            todo.append((path + b'/' + name, prefix + name + b'/', inner))


def right_in(folder):
    """(images, folders) right in a folder (a Path): names as bytes."""
    return listing(os.fsencode(folder), b'', Found(Names(), [], [], Counter()))


def listing(path, prefix, found):
    """(image files, folders) right in `path`, names as bytes; the rest is counted in `found`."""
    files, folders = [], []
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                name = entry.name
                kind = kind_of(entry)
                if name[0] == 46 or name.lower() in OF_SYSTEMS:  # a dot
                    left_out(name, prefix, kind == 'folder', found)
                elif kind == 'file':
                    files.append(name) if is_image(name) else found.others.update([ending(name)])
                elif kind == 'folder':
                    folders.append(name)
                elif kind == 'lost' and is_image(name):
                    files.append(name)  # a link that leads nowhere: whoever reads it will say so
                else:
                    found.others['(neither file nor folder)'] += 1
    except OSError as error:
        raise UserError(f'the folder {shown(path)} may not be read: {error.strerror}') from None
    return files, folders


def kind_of(entry):
    """file, folder, lost (a link that leads nowhere or in a circle), or other: a pipe would be waited for."""
    try:
        return 'file' if entry.is_file() else 'folder' if entry.is_dir() else 'lost' if entry.is_symlink() else 'other'
    except OSError:
        return 'lost'


def left_out(name, prefix, is_folder, found):
    """Note what belongs to the system, or is hidden."""
    if is_folder:
        found.passed.append(shown(prefix + name) + '/')
    else:
        found.others['(hidden)'] += 1


def take(files, prefix, data, lengths):
    """Add these names, sorted, to the bytes and lengths of all."""
    files.sort()
    data += b''.join([prefix + name for name in files])
    before = len(prefix)
    lengths.extend([before + len(name) for name in files])


def ending(name):
    """The ending of a file's name (bytes), for people."""
    dot = name.rfind(b'.')
    return shown(name[dot:].lower()) if dot > 0 else '(no ending)'


def identity(path):
    status = os.stat(path)
    return status.st_dev, status.st_ino
