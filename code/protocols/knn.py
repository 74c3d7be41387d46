"""kNN on frozen features: the monitor of training (paper appendix D), and a protocol of its own.

The features of the bank are looked at as they come, so that it may be of any size; of several processes each looks at
its own part.
"""

import torch

from ckpt import build_model
from dataloader.load_dataset import eval_loader, labeled_subset
from metric.accuracy import topk_accuracy
from metric.knn import TopKSearch, clip_k, weighted_vote
from protocols.features import extract_features, iter_features
from protocols.protocol import TOP, Outcome, Protocol, labeled_splits
from runtime.device import explain_oom, get_device
from runtime.distributed import all_gather_rows, rank, world_size


def knn(args, model, splits, _):
    """Top-1 and top-5 of val by its neighbours in train, in percent.

    Also the top-1 of an untrained backbone (what does not rise above it has learned nothing), and on request of raw
    pixels.
    """
    bank, val = eval_loader(args, labeled_subset(splits['train'])), eval_loader(args, splits['val'])
    scores, labels = knn_classify(args, model.backbone, bank, val)
    result = {
        'top1': topk_accuracy(scores, labels, 1),
        'top5': topk_accuracy(scores, labels, 5),
        'k': clip_k(args.knn_k, bank.dataset.labels),
        'num_train': len(bank.dataset),
        'num_val': len(labels),
        **untrained_baselines(args, bank, val),
    }
    return Outcome(result, scores, labels, splits['val'].classes)


def untrained_baselines(args, bank, val):
    """What kNN gives without any training: {'knn_top1_untrained': percent, and with --knn_raw_pixels
    'knn_top1_pixels'}."""
    untrained = build_model(args).backbone.to(get_device(args), memory_format=torch.channels_last)
    found = {'knn_top1_untrained': knn_accuracy(args, untrained, bank, val)}
    if args.knn_raw_pixels:
        found['knn_top1_pixels'] = knn_accuracy(args, torch.nn.Flatten(), bank, val)
    return found


def knn_accuracy(args, backbone, bank, val):
    """Top-1 in percent of kNN on the backbone's features: the neighbours are `bank`'s, `val` is judged (batches)."""
    with explain_oom('the kNN test', '--knn_every=0 trains without it'):
        return topk_accuracy(*knn_classify(args, backbone, bank, val), 1)


def knn_classify(args, backbone, bank, val):
    """(scores, N x classes, labels) of val (batches) by its neighbours in bank (batches)."""
    features, labels = extract_features(args, backbone, val, 'kNN: features of val')
    return knn_scores_from_loader(args, backbone, bank, features, len(val.dataset.classes)), labels


def knn_scores_from_loader(args, backbone, bank, queries, num_classes):
    """Scores, Q x num_classes, of queries, Q x d, by their neighbours among the labelled images of bank (batches)."""
    labels = bank.dataset.labels
    cosine, rows = nearest_in_bank(args, backbone, bank, queries, clip_k(args.knn_k, labels))
    return weighted_vote(cosine, labels.to(rows.device)[rows], num_classes, args.knn_temperature)


def nearest_in_bank(args, backbone, bank, queries, k, sample=None):
    """(cosines, row numbers in bank), Q x k, of the images of bank (batches) whose features are nearest to queries.
    sample: a few_labels.Sample, which is shown the same features."""
    count = len(bank.dataset)
    found, row = TopKSearch(queries, min(k, count)), rank() * -(-count // world_size())
    for features, _ in iter_features(args, backbone, bank, 'kNN: features of train'):
        found.see(features, row)
        if sample:
            sample.see(features, row)
        row += len(features)
    if world_size() == 1:
        return found.cosine, found.rows
    cosine, rows = (all_gather_rows(x.T.contiguous()).T for x in (found.cosine, found.rows))
    cosine, best = cosine.topk(found.cosine.shape[1], dim=1)
    return cosine, rows.gather(1, best)


REFERENCES = {'knn_top1_untrained': 'kNN top-1 untrained', 'knn_top1_pixels': 'kNN top-1 raw pixels'}
PROTOCOL = Protocol(knn, labeled_splits, {**TOP, **REFERENCES}, '--batch_size', several_ranks=True)
