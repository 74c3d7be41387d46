"""A split before an image of it is opened: where its images come from, and the class of each."""

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
EMPTY_FOLDER_HINTS = {  # of what lies in place of images
    ('.tar',): '; archives are read by their names: train.tar, or train-000000.tar and so on',
    COMPRESSED_SUFFIXES: '; unpack what is packed first',
}


@dataclass
class SplitSource:
    """The images of a split. labels: N, int64, numbers of `classes`; -1: none."""

    where: Path
    store: object
    labels: torch.Tensor
    classes: list
    others: Counter = field(default_factory=Counter)  # what lies there and is no image, by ending
    passed: list = field(default_factory=list)  # folders that were not gone into
    cache_subdir: str = ''  # what is held out of a folder keeps its cache files apart from those of the rest

    def select(self, rows):
        return replace(self, store=self.store.select(rows), labels=self.labels[rows])


def stratified_holdout(part, fraction):
    """(train, val): of each class the same share of `part`, at least one image of two or more, goes to val.

    Which ones depends on their names alone: not on a seed, and hardly on what is added later.
    """
    names, chosen = part.store.names, []
    counts = (part.labels + 1).bincount(minlength=len(part.classes) + 1).tolist()  # the first: without a label
    for rows in part.labels.argsort(stable=True).split(counts)[1:]:
        rows = rows.tolist()
        count = min(len(rows) - 1, max(1, round(fraction * len(rows))))
        rows.sort(key=lambda row: hashlib.blake2b(names.bytes_at(row), digest_size=8).digest())
        chosen += rows[: max(0, count)]
    held = torch.zeros(len(names), dtype=torch.bool)
    held[chosen] = True
    train, val = (part.select(mask.nonzero()[:, 0]) for mask in (~held, held))
    return train, replace(val, cache_subdir='held_out')


def source_from_class_folders(where, found, store):
    """The SplitSource of a split: its folders are its classes. Raises UserError where images lie beside them, or a
    class is empty (torchvision's ImageFolder refuses both, or drops the images)."""
    if not found.folders or not len(found.names):
        return source_unlabeled(where, found, store)
    if found.num_root_images:
        stray = printable(found.names[0])
        raise UserError(
            f'{printable(where)} has class folders, and beside them the image {stray}: move it into a class'
        )
    for name, count in zip(found.folders, found.counts, strict=True):
        if not count:
            raise UserError(f'the class folder {printable(where / name)} holds no images: fill or delete it')
    labels = torch.repeat_interleave(torch.tensor(found.counts))
    return SplitSource(where, store, labels, found.folders, found.others, found.passed)


def source_guess_classes(where, found, store):
    """The SplitSource of a folder that has no splits: two or more folders of images, and none beside them, are
    classes."""
    full = [(name, count) for name, count in zip(found.folders, found.counts, strict=True) if count]
    if len(full) < 2 or found.num_root_images:
        if len(full) > 1:
            stray = f'{found.num_root_images} images beside them, the first {printable(found.names[0])}'
            log(f'{printable(where)} has {len(full)} folders of images, which are no classes for there are {stray}')
        return source_unlabeled(where, found, store)
    if none := [printable(name) for name, count in zip(found.folders, found.counts, strict=True) if not count]:
        log(f'{printable(where)}: no class is {join_first(none)}, with no images that Pillow can open')
    labels = torch.repeat_interleave(torch.tensor([count for _, count in full]))
    return SplitSource(where, store, labels, [name for name, _ in full], found.others, found.passed)


def source_unlabeled(where, found, store):
    if not len(found.names):
        other = ', '.join(f'{count} {kind}' for kind, count in found.others.most_common(5)) or 'nothing else either'
        helps = [install_hint(found.others)]
        helps += [hint for endings, hint in EMPTY_FOLDER_HINTS.items() if not found.others.keys().isdisjoint(endings)]
        raise UserError(f'{printable(where)} holds no images that Pillow can open ({other}){"".join(helps)}')
    return SplitSource(where, store, torch.full((len(found.names),), -1), [], found.others, found.passed)
