"""The index of tar archives: the name, offset and size of each image. It is built once and cached."""

import codecs
import hashlib
import os
import tarfile
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch

from dataloader.cache import cache_file
from dataloader.loading.decode import image_extensions, is_image
from dataloader.readers.tar import Tar
from dataloader.sources.folder import SYSTEM_NAMES, FolderScan, file_extension
from dataloader.sources.path_array import PathArray
from runtime.console import printable
from runtime.errors import UserError, WorkError
from runtime.files import stat_fingerprint
from runtime.messages import log

COMPRESSED = ('.tar.gz', '.tgz', '.tar.bz2', '.tar.xz', '.tar.zst')
MAGIC = {
    'gzip': b'\x1f\x8b',
    'zip': b'PK',
    'xz': b'\xfd7zXZ',
    'bzip2': b'BZh',
    'zstd': b'\x28\xb5\x2f\xfd',
    '7z': b'7z\xbc',
}
MAX_CLASS_BYTES = 1000  # of a .cls file
LINK = '(a link, or no plain file)'
INDEX_VERSION = 6  # of build_index; an index of another version is built again


def open_archives(paths, cache_path, progress):
    """Open archives. Returns (FolderScan, Tar, (labels, classes) from .cls files or None), with the images in the order
    of a folder scan. Raises UserError for compressed archives, WorkError for damaged ones.
    """
    for path in paths:
        if str(path).lower().endswith(COMPRESSED):
            raise UserError(f'{printable(path)} is compressed, without random access: make a .tar of it (gunzip)')
    readable = hashlib.blake2b(b' '.join(sorted(image_extensions())), digest_size=4).hexdigest()  # more by packages
    state = f'{INDEX_VERSION} {readable} {stat_fingerprint(paths)}'
    index_path = cache_file.cache_file(cache_path, paths[0].parent, paths[0].stem, 'index')
    index = cache_file.load(index_path, state)
    if index is None:
        index = build_index(paths, progress)
        cache_file.save(index_path, {'mark': state, 'content': index})
    arrays = [index[name].numpy() for name in ('archive_index', 'offsets', 'sizes')]
    for line in index['messages']:
        log(line)
    names = PathArray.from_buffer(index['names'].numpy().tobytes(), index['ends'].numpy())
    scanned = FolderScan(names, index['folders'], index['counts'], Counter(index['other_files']))
    by_cls = (index['labels'], index['classes']) if index['classes'] else None
    return scanned, Tar([str(path) for path in paths], names, *arrays), by_cls


def build_index(paths, progress):
    """Build the index of archives: a dict of tensors, lists of strings and counts."""
    entries, notes, classes = [], TarNotes(), {}  # classes: {(archive number, name without .cls): class}
    total = sum(os.path.getsize(path) for path in paths)
    with progress(title='indexing the archives', unit='B', total=total) as bar:
        for archive_index, path in enumerate(paths):
            try:
                with tarfile.open(path, 'r:', errors='surrogateescape') as archive:
                    notes.classes = {}
                    placed = members_by_name(path, members(archive, notes, os.path.getsize(path), bar), notes)
                    entries += [(sort_key(name), name, archive_index, *place) for name, place in placed.items()]
                    classes |= {(archive_index, key): owner for key, owner in notes.classes.items()}
            except tarfile.TarError as error:
                hint = compression_hint(path) or f'is damaged or no tar archive: {error}'
                raise WorkError(f'{printable(path)} {hint}') from None
    entries.sort()
    tops = Counter(os.fsdecode(name.split(b'/', 1)[0]) for _, name, *_ in entries if b'/' in name)
    folders = sorted(tops)
    names = PathArray(make_names_unique([(name, archive_index) for _, name, archive_index, *_ in entries], paths))
    owners = [class_from_cls_file(name, archive, classes) for _, name, archive, *_ in entries]
    class_names = sorted(
        {*owners} - {None}, key=lambda name: (not name.isdecimal(), name.isdecimal() and int(name), name)
    )
    class_to_idx = {name: i for i, name in enumerate(class_names)} | {None: -1}
    labels = [class_to_idx[owner] for owner in owners]
    which, offsets, sizes = (torch.tensor([entry[i] for entry in entries], dtype=torch.int64) for i in (2, 3, 4))
    return {
        'names': torch.frombuffer(bytearray(names.data or b'\0'), dtype=torch.uint8)[: len(names.data)],
        'ends': torch.from_numpy(np.asarray(names.end_offsets)),
        'archive_index': which,
        'offsets': offsets,
        'sizes': sizes,
        'folders': folders,
        'counts': [tops[name] for name in folders],
        'other_files': dict(notes.other_files),
        'messages': notes.messages,
        'labels': torch.tensor(labels),
        'classes': class_names,
    }


