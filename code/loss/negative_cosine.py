"""SimSiam's loss (arXiv 2011.10566, section 3, equations 1 to 4), its variants of section 4, and more than two
views."""

from torch.nn.functional import cosine_similarity, log_softmax, softmax


def simsiam_loss(*outputs, stop_gradient=True, similarity='cosine', symmetric=True):
    """L = D(p1, stopgrad(z2)) / 2 + D(p2, stopgrad(z1)) / 2 (equation 4). Returns a scalar, in [-1, 1] with cosine
    similarity.

    outputs: p1, p2, z1, z2, N x d each. With n views, p1 ... pn, z1 ... zn: the mean over the views i of D(p_i,
    stopgrad(mean of z_j, j != i)) (FastSiam, Pototzky et al., GCPR 2022, equation 3). symmetric=False: only
    D(p1, stopgrad(z2)), for two views.
    """
    distance = negative_cosine if similarity == 'cosine' else cross_entropy
    n = len(outputs) // 2
    p, z = outputs[:n], [each.detach() if stop_gradient else each for each in outputs[n:]]
    if not symmetric:
        return distance(p[0], z[1])
    targets = [sum(z[:i] + z[i + 1 :]) / (n - 1) for i in range(n)]
    return sum(distance(p[i], targets[i]) / n for i in range(n))


def negative_cosine(p, z):
    """D(p, z) = -<p / |p|, z / |z|> (equation 1), mean over the batch. p, z: N x d."""
    return -cosine_similarity(p, z, dim=1).mean()


def cross_entropy(p, z):
    """D(p, z) = -softmax(z) . log softmax(p) (section 4.5), mean over the batch. p, z: N x d."""
    return -(softmax(z, dim=1) * log_softmax(p, dim=1)).sum(1).mean()
