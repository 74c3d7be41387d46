"""The index of tar archives: which images they hold, and where. Made once, with a bar, and kept in the cache."""

import os
import tarfile
from collections import Counter

import numpy as np
import torch

from config import UserError, WorkError
from dataloader import cache
from dataloader.images import is_image
from dataloader.names import Names
from dataloader.scan import OF_SYSTEMS, Found, ending
from dataloader.stores.tar import Tar, state_of
from logger import say
from terminal import shown

PACKED = ('.tar.gz', '.tgz', '.tar.bz2', '.tar.xz', '.tar.zst')
LONGEST_CLASS = 1000  # bytes of a .cls file
RULES = 3  # which index_of follows; an index of earlier ones is made again


def open_archives(paths, cache_path, progress):
    """(Found, Tar, (labels, classes) by .cls files or None) of these archives, in the order that folders would have.

    Raises UserError for packed archives, WorkError for damaged ones.
    """
    for path in paths:
        if str(path).lower().endswith(PACKED):
            raise UserError(f'{shown(path)} is packed, and cannot be read at random: make a .tar of it (gunzip)')
    state = f'{RULES} {state_of(paths)}'
    where = cache.file_of(cache_path, paths[0].parent, paths[0].stem, 'index')
    kept = cache.load(where, state)
    if kept is None:
        kept = index_of(paths, progress)
        cache.keep(where, {'mark': state, 'content': kept})
    arrays = [kept[name].numpy() for name in ('which', 'offsets', 'sizes')]
    names = Names.of(kept['names'].numpy().tobytes(), kept['ends'].numpy())
    found = Found(names, kept['folders'], kept['counts'], Counter(kept['others']), kept['passed'])
    by_cls = (kept['labels'], kept['classes']) if kept['classes'] else None
    return found, Tar([str(path) for path in paths], names, *arrays), by_cls


def index_of(paths, progress):
    """What the cache keeps: tensors, lists of strings, counts."""
    entries, others, passed, classes = [], Counter(), [], {}  # classes: of a .cls by its archive and name
    total = sum(os.path.getsize(path) for path in paths)
    with progress(title='indexing the archives', unit='B', total=total) as bar:
        for number, path in enumerate(paths):
            try:
                with tarfile.open(path, 'r:', errors='surrogateescape') as archive:
                    owners = {}
                    found = by_name(members(archive, others, owners, os.path.getsize(path), bar), others)
                    entries += [(in_order(name), name, number, *place) for name, place in found.items()]
                    classes |= {(number, key): owner for key, owner in owners.items()}
            except tarfile.TarError as error:
                raise WorkError(f'{shown(path)} is damaged or no tar archive: {error}') from None
    entries.sort()
    tops = Counter(os.fsdecode(name.split(b'/', 1)[0]) for _, name, *_ in entries if b'/' in name)
    folders = sorted(tops)
    names = Names(name for _, name, *_ in entries)
    known = sorted(set(classes.values()), key=lambda name: (not name.isdecimal(), name.isdecimal() and int(name), name))
    number = {name: i for i, name in enumerate(known)}
    labels = [number.get(owner_of(name, archive, classes), -1) for _, name, archive, *_ in entries]
    which, offsets, sizes = (torch.tensor([entry[i] for entry in entries], dtype=torch.int64) for i in (2, 3, 4))
    return {
        'names': torch.frombuffer(bytearray(names.data or b'\0'), dtype=torch.uint8)[: len(names.data)],
        'ends': torch.from_numpy(np.asarray(names.ends)),
        'which': which,
        'offsets': offsets,
        'sizes': sizes,
        'folders': folders,
        'counts': [tops[name] for name in folders],
        'others': dict(others),
        'passed': passed,
        'labels': torch.tensor(labels),
        'classes': known,
    }