@dataclass
class TarNotes:
    """The contents of archives besides images."""

    other_files: Counter = field(default_factory=Counter)  # number of files that are not read, by kind
    messages: list = field(default_factory=list)  # to be logged whenever the archives are opened
    classes: dict = field(default_factory=dict)  # of the current archive: {name without .cls: class}


def make_names_unique(entries, paths):
    """Return unique names for entries (name, archive number). If archives share names, as shards whose numbering starts
    again, the archive's name is put before the file's."""
    if len({name for name, _ in entries}) == len(entries):
        return [name for name, _ in entries]
    stems = [os.fsencode(path.name.removesuffix('.tar')) for path in paths]
    unique = []
    for name, archive_index in entries:
        folder, slash, file = name.rpartition(b'/')
        unique.append(folder + slash + stems[archive_index] + b':' + file)
    return unique


def compression_hint(path):
    """Return a hint for a .tar file that is another format, or None."""
    with open(path, 'rb') as file:
        start = file.read(6)
    kind = next((kind for kind, magic in MAGIC.items() if start.startswith(magic)), None)
    return f'is not a .tar but {kind}, without random access: unpack it' if kind else None


def members_by_name(path, entries, notes):
    """Collect {name: (offset, size)} from `members`. Of two members with one name the later counts, as for tar; a hard
    link has the place of its target."""
    last, links = {}, []
    for name, offset, size in entries:
        if size is None and offset in last:
            offset, size = last[offset]
        if size is None:
            links.append((name, offset))
            continue
        if name in last:
            notes.other_files['(an older one of the same name)'] += 1
        last[name] = offset, size
    targets = find_members(path, {first for _, first in links}) if links else {}
    last |= {name: targets[first] for name, first in links if first in targets}
    if dangling := sum(first not in targets for _, first in links):
        notes.other_files[LINK] += dangling
    return last


def find_members(path, names):
    """Return {name: (offset, size)} of the members with these names, images or not."""
    positions, limit = {}, os.path.getsize(path)
    with tarfile.open(path, 'r:', errors='surrogateescape') as archive:
        while (member := archive.next()) is not None:
            archive.members = []
            name = b'/'.join(path_parts(member.name))
            good = member.isreg() and not member.issparse() and not escapes_root(member)
            if name in names and good and 0 <= member.size <= limit - member.offset_data:
                positions[name] = member.offset_data, member.size
    return positions


