"""Accuracy with few labels per class: a linear classifier on frozen features, averaged over random label subsets.

The subsets depend only on the labels of the dataset, so they are the same for every backbone.
"""

import torch

from metric.accuracy import topk_accuracy
from metric.knn import clip_k, weighted_vote
from metric.standardization import MIN_STD
from protocols.features import extract_features
from protocols.knn import nearest_in_bank
from protocols.logistic import logistic_regression
from runtime.checkpoints.best_epoch import WATCHED
from runtime.device import explain_oom
from runtime.distributed import all_reduce_sum, world_size
from runtime.messages import log
from runtime.seeding import generator_for
from runtime.tensors import zeros_f64

L2 = 0.1  # of the logistic regression on standardized features: sum of cross-entropies + 0.1 / 2 |w|^2
DRAWS = 5  # label subsets, in training
MAX_ROWS = 20_000  # labeled images of all subsets together: with many classes there are fewer subsets


def draw_label_subset(labels, per_class, draw):
    """Draw `per_class` random row numbers of each class (all of a smaller class). labels: N, int64, >= 0; draw: the
    number of the subset."""
    order = torch.randperm(len(labels), generator=generator_for('few labels', per_class, draw))
    order = order[labels[order].argsort(stable=True)]
    counts = labels.unique(return_counts=True)[1].tolist()
    return torch.cat([rows[:per_class] for rows in order.split(counts)])


def log_missing_labels(title, labels, counts):
    """Log which numbers of labels per class are more than some classes have. labels: N, -1 for none."""
    sizes = labels[labels >= 0].unique(return_counts=True)[1]
    for count in counts:
        if short := int((sizes < count).sum()):
            log(f'{title}: {short} of {len(sizes)} classes have fewer than {count} labeled images: all are used')


def draw_label_subsets(labels, per_class, draws):
    """Return a list of subsets from draw_label_subset, `draws` of them or fewer, so that they have at most MAX_ROWS in
    all."""
    first = draw_label_subset(labels, per_class, 0)
    draws = max(1, min(draws, MAX_ROWS // max(1, len(first))))
    return [first, *(draw_label_subset(labels, per_class, draw) for draw in range(1, draws))]


def classify(x, labels, queries, num_classes):
    """Classify queries, Q x d, by logistic regression on x, n x d, with labels, n. Returns class numbers, Q."""
    weight, bias = logistic_regression(x, labels, num_classes, L2)
    return (queries @ weight.T + bias).argmax(1)


def score_few_labels(x, labels, rows, queries, query_labels, num_classes):
    """Classify the queries with each of D label subsets. Returns which are correct, D x Q float64 of 0 and 1.

    x: standardized features of the rows of all subsets, sorted by row number. labels: N, of the whole dataset. rows:
    list of row-number tensors, one per subset. queries: Q x d, standardized likewise, with labels query_labels, Q.
    """
    drawn_rows = torch.cat(rows).unique()
    right = torch.zeros(len(rows), len(queries), dtype=torch.float64)
    for number, draw in enumerate(rows):
        chosen = torch.searchsorted(drawn_rows, draw).to(x.device)
        predicted = classify(x[chosen], labels[draw].to(x.device), queries, num_classes)
        right[number] = (predicted == query_labels).cpu()
    return right


def mean_and_error(right):
    """Return the mean and its standard error, in percent. right: D x N float64, of D label subsets and N images: 0 or
    1, or the difference of two backbones.

    Images and subsets are both samples, so the squared error is var(means of the images) / N + var(means of the
    subsets) / D. One subset (kNN, all labels) adds nothing. It is at least one image, as val may have three, unless all
    values are 0. The error of one image is nan.
    """
    num_draws, num_images = right.shape
    if num_images < 2:
        return 100 * right.mean().item(), float('nan')
    variance = right.mean(0).var() / num_images
    if num_draws > 1:
        variance = variance + right.mean(1).var() / num_draws
    least = 1 / num_images if right.any() else 0.0
    return 100 * right.mean().item(), 100 * max(variance.sqrt().item(), least)


def accuracy_and_error(right):
    """mean_and_error of an accuracy, whose error is at least one image also if all images are wrong."""
    top1, error = mean_and_error(right)
    return top1, max(error, 100 / right.shape[1])


class Sample:
    """Collects some rows of a bank of features that is passed in parts, and the mean and standard deviation of all.

    rows: sorted row numbers. With several ranks each passes its own part, and `finish` combines them.
    """

    def __init__(self, rows):
        self.rows, self.x, self.count = rows, None, 0

    def update(self, features, first):
        """Take the selected rows from features, n x d: the bank's rows number `first` to first + n - 1."""
        if self.x is None:
            self.x = features.new_zeros(len(self.rows), features.shape[1])
            self.sums = zeros_f64(2, features.shape[1], device=features.device)
        double = features.to(self.sums.dtype)
        self.sums += torch.stack((double.sum(0), double.square().sum(0)))
        self.count += len(features)
        low, high = torch.searchsorted(self.rows, torch.tensor([first, first + len(features)])).tolist()
        self.x[low:high] = features[(self.rows[low:high] - first).to(features.device)]

    def finish(self, count):
        """Standardize the collected rows by the mean and standard deviation of all `count` features. Returns these, d
        each."""
        if world_size() > 1:
            self.x, self.sums = all_reduce_sum(self.x), all_reduce_sum(self.sums)
        mean = self.sums[0] / count
        deviation = (self.sums[1] / count - mean.square()).clamp(min=0).sqrt().clamp(min=MIN_STD)
        mean, deviation = mean.to(self.x), deviation.to(self.x)
        self.x = (self.x - mean) / deviation
        return mean, deviation


def measure_labels(args, backbone, bank, val):
    """Compute the labeled metrics of training in one pass over bank and val (loaders). Returns (kNN top-1 in percent,
    which images of val are classified correctly, D x Q float64: score_few_labels)."""
    with explain_oom('the kNN test', '--knn_every=0 trains without it'):
        queries, query_labels = extract_features(args, backbone, val, 'kNN: features of val')
        labels, num_classes = bank.dataset.labels, len(val.dataset.classes)
        rows = draw_label_subsets(labels, WATCHED, DRAWS)
        sample = Sample(torch.cat(rows).unique())
        cosine, near = nearest_in_bank(args, backbone, bank, queries, clip_k(args.knn_k, labels), sample)
        scores = weighted_vote(cosine, labels.to(near.device)[near], num_classes, args.knn_temperature)
        mean, deviation = sample.finish(len(labels))
        right = score_few_labels(sample.x, labels, rows, (queries - mean) / deviation, query_labels, num_classes)
        return topk_accuracy(scores, query_labels, 1), right
