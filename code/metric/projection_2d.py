"""Projection of features to two dimensions, for plots."""

import numpy as np

from metric.subset_selection import center_and_normalize

MAX_TSNE_ROWS = 20_000  # with more rows t-SNE takes hours


def tsne_2d(x):
    """Project features, N x d, to N x 2 float32 by t-SNE (van der Maaten and Hinton, JMLR 2008) of their directions.

    t-SNE preserves neighborhoods better than PCA (bench/maps.py). With fewer than 10 rows, or more than MAX_TSNE_ROWS,
    PCA is used.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    rows = center_and_normalize(x).cpu().numpy()
    if len(rows) < 3:
        return np.arange(2 * len(rows), dtype=np.float32).reshape(-1, 2)
    if not rows.any():  # all images are equal
        return np.zeros((len(rows), 2), dtype=np.float32)
    if not 10 <= len(rows) <= MAX_TSNE_ROWS:
        return PCA(2).fit_transform(rows).astype(np.float32)
    return TSNE(2, init='pca', perplexity=min(30, len(rows) / 4), random_state=0).fit_transform(rows)
