"""The index of tar archives: which images they hold, and where. Made once, with a bar, and kept in the cache."""

import codecs
import os
import tarfile
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch

from dataloader.cache import cache_file
from dataloader.loading.decode import is_image
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
LONGEST_CLASS = 1000  # bytes of a .cls file
LINK = '(a link, or no plain file)'
INDEX_VERSION = 5  # which build_index follows; an index of earlier ones is made again


def open_archives(paths, cache_path, progress):
    """(FolderScan, Tar, (labels, classes) by .cls files or None) of these archives, in the order that folders would
    have.

    Raises UserError for packed archives, WorkError for damaged ones.
    """
    for path in paths:
        if str(path).lower().endswith(COMPRESSED):
            raise UserError(f'{printable(path)} is packed, and cannot be read at random: make a .tar of it (gunzip)')
    state = f'{INDEX_VERSION} {stat_fingerprint(paths)}'
    where = cache_file.cache_file(cache_path, paths[0].parent, paths[0].stem, 'index')
    kept = cache_file.load(where, state)
    if kept is None:
        kept = build_index(paths, progress)
        cache_file.save(where, {'mark': state, 'content': kept})
    arrays = [kept[name].numpy() for name in ('which', 'offsets', 'sizes')]
    for line in kept['said']:
        log(line)
    names = PathArray.from_buffer(kept['names'].numpy().tobytes(), kept['ends'].numpy())
    found = FolderScan(names, kept['folders'], kept['counts'], Counter(kept['others']))
    by_cls = (kept['labels'], kept['classes']) if kept['classes'] else None
    return found, Tar([str(path) for path in paths], names, *arrays), by_cls


def build_index(paths, progress):
    """What the cache keeps: tensors, lists of strings, counts."""
    entries, rest, classes = [], TarNotes(), {}  # classes: of a .cls by its archive and name
    total = sum(os.path.getsize(path) for path in paths)
    with progress(title='indexing the archives', unit='B', total=total) as bar:
        for archive_index, path in enumerate(paths):
            try:
                with tarfile.open(path, 'r:', errors='surrogateescape') as archive:
                    rest.classes = {}
                    found = members_by_name(path, members(archive, rest, os.path.getsize(path), bar), rest)
                    entries += [(sort_key(name), name, archive_index, *place) for name, place in found.items()]
                    classes |= {(archive_index, key): owner for key, owner in rest.classes.items()}
            except tarfile.TarError as error:
                hint = compression_hint(path) or f'is damaged or no tar archive: {error}'
                raise WorkError(f'{printable(path)} {hint}') from None
    entries.sort()
    tops = Counter(os.fsdecode(name.split(b'/', 1)[0]) for _, name, *_ in entries if b'/' in name)
    folders = sorted(tops)
    names = PathArray(make_names_unique([(name, archive_index) for _, name, archive_index, *_ in entries], paths))
    owners = [class_from_cls_file(name, archive, classes) for _, name, archive, *_ in entries]
    known = sorted({*owners} - {None}, key=lambda name: (not name.isdecimal(), name.isdecimal() and int(name), name))
    class_to_idx = {name: i for i, name in enumerate(known)} | {None: -1}
    labels = [class_to_idx[owner] for owner in owners]
    which, offsets, sizes = (torch.tensor([entry[i] for entry in entries], dtype=torch.int64) for i in (2, 3, 4))
    return {
        'names': torch.frombuffer(bytearray(names.data or b'\0'), dtype=torch.uint8)[: len(names.data)],
        'ends': torch.from_numpy(np.asarray(names.end_offsets)),
        'which': which,
        'offsets': offsets,
        'sizes': sizes,
        'folders': folders,
        'counts': [tops[name] for name in folders],
        'others': dict(rest.others),
        'said': rest.said,
        'labels': torch.tensor(labels),
        'classes': known,
    }


@dataclass
class TarNotes:
    """What archives hold beside images."""

    others: Counter = field(default_factory=Counter)  # what is not read, by kind
    said: list = field(default_factory=list)  # what is to be known whenever they are read
    classes: dict = field(default_factory=dict)  # of one archive: {name of a .cls without its ending: what it says}


def make_names_unique(entries, paths):
    """The names of images, (name, number of its archive) each, as they are shown and written: where archives have names
    in common, as shards whose keys begin anew in each, the archive's goes before the file's."""
    if len({name for name, _ in entries}) == len(entries):
        return [name for name, _ in entries]
    stems = [os.fsencode(path.name.removesuffix('.tar')) for path in paths]
    found = []
    for name, archive_index in entries:
        folder, slash, file = name.rpartition(b'/')
        found.append(folder + slash + stems[archive_index] + b':' + file)
    return found


def compression_hint(path):
    """What helps where a file that is called .tar is something else, or None."""
    with open(path, 'rb') as file:
        start = file.read(6)
    kind = next((kind for kind, magic in MAGIC.items() if start.startswith(magic)), None)
    return f'is no .tar but {kind}, and cannot be read at random: unpack it' if kind else None


