"""A split before an image of it is opened: where its images come from, and the class of each."""

import hashlib
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch


@dataclass
class Part:
    """The images of a split. labels: N, int64, numbers of `classes`; -1: none."""

    where: Path
    store: object
    labels: torch.Tensor
    classes: list
    others: Counter = field(default_factory=Counter)  # what lies there and is no image, by ending
    passed: list = field(default_factory=list)  # folders that were not gone into
    share: str = ''  # what is held out of a folder keeps its cache files apart from those of the rest

    def select(self, rows):
        return replace(self, store=self.store.select(rows), labels=self.labels[rows])


def hold_out(part, fraction):
    """(train, val): of each class the same share of `part`, at least one image of two or more, goes to val.

    Which ones depends on their names alone: not on a seed, and hardly on what is added later.
    """
    names, chosen = part.store.names, []
    counts = (part.labels + 1).bincount(minlength=len(part.classes) + 1).tolist()  # the first: without a label
    for rows in part.labels.argsort(stable=True).split(counts)[1:]:
        rows = rows.tolist()
        count = min(len(rows) - 1, max(1, round(fraction * len(rows))))
        rows.sort(key=lambda row: hashlib.blake2b(names.raw(row), digest_size=8).digest())
        chosen += rows[: max(0, count)]
    held = torch.zeros(len(names), dtype=torch.bool)
    held[chosen] = True
    train, val = (part.select(mask.nonzero()[:, 0]) for mask in (~held, held))
    return train, replace(val, share='held_out')
