"""Which images to label first, which are double, which are odd: by their features alone.

x: N x d features; all is by cosine, on directions of the centred features, for those of a network have a common part
that makes every cosine near 1.
"""

import warnings

import torch
from torch.nn.functional import normalize

from metric.knn import nearest

NEIGHBOURS = 20  # of an image that say how typical it is (TypiClust, section 3)
MOST_CLUSTERS = 500


def directions(x):
    """x, centred and at length 1; 0 for a row that is the mean but for rounding, as all are of a set of one image."""
    centred = x - x.mean(0)
    rounding = 1e-5 * x.norm(dim=1, keepdim=True).mean()
    return torch.where(centred.norm(dim=1, keepdim=True) > rounding, normalize(centred, dim=1), 0)


def k_centre(x, count, seed=0):
    """`count` rows, each the one farthest from all before it; the first is the nearest to the mean (seed 0), or any.

    Sener and Savarese, arXiv 1708.00489: greedy k-centre. Returns row numbers, in the order chosen.
    """
    x = directions(x)
    row = int((x @ x.mean(0)).argmax()) if not seed else seed % len(x)
    closest, rows = torch.full((len(x),), -2.0, device=x.device), []
    for _ in range(min(count, len(x))):
        rows.append(row)
        closest = torch.maximum(closest, x @ x[row])
        closest[row] = 2.0
        row = int(closest.argmin())
    return torch.tensor(rows)


def typical(x, count, seed=0):
    """`count` rows, the most typical of each of so many clusters: the one whose NEIGHBOURS in it are nearest.

    TypiClust (Hacohen et al., arXiv 2202.02794, section 3), for few labels: as many clusters (k-means) as images are
    wanted, up to MOST_CLUSTERS, from the largest on, round after round. Returns row numbers, in the order chosen.
    """
    from sklearn.cluster import KMeans

    x, count = directions(x), min(count, len(x))
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
    cosine, _ = nearest(x, x, min(NEIGHBOURS + 1, len(x)))
    return cosine[:, 1:].mean(1)  # the first is the row itself


def with_the_mean(x):
    """Directions, N x d, and one number more: 1 for rows at the mean, that have none and are one another's doubles."""
    return torch.cat((x, (~x.any(1, keepdim=True)).to(x)), 1)


def near_pairs(x, least):
    """(pairs of rows, P x 2, smaller number first; their cosines) above `least`, the nearest first."""
    x = with_the_mean(directions(x))
    found, values = [], []
    for start in range(0, len(x), 1024):
        cosine = x[start : start + 1024] @ x.T
        rows, others = (cosine > least).nonzero().T
        keep = rows + start < others
        found.append(torch.stack((rows[keep] + start, others[keep]), 1).cpu())
        values.append(cosine[rows[keep], others[keep]].cpu())
    pairs, values = torch.cat(found), torch.cat(values)
    order = values.argsort(descending=True)
    return pairs[order], values[order]


def oddest(x, count):
    """(the `count` rows that are farthest from their neighbours, how near those are), the oddest first."""
    near = typicality(with_the_mean(directions(x)))
    values, rows = near.sort()
    return rows[:count].cpu(), values[:count].cpu()
