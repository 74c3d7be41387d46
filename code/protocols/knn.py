"""kNN on frozen features: the monitor of training (paper appendix D), and a protocol of its own."""

import torch

from ckpt import new_model
from dataloader.load_dataset import in_order, labelled
from metric.accuracy import topk_accuracy
from metric.knn import knn_scores, neighbours
from protocols.features import features_of
from utils import get_device, memory_for


def knn(args, model, splits):
    """Top-1 and top-5 of val by its neighbours in train, in percent. Returns (result, scores, labels, None, classes).

    Also the top-1 of an untrained backbone (what does not rise above it has learned nothing), and on request of raw
    pixels.
    """
    bank, val = in_order(args, labelled(splits['train'])), in_order(args, splits['val'])
    train_features, train_labels = features_of(args, model.backbone, bank, 'features of train')
    val_features, val_labels = features_of(args, model.backbone, val, 'features of val')
    scores = vote(args, train_features, train_labels, val_features, len(splits['val'].classes))
    result = {
        'top1': topk_accuracy(scores, val_labels, 1),
        'top5': topk_accuracy(scores, val_labels, 5),
        'k': neighbours(args.knn_k, train_labels),
        'num_train': len(train_labels),
        'num_val': len(val_labels),
        **references(args, bank, val),
    }
    return result, scores, val_labels, None, splits['val'].classes


def references(args, bank, val):
    """What kNN gives without any training: {'knn_top1_untrained': percent, and with --knn_pixels 'knn_top1_pixels'}."""
    untrained = new_model(args).backbone.to(get_device(args), memory_format=torch.channels_last)
    found = {'knn_top1_untrained': knn_accuracy(args, untrained, bank, val)}
    if args.knn_pixels:
        found['knn_top1_pixels'] = knn_accuracy(args, torch.nn.Flatten(), bank, val)
    return found


def knn_accuracy(args, backbone, bank, val):
    """Top-1 in percent of kNN on the backbone's features: the neighbours are `bank`'s, `val` is judged (batches)."""
    with memory_for('the kNN test', '--knn_every=0 trains without it'):
        train_features, train_labels = features_of(args, backbone, bank, 'kNN: features of train')
        val_features, val_labels = features_of(args, backbone, val, 'kNN: features of val')
        scores = vote(args, train_features, train_labels, val_features, len(val.dataset.classes))
        return topk_accuracy(scores, val_labels, 1)


def vote(args, train_features, train_labels, features, num_classes):
    """Scores, N x num_classes, of knn_scores with the options' k and temperature."""
    k = neighbours(args.knn_k, train_labels)
    return knn_scores(features, train_features, train_labels, num_classes, k, args.knn_temperature)