def members_by_name(path, found, rest):
    """{name: (offset, size)} of `members` of the archive at `path`. Of two with one name the later one is the file, as
    for tar itself; a hard link is what it leads to, whatever that is called."""
    last, links = {}, []
    for name, offset, size in found:
        if size is None and offset in last:
            offset, size = last[offset]
        if size is None:
            links.append((name, offset))
            continue
        if name in last:
            rest.others['(an older one of the same name)'] += 1
        last[name] = offset, size
    others = find_members(path, {first for _, first in links}) if links else {}
    last |= {name: others[first] for name, first in links if first in others}
    if lost := sum(first not in others for _, first in links):
        rest.others[LINK] += lost
    return last


def find_members(path, names):
    """{name: (offset, size)} of those of these files that an archive holds, whatever they are."""
    found, limit = {}, os.path.getsize(path)
    with tarfile.open(path, 'r:', errors='surrogateescape') as archive:
        while (member := archive.next()) is not None:
            archive.members = []
            name = b'/'.join(path_parts(member.name))
            good = member.isreg() and not member.issparse() and not escapes_root(member)
            if name in names and good and 0 <= member.size <= limit - member.offset_data:
                found[name] = member.offset_data, member.size
    return found


def members(archive, rest, limit, bar, prefix=b'', start=0):
    """(name, offset, size) of every image of an open archive; a tar in it is gone into, as a folder of its name. Of a
    second name of a file (a hard link) (name, the first name, None).

    limit: bytes of the outer file. start: where the archive begins in it. Raises tarfile.TarError, WorkError.
    """
    before = 0
    while (member := archive.next()) is not None:
        archive.members = []  # it would keep them all
        bar.update(0 if prefix else archive.offset - before)
        before = archive.offset
        parts = path_parts(member.name)
        name = b'/'.join(parts)
        offset = start + member.offset_data
        if member.isdir():
            continue
        if reason := describe_skipped_member(member, parts, bool(prefix)):
            rest.others[reason] += 1
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
                yield from members(nested, rest, limit, bar, name[:-4] + b'/', offset)
        elif name.lower().endswith(b'.cls'):
            said = archive.extractfile(member).read().removeprefix(codecs.BOM_UTF8)
            rest.classes[prefix + name[:-4]] = os.fsdecode(said.strip())
        else:
            yield prefix + name, offset, member.size
    check_trailer(archive, prefix, rest.said)


def escapes_root(member):
    return member.name.startswith('/') or '..' in member.name.split('/')


def describe_skipped_member(member, parts, inner):
    """Of what kind a member is that is no image, no class of one and no archive; None of those. parts: pieces of its
    name. inner: it lies in an archive in an archive, where another is not gone into."""
    name = parts[-1].lower() if parts else b''
    if member.issparse():
        return '(stored with holes: tar it without -S)'
    if not (member.isreg() or member.islnk()):
        return LINK
    if escapes_root(member):
        return '(a path out of the folder)'
    if any(part[:1] == b'.' or part.lower() in SYSTEM_NAMES for part in parts):
        return '(hidden)'
    if member.isreg() and name.endswith(b'.tar') and not inner:
        return None
    if member.isreg() and name.endswith(b'.cls') and 0 < member.size <= LONGEST_CLASS:
        return None
    if not is_image(name):
        return file_extension(name)
    return '(empty)' if member.isreg() and member.size == 0 else None


def path_parts(name):
    """The folders and the file of a member's name, as bytes."""
    return [part for part in os.fsencode(name).split(b'/') if part not in (b'', b'.')]


def class_from_cls_file(name, archive, classes):
    """What the .cls beside an image says: of its whole name, or of its name up to the first dot (WebDataset's key)."""
    folder, slash, file = name.rpartition(b'/')
    return classes.get(
        (archive, os.path.splitext(name)[0]), classes.get((archive, folder + slash + file.split(b'.')[0]))
    )


def check_trailer(archive, prefix, said):
    """Raise WorkError where what stopped tarfile is not the end of an archive, two blocks of zeros, but a header that
    cannot be read, or where another archive follows; where the archive just stops that is added to `said`."""
    archive.fileobj.seek(archive.offset)
    block, name = archive.fileobj.read(tarfile.BLOCKSIZE), printable(archive.name or prefix)
    if block.strip(b'\0'):
        raise WorkError(f'{name} is damaged: there is no header at byte {archive.offset}, and more behind it')
    if len(block) < tarfile.BLOCKSIZE:
        said.append(f'{name} stops without the mark that ends an archive: was it cut short?')
    while block and not block.strip(b'\0'):
        block = archive.fileobj.read(tarfile.BLOCKSIZE)
    if is_header(block):
        raise WorkError(f'{name} has another archive behind its end, as from cat: tar --concatenate makes one of them')


def is_header(block):
    """Whether a block begins a member, in the format of 1979 as well, which has no mark but the sum of its bytes."""
    try:
        return tarfile.TarInfo.frombuf(block, 'utf-8', 'surrogateescape') is not None
    except tarfile.HeaderError:
        return False


def sort_key(name):
    """The key by which images are sorted as scan.scan finds them: a folder's files before what lies in its folders."""
    *folders, file = name.split(b'/')
    return (*((1, os.fsdecode(part).encode('utf-32-be', 'surrogatepass')) for part in folders), (0, file))
