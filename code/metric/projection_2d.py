"""Features as points of a plane, for people to look at."""

import numpy as np

from metric.subset_selection import center_and_normalize

MAX_TSNE_ROWS = 20_000  # rows for which t-SNE takes minutes, not hours


def tsne_2d(x):
    """x, N x d features, as points of a plane, N x 2 float32: t-SNE of their directions.

    t-SNE (van der Maaten and Hinton, JMLR 2008) keeps neighbours together better than the main axes do (measured:
    bench/maps.py); of a handful of rows, or of more than MOST, it is the main axes all the same.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    rows = center_and_normalize(x).cpu().numpy()
    if len(rows) < 3:
        return np.arange(2 * len(rows), dtype=np.float32).reshape(-1, 2)
    if not rows.any():  # one image, again and again
        return np.zeros((len(rows), 2), dtype=np.float32)
    if not 10 <= len(rows) <= MAX_TSNE_ROWS:
        return PCA(2).fit_transform(rows).astype(np.float32)
    return TSNE(2, init='pca', perplexity=min(30, len(rows) / 4), random_state=0).fit_transform(rows)