def members(archive, notes, limit, bar, prefix=b'', start=0):
    """Yield (name, offset, size) of every image of an open archive, and (name, target, None) for hard links. A tar in
    the archive is read as a folder with its name.

    limit: bytes of the outer file. start: offset of the archive in it. Raises tarfile.TarError or WorkError.
    """
    before = 0
    while (member := archive.next()) is not None:
        archive.members = []  # tarfile keeps all members in memory
        bar.update(0 if prefix else archive.offset - before)
        before = archive.offset
        parts = path_parts(member.name)
        name = b'/'.join(parts)
        offset = start + member.offset_data
        if member.isdir():
            continue
        if reason := describe_skipped_member(member, parts, bool(prefix)):
            notes.other_files[reason] += 1
        elif member.islnk():
            yield prefix + name, prefix + b'/'.join(path_parts(member.linkname)), None
        elif member.size < 0 or offset + member.size > limit:
            raise WorkError(
                f'{printable(archive.name or prefix)}: {printable(name)} claims {member.size} bytes, more than the '
                'archive has'
            )
        elif name.lower().endswith(b'.tar'):
            inner = archive.extractfile(member)
            with inner, tarfile.open(fileobj=inner, mode='r:', errors='surrogateescape') as nested:
                yield from members(nested, notes, limit, bar, name[:-4] + b'/', offset)
        elif name.lower().endswith(b'.cls'):
            class_name = archive.extractfile(member).read().removeprefix(codecs.BOM_UTF8)
            notes.classes[prefix + name[:-4]] = os.fsdecode(class_name.strip())
        else:
            yield prefix + name, offset, member.size
    check_trailer(archive, prefix, notes.messages)


def escapes_root(member):
    return member.name.startswith('/') or '..' in member.name.split('/')


def describe_skipped_member(member, parts, inner):
    """Describe why a member is skipped; None for images, .cls files and nested archives. parts: its path as a list.
    inner: whether it is in a nested archive, where further archives are skipped."""
    name = parts[-1].lower() if parts else b''
    if member.issparse():
        return '(sparse: tar it without -S)'
    if not (member.isreg() or member.islnk()):
        return LINK
    if escapes_root(member):
        return '(a path out of the folder)'
    if any(part[:1] == b'.' or part.lower() in SYSTEM_NAMES for part in parts):
        return '(hidden)'
    if member.isreg() and name.endswith(b'.tar') and not inner:
        return None
    if member.isreg() and name.endswith(b'.cls') and 0 < member.size <= MAX_CLASS_BYTES:
        return None
    if not is_image(name):
        return file_extension(name)
    return '(empty)' if member.isreg() and member.size == 0 else None


def path_parts(name):
    """Split a member's name into its parts, as bytes."""
    return [part for part in os.fsencode(name).split(b'/') if part not in (b'', b'.')]


def class_from_cls_file(name, archive, classes):
    """Return the class from the .cls file of an image, named like it, or up to its first dot (WebDataset's key)."""
    folder, slash, file = name.rpartition(b'/')
    return classes.get(
        (archive, os.path.splitext(name)[0]), classes.get((archive, folder + slash + file.split(b'.')[0]))
    )


def check_trailer(archive, prefix, messages):
    """Check that an archive ends with blocks of zeros. Raises WorkError for an unreadable header or a second archive; a
    missing end is added to the messages."""
    archive.fileobj.seek(archive.offset)
    block, name = archive.fileobj.read(tarfile.BLOCKSIZE), printable(archive.name or prefix)
    if block.strip(b'\0'):
        raise WorkError(f'{name} is damaged: there is no header at byte {archive.offset}, and more behind it')
    if len(block) < tarfile.BLOCKSIZE:
        messages.append(f'{name} has no end-of-archive mark: is it truncated?')
    while block and not block.strip(b'\0'):
        block = archive.fileobj.read(tarfile.BLOCKSIZE)
    if is_header(block):
        raise WorkError(f'{name} has another archive after its end, as from cat: tar --concatenate joins them')


def is_header(block):
    """Whether a block is the header of a member, of any tar format."""
    try:
        return tarfile.TarInfo.frombuf(block, 'utf-8', 'surrogateescape') is not None
    except tarfile.HeaderError:
        return False


def sort_key(name):
    """Return the sort key of a name in the order of folder.scan_images: files of a folder before its subfolders."""
    *folders, file = name.split(b'/')
    return (*((1, os.fsdecode(part).encode('utf-32-be', 'surrogatepass')) for part in folders), (0, file))
