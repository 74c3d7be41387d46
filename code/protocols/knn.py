"""kNN on frozen features: a metric during training (paper appendix D), and a protocol.

The features of the training images are not stored, so their number is not limited. With several ranks each searches its
own part.
"""

import torch

from dataloader.load_dataset import eval_loader, labeled_subset
from metric.accuracy import topk_accuracy
from metric.knn import TopKSearch, clip_k, weighted_vote
from protocols.features import extract_features, iter_features
from protocols.protocol import TOP, Outcome, Protocol, labeled_splits
from runtime.checkpoints.load_state import build_model
from runtime.device import move_network
from runtime.distributed import all_gather_rows, rank, rows_per_rank, world_size
from runtime.messages import log


def evaluate_knn(args, model, splits, _):
    """Classify val by its neighbors in train. Returns an Outcome with top-1 and top-5 in percent, the top-1 of an
    untrained backbone for reference, and with --knn_raw_pixels that of the pixels.
    """
    bank, val = eval_loader(args, labeled_subset(splits['train'])), eval_loader(args, splits['val'])
    log_clipped_k(args, bank.dataset.labels)
    scores, labels = knn_classify(args, model.backbone, bank, val)
    result = {
        'top1': topk_accuracy(scores, labels, 1),
        'top5': topk_accuracy(scores, labels, 5, least=0),  # without a vote a class is not predicted
        'k': clip_k(args.knn_k, bank.dataset.labels),
        'num_train': len(bank.dataset),
        'num_val': len(labels),
        **untrained_baselines(args, bank, val),
    }
    return Outcome(result, scores, labels, splits['val'].classes)


def log_clipped_k(args, labels):
    """Log the number of neighbors if it is less than --knn_k. labels: of train."""
    if (k := clip_k(args.knn_k, labels)) < args.knn_k:
        log(f'kNN with {k} neighbors in place of {args.knn_k}: a class has no more images on average')


def untrained_baselines(args, bank, val):
    """Return the kNN accuracies without training: {'knn_top1_untrained': percent, and with --knn_raw_pixels
    'knn_top1_pixels'}."""
    untrained = move_network(args, build_model(args).backbone)
    accuracies = {'knn_top1_untrained': knn_accuracy(args, untrained, bank, val)}
    if args.knn_raw_pixels:
        accuracies['knn_top1_pixels'] = knn_accuracy(args, torch.nn.Flatten(), bank, val)
    return accuracies


def knn_accuracy(args, backbone, bank, val):
    """Return the kNN top-1 of val in percent. bank, val: loaders."""
    return topk_accuracy(*knn_classify(args, backbone, bank, val), 1)


def knn_classify(args, backbone, bank, val):
    """Classify val by its neighbors in bank (loaders). Returns (scores, N x classes, labels)."""
    features, labels = extract_features(args, backbone, val, 'kNN: features of val')
    return knn_scores_from_loader(args, backbone, bank, features, len(val.dataset.classes)), labels


def knn_scores_from_loader(args, backbone, bank, queries, num_classes):
    """Classify queries, Q x d, by their neighbors in bank, a loader of labeled images. Returns Q x num_classes."""
    labels = bank.dataset.labels
    cosine, rows = nearest_in_bank(args, backbone, bank, queries, clip_k(args.knn_k, labels))
    return weighted_vote(cosine, labels.to(rows.device)[rows], num_classes, args.knn_temperature)


def nearest_in_bank(args, backbone, bank, queries, k, sample=None):
    """Search the k nearest images of bank, a loader, for each query, Q x d. Returns (cosine, row numbers in bank), Q x
    k. sample: a few_labels.Sample that gets the same features, or None."""
    count = len(bank.dataset)
    search, row = TopKSearch(queries, min(k, count)), rank() * rows_per_rank(count)
    for features, _ in iter_features(args, backbone, bank, 'kNN: features of train'):
        search.update(features, row)
        if sample:
            sample.update(features, row)
        row += len(features)
    if world_size() == 1:
        return search.cosine, search.rows
    cosine, rows = (all_gather_rows(x.T.contiguous()).T for x in (search.cosine, search.rows))
    cosine, best = cosine.topk(search.cosine.shape[1], dim=1)
    return cosine, rows.gather(1, best)


REFERENCES = {'knn_top1_untrained': 'kNN top-1 untrained', 'knn_top1_pixels': 'kNN top-1 raw pixels'}
PROTOCOL = Protocol(evaluate_knn, labeled_splits, {**TOP, **REFERENCES}, '--batch_size', several_ranks=True)
