"""What labels are worth by who chose them: accuracy after labelling the images that `select` names, and random ones.

    python3 bench/choice.py --output=results/choice_demo.json --ckpt_name=...

A logistic regression on the features of the chosen images of train, judged on val; five seeds of each way and number.
"""

import json
from statistics import mean

import common  # noqa: F401
import torch

from ckpt import get_model_ckpt
from dataloader.load_dataset import eval_loader, labeled_subset, load_splits
from metric import subset_selection
from metric.accuracy import topk_accuracy
from protocols.features import extract_features
from protocols.logistic import logistic_regression
from runtime.device import init_device
from runtime.errors import resolve_path
from runtime.options import get_config
from runtime.seeding import generator_for

COUNTS, SEEDS = (10, 20, 50, 100), range(5)


def at_random(x, count, seed):
    return torch.randperm(len(x), generator=generator_for('choice', seed))[:count]


WAYS = {'random': at_random, 'typical': subset_selection.typiclust, 'kcenter': subset_selection.k_center_greedy}


def accuracy(x, labels, rows, val, val_labels, num_classes):
    """Top-1 on val of a classifier of these rows, on features of one scale."""
    scale = x.std(0).clamp(min=1e-6)
    x, val = (x - x.mean(0)) / scale, (val - x.mean(0)) / scale
    weight, bias = logistic_regression(x[rows], labels[rows], num_classes, 1.0)
    return topk_accuracy(val @ weight.T + bias, val_labels, 1)


def main():
    import sys

    given = dict(text.removeprefix('--').split('=', 1) for text in sys.argv[1:])
    output = given.pop('output')
    args = get_config(**given)
    device = init_device(args)
    args, model, checkpoint = get_model_ckpt(args)
    splits, backbone = load_splits(args), model.backbone.to(device)
    train, val = labeled_subset(splits['train']), splits['val']
    x, labels = extract_features(args, backbone, eval_loader(args, train), 'train')
    val_x, val_labels = extract_features(args, backbone, eval_loader(args, val), 'val')
    top1 = {
        way: {
            count: [
                accuracy(x, labels, choose_rows(x, count, seed), val_x, val_labels, len(val.classes)) for seed in SEEDS
            ]
            for count in COUNTS
        }
        for way, choose_rows in WAYS.items()
    }
    for way, counts in top1.items():
        print(way, *(f'{count}: {mean(values):.1f}' for count, values in counts.items()))
    about = {'checkpoint': checkpoint['path'].name, 'epoch': checkpoint['epoch'], 'top1': top1}
    resolve_path(output).write_text(json.dumps(about, indent=1) + '\n')


if __name__ == '__main__':
    main()
