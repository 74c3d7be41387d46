"""Quality measures that need no labels, from the spectrum of N features, from two views of each image, and from the z
and p of a training step.

x: N x d, features of center crops. Singular values s_1 >= s_2 >= ..., in double precision.
"""

import torch
from torch.nn.functional import normalize, pad

EPS = 1e-7  # keeps logarithms finite (RankMe, equation 1)
SW_REGULARIZER = 1e-4  # added to the diagonal of the within-image covariance (LiDAR, section 3)


def to_double(x):
    """Return x in double precision; an Apple GPU has none, so its tensors go to the CPU."""
    return x.cpu().double() if x.device.type == 'mps' else x.double()


def singular_values(x):
    """Return the singular values of x, largest first, on the CPU: square roots of the eigenvalues of x x^T or x^T x,
    whichever is smaller. Values below the rounding error are 0."""
    x = to_double(x)
    squares = torch.linalg.eigvalsh((x @ x.T if len(x) < x.shape[1] else x.T @ x).cpu()).flip(0)
    rounding = max(x.shape) * torch.finfo(x.dtype).eps * squares[0]
    return torch.where(squares > rounding, squares, 0.0).sqrt()


def rankme(x):
    """Return RankMe: exp(entropy of s / sum s), the effective number of directions of x, 1 to min(N, d). Not centered.

    Garrido et al., arXiv 2210.02885, equation 1.
    """
    return effective_rank(singular_values(x))


def effective_rank(values):
    """Return exp(entropy of values / sum values), with EPS added to each share. values: >= 0; 1 if all are 0."""
    total = values.sum()
    shares = values / total if total > 0 else torch.zeros_like(values)
    shares = shares + EPS
    return min(len(values), max(1.0, torch.exp(-(shares * shares.log()).sum()).item())) if total > 0 else 1.0


def cumulative_spectrum_auc(x):
    """Return the area under the cumulative spectrum of the centered features: 1 if they vary in at most one direction,
    1/2 + 1/2d if they vary equally in all d.

    Li, Efros, Pathak, arXiv 2209.15007, equation 2.
    """
    values = singular_values(to_double(x) - to_double(x).mean(0))
    total = values.sum().item()
    return (values.cumsum(0) / total).mean().item() if total > 1e-12 * to_double(x).norm().item() else 1.0


def alpha_req(x):
    """Return the exponent a of the covariance's eigenvalues, lambda_i ~ i^-a: a least-squares fit on log-log axes over
    the middle half of the log i axis; nan if fewer than three eigenvalues there are above the rounding error.

    Agrawal et al., NeurIPS 2022.
    """
    values = singular_values(to_double(x) - to_double(x).mean(0)).square()
    first, last = len(values) ** 0.25, len(values) ** 0.75
    index = torch.arange(1, len(values) + 1, dtype=torch.float64)
    middle = (index >= first) & (index <= last) & (values > 1e-12 * values[0])
    if middle.sum() < 3:
        return float('nan')
    log_i, log_value = index[middle].log(), values[middle].log()
    log_i = log_i - log_i.mean()
    return -((log_i * log_value).sum() / log_i.square().sum()).item()


def lidar(x):
    """Return LiDAR: the effective rank of the linear discriminants between images. x: n x q x d, q views of n images.

    The eigenvalues are those of Sw^-1/2 Sb Sw^-1/2. Sb is the covariance of the images' means, Sw the mean covariance
    of an image's views, with SW_REGULARIZER on its diagonal (Thilak et al., arXiv 2312.04000, section 3). With
    Sb = B B^T, B of n columns, the non-zero ones equal those of B^T Sw^-1 B, an n x n matrix.
    """
    x = to_double(x.cpu())
    (n, q, d), means = x.shape, x.mean(1)
    within_class_residual = (x - means[:, None]).flatten(0, 1)
    within = within_class_residual.T @ within_class_residual / (n * (q - 1))
    within.diagonal().add_(SW_REGULARIZER)
    between = (means - means.mean(0)).T / (n - 1) ** 0.5
    whitened_means = torch.linalg.solve_triangular(torch.linalg.cholesky(within), between, upper=False)
    values = torch.linalg.eigvalsh(whitened_means.T @ whitened_means).clamp(min=0).flip(0)[:d]
    return effective_rank(pad(values, (0, d - len(values))))


def positive_ranks(first, second):
    """Return the retrieval rank of the positive view of each image, n float: the position of its second view among all
    n second views, sorted by cosine to its first view; 1 is the nearest. Ties (within rounding) get the last position.
    first, second: n x d."""
    cosine = normalize(first, dim=1) @ normalize(second, dim=1).T
    return (cosine >= cosine.diagonal()[:, None] - 4 * torch.finfo(cosine.dtype).eps).sum(1).float()


def view_retrieval_top1(first, second):
    """Return the percentage of images whose second view is the nearest to their first; chance is 100 / n. first,
    second: n x d. Returns a scalar tensor."""
    return 100 * (positive_ranks(first, second) == 1).float().mean()


def geometric_mean_rank(first, second):
    """Return the geometric mean of `positive_ranks`: 1 is perfect, chance is about n / e. It has a lower variance than
    `view_retrieval_top1`, because every image contributes."""
    return positive_ranks(first, second).log().mean().exp().item()


def alignment(first, second):
    """Return the mean squared distance between the normalized features of two views, 0 to 4. first, second: n x d.

    Wang and Isola, arXiv 2005.10242, equation 1. Collapse makes it 0, so read it together with `uniformity`.
    """
    return (normalize(to_double(first), dim=1) - normalize(to_double(second), dim=1)).square().sum(1).mean().item()


def uniformity(x):
    """Return log mean exp(-2 |x - y|^2) over pairs of normalized features: 0 if all are equal, near -4 if uniform.

    Wang and Isola, arXiv 2005.10242, equation 2.
    """
    distances = torch.pdist(normalize(to_double(x), dim=1))
    return torch.exp(-2 * distances.square()).mean().log().item()


def output_statistics(z, p):
    """Return statistics of z and p, N x d each, of a training step, by name.

    mean_direction: norm of mean(z / |z|); 0 is healthy, 1 is collapse to one direction. correlation: mean absolute
    correlation between channels of z (Zhang et al., arXiv 2203.16262). rank_z_minus_p: effective rank of z minus that
    of p, positive in successful training (Zhuo et al., arXiv 2303.02387). norm_z, norm_p: mean norms; they grow, and
    large norms slow down training (Draganov et al., arXiv 2406.16468).
    """
    z, p = to_double(z), to_double(p)
    return {
        'mean_direction': normalize(z, dim=1).mean(0).norm().item(),
        'correlation': mean_abs_channel_correlation(z),
        'rank_z_minus_p': rankme(z) - rankme(p),
        'norm_z': z.norm(dim=1).mean().item(),
        'norm_p': p.norm(dim=1).mean().item(),
    }


def mean_abs_channel_correlation(z):
    """Return the mean absolute correlation between different channels of z, N x d; constant channels count as 0."""
    z = to_double(z) - to_double(z).mean(0)
    z = z / z.norm(dim=0).clamp(min=1e-12)
    d = z.shape[1]
    return (((z.T @ z).abs().sum() - z.square().sum()) / (d * (d - 1))).item()
