"""SimSiam's loss (arXiv 2011.10566, section 3, equations 1 to 4), and what section 4 changes in it."""

from torch.nn.functional import cosine_similarity, log_softmax, softmax


def simsiam_loss(p1, p2, z1, z2, stop_gradient=True, similarity='cosine', symmetric=True):
    """L = D(p1, stopgrad(z2)) / 2 + D(p2, stopgrad(z1)) / 2 (equation 4). p, z: N x d. Returns a scalar.

    With cosine similarity it lies in [-1, 1]. symmetric=False: D(p1, stopgrad(z2)) alone.
    """
    d = negative_cosine if similarity == 'cosine' else cross_entropy
    if stop_gradient:
        z1, z2 = z1.detach(), z2.detach()
    return d(p1, z2) / 2 + d(p2, z1) / 2 if symmetric else d(p1, z2)


def negative_cosine(p, z):
    """D(p, z) = -<p / |p|, z / |z|> (equation 1), mean over the batch. p, z: N x d."""
    return -cosine_similarity(p, z, dim=1).mean()


def cross_entropy(p, z):
    """D(p, z) = -softmax(z) . log softmax(p) (section 4.5), mean over the batch. p, z: N x d."""
    return -(softmax(z, dim=1) * log_softmax(p, dim=1)).sum(1).mean()
