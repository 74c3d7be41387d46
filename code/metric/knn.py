"""Weighted k-nearest-neighbor classification (Wu et al., arXiv 1805.01978, section 3.4)."""

import torch
from torch.nn.functional import normalize

BANK_CHUNK, QUERY_CHUNK = 4096, 8192  # rows of the bank and queries per matrix product


class TopKSearch:
    """Search the k nearest rows by cosine for each query, in a bank of features that is passed in parts and not stored.

    queries: Q x d. Results, nearest first: cosine, Q x k, and rows, Q x k; if the bank has fewer than k rows, the rest
    has cosine -inf and row 0.
    """

    def __init__(self, queries, k):
        self.queries = normalize(queries, dim=1)
        self.cosine = self.queries.new_full((len(queries), k), -torch.inf)
        self.rows = torch.zeros(len(queries), k, dtype=torch.int64, device=queries.device)

    def update(self, bank, first):
        """Search a part of the bank, n x d: its rows number `first` to first + n - 1."""
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
    """Return each class's share of the votes of a query's neighbors; a vote has the weight exp(cosine / temperature).

    cosine: Q x k; labels: Q x k, int64, >= 0, of the neighbors. Returns Q x num_classes; rows sum to 1.
    """
    # Subtracting the largest cosine does not change the shares, and avoids overflow and rows of zeros.
    weight = torch.exp((cosine - cosine.max(1, keepdim=True).values) / temperature)
    shares = weight.new_zeros(len(cosine), num_classes).scatter_add_(1, labels, weight)
    return shares / shares.sum(1, keepdim=True)


def topk_neighbors(queries, bank, k):
    """Return (cosine, row numbers in bank), both Q x k, of the k nearest rows of each query, nearest first."""
    search = TopKSearch(queries, min(k, len(bank)))
    search.update(bank, 0)
    return search.cosine, search.rows


def knn_scores(queries, bank, labels, num_classes, k, temperature):
    """Classify queries, Q x d, by `weighted_vote` of their k nearest rows in bank, N x d, with labels, N int64, >= 0.
    Returns Q x num_classes."""
    cosine, rows = topk_neighbors(queries, bank, k)
    return weighted_vote(cosine, labels[rows], num_classes, temperature)


def clip_k(k, labels):
    """Limit k to the mean number of images per class: further neighbors are necessarily of other classes."""
    return max(1, min(k, len(labels) // max(1, len(labels.unique()))))
