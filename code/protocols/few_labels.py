"""Accuracy with few labels a class: a linear classifier on frozen features, over several draws of the labelled images.

The draws depend on the classes of the images alone, so that every backbone that is judged on a set sees the same ones.
"""

import torch

from ckpt import WATCHED
from metric.knn import clip_k, weighted_vote
from protocols.features import extract_features
from protocols.knn import nearest_in_bank
from protocols.transfer import logistic_regression
from runtime.device import explain_oom
from runtime.distributed import all_reduce_sum, world_size
from runtime.seeding import generator_for

L2 = 0.1  # of the logistic regression, on standardized features: 0.1 / 2 |w|^2 beside the sum of the cross-entropies
DRAWS = 5  # of labels, that training looks at
MOST_ROWS = 20_000  # labelled images of all draws together: with very many classes there are fewer draws


def draw_rows(labels, per_class, draw):
    """Row numbers of `per_class` images of each class, of all that a smaller class has. labels: N, int64, >= 0; draw:
    the number of the draw."""
    order = torch.randperm(len(labels), generator=generator_for('few labels', per_class, draw))
    order = order[labels[order].argsort(stable=True)]
    counts = labels.unique(return_counts=True)[1].tolist()
    return torch.cat([rows[:per_class] for rows in order.split(counts)])


def draw_label_subsets(labels, per_class, draws):
    """draw_rows of so many draws, fewer where all together would be more than MOST_ROWS."""
    first = draw_rows(labels, per_class, 0)
    draws = max(1, min(draws, MOST_ROWS // max(1, len(first))))
    return [first, *(draw_rows(labels, per_class, draw) for draw in range(1, draws))]


def classify(x, labels, queries, num_classes):
    """Class numbers of `queries`, Q x d, by logistic regression on x, n x d, with labels, n; standardized features."""
    weight, bias = logistic_regression(x, labels, num_classes, L2)
    return (queries @ weight.T + bias).argmax(1)


def score_few_labels(x, labels, rows, queries, wanted, num_classes):
    """Share of the draws in which each query is classified rightly, Q float64, and each draw's accuracy in percent.

    x: features of the rows of all draws, in the order of `rows.unique()`, standardized as queries, Q x d, are; rows: a
    tensor of row numbers for each draw; labels: of the whole set.
    """
    where = torch.cat(rows).unique()
    right, accuracies = torch.zeros(len(queries), dtype=torch.float64), []
    for draw in rows:
        chosen = torch.searchsorted(where, draw).to(x.device)
        found = classify(x[chosen], labels[draw].to(x.device), queries, num_classes) == wanted
        right += found.cpu().double() / len(rows)
        accuracies.append(100 * found.double().mean().item())
    return right, accuracies


class Sample:
    """Some rows of a bank that is shown in parts, and mean and standard deviation of all its features.

    rows: sorted row numbers. With several processes each is shown its own part, and `finish` makes them one.
    """

    def __init__(self, rows):
        self.rows, self.x, self.count = rows, None, 0

    def see(self, features, first):
        """Features, n x d, of the bank's rows number `first` to first + n - 1."""
        if self.x is None:
            self.x = features.new_zeros(len(self.rows), features.shape[1])
            self.sums = features.new_zeros(2, features.shape[1], dtype=torch.float64)
        double = features.double()
        self.sums += torch.stack((double.sum(0), double.square().sum(0)))
        self.count += len(features)
        low, high = torch.searchsorted(self.rows, torch.tensor([first, first + len(features)])).tolist()
        self.x[low:high] = features[(self.rows[low:high] - first).to(features.device)]

    def finish(self, count):
        """Mean and standard deviation, d each, of all `count` features; the rows are standardized with them."""
        if world_size() > 1:
            self.x, self.sums = all_reduce_sum(self.x), all_reduce_sum(self.sums)
        mean = self.sums[0] / count
        deviation = (self.sums[1] / count - mean.square()).clamp(min=0).sqrt().clamp(min=1e-6)
        mean, deviation = mean.to(self.x), deviation.to(self.x)
        self.x = (self.x - mean) / deviation
        return mean, deviation


def measure_labels(args, backbone, bank, val):
    """What training looks at where there are labels: (kNN top-1 in percent, shares of right draws of each image of val,
    Q float64). One pass over bank and val (batches)."""
    with explain_oom('the kNN test', '--knn_every=0 trains without it'):
        queries, wanted = extract_features(args, backbone, val, 'kNN: features of val')
        labels, num_classes = bank.dataset.labels, len(val.dataset.classes)
        rows = draw_label_subsets(labels, WATCHED, DRAWS)
        sample = Sample(torch.cat(rows).unique())
        cosine, near = nearest_in_bank(args, backbone, bank, queries, clip_k(args.knn_k, labels), sample)
        scores = weighted_vote(cosine, labels.to(near.device)[near], num_classes, args.knn_temperature)
        mean, deviation = sample.finish(len(labels))
        right, _ = score_few_labels(sample.x, labels, rows, (queries - mean) / deviation, wanted, num_classes)
        return 100 * (scores.argmax(1) == wanted).double().mean().item(), right
