"""SimSiam's loss (arXiv 2011.10566, section 3, equations 1 to 4)."""

from torch.nn.functional import cosine_similarity


def simsiam_loss(p1, p2, z1, z2):
    """L = D(p1, stopgrad(z2)) / 2 + D(p2, stopgrad(z1)) / 2 (equation 4). p, z: N x d. Returns a scalar in [-1, 1]."""
    return negative_cosine(p1, z2.detach()) / 2 + negative_cosine(p2, z1.detach()) / 2


def negative_cosine(p, z):
    """D(p, z) = -<p / |p|, z / |z|> (equation 1), mean over the batch. p, z: N x d."""
    return -cosine_similarity(p, z, dim=1).mean()
