"""Semi-supervised learning: the whole network is fine-tuned with few labels."""

import os

import torch

from dataloader.load_dataset import labeled_subset, select
from protocols.finetune import FINETUNED, finetune, rows_per_class
from protocols.protocol import KNN_OPTIONS, Outcome, Protocol, labeled_splits
from runtime.console import print_message, printable
from runtime.errors import UserError, resolve_path


def semi(args, model, splits, _):
    """Fine-tune on the labels of --label_fraction or --subset_list.

    With --baseline the same network is also trained from scratch on the same labels: what the pretraining is worth.
    """
    few, val = select_labeled_fraction(args, labeled_subset(splits['train'])), splits['val']
    result, scores, labels = finetune(args, model.backbone, few, val)
    result['labels'] = args.subset_list or f'{args.label_fraction:g} of train, the same number of each class'
    return Outcome(result, scores, labels, val.classes)


def select_labeled_fraction(args, train):
    """The labelled images of --label_fraction or --subset_list. Raises UserError for a list that cannot be used."""
    rows = (
        rows_from_list(args, train)
        if args.subset_list
        else class_balanced_rows(train.labels, args.label_fraction, args.random_seed)
    )
    if len(rows) < 2:
        raise UserError('--protocol=semi: the labels are of one image; fine-tuning wants two')
    return select(train, rows)


def class_balanced_rows(labels, fraction, seed):
    """Row numbers of `fraction` of the images, at least one of every class, and the same number of every one, as far as
    they have it: what a small class lacks, the larger ones give.

    labels: N, int64, >= 0. The choice depends on the seed alone.
    """
    groups = rows_per_class(labels, seed)
    wanted, chosen, left = round(fraction * len(labels)), [], len(groups)
    for rows in sorted(groups, key=len):  # the smallest first: what it has not is shared by those that follow
        count = min(len(rows), max(1, round(wanted / left)))
        chosen.append(rows[:count])
        wanted, left = wanted - count, left - 1
    return torch.cat(chosen).sort().values


def rows_from_list(args, images):
    """Row numbers of the images that --subset_list names, one a line: a file name, or class/name where names repeat.

    Raises UserError for a missing file, a name that is not among the images, or one that several have.
    """
    path = resolve_path(args.subset_list)
    if path.exists() and not path.is_file():
        raise UserError(f'--subset_list: {path} is no file')
    try:
        lines = path.read_bytes().removeprefix(b'\xef\xbb\xbf').splitlines()
        wanted = [os.fsdecode(line.strip()) for line in lines if line.strip()]
    except OSError as error:
        raise UserError(f'--subset_list: {path} cannot be read: {error}') from None
    by_name = {}
    for row, name in enumerate(images.names):
        for key in {name, name.rsplit('/', 1)[-1]}:
            by_name.setdefault(key, []).append(row)
    unknown = [name for name in wanted if name not in by_name]
    if not wanted:
        raise UserError(f'--subset_list: {path} names no image')
    if unknown:
        raise UserError(
            f'--subset_list: {len(unknown)} of its {len(wanted)} names are not in {images.folder}; the '
            f'first is {printable(unknown[0])!r}'
        )
    repeated = [name for name in wanted if len(by_name[name]) > 1]
    if repeated:
        raise UserError(
            f'--subset_list: {len(by_name[repeated[0]])} images of {images.folder} are named '
            f'{repeated[0]!r}: write <class>/{repeated[0]}'
        )
    rows = torch.tensor(sorted({by_name[name][0] for name in wanted}))
    if len(rows) < len(wanted):
        print_message('warning', f'--subset_list: {len(wanted) - len(rows)} of its {len(wanted)} names are there twice')
    none = sorted({*range(len(images.classes))} - {*images.labels[rows].tolist()})
    if none:
        first = printable(images.classes[none[0]])
        print_message(
            'warning', f'--subset_list: {len(none)} of {len(images.classes)} classes have no image, such as {first}'
        )
    return rows


def splits_for_semi(args, labels):
    """labelled_splits, of which a list of labels can be used. Raises UserError."""
    splits = labeled_splits(args, labels)
    select_labeled_fraction(args, labeled_subset(splits['train']))
    return splits


PROTOCOL = Protocol(
    run=semi,
    splits=splits_for_semi,
    numbers=FINETUNED,
    smaller='--finetune_batch_size',
    details=lambda args: ['list' if args.subset_list else f'{args.label_fraction:g}'],
    unused=KNN_OPTIONS,
)
