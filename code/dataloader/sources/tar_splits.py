"""Find the splits and classes of tar archives: those of the folders that were packed."""

import os
import re
from collections import Counter

from dataloader.sources.folder import FolderScan, list_folder
from dataloader.sources.path_array import PathArray
from dataloader.sources.split_names import (
    SPLIT_ALIASES,
    check_no_splits_below,
    require_train,
    split_from_folder_name,
)
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
    """Return the SplitSource of one split in these archives."""
    scanned, store, by_cls = open_archives(paths, cache_path, progress)
    labels, classes = by_cls or (None, [])
    location = join_shard_names(paths)
    match = ARCHIVE.fullmatch(paths[0].name.lower())
    named_split, whole = SPLIT_ALIASES.get(match[1]) if match else None, (scanned, store, labels)
    while len(scanned.folders) == 1 and not scanned.num_root_images:  # tar cf train.tar photos/train
        name = scanned.folders[0]
        scanned, store, labels = subfolder(scanned, store, 0, labels)
        if named_split and split_from_folder_name(name) == named_split:
            return source_from_scan(location, scanned, store, labels, classes)
    return source_from_scan(location, *whole, classes)


def list_numbered_archives(folder):
    """Return the numbered archives directly in a folder, sorted. Raises UserError if images or folders of images lie
    beside them."""
    archives = sorted(path for path in folder.iterdir() if NUMBERED.fullmatch(path.name.lower()) and path.is_file())
    if archives:
        images, folders = list_folder(folder)
        others = [*images, *(name for name in folders if list_folder(folder / os.fsdecode(name))[0])]
        if others:
            raise UserError(
                f'{printable(folder)} holds archives, such as {printable(archives[0].name)}, and beside them images, '
                f'such as {printable(others[0])}: move the archives or the images to a folder of their own'
            )
    return archives


def expand_braces(path):
    """Expand a path with braces, train-{000000..000002}.tar, to the archives; [] without braces. Raises UserError if
    one does not exist."""
    match = BRACES.fullmatch(path.name)
    if not match:
        return []
    before, first, last, after = match.groups()
    paths = [path.with_name(f'{before}{number:0{len(first)}d}{after}') for number in range(int(first), int(last) + 1)]
    if missing := [each for each in paths if not each.is_file()]:
        raise UserError(
            f'{printable(path)} names {len(paths)} archives, and {len(missing)} are not there: {printable(missing[0])}'
        )
    if not paths:
        raise UserError(f'{printable(path)} names no archive: the first number is larger than the last')
    return paths


def join_shard_names(paths):
    """Return one path that stands for all archives, with braces: val-{000000..000002}.tar."""
    if len(paths) == 1:
        return paths[0]
    first, last = (path.name.removesuffix('.tar') for path in (paths[0], paths[-1]))
    shared = os.path.commonprefix((first, last)).rstrip('0123456789')
    return paths[0].with_name(f'{shared}{{{first[len(shared) :]}..{last[len(shared) :]}}}.tar')


def splits_in_archive(path, cache_path, progress):
    """Find the splits of one archive, in which they may be nested in further folders. Returns {split: SplitSource}."""
    scanned, store, by_cls = open_archives([path], cache_path, progress)
    labels, classes = by_cls or (None, [])
    while True:
        named = [(name, ARCHIVE.fullmatch(f'{name}.tar')) for name in scanned.folders]  # nested archives are folders
        if shards := [name for name, match in named if match and match[2] and match[1] in SPLIT_ALIASES]:
            raise UserError(
                f'{printable(path)} holds the shards {printable(shards[0])}, ...: unpack it (tar xf) into a folder'
            )
        if splits := split_folders(path, scanned):
            return {
                name: source_from_scan(path / name, *subfolder(scanned, store, row, labels), classes)
                for name, row in splits.items()
            }
        if len(scanned.folders) != 1 or scanned.num_root_images:
            break
        scanned, store, labels = subfolder(scanned, store, 0, labels)
    check_no_splits_below(path, scanned.names, is_archive=True)
    if by_cls:
        return {'train': source_from_scan(path, scanned, store, labels, classes)}
    return {'train': source_guess_classes(path, scanned, store)}


def split_folders(path, scanned):
    """Return {split: number of its folder} in an archive, and log what is not read. Raises UserError for two folders of
    one split."""
    rows = {}
    for row, name in enumerate(scanned.folders):
        if (split := split_from_folder_name(name)) in rows:
            two_folders = f'{printable(scanned.folders[rows[split]])} and {printable(name)}'
            raise UserError(f'{printable(path)} has both {two_folders}: which of them is {split}?')
        if split:
            rows[split] = row
    if rows:
        require_train(path, {split: scanned.folders[row] for split, row in rows.items()})
        beside = [name for row, name in enumerate(scanned.folders) if row not in rows.values()]
        if beside or scanned.num_root_images:
            unread = [
                *map(printable, beside[:5]),
                *([f'{scanned.num_root_images} images in no folder'] if scanned.num_root_images else []),
            ]
            log(
                f'not read: {", ".join(unread)}, beside {printable(scanned.folders[rows["train"]])} in '
                f'{printable(path)}'
            )
    return rows


def source_from_scan(location, scanned, store, labels, classes):
    """Return the SplitSource of an archive's images, with the classes of .cls files, else of its folders."""
    if labels is None:
        return source_from_class_folders(location, scanned, store)
    return SplitSource(location, store, labels, classes, scanned.other_files, scanned.skipped_folders)


def subfolder(scanned, store, row, labels=None):
    """Return (FolderScan, store, labels) of the folder number `row` of `scanned`."""
    start = scanned.num_root_images + sum(scanned.counts[:row])
    end = start + scanned.counts[row]
    store, labels = store.select(range(start, end)), None if labels is None else labels[start:end]
    cut = len(os.fsencode(scanned.folders[row])) + 1
    names = [store.names.bytes_at(i)[cut:] for i in range(len(store.names))]
    store.names = PathArray(names)
    tops = Counter(os.fsdecode(name.split(b'/', 1)[0]) for name in names if b'/' in name)
    folders = sorted(tops)
    return (
        FolderScan(
            store.names, folders, [tops[name] for name in folders], scanned.other_files, scanned.skipped_folders
        ),
        store,
        labels,
    )
