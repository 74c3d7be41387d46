"""Notes and warnings about a dataset: files that are not read, and images that two splits share."""

import os
import re
import stat

from dataloader.loading.decode import install_hint
from dataloader.readers.files import Files
from dataloader.readers.tar import Tar
from dataloader.sources.folder import list_folder
from dataloader.sources.split_names import split_from_folder_name
from dataloader.sources.split_source import COMPRESSED_SUFFIXES
from runtime.console import join_first, printable
from runtime.distributed import rank
from runtime.messages import log, warn
from runtime.tensors import evenly_spaced

LINK_SAMPLE = 1000  # images of a split that are checked for links
LISTS = ('.txt', '.tar', *COMPRESSED_SUFFIXES)


def log_dataset_notes(root, sources):
    """Log notes on the splits, {split: SplitSource}, of the dataset at `root`."""
    if unread := unread_entries(root, sources):
        names = ', '.join(printable(name) for name in unread[:5]) + (' ...' if len(unread) > 5 else '')
        train = sources['train'].location
        warn(f'not read: {names}, beside {printable(train.name)} in {printable(train.parent)}')
    for name, source in sources.items():
        if not source.cache_subdir:
            log_split_notes(name, source)
        if name != 'train':
            warn_train_test_overlap(sources['train'], source)


def log_split_notes(name, source):
    if source.other_files:
        counts = ', '.join(
            f'{count} {kind}' for kind, count in sorted(source.other_files.items(), key=lambda x: (-x[1], x[0]))
        )
        log(f'{name:5}  not images, not read: {counts}{install_hint(source.other_files)}')
    if source.skipped_folders:
        log(f'{name:5}  skipped folders: {join_first(source.skipped_folders)}')
    num_unlabeled = int((source.labels < 0).sum())
    if 0 < num_unlabeled < len(source.labels):
        log(f'{name:5}  {num_unlabeled} of {len(source.labels)} images have no class')


def warn_ignored_data_options(args, sources, train):
    """Warn of explicit options that have no effect on these images."""
    reason_in_memory = train.pixels is not None and 'images this small are kept in memory'
    reasons = {
        'cache_short_side': reason_in_memory,
        'jpeg_draft': reason_in_memory,
        'val_fraction': 'val' in sources
        and not sources['val'].cache_subdir
        and f'{printable(sources["val"].location)} is val',
    }
    for name, reason in reasons.items():
        if reason and name in args.explicit:
            warn(f'`{name}` has no effect: {reason}')


def unread_entries(root, sources):
    """Return names in `root`, or in the folder below it that holds the splits, that are not read but may be meant to
    be: folders and images beside the folders of splits, and archives or lists named like a split."""
    locations = {source.location for source in sources.values()}
    parents = {location.parent for location in locations}
    if not root.is_dir() or root in locations or len(parents) != 1 or not next(iter(parents)).is_relative_to(root):
        return []
    root, entries = parents.pop(), set()
    if all(location.is_dir() for location in locations):
        files, folders = list_folder(root)
        entries = {*map(os.fsdecode, files), *map(os.fsdecode, folders)}
    from_folder = {split_from_filename(location.name): location.is_dir() for location in locations}
    for name in os.listdir(root):
        split = split_from_filename(name)
        if split and name.lower().endswith(LISTS) and from_folder.get(split, True):
            entries.add(name)
    return sorted(entries - {location.name for location in locations})


def split_from_filename(name):
    """Return the split in the name of an archive, a list or a folder (train of train-000000.tar), or None."""
    return split_from_folder_name(re.split(r'[-.]', name)[0])


def warn_train_test_overlap(train, other):
    """Warn if images of another split are the same files as images of train, by links or in two lists. check_dataloader
    finds copies."""
    if rank() or not (may_share_files(train) or may_share_files(other)):
        return
    other_ids = [*file_ids(other)]
    other_set = {file_id for _, file_id in other_ids}
    train_ids = {file_id for _, file_id in file_ids(train) if file_id in other_set}
    if shared_rows := [row for row, file_id in other_ids if file_id in train_ids]:
        warn(
            f'{len(shared_rows)} of the {len(other.labels)} images of {printable(other.location)} are files of '
            f'{printable(train.location)} too, the first {printable(other.store.names[shared_rows[0]])}: accuracy on '
            'them is overestimated'
        )


def may_share_files(source):
    """Whether a split may share files with another: it is a list, or an archive or some of a sample of its images are
    links."""
    if isinstance(source.store, Tar):
        return any(os.path.islink(path) or os.stat(path).st_nlink > 1 for path in source.store.archives)
    if not isinstance(source.store, Files):
        return False
    if not os.path.isdir(source.location):
        return True
    top = os.path.realpath(source.store.folder)
    real = {}
    for row in evenly_spaced(len(source.labels), LINK_SAMPLE).tolist():
        folder, name = os.path.split(os.path.join(top, source.store.names.bytes_at(row)))
        if folder not in real:
            real[folder] = os.path.realpath(folder)
        try:
            status = os.lstat(os.path.join(folder, name))
        except OSError:
            continue
        if real[folder] != os.path.normpath(folder) or status.st_nlink > 1 or stat.S_ISLNK(status.st_mode):
            return True
    return os.path.islink(source.location)


def file_ids(source):
    """Yield (row, identity of the file: device, inode and offset) of the existing images."""
    store = source.store
    if isinstance(store, Tar):
        files = [(status.st_dev, status.st_ino) for status in map(os.stat, store.archives)]
        for row, (archive, offset) in enumerate(zip(store.archive_index.tolist(), store.offsets.tolist(), strict=True)):
            yield row, (*files[archive], offset)
    elif isinstance(store, Files):
        for row in range(len(store.names)):
            try:
                status = os.stat(os.path.join(store.folder, store.names.bytes_at(row)))
            except OSError:
                continue
            yield row, (status.st_dev, status.st_ino, 0)
