"""Fine-tuning of the whole network with labels: semi-supervised learning, and one half of transfer."""

import copy
import os

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ckpt import new_model
from config import UserError, WorkError, changed, path_of
from dataloader.load_dataset import at_most, in_order, labelled, select, shuffled_crops
from dataloader.vision import plain_view
from metric.accuracy import topk_accuracy
from optimizer.sgd import learning_rate
from protocols.features import labelled_crops
from runtime.console import complain, shown
from runtime.device import get_device
from runtime.messages import progress
from runtime.precision import autocast
from runtime.seeding import random_from, seed_step
from runtime.tensors import channels_last
from utils import prepared


def semi(args, model, splits):
    """Fine-tune on the labels of --label_fraction or --subset_list. Returns (result, scores, labels of val, None,
    classes).

    With --baseline the same network is also trained from scratch on the same labels: what the pretraining is worth.
    """
    few, val = few_of(args, labelled(splits['train'])), splits['val']
    result, scores, labels = finetune(args, model.backbone, few, val)
    result['labels'] = args.subset_list or f'{args.label_fraction:g} of train, the same number of each class'
    return result, scores, labels, None, val.classes


def few_of(args, train):
    """The labelled images of --label_fraction or --subset_list. Raises UserError for a list that cannot be used."""
    rows = listed(args, train) if args.subset_list else balanced(train.labels, args.label_fraction, args.random_seed)
    if len(rows) < 2:
        raise UserError('--protocol=semi: the labels are of one image; fine-tuning wants two')
    return select(train, rows)


def finetune(args, backbone, train, val):
    """Train a copy of `backbone` and a new linear head on `train`, and judge them on `val`. Returns (result, scores,
    labels). result has the accuracies in percent; with --baseline also those of a network without pretraining."""
    rates = args.finetune_learning_rate, args.head_learning_rate
    scores, labels = train_and_score(args, copy.deepcopy(backbone), train, val, rates, 'fine-tuning')
    result = {'top1': topk_accuracy(scores, labels, 1), 'top5': topk_accuracy(scores, labels, 5)}
    if args.baseline:
        fresh = new_model(args).backbone.to(get_device(args), memory_format=torch.channels_last)
        rates = args.baseline_learning_rate, args.baseline_learning_rate
        others, _ = train_and_score(args, fresh, train, val, rates, 'from scratch')
        result |= {
            'top1_from_scratch': topk_accuracy(others, labels, 1),
            'top5_from_scratch': topk_accuracy(others, labels, 5),
        }
    return {**result, 'num_train': len(train), 'num_val': len(val)}, scores, labels


def train_and_score(args, backbone, train, val, rates, title):
    """SGD on random crops and flips, cosine to zero; rates: base rates of the backbone and of the head, x batch / 256.

    Returns (scores, labels) of val after the last epoch.
    """
    device, size = get_device(args), min(args.finetune_batch_size, len(train))
    few = changed(args, batch_size=size)
    crops = shuffled_crops(few, train, drop_last=True)
    with torch.no_grad():
        width = backbone.eval()(torch.zeros(1, 3, args.image_size, args.image_size, device=device)).shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.random_seed)
        head = nn.Linear(width, len(val.classes)).to(device)
    groups = [{'params': list(backbone.parameters())}, {'params': list(head.parameters())}]
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, weight_decay=args.finetune_weight_decay)
    steps = len(crops)
    for epoch in progress(range(args.finetune_epochs), title, 'epochs'):
        backbone.train()
        for step, (view, labels) in enumerate(labelled_crops(few, crops, epoch)):
            for group, base in zip(optimizer.param_groups, rates, strict=True):
                done = (epoch + step / steps) / args.finetune_epochs
                group['lr'] = learning_rate(done, args.finetune_warmup, base * size / 256)
            seed_step(args.random_seed, title, epoch, step)
            with autocast(args, scaled=False):
                scores = head(backbone(view))
            loss = cross_entropy(scores.float(), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        if not loss.isfinite():
            raise WorkError(
                f'the loss of {title} is {loss.item()} in epoch {epoch + 1}: try a lower --finetune_learning_rate'
            )
    backbone.eval()
    found = []
    with torch.inference_mode():
        for images, labels in prepared(args, in_order(args, val)):
            view = plain_view(images, args)
            for part, own in zip(view.split(at_most(args)), labels.split(at_most(args)), strict=True):
                with autocast(args, scaled=False):
                    scores = head(backbone(channels_last(part)))
                found.append((scores.float(), own))
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def balanced(labels, fraction, seed):
    """Row numbers of `fraction` of the images, at least one of every class, and the same number of every one, as far as
    they have it: what a small class lacks, the larger ones give.

    labels: N, int64, >= 0. The choice depends on the seed alone.
    """
    groups = of_each_class(labels, seed)
    wanted, chosen, left = round(fraction * len(labels)), [], len(groups)
    for rows in sorted(groups, key=len):  # the smallest first: what it has not is shared by those that follow
        count = min(len(rows), max(1, round(wanted / left)))
        chosen.append(rows[:count])
        wanted, left = wanted - count, left - 1
    return torch.cat(chosen).sort().values


def of_each_class(labels, seed):
    """The row numbers of each class that has images, in random order."""
    order = torch.randperm(len(labels), generator=random_from(seed, 'label fraction'))
    order = order[labels[order].argsort(stable=True)]
    return order.split(labels.unique(return_counts=True)[1].tolist())


def listed(args, images):
    """Row numbers of the images that --subset_list names, one a line: a file name, or class/name where names repeat.

    Raises UserError for a missing file, a name that is not among the images, or one that several have.
    """
    path = path_of(args.subset_list)
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
            f'first is {shown(unknown[0])!r}'
        )
    repeated = [name for name in wanted if len(by_name[name]) > 1]
    if repeated:
        raise UserError(
            f'--subset_list: {len(by_name[repeated[0]])} images of {images.folder} are named '
            f'{repeated[0]!r}: write <class>/{repeated[0]}'
        )
    rows = torch.tensor(sorted({by_name[name][0] for name in wanted}))
    if len(rows) < len(wanted):
        complain('warning', f'--subset_list: {len(wanted) - len(rows)} of its {len(wanted)} names are there twice')
    none = sorted({*range(len(images.classes))} - {*images.labels[rows].tolist()})
    if none:
        first = shown(images.classes[none[0]])
        complain(
            'warning', f'--subset_list: {len(none)} of {len(images.classes)} classes have no image, such as {first}'
        )
    return rows
