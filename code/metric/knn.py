"""Weighted k-nearest-neighbour classification (Wu et al., arXiv 1805.01978, section 3.4), the paper's monitor."""

import torch
from torch.nn.functional import normalize

BANK_CHUNK, QUERY_CHUNK = 4096, 8192  # rows of the bank and queries whose cosines are held at once


class TopKSearch:
    """Of each query the k nearest rows by cosine of a bank that is shown in parts, none of which is kept.

    queries: Q x d. cosine, rows: Q x k, the nearest first; where fewer than k were shown, cosine is -inf and row 0.
    """

    def __init__(self, queries, k):
        self.queries = normalize(queries, dim=1)
        self.cosine = self.queries.new_full((len(queries), k), -torch.inf)
        self.rows = torch.zeros(len(queries), k, dtype=torch.int64, device=queries.device)

    def see(self, bank, first):
        """Part of the bank, n x d, as its rows number `first` to first + n - 1."""
        for start in range(0, len(bank), BANK_CHUNK):
            piece = normalize(bank[start : start + BANK_CHUNK], dim=1).T
            for chunk in range(0, len(self.queries), QUERY_CHUNK):
                part = slice(chunk, chunk + QUERY_CHUNK)
                k = min(self.cosine.shape[1], piece.shape[1])
                cosine, rows = (self.queries[part] @ piece).topk(k, dim=1)
                cosine = torch.cat((self.cosine[part], cosine), 1)
                rows = torch.cat((self.rows[part], rows + first + start), 1)
                self.cosine[part], best = cosine.topk(self.cosine.shape[1], dim=1)
                self.rows[part] = rows.gather(1, best)


def weighted_vote(cosine, labels, num_classes, temperature):
    """Each class's share of the votes of a query's neighbours; a vote weighs exp(cosine / T).

    cosine: Q x k; labels: Q x k, int64, the neighbours', >= 0. Returns Q x num_classes, rows that sum to 1.
    """
    # The largest cosine cancels in the shares; without it exp overflows, or all of a row's weights are 0.
    weight = torch.exp((cosine - cosine.max(1, keepdim=True).values) / temperature)
    shares = weight.new_zeros(len(cosine), num_classes).scatter_add_(1, labels, weight)
    return shares / shares.sum(1, keepdim=True)


def topk_neighbors(queries, bank, k):
    """(cosines, row numbers in bank), both Q x k, of each query's k nearest, the nearest first."""
    found = TopKSearch(queries, min(k, len(bank)))
    found.see(bank, 0)
    return found.cosine, found.rows


def knn_scores(queries, bank, labels, num_classes, k, temperature):
    """`weighted_vote` of each query's k nearest. queries: Q x d; bank: N x d; labels: N int64, all >= 0."""
    cosine, rows = topk_neighbors(queries, bank, k)
    return weighted_vote(cosine, labels[rows], num_classes, temperature)


def clip_k(k, labels):
    """k, or the images a class has on average where that is fewer: more neighbours than that must be wrong ones."""
    return max(1, min(k, len(labels) // max(1, len(labels.unique()))))
