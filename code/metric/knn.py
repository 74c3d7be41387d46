"""Weighted k-nearest-neighbour classification (Wu et al., arXiv 1805.01978, section 3.4), the paper's monitor."""

import torch
from torch.nn.functional import normalize


def knn_scores(queries, bank, labels, num_classes, k, temperature, chunk=1024):
    """Each class's share of the votes of a query's k nearest neighbours by cosine; a vote weighs exp(cosine / T).

    queries: Q x d; bank: N x d; labels: N int64, all >= 0. Works `chunk` queries at a time. Returns Q x num_classes,
    rows that sum to 1.
    """
    bank, k = normalize(bank, dim=1).T, min(k, len(labels))
    scores = []
    for part in normalize(queries, dim=1).split(chunk):
        cosine, nearest = (part @ bank).topk(k, dim=1)
        weight = torch.exp((cosine - 1) / temperature)  # the 1 cancels in the shares and keeps exp from overflowing
        votes = weight.new_zeros(len(part), num_classes).scatter_add_(1, labels[nearest], weight)
        scores.append(votes / votes.sum(1, keepdim=True))
    return torch.cat(scores)


def nearest(queries, bank, k):
    """(cosines, row numbers in bank), both Q x k, of each query's k nearest, the nearest first. For few queries."""
    return (normalize(queries, dim=1) @ normalize(bank, dim=1).T).topk(min(k, len(bank)), dim=1)


def neighbours(k, labels):
    """k, or the images a class has on average where that is fewer: more neighbours than that must be wrong ones."""
    return max(1, min(k, len(labels) // max(1, len(labels.unique()))))
