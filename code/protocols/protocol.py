"""The entry of an evaluation protocol. To add a protocol, write a file <name>.py here that ends with PROTOCOL =
Protocol(...), and add a line to config.PROTOCOLS. evaluate, --help, result files, TensorBoard and `report` use these.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from config import OPTIONS
from dataloader.load_dataset import labeled_subset, num_labeled_classes
from runtime.console import printable
from runtime.errors import UserError
from runtime.messages import log


@dataclass
class Outcome:
    """The outcome of a protocol. result: plain values, with num_train and num_val; accuracies in percent. scores,
    N x classes, and labels, N int64: of the evaluation images, or None. classes: their names. classifier: {'weight',
    'bias'} for `infer`, or None."""

    result: dict
    scores: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    classes: list = field(default_factory=list)
    classifier: dict | None = None


@dataclass(frozen=True)
class Protocol:
    """run: function (args, model, splits, checkpoint) -> Outcome; checkpoint: a dict with path, run (folder) and epoch.

    splits: function (args, own_splits) -> {'train', 'val'} or {'train', 'test'}; own_splits: those of the
    checkpoint's dataset, None in `evaluate` if `path` is given. It raises UserError if something is missing
    (labels, a list, a folder, a package); `train` calls it before the training. numbers: {key of the result:
    printed name}, in percent, in the order to print. Other numbers are in result['measures'] (names of
    collapse_verdict.MEASURES) and result['untrained']. smaller: options to reduce when memory is short. path:
    function args -> the --..._path of the images; None for the checkpoint's dataset. several_ranks: whether it runs
    under torchrun. details: function args -> words for the name of the result file. unused: options of evaluate
    that it ignores, besides those of other protocols (`only`).
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
    """Import and return the Protocol with a name of config.PROTOCOLS."""
    return importlib.import_module(f'protocols.{name}').PROTOCOL


def has_effect(args, name):
    """Whether an option of evaluate affects the protocol of `args`."""
    stages = {args.protocol, 'finetune' if (args.protocol, args.transfer) == ('transfer', 'finetune') else ''}
    only = OPTIONS[name].metadata['only']
    return name not in find_protocol(args.protocol).unused and (not only or bool(stages & {*only}))


def ignored_by_protocol(args):
    """Return the explicit options that have no effect on the protocol of `args`."""
    return sorted(name for name in args.explicit if not has_effect(args, name))


def labeled_splits(args, pretraining_splits):
    """Return {'train', 'val'} of the checkpoint's dataset. Raises UserError if labels are missing."""
    if reason := missing_labels_reason(pretraining_splits):
        raise UserError(f'evaluate needs labels: {reason}')
    return leave_out_unlabeled({name: pretraining_splits[name] for name in ('train', 'val')})


def leave_out_unlabeled(splits):
    """Log how many images of each split have no label. Returns the splits; of val or test only the labeled images."""
    for name, images in splits.items():
        if num_unlabeled := int((images.labels < 0).sum()):
            log(f'{num_unlabeled} of the {len(images)} images of {name} have no class, and are left out')
    return {name: images if name == 'train' else labeled_subset(images) for name, images in splits.items()}


def missing_labels_reason(splits):
    """Return why accuracy cannot be measured on these splits, or None."""
    train, val = splits['train'], splits['val']
    num_classes = num_labeled_classes(train.labels)
    if num_classes < 2:
        folder = printable(train.folder)
        return f'all labels of {folder} are one class' if num_classes else f'{folder} has no classes'
    if val is None:
        fraction = f'--val_fraction={train.args.val_fraction:g} holds none out'
        why = 'no class has two images, one of which could be held out' if train.args.val_fraction else fraction
        return f'{printable(train.folder)} has no val: {why}'
    if not num_labeled_classes(val.labels):
        return f'{printable(val.folder)} has no classes; without it a part of train would be held out'
    return None
