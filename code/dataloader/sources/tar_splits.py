"""Which splits and classes tar archives have: those of the folders that were packed."""

import os
import re
from collections import Counter

from dataloader.sources.folder import Found
from dataloader.sources.path_array import Names
from dataloader.sources.split_names import SPLITS, split_of, wants_train
from dataloader.sources.split_source import Part, part_of, plain
from dataloader.sources.tar_index import open_archives
from errors import UserError
from runtime.console import shown
from runtime.messages import say

# train.tar, train-000000.tar, imagenet1k-train-0000.tar
ARCHIVE = re.compile(r'(?:[\w.]+-)*?([a-z]+)(-\d+)?\.tar')
NUMBERED = re.compile(r'(?:[\w.]+-)?\d+\.tar')  # 00000.tar of img2dataset, shard-000000.tar
BRACES = re.compile(r'(.*)\{(\d+)\.\.(\d+)\}(.*\.tar)')  # as WebDataset and shells write them


def of_archives(paths, cache_path, progress):
    """The Part of one split, in these archives."""
    found, store, by_cls = open_archives(paths, cache_path, progress)
    labels, classes = by_cls or (None, [])
    where = named_together(paths)
    match = ARCHIVE.fullmatch(paths[0].name.lower())
    own, whole = SPLITS.get(match[1]) if match else None, (found, store, labels)
    while len(found.folders) == 1 and not found.loose:  # tar cf train.tar photos/train
        name = found.folders[0]
        found, store, labels = inside(found, store, 0, labels)
        if own and split_of(name) == own:
            return as_part(where, found, store, labels, classes)
    return as_part(where, *whole, classes)


def numbered_in(folder):
    """The numbered archives right in a folder, in order."""
    return sorted(path for path in folder.iterdir() if NUMBERED.fullmatch(path.name.lower()) and path.is_file())


def braced(path):
    """The archives that a path with braces names, train-{000000..000002}.tar; [] of another. Raises UserError where one
    is not there."""
    match = BRACES.fullmatch(path.name)
    if not match:
        return []
    before, first, last, after = match.groups()
    paths = [path.with_name(f'{before}{number:0{len(first)}d}{after}') for number in range(int(first), int(last) + 1)]
    if gone := [each for each in paths if not each.is_file()]:
        raise UserError(f'{shown(path)} names {len(paths)} archives, and {len(gone)} are not there: {shown(gone[0])}')
    if not paths:
        raise UserError(f'{shown(path)} names no archive: the first number is the larger')
    return paths


def named_together(paths):
    """One path that names all archives, as a shell would: val-{000000..000002}.tar."""
    if len(paths) == 1:
        return paths[0]
    first, last = (path.name.removesuffix('.tar') for path in (paths[0], paths[-1]))
    shared = os.path.commonprefix((first, last)).rstrip('0123456789')
    return paths[0].with_name(f'{shared}{{{first[len(shared) :]}..{last[len(shared) :]}}}.tar')


def in_one_archive(path, cache_path, progress):
    """The splits of one archive, which may be packed as a folder of them, or as folders that hold such a one."""
    found, store, by_cls = open_archives([path], cache_path, progress)
    labels, classes = by_cls or (None, [])
    while True:
        named = [(name, ARCHIVE.fullmatch(f'{name}.tar')) for name in found.folders]  # an archive in it is a folder
        if shards := [name for name, match in named if match and match[2] and match[1] in SPLITS]:
            raise UserError(f'{shown(path)} holds the shards {shown(shards[0])}, ...: unpack it (tar xf) into a folder')
        if splits := rows_of_splits(path, found):
            return {
                name: as_part(path / name, *inside(found, store, row, labels), classes) for name, row in splits.items()
            }
        if len(found.folders) != 1 or found.loose:
            break
        found, store, labels = inside(found, store, 0, labels)
    if by_cls:
        return {'train': as_part(path, found, store, labels, classes)}
    return {'train': plain(path, found, store)}


def rows_of_splits(path, found):
    """{split: the number of its folder} in an archive. Raises UserError as for folders; what lies beside is said."""
    rows = {}
    for row, name in enumerate(found.folders):
        if (split := split_of(name)) in rows:
            both = f'{shown(found.folders[rows[split]])} and {shown(name)}'
            raise UserError(f'{shown(path)} has both {both}: which of them is {split}?')
        if split:
            rows[split] = row
    if rows:
        wants_train(path, {split: found.folders[row] for split, row in rows.items()})
        beside = [name for row, name in enumerate(found.folders) if row not in rows.values()]
        if beside or found.loose:
            said = [*map(shown, beside[:5]), *([f'{found.loose} images in no folder'] if found.loose else [])]
            say(f'not read: {", ".join(said)}, beside {shown(found.folders[rows["train"]])} in {shown(path)}')
    return rows


def as_part(where, found, store, labels, classes):
    """The Part of an archive's images: of the classes that .cls files name, or else of its folders."""
    if labels is None:
        return part_of(where, found, store)
    return Part(where, store, labels, classes, found.others, found.passed)


def inside(found, store, row, labels=None):
    """(Found, store, labels) of what lies in folder number `row` of `found`."""
    start = found.loose + sum(found.counts[:row])
    end = start + found.counts[row]
    store, labels = store.select(range(start, end)), None if labels is None else labels[start:end]
    cut = len(os.fsencode(found.folders[row])) + 1
    names = [store.names.raw(i)[cut:] for i in range(len(store.names))]
    store.names = Names(names)
    tops = Counter(os.fsdecode(name.split(b'/', 1)[0]) for name in names if b'/' in name)
    folders = sorted(tops)
    return Found(store.names, folders, [tops[name] for name in folders], found.others, found.passed), store, labels