def by_name(found, others):
    """{name: (offset, size)} of `members`. Of two with one name the later one is the file, as for tar itself; a hard
    link is what it leads to."""
    last = {}
    for name, offset, size in found:
        if size is None and offset in last and is_image(name):
            offset, size = last[offset]
        if size is None:
            others['(a link, or no plain file)'] += 1
            continue
        if name in last:
            others['(an older one of the same name)'] += 1
        last[name] = offset, size
    return last


def members(archive, others, classes, limit, bar, prefix=b'', start=0):
    """(name, offset, size) of every image of an open archive; a tar in it is gone into, as a folder of its name. Of a
    second name of a file (a hard link) (name, the first name, None).

    limit: bytes of the outer file. start: where the archive begins in it. Raises tarfile.TarError, WorkError.
    """
    before = 0
    while (member := archive.next()) is not None:
        archive.members = []  # it would keep them all
        bar.update(0 if prefix else archive.offset - before)
        before = archive.offset
        parts = pieces(member.name)
        name = b'/'.join(parts)
        offset = start + member.offset_data
        if member.isdir():
            continue
        if not (member.isreg() or member.islnk()) or member.issparse():
            others['(a link, or no plain file)'] += 1
        elif member.name.startswith('/') or b'..' in parts:
            others['(a path out of the folder)'] += 1
        elif any(part[:1] == b'.' or part.lower() in OF_SYSTEMS for part in parts):
            others['(hidden)'] += 1
        elif member.islnk():
            yield prefix + name, prefix + b'/'.join(pieces(member.linkname)), None
        elif member.size < 0 or offset + member.size > limit:
            raise WorkError(
                f'{shown(archive.name or prefix)}: {shown(name)} claims {member.size} bytes, more than the archive has'
            )
        elif not prefix and name.lower().endswith(b'.tar'):
            inner = archive.extractfile(member)
            with inner, tarfile.open(fileobj=inner, mode='r:', errors='surrogateescape') as nested:
                yield from members(nested, others, classes, limit, bar, name[:-4] + b'/', offset)
        elif name.lower().endswith(b'.cls') and 0 < member.size <= LONGEST_CLASS:
            classes[prefix + name[:-4]] = archive.extractfile(member).read().decode(errors='replace').strip()
        elif not is_image(name):
            others[ending(name)] += 1
        elif member.size == 0:
            others['(empty)'] += 1
        else:
            yield prefix + name, offset, member.size
    check_end(archive, prefix)


def pieces(name):
    """The folders and the file of a member's name, as bytes."""
    return [part for part in os.fsencode(name).split(b'/') if part not in (b'', b'.')]


def owner_of(name, archive, classes):
    """What the .cls beside an image says: of its whole name, or of its name up to the first dot (WebDataset's key)."""
    folder, slash, file = name.rpartition(b'/')
    return classes.get(
        (archive, os.path.splitext(name)[0]), classes.get((archive, folder + slash + file.split(b'.')[0]))
    )


def check_end(archive, prefix):
    """Raise WorkError where what stopped tarfile is not the end of an archive, two blocks of zeros, but a header that
    cannot be read, or where another archive follows; say so where the archive just stops."""
    archive.fileobj.seek(archive.offset)
    block, name = archive.fileobj.read(tarfile.BLOCKSIZE), shown(archive.name or prefix)
    if block.strip(b'\0'):
        raise WorkError(f'{name} is damaged: there is no header at byte {archive.offset}, and more behind it')
    if len(block) < tarfile.BLOCKSIZE:
        say(f'{name} stops without the mark that ends an archive: was it cut short?')
    while block and not block.strip(b'\0'):
        block = archive.fileobj.read(tarfile.BLOCKSIZE)
    if block[257:262] == b'ustar':
        raise WorkError(f'{name} has another archive behind its end, as from cat: tar --concatenate makes one of them')


def in_order(name):
    """The key by which images are sorted as scan.scan finds them: a folder's files before what lies in its folders."""
    *folders, file = name.split(b'/')
    return (*((1, os.fsdecode(part).encode('utf-32-be', 'surrogatepass')) for part in folders), (0, file))
