"""Which splits and classes tar archives have: those of the folders that were packed."""

import os
import re
from collections import Counter

from dataloader.sources.folder import FolderScan
from dataloader.sources.path_array import PathArray
from dataloader.sources.split_names import SPLIT_ALIASES, require_train, split_from_folder_name
from dataloader.sources.split_source import SplitSource, source_from_class_folders, source_guess_classes
from dataloader.sources.tar_index import open_archives
from runtime.console import printable
from runtime.errors import UserError
from runtime.messages import log

# train.tar, train-000000.tar, imagenet1k-train-0000.tar
ARCHIVE = re.compile(r'(?:[\w.]+-)*?([a-z]+)(-\d+)?\.tar')
NUMBERED = re.compile(r'(?:[\w.]+-)?\d+\.tar')  # 00000.tar of img2dataset, shard-000000.tar
BRACES = re.compile(r'(.*)\{(\d+)\.\.(\d+)\}(.*\.tar)')  # as WebDataset and shells write them


def source_from_shards(paths, cache_path, progress):
    """The SplitSource of one split, in these archives."""
    found, store, by_cls = open_archives(paths, cache_path, progress)
    labels, classes = by_cls or (None, [])
    where = join_shard_names(paths)
    match = ARCHIVE.fullmatch(paths[0].name.lower())
    own, whole = SPLIT_ALIASES.get(match[1]) if match else None, (found, store, labels)
    while len(found.folders) == 1 and not found.num_root_images:  # tar cf train.tar photos/train
        name = found.folders[0]
        found, store, labels = subfolder(found, store, 0, labels)
        if own and split_from_folder_name(name) == own:
            return source_from_scan(where, found, store, labels, classes)
    return source_from_scan(where, *whole, classes)


def list_numbered_archives(folder):
    """The numbered archives right in a folder, in order."""
    return sorted(path for path in folder.iterdir() if NUMBERED.fullmatch(path.name.lower()) and path.is_file())


def expand_braces(path):
    """The archives that a path with braces names, train-{000000..000002}.tar; [] of another. Raises UserError where one
    is not there."""
    match = BRACES.fullmatch(path.name)
    if not match:
        return []
    before, first, last, after = match.groups()
    paths = [path.with_name(f'{before}{number:0{len(first)}d}{after}') for number in range(int(first), int(last) + 1)]
    if gone := [each for each in paths if not each.is_file()]:
        raise UserError(
            f'{printable(path)} names {len(paths)} archives, and {len(gone)} are not there: {printable(gone[0])}'
        )
    if not paths:
        raise UserError(f'{printable(path)} names no archive: the first number is the larger')
    return paths


def join_shard_names(paths):
    """One path that names all archives, as a shell would: val-{000000..000002}.tar."""
    if len(paths) == 1:
        return paths[0]
    first, last = (path.name.removesuffix('.tar') for path in (paths[0], paths[-1]))
    shared = os.path.commonprefix((first, last)).rstrip('0123456789')
    return paths[0].with_name(f'{shared}{{{first[len(shared) :]}..{last[len(shared) :]}}}.tar')


def splits_in_archive(path, cache_path, progress):
    """The splits of one archive, which may be packed as a folder of them, or as folders that hold such a one."""
    found, store, by_cls = open_archives([path], cache_path, progress)
    labels, classes = by_cls or (None, [])
    while True:
        named = [(name, ARCHIVE.fullmatch(f'{name}.tar')) for name in found.folders]  # an archive in it is a folder
        if shards := [name for name, match in named if match and match[2] and match[1] in SPLIT_ALIASES]:
            raise UserError(
                f'{printable(path)} holds the shards {printable(shards[0])}, ...: unpack it (tar xf) into a folder'
            )
        if splits := split_folders(path, found):
            return {
                name: source_from_scan(path / name, *subfolder(found, store, row, labels), classes)
                for name, row in splits.items()
            }
        if len(found.folders) != 1 or found.num_root_images:
            break
        found, store, labels = subfolder(found, store, 0, labels)
    if by_cls:
        return {'train': source_from_scan(path, found, store, labels, classes)}
    return {'train': source_guess_classes(path, found, store)}


def split_folders(path, found):
    """{split: the number of its folder} in an archive. Raises UserError as for folders; what lies beside is said."""
    rows = {}
    for row, name in enumerate(found.folders):
        if (split := split_from_folder_name(name)) in rows:
            both = f'{printable(found.folders[rows[split]])} and {printable(name)}'
            raise UserError(f'{printable(path)} has both {both}: which of them is {split}?')
        if split:
            rows[split] = row
    if rows:
        require_train(path, {split: found.folders[row] for split, row in rows.items()})
        beside = [name for row, name in enumerate(found.folders) if row not in rows.values()]
        if beside or found.num_root_images:
            said = [
                *map(printable, beside[:5]),
                *([f'{found.num_root_images} images in no folder'] if found.num_root_images else []),
            ]
            log(f'not read: {", ".join(said)}, beside {printable(found.folders[rows["train"]])} in {printable(path)}')
    return rows


def source_from_scan(where, found, store, labels, classes):
    """The SplitSource of an archive's images: of the classes that .cls files name, or else of its folders."""
    if labels is None:
        return source_from_class_folders(where, found, store)
    return SplitSource(where, store, labels, classes, found.others, found.passed)


def subfolder(found, store, row, labels=None):
    """(FolderScan, store, labels) of what lies in folder number `row` of `found`."""
    start = found.num_root_images + sum(found.counts[:row])
    end = start + found.counts[row]
    store, labels = store.select(range(start, end)), None if labels is None else labels[start:end]
    cut = len(os.fsencode(found.folders[row])) + 1
    names = [store.names.bytes_at(i)[cut:] for i in range(len(store.names))]
    store.names = PathArray(names)
    tops = Counter(os.fsdecode(name.split(b'/', 1)[0]) for name in names if b'/' in name)
    folders = sorted(tops)
    return FolderScan(store.names, folders, [tops[name] for name in folders], found.others, found.passed), store, labels
