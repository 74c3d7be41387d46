"""Fine-tuning of the whole network with labels, for --protocol=semi and --protocol=transfer."""

import copy

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from dataloader.load_dataset import eval_loader, max_eval_batch, supervised_loader
from dataloader.vision import eval_view
from metric.accuracy import topk_accuracy
from optimizer.sgd import lr_schedule
from protocols.features import augmented_batches
from runtime.checkpoints.load_state import build_model
from runtime.device import get_device, move_network
from runtime.errors import WorkError
from runtime.messages import progress
from runtime.options import replace_args
from runtime.precision import autocast
from runtime.seeding import generator_for, seed_step
from runtime.tensors import channels_last
from utils import prefetch_to_device

FINETUNE_NAMES = {  # printed names of the numbers
    'top1': 'top-1',
    'top5': 'top-5',
    'top1_from_scratch': 'top-1 from scratch',
    'top5_from_scratch': 'top-5 from scratch',
    'mean_per_class': 'mean over classes',
}


def finetune(args, backbone, train, val):
    """Fine-tune a copy of `backbone` with a new linear head on `train`, and evaluate it on `val`. Returns (result,
    scores, labels). result: accuracies in percent; with --baseline also those of a network trained from scratch."""
    rates = args.finetune_learning_rate, args.head_learning_rate
    scores, labels = finetune_and_score(args, copy.deepcopy(backbone), train, val, rates, 'fine-tuning')
    result = {'top1': topk_accuracy(scores, labels, 1), 'top5': topk_accuracy(scores, labels, 5)}
    if args.baseline:
        fresh = move_network(args, build_model(args).backbone)
        rates = args.baseline_learning_rate, args.baseline_learning_rate
        scratch_scores, _ = finetune_and_score(args, fresh, train, val, rates, 'from scratch')
        result |= {
            'top1_from_scratch': topk_accuracy(scratch_scores, labels, 1),
            'top5_from_scratch': topk_accuracy(scratch_scores, labels, 5),
        }
    return {**result, 'num_train': len(train), 'num_val': len(val)}, scores, labels


def finetune_and_score(args, backbone, train, val, rates, title):
    """Train backbone and head by SGD on random crops and flips, with a cosine schedule. rates: base learning rates of
    backbone and head, x batch / 256. Returns (scores, labels) of val after the last epoch. Raises WorkError if the loss
    is not finite.
    """
    device, size = get_device(args), min(args.finetune_batch_size, len(train))
    few_args = replace_args(args, batch_size=size)
    crops = supervised_loader(few_args, train, drop_last=True)
    sides = args.num_channels, args.image_size, args.image_size
    with torch.no_grad():
        width = backbone.eval()(torch.zeros(1, *sides, device=device)).shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.random_seed)
        head = nn.Linear(width, len(val.classes)).to(device)
    groups = [{'params': list(backbone.parameters())}, {'params': list(head.parameters())}]
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, weight_decay=args.finetune_weight_decay)
    steps = len(crops)
    for epoch in progress(range(args.finetune_epochs), title, 'epochs'):
        backbone.train()
        for step, (view, labels) in enumerate(augmented_batches(few_args, crops, epoch)):
            for group, base in zip(optimizer.param_groups, rates, strict=True):
                fraction_done = (epoch + step / steps) / args.finetune_epochs
                group['lr'] = lr_schedule(fraction_done, args.finetune_warmup, base * size / 256)
            seed_step(args.random_seed, title, epoch, step)
            with autocast(args, uses_grad_scaler=False):
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
    outputs = []
    with torch.inference_mode():
        for images, labels in prefetch_to_device(args, eval_loader(args, val)):
            view = eval_view(images, args)
            for part, part_labels in zip(
                view.split(max_eval_batch(args)), labels.split(max_eval_batch(args)), strict=True
            ):
                with autocast(args, uses_grad_scaler=False):
                    scores = head(backbone(channels_last(part)))
                outputs.append((scores.float(), part_labels))
    return tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))


def rows_per_class(labels, seed):
    """Return a list with the row numbers of each class that has images, in random order."""
    order = torch.randperm(len(labels), generator=generator_for(seed, 'label fraction'))
    order = order[labels[order].argsort(stable=True)]
    return order.split(labels.unique(return_counts=True)[1].tolist())
