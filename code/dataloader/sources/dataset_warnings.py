"""What is said of a set before it is used: what lies there and is not read, and what two splits have in common."""

import os
import re
import stat

from dataloader.loading.decode import install_hint
from dataloader.readers.files import Files
from dataloader.readers.tar import Tar
from dataloader.sources.folder import list_folder
from dataloader.sources.split_names import split_from_folder_name
from dataloader.sources.split_source import COMPRESSED_SUFFIXES
from runtime.console import join_first, print_message, printable
from runtime.distributed import rank
from runtime.messages import log
from runtime.tensors import evenly_spaced

LINK_SAMPLE = 1000  # images of a split, to see whether links are among them
LISTS = ('.txt', '.tar', *COMPRESSED_SUFFIXES)


def log_dataset_notes(root, parts):
    """Say it of these SplitSource, {split: SplitSource}, of the set at `root`."""
    if (unread := unread_entries(root, parts)) and not rank():
        said = ', '.join(printable(name) for name in unread[:5]) + (' ...' if len(unread) > 5 else '')
        print_message(
            'warning', f'not read: {said}, beside {printable(parts["train"].where.name)} in {printable(root)}'
        )
    for name, part in parts.items():
        if not part.cache_subdir:
            log_split_notes(name, part)
        if name != 'train':
            warn_train_test_overlap(parts['train'], part)


def log_split_notes(name, part):
    if part.others:
        said = ', '.join(f'{count} {kind}' for kind, count in sorted(part.others.items(), key=lambda x: (-x[1], x[0])))
        log(f'{name:5}  no images for Pillow, and not read: {said}{install_hint(part.others)}')
    if part.passed:
        log(f'{name:5}  not gone into: {join_first(part.passed)}')
    without = int((part.labels < 0).sum())
    if 0 < without < len(part.labels):
        log(f'{name:5}  {without} of {len(part.labels)} images have no class')


def warn_ignored_data_options(args, parts, train):
    """Say which given options do nothing to these images."""
    held = train.pixels is not None and 'images this small are held in memory'
    reasons = {
        'cache_short_side': held,
        'jpeg_draft': held,
        'val_fraction': 'val' in parts and not parts['val'].cache_subdir and f'{printable(parts["val"].where)} is val',
    }
    for name, reason in reasons.items():
        if reason and name in args.given and not rank():
            print_message('warning', f'`{name}` has no effect: {reason}')


def unread_entries(root, parts):
    """Names of what lies in `root` beside the splits and could be meant: folders and images, where the splits are
    folders there, and archives and lists that are called as a split which is made of something else."""
    places = {part.where for part in parts.values()}
    if not root.is_dir() or not all(place.parent == root for place in places):
        return []
    found = set()
    if all(place.is_dir() for place in places):
        files, folders = list_folder(root)
        found = {*map(os.fsdecode, files), *map(os.fsdecode, folders)}
    from_folder = {split_from_filename(place.name): place.is_dir() for place in places}
    for name in os.listdir(root):
        split = split_from_filename(name)
        if split and name.lower().endswith(LISTS) and from_folder.get(split, True):
            found.add(name)
    return sorted(found - {place.name for place in places})


def split_from_filename(name):
    """train of train-000000.tar: the split that an archive, a list or a folder is called as, or None."""
    return split_from_folder_name(re.split(r'[-.]', name)[0])


def warn_train_test_overlap(train, other):
    """Warn where images of another split are files of train's: by links, or as lines of two lists. That an image was
    copied is told by check_dataloader, which reads them all."""
    if rank() or not (may_share_files(train) or may_share_files(other)):
        return
    others = [*file_ids(other)]  # the smaller of the two: of train only what is wanted is kept
    wanted = {known for _, known in others}
    trained_on = {known for _, known in file_ids(train) if known in wanted}
    if same := [row for row, known in others if known in trained_on]:
        print_message(
            'warning',
            f'{len(same)} of the {len(other.labels)} images of {printable(other.where)} are files of '
            f'{printable(train.where)} too, the first {printable(other.store.names[same[0]])}: what is judged on them '
            'was '
            'learned',
        )


def may_share_files(part):
    """Whether a split may have files of another place: it is a list, or an archive or some of its images are reached by
    links. Of many images some are looked at, for links come in numbers."""
    if isinstance(part.store, Tar):
        return any(os.path.islink(path) or os.stat(path).st_nlink > 1 for path in part.store.archives)
    if not isinstance(part.store, Files):
        return False
    if not os.path.isdir(part.where):
        return True
    top = os.path.realpath(part.store.folder)
    real = {}
    for row in evenly_spaced(len(part.labels), LINK_SAMPLE).tolist():
        folder, name = os.path.split(os.path.join(top, part.store.names.bytes_at(row)))
        if folder not in real:
            real[folder] = os.path.realpath(folder)
        try:
            status = os.lstat(os.path.join(folder, name))
        except OSError:
            continue
        if real[folder] != os.path.normpath(folder) or status.st_nlink > 1 or stat.S_ISLNK(status.st_mode):
            return True
    return os.path.islink(part.where)


def file_ids(part):
    """(row, what tells the bytes of its image from all others on this machine) of the images that are there."""
    store = part.store
    if isinstance(store, Tar):
        files = [(status.st_dev, status.st_ino) for status in map(os.stat, store.archives)]
        for row, (which, offset) in enumerate(zip(store.archive_index.tolist(), store.offsets.tolist(), strict=True)):
            yield row, (*files[which], offset)
    elif isinstance(store, Files):
        for row in range(len(store.names)):
            try:
                status = os.stat(os.path.join(store.folder, store.names.bytes_at(row)))
            except OSError:
                continue
            yield row, (status.st_dev, status.st_ino, 0)
