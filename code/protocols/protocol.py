"""An evaluation protocol as one entry. To add one: a file <name>.py here that ends with PROTOCOL = Protocol(...), and a
line in config.PROTOCOLS. evaluate, --help, the results' files, TensorBoard and `report` take all they say from these.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from config import OPTIONS
from dataloader.load_dataset import labeled_subset
from runtime.console import printable
from runtime.errors import UserError
from runtime.messages import log


@dataclass
class Outcome:
    """What a protocol found. result: plain values, num_train and num_val among them; numbers in percent. scores, N x
    classes, and labels, N int64, of the judged images, where there are any; classes: their names; classifier: a dict of
    weight and bias, which `infer` uses."""

    result: dict
    scores: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    classes: list = field(default_factory=list)
    classifier: dict | None = None


@dataclass(frozen=True)
class Protocol:
    """run: (args, model, splits, checkpoint) to Outcome; checkpoint: a dict of its path, run (a folder) and epoch.

    splits: (args, own) to {'train', 'val'}, the images to work on, from those of the checkpoint's own set (None in
    `evaluate` where `path` is given). Raises UserError for what is missing (labels, a list, a folder, a package);
    `train` asks before it begins.
    numbers: {key of the result: what people read}, in percent, in the order in which they are shown. What is not in
    percent goes into result['measures'], of the names of collapse_verdict.MEASURES, beside result['untrained'].
    smaller: the options to lower where memory is short. path: (args) to the --..._path of the images, None: the
    checkpoint's own. several_ranks: whether torchrun may run it. details: (args) to words for the result's file name.
    unused: options of evaluate that have no effect on it, beside those that are of another protocol alone (`only`).
    """

    run: Callable
    splits: Callable
    numbers: dict
    smaller: str
    path: Callable | None = None
    several_ranks: bool = False
    details: Callable = lambda args: []
    unused: tuple = ()


TOP = {'top1': 'top-1', 'top5': 'top-5', 'mean_per_class': 'mean over classes'}
KNN_OPTIONS = ('knn_k', 'knn_temperature', 'knn_raw_pixels')


def find_protocol(name):
    """The Protocol of a name in config.PROTOCOLS, imported when asked for: torchvision's detectors take a second."""
    return importlib.import_module(f'protocols.{name}').PROTOCOL


def has_effect(args, name):
    """Whether an option of evaluate matters to the protocol of `args`."""
    stages = {args.protocol, 'finetune' if (args.protocol, args.transfer) == ('transfer', 'finetune') else ''}
    only = OPTIONS[name].metadata['only']
    return name not in find_protocol(args.protocol).unused and (not only or bool(stages & {*only}))


def ignored_by_protocol(args):
    """The explicitly given options that have no effect on the protocol of `args`."""
    return sorted(name for name in args.given if not has_effect(args, name))


def labeled_splits(args, pretraining_splits):
    """{'train', 'val'} of the checkpoint's own set. Raises UserError where labels are missing."""
    if reason := missing_labels_reason(pretraining_splits):
        raise UserError(f'evaluate needs labels: {reason}')
    return report_unlabeled({name: pretraining_splits[name] for name in ('train', 'val')})


def report_unlabeled(splits):
    """`splits`, after saying how many of train are of no use without a label."""
    none, count = int((splits['train'].labels < 0).sum()), len(splits['train'])
    if none:
        log(f'{none} of the {count} images of train have no class, and are left out')
    return splits


def missing_labels_reason(splits):
    """Why accuracies cannot be measured on these splits, or None."""
    train, val = splits['train'], splits['val']
    if not len(labeled_subset(train)):
        return f'{printable(train.folder)} has no classes'
    if val is None:
        fraction = f'--val_fraction={train.args.val_fraction:g} holds none out'
        why = 'no class has two images, one of which could be held out' if train.args.val_fraction else fraction
        return f'{printable(train.folder)} has no val: {why}'
    if not (val.labels >= 0).any():
        return f'{printable(val.folder)} has no classes'
    if not (val.labels >= 0).all():
        return f'{int((val.labels < 0).sum())} of the {len(val)} images of {printable(val.folder)} have no class'
    return None
