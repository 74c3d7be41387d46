"""Which images to label first, which are double, which are odd: by their features alone.

x: N x d features; all is by cosine, on directions of the centred features, for those of a network have a common part
that makes every cosine near 1.
"""

import warnings

import torch
from torch.nn.functional import normalize

from metric.knn import topk_neighbors

NEIGHBORS = 20  # of an image that say how typical it is (TypiClust, section 3)
MOST_CLUSTERS = 500
PART = 1024  # rows whose cosines to all are held at once


def center_and_normalize(x):
    """x, centred and at length 1; 0 for a row that is the mean but for rounding, as all are of a set of one image."""
    centered = x - x.mean(0)
    rounding = 1e-5 * x.norm(dim=1, keepdim=True).mean()
    return torch.where(centered.norm(dim=1, keepdim=True) > rounding, normalize(centered, dim=1), 0)


def k_center_greedy(x, count, seed=0):
    """`count` rows, each the one farthest from all before it; the first is the nearest to the mean (seed 0), or any.

    Sener and Savarese, arXiv 1708.00489: greedy k-centre. Returns row numbers, in the order chosen.
    """
    x = center_and_normalize(x)
    row = int((x @ x.mean(0)).argmax()) if not seed else seed % len(x)
    max_cosine_to_chosen, rows = torch.full((len(x),), -2.0, device=x.device), []
    for _ in range(min(count, len(x))):
        rows.append(row)
        max_cosine_to_chosen = torch.maximum(max_cosine_to_chosen, x @ x[row])
        max_cosine_to_chosen[row] = 2.0
        row = int(max_cosine_to_chosen.argmin())
    return torch.tensor(rows)


def typiclust(x, count, seed=0):
    """`count` rows, the most typical of each of so many clusters: the one whose NEIGHBOURS in it are nearest.

    TypiClust (Hacohen et al., arXiv 2202.02794, section 3), for few labels: as many clusters (k-means) as images are
    wanted, up to MOST_CLUSTERS, from the largest on, round after round. Returns row numbers, in the order chosen.
    """
    from sklearn.cluster import KMeans

    x, count = center_and_normalize(x), min(count, len(x))
    clusters = min(count, MOST_CLUSTERS)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # fewer different images than clusters: the empty ones are left out below
        labels = KMeans(clusters, n_init=1, random_state=seed).fit(x.cpu().numpy()).labels_
    members = [rows for rows in (torch.from_numpy(labels == i).nonzero()[:, 0] for i in range(clusters)) if len(rows)]
    ordered = [
        rows[typicality(x[rows.to(x.device)]).argsort(descending=True).cpu()]
        for rows in sorted(members, key=len, reverse=True)
    ]
    rounds = max(map(len, ordered))
    rows = [int(of[turn]) for turn in range(rounds) for of in ordered if turn < len(of)]
    return torch.tensor(rows[:count])


def typicality(x):
    """How near each row's NEIGHBOURS are, N: the mean of their cosines. x: N x d, of length 1."""
    if len(x) == 1:
        return x.new_zeros(1)
    cosine, _ = topk_neighbors(x, x, min(NEIGHBORS + 1, len(x)))
    return cosine[:, 1:].mean(1)  # the first is the row itself


def append_zero_flag(x):
    """Directions, N x d, and one number more: 1 for rows at the mean, that have none and are one another's doubles."""
    return torch.cat((x, (~x.any(1, keepdim=True)).to(x)), 1)


def near_groups(x, least):
    """Groups of near-duplicates, N x d: two rows are of one group where a chain of cosines above `least` joins them.

    Returns (rows, M; the number of the group of each, M, 0 the largest; the row nearest to each, M; its cosine, M). The
    rows come group by group. The memory grows with the rows, not with the pairs that are near.
    """
    x = append_zero_flag(center_and_normalize(x))
    count, near, cosines = len(x), torch.zeros(len(x), dtype=torch.int64), torch.full((len(x),), -2.0)
    labels, before = torch.arange(count, device=x.device), None
    while before is None or not torch.equal(labels, before):  # each row takes the least number that it touches
        before, found = labels, labels.clone()
        for start in range(0, count, PART):
            cosine = x[start : start + PART] @ x.T
            here = torch.arange(len(cosine), device=x.device)
            if start == 0 or cosines[start] == -2.0:
                alone = cosine.index_put((here, here + start), cosine.new_tensor(-2.0))
                values, rows = alone.max(1)
                cosines[start : start + PART], near[start : start + PART] = values.cpu(), rows.cpu()
            touched = torch.where(cosine > least, labels, count).min(1).values
            found[start : start + PART] = torch.minimum(touched, found[start : start + PART])
        labels = found[found]
    labels = labels.cpu()
    rows = (torch.bincount(labels, minlength=count)[labels] > 1).nonzero()[:, 0]
    _, number, counts = labels[rows].unique(return_inverse=True, return_counts=True)
    place = torch.empty_like(counts)
    place[counts.argsort(descending=True, stable=True)] = torch.arange(len(counts))
    order = place[number].argsort(stable=True)
    rows, number = rows[order], place[number][order]
    return rows, number, near[rows], cosines[rows]


def nearest_pairs(rows, near, cosines):
    """[(row, other, cosine)] of near_groups' rows and the row nearest to each, each pair once, the nearest first."""
    found = {}
    for row, other, cosine in zip(rows.tolist(), near.tolist(), cosines.tolist(), strict=True):
        found.setdefault((min(row, other), max(row, other)), cosine)
    return [(*pair, cosine) for pair, cosine in sorted(found.items(), key=lambda item: -item[1])]


def outliers(x, count):
    """(the `count` rows that are farthest from their neighbours, how near those are), the oddest first."""
    near = typicality(append_zero_flag(center_and_normalize(x)))
    values, rows = near.sort()
    return rows[:count].cpu(), values[:count].cpu()
