"""SplitSource: the images of a split, before any is opened, and their classes."""

import hashlib
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from dataloader.loading.decode import install_hint
from runtime.console import join_first, printable
from runtime.errors import UserError
from runtime.messages import log

COMPRESSED_SUFFIXES = ('.zip', '.rar', '.7z', '.gz', '.bz2', '.xz', '.zst')
EMPTY_FOLDER_HINTS = {  # hints by the endings of files in a folder without images
    ('.tar',): '; archives are recognized by their names: train.tar, or train-000000.tar and so on',
    ('.parquet',): '; Parquet files are recognized by their names: train-00000-of-00005.parquet, or train/0000.parquet',
    COMPRESSED_SUFFIXES: '; unpack compressed files first',
}


@dataclass
class SplitSource:
    """The images of a split. store: a reader; labels: N, int64, indices of `classes`, -1 for no label."""

    location: Path
    store: object
    labels: torch.Tensor
    classes: list
    other_files: Counter = field(default_factory=Counter)  # number of other files by ending
    skipped_folders: list = field(default_factory=list)  # system folders and links to parents
    cache_subdir: str = ''  # of a held-out val, whose cache files must differ from those of train

    def select(self, rows):
        return replace(self, store=self.store.select(rows), labels=self.labels[rows])


def stratified_holdout(source, fraction):
    """Split `source` into (train, val): the same share of each class goes to val, at least one of two or more images.

    The choice depends only on the images' names: not on a seed, and little on images that are added later.
    """
    names, chosen = source.store.names, []
    counts = (source.labels + 1).bincount(minlength=len(source.classes) + 1).tolist()  # index 0: images without label
    for rows in source.labels.argsort(stable=True).split(counts)[1:]:
        rows = rows.tolist()
        count = min(len(rows) - 1, max(1, round(fraction * len(rows))))
        rows.sort(key=lambda row: hashlib.blake2b(names.bytes_at(row), digest_size=8).digest())
        chosen += rows[: max(0, count)]
    in_val = torch.zeros(len(names), dtype=torch.bool)
    in_val[chosen] = True
    train, val = (source.select(mask.nonzero()[:, 0]) for mask in (~in_val, in_val))
    return train, replace(val, cache_subdir='held_out')


def source_from_class_folders(location, scanned, store):
    """Return a SplitSource whose classes are the folders. Raises UserError if there are images beside them, or a class
    is empty."""
    if not scanned.folders or not len(scanned.names):
        return source_unlabeled(location, scanned, store)
    if scanned.num_root_images:
        stray = printable(scanned.names[0])
        raise UserError(
            f'{printable(location)} has class folders, and beside them the image {stray}: move it into a class'
        )
    for name, count in zip(scanned.folders, scanned.counts, strict=True):
        if not count:
            raise UserError(f'the class folder {printable(location / name)} holds no images: fill or delete it')
    labels = torch.repeat_interleave(torch.tensor(scanned.counts))
    return SplitSource(location, store, labels, scanned.folders, scanned.other_files, scanned.skipped_folders)


def source_guess_classes(location, scanned, store):
    """Return the SplitSource of a folder without splits. Two or more folders of images are its classes, if there are no
    images beside them."""
    with_images = [(name, count) for name, count in zip(scanned.folders, scanned.counts, strict=True) if count]
    if len(with_images) < 2 or scanned.num_root_images:
        if len(with_images) > 1:
            stray = f'{scanned.num_root_images} images beside them, the first {printable(scanned.names[0])}'
            log(
                f'{printable(location)} has {len(with_images)} folders of images, which are not classes, because '
                f'there are {stray}'
            )
        return source_unlabeled(location, scanned, store)
    if empty := [printable(name) for name, count in zip(scanned.folders, scanned.counts, strict=True) if not count]:
        log(f'{printable(location)}: not a class: {join_first(empty)} (no images that Pillow can open)')
    labels = torch.repeat_interleave(torch.tensor([count for _, count in with_images]))
    return SplitSource(
        location, store, labels, [name for name, _ in with_images], scanned.other_files, scanned.skipped_folders
    )


def source_unlabeled(location, scanned, store):
    if not len(scanned.names):
        other = (
            ', '.join(f'{count} {kind}' for kind, count in scanned.other_files.most_common(5)) or 'nothing else either'
        )
        helps = [install_hint(scanned.other_files)]
        helps += [
            hint for endings, hint in EMPTY_FOLDER_HINTS.items() if not scanned.other_files.keys().isdisjoint(endings)
        ]
        raise UserError(f'{printable(location)} holds no images that Pillow can open ({other}){"".join(helps)}')
    return SplitSource(
        location, store, torch.full((len(scanned.names),), -1), [], scanned.other_files, scanned.skipped_folders
    )
