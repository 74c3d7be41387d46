"""Select images to label first, near-duplicates and outliers, from their features.

x: N x d features. Distances are cosines of the centered features: without centering, the common mean of a network's
features makes every cosine near 1.
"""

import warnings

import torch
from torch.nn.functional import normalize

from metric.knn import topk_neighbors

NEIGHBORS = 20  # neighbors that define an image's typicality (TypiClust, section 3)
MAX_CLUSTERS = 500
CHUNK_ROWS = 1024  # rows per matrix of cosines to all others


def center_and_normalize(x):
    """Center x and normalize its rows to length 1. Rows within rounding error of the mean become 0."""
    centered = x - x.mean(0)
    rounding = 1e-5 * x.norm(dim=1, keepdim=True).mean()
    return torch.where(centered.norm(dim=1, keepdim=True) > rounding, normalize(centered, dim=1), 0)


def k_center_greedy(x, count, seed=0, labeled=()):
    """Select `count` rows by greedy k-center (Sener and Savarese, arXiv 1708.00489): each is the farthest from all
    selected before it and from the rows `labeled`, which are not selected. Without these the first is the nearest to
    the mean (seed 0), or row seed % N. Returns row numbers in order of selection.
    """
    x = center_and_normalize(x)
    row = int((x @ x.mean(0)).argmax()) if not seed else seed % len(x)
    max_cosine_to_chosen, rows = torch.full((len(x),), -2.0, device=x.device), []
    for known in labeled:
        max_cosine_to_chosen = torch.maximum(max_cosine_to_chosen, x @ x[known])
    if len(labeled):
        max_cosine_to_chosen[labeled] = 2.0
        row = int(max_cosine_to_chosen.argmin())
    for _ in range(min(count, len(x) - len(labeled))):
        rows.append(row)
        max_cosine_to_chosen = torch.maximum(max_cosine_to_chosen, x @ x[row])
        max_cosine_to_chosen[row] = 2.0
        row = int(max_cosine_to_chosen.argmin())
    return torch.tensor(rows)


def typiclust(x, count, seed=0, labeled=()):
    """Select `count` rows by TypiClust (Hacohen et al., arXiv 2202.02794, section 3), for small label budgets.

    k-means with a cluster for each labeled row and each of `count`, at most MAX_CLUSTERS; then the most typical
    remaining row of each cluster in turn, first of those without a row of `labeled`, from the largest cluster to the
    smallest, until `count` are selected. Returns row numbers in order of selection, none of `labeled`.
    """
    from sklearn.cluster import KMeans

    x, count = center_and_normalize(x), min(count, len(x) - len(labeled))
    clusters = min(count + len(labeled), MAX_CLUSTERS)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # fewer distinct images than clusters: empty clusters are dropped below
        labels = KMeans(clusters, n_init=1, random_state=seed).fit(x.cpu().numpy()).labels_
    members = [rows for rows in (torch.from_numpy(labels == i).nonzero()[:, 0] for i in range(clusters)) if len(rows)]
    is_labeled = torch.zeros(len(x), dtype=torch.bool)
    is_labeled[list(labeled)] = True
    members.sort(key=lambda rows: (bool(is_labeled[rows].any()), -len(rows)))
    ordered = [rows[typicality(x[rows.to(x.device)]).argsort(descending=True).cpu()] for rows in members]
    ordered = [rows[~is_labeled[rows]] for rows in ordered]
    rounds = max(map(len, ordered))
    rows = [int(cluster[turn]) for turn in range(rounds) for cluster in ordered if turn < len(cluster)]
    return torch.tensor(rows[:count])


def typicality(x):
    """Return the typicality of each row, N: the mean cosine to its NEIGHBORS nearest rows. x: N x d, normalized."""
    if len(x) == 1:
        return x.new_zeros(1)
    cosine, _ = topk_neighbors(x, x, min(NEIGHBORS + 1, len(x)))
    return cosine[:, 1:].mean(1)  # the first is the row itself


def append_zero_flag(x):
    """Append a column to x, N x d: 1 for zero rows (images at the mean), so that they count as duplicates of each
    other, else 0."""
    return torch.cat((x, (~x.any(1, keepdim=True)).to(x)), 1)


def near_groups(x, least):
    """Find groups of near-duplicates: connected components of the graph of cosines above `least`. x: N x d.

    Returns four tensors of length M, sorted by group: row numbers, group numbers (0 is the largest group), the nearest
    other row of each, and the cosine to it. Memory grows with N, not with the number of pairs.
    """
    x = append_zero_flag(center_and_normalize(x))
    count, near, cosines = len(x), torch.zeros(len(x), dtype=torch.int64), torch.full((len(x),), -2.0)
    labels, previous = torch.arange(count, device=x.device), None
    while previous is None or not torch.equal(labels, previous):  # each row takes the smallest label it is joined to
        previous, new_labels = labels, labels.clone()
        for start in range(0, count, CHUNK_ROWS):
            cosine = x[start : start + CHUNK_ROWS] @ x.T
            row_index = torch.arange(len(cosine), device=x.device)
            if start == 0 or cosines[start] == -2.0:
                alone = cosine.index_put((row_index, row_index + start), cosine.new_tensor(-2.0))
                values, rows = alone.max(1)
                cosines[start : start + CHUNK_ROWS], near[start : start + CHUNK_ROWS] = values.cpu(), rows.cpu()
            touched = torch.where(cosine > least, labels, count).min(1).values
            new_labels[start : start + CHUNK_ROWS] = torch.minimum(touched, new_labels[start : start + CHUNK_ROWS])
        labels = new_labels[new_labels]
    labels = labels.cpu()
    rows = (torch.bincount(labels, minlength=count)[labels] > 1).nonzero()[:, 0]
    _, number, counts = labels[rows].unique(return_inverse=True, return_counts=True)
    group_rank = torch.empty_like(counts)
    group_rank[counts.argsort(descending=True, stable=True)] = torch.arange(len(counts))
    order = group_rank[number].argsort(stable=True)
    rows, number = rows[order], group_rank[number][order]
    return rows, number, near[rows], cosines[rows]


def nearest_pairs(rows, near, cosines):
    """Return [(row, other row, cosine)] from the results of near_groups, each pair once, the nearest first."""
    pairs = {}
    for row, other, cosine in zip(rows.tolist(), near.tolist(), cosines.tolist(), strict=True):
        pairs.setdefault((min(row, other), max(row, other)), cosine)
    return [(*pair, cosine) for pair, cosine in sorted(pairs.items(), key=lambda item: -item[1])]


def outliers(x, count):
    """Return (row numbers, typicality) of the `count` least typical rows, the least typical first."""
    near = typicality(append_zero_flag(center_and_normalize(x)))
    values, rows = near.sort()
    return rows[:count].cpu(), values[:count].cpu()
