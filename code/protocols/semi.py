"""Semi-supervised learning: fine-tune the whole network with few labels."""

import os

import torch

from dataloader.load_dataset import labeled_subset, select
from protocols.finetune import FINETUNE_NAMES, finetune, rows_per_class
from protocols.protocol import KNN_OPTIONS, Outcome, Protocol, labeled_splits
from runtime.console import printable
from runtime.errors import UserError, resolve_path
from runtime.messages import warn


def evaluate_semi_supervised(args, model, splits, _):
    """Fine-tune on the labels of --label_fraction or --subset_list. Returns an Outcome.

    With --baseline the same network is also trained from scratch on these labels, for comparison.
    """
    few, val = select_labeled_fraction(args, labeled_subset(splits['train'])), splits['val']
    result, scores, labels = finetune(args, model.backbone, few, val)
    result['labels'] = args.subset_list or f'{args.label_fraction:g} of train, the same number of each class'
    return Outcome(result, scores, labels, val.classes)


def select_labeled_fraction(args, train):
    """Return the labeled images of --label_fraction or --subset_list. Raises UserError for an invalid list."""
    rows = (
        rows_from_list(args, train)
        if args.subset_list
        else class_balanced_rows(train.labels, args.label_fraction, args.random_seed)
    )
    if len(rows) < 2:
        raise UserError('--protocol=semi: only one image has a label; fine-tuning needs two')
    return select(train, rows)


def class_balanced_rows(labels, fraction, seed):
    """Choose a fraction of the images, with the same number of each class and at least one; what small classes lack is
    taken from larger ones. labels: N, int64, >= 0. Returns sorted row numbers.
    """
    groups = rows_per_class(labels, seed)
    remaining, chosen, classes_left = round(fraction * len(labels)), [], len(groups)
    for rows in sorted(groups, key=len):  # smallest first, so that larger classes fill up
        count = min(len(rows), max(1, round(remaining / classes_left)))
        chosen.append(rows[:count])
        remaining, classes_left = remaining - count, classes_left - 1
    return torch.cat(chosen).sort().values


def rows_from_list(args, images):
    """Read --subset_list: one file name per line, or class/name if names repeat; a first line `file`, as `select`
    writes it, is a title. Returns sorted row numbers of the images.

    Raises UserError for a missing file, or an unknown or ambiguous name.
    """
    path = resolve_path(args.subset_list)
    if path.exists() and not path.is_file():
        raise UserError(f'--subset_list: {path} is no file')
    try:
        lines = path.read_bytes().removeprefix(b'\xef\xbb\xbf').splitlines()
        listed = [os.fsdecode(line.strip()) for line in lines if line.strip()]
    except OSError as error:
        raise UserError(f'--subset_list: {path} cannot be read: {error}') from None
    by_name = {}
    for row, name in enumerate(images.names):
        for key in {name, name.rsplit('/', 1)[-1]}:
            by_name.setdefault(key, []).append(row)
    listed = listed[1:] if listed[:1] == ['file'] and 'file' not in by_name else listed
    unknown = [name for name in listed if name not in by_name]
    if not listed:
        raise UserError(f'--subset_list: {path} names no image')
    if unknown:
        raise UserError(
            f'--subset_list: {len(unknown)} of its {len(listed)} names are not in {images.folder}; the '
            f'first is {printable(unknown[0])!r}'
        )
    repeated = [name for name in listed if len(by_name[name]) > 1]
    if repeated:
        raise UserError(
            f'--subset_list: {len(by_name[repeated[0]])} images of {images.folder} are named '
            f'{repeated[0]!r}: write <class>/{repeated[0]}'
        )
    rows = torch.tensor(sorted({by_name[name][0] for name in listed}))
    if len(rows) < len(listed):
        warn(f'--subset_list: {len(listed) - len(rows)} of its {len(listed)} names occur twice')
    missing = sorted({*range(len(images.classes))} - {*images.labels[rows].tolist()})
    if missing:
        first = printable(images.classes[missing[0]])
        warn(f'--subset_list: {len(missing)} of {len(images.classes)} classes have no image, such as {first}')
    return rows


def splits_for_semi(args, labels):
    """labeled_splits, after checking that the label subset is valid. Raises UserError."""
    splits = labeled_splits(args, labels)
    select_labeled_fraction(args, labeled_subset(splits['train']))
    return splits


PROTOCOL = Protocol(
    run=evaluate_semi_supervised,
    splits=splits_for_semi,
    numbers=FINETUNE_NAMES,
    smaller='--finetune_batch_size',
    details=lambda args: ['list' if args.subset_list else f'{args.label_fraction:g}'],
    unused=KNN_OPTIONS,
)
