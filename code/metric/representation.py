"""What features are worth, told without a label: of the spectrum of N features, of two views of the same images, and of
the z and p of a training step.

x: N x d, features of plain views. Singular values s_1 >= s_2 >= ..., in double precision.
"""

import torch
from torch.nn.functional import normalize, pad

EPS = 1e-7  # that keeps a logarithm finite (RankMe, equation 1)
SW_REGULARIZER = 1e-4  # added to the scatter within images (LiDAR, section 3)


def singular_values(x):
    """Those of x, the largest first, on the CPU: by way of the products of its rows or columns, whichever are fewer,
    for whose roots a CPU is fast enough. What rounding leaves is 0."""
    x = x.double()
    squares = torch.linalg.eigvalsh((x @ x.T if len(x) < x.shape[1] else x.T @ x).cpu()).flip(0)
    rounding = max(x.shape) * torch.finfo(x.dtype).eps * squares[0]
    return torch.where(squares > rounding, squares, 0.0).sqrt()


def rankme(x):
    """exp(entropy of s / sum s): how many directions the features use, 1 to min(N, d). Not centred.

    Garrido et al., arXiv 2210.02885, equation 1.
    """
    return effective_rank(singular_values(x))


def effective_rank(values):
    """exp(entropy of the shares of `values`, >= 0 and not all 0), SMALL added to each; of none but zeros 1."""
    total = values.sum()
    shares = values / total if total > 0 else torch.zeros_like(values)
    shares = shares + EPS
    return min(len(values), max(1.0, torch.exp(-(shares * shares.log()).sum()).item())) if total > 0 else 1.0


def cumulative_spectrum_auc(x):
    """Area under the cumulative spectrum of the centred features: 1 where they vary in one direction or in none, 1/2 +
    1/2d where in all alike.

    Li, Efros, Pathak, arXiv 2209.15007, equation 2.
    """
    values = singular_values(x.double() - x.double().mean(0))
    total = values.sum().item()
    return (values.cumsum(0) / total).mean().item() if total > 1e-12 * x.double().norm().item() else 1.0


def alpha_req(x):
    """Exponent a of the covariance's eigenvalues, lambda_i ~ i^-a: least squares on log-log axes over the middle half
    of the logarithmic axis of i; nan where fewer than three eigenvalues there are above rounding.

    Agrawal et al., NeurIPS 2022.
    """
    values = singular_values(x.double() - x.double().mean(0)).square()
    first, last = len(values) ** 0.25, len(values) ** 0.75
    index = torch.arange(1, len(values) + 1, dtype=torch.float64)
    middle = (index >= first) & (index <= last) & (values > 1e-12 * values[0])
    if middle.sum() < 3:
        return float('nan')
    log_i, log_value = index[middle].log(), values[middle].log()
    log_i = log_i - log_i.mean()
    return -((log_i * log_value).sum() / log_i.square().sum()).item()


def lidar(x):
    """Effective rank of the linear discriminants that tell images apart. x: n x q x d, of q views of each of n images.

    The eigenvalues are those of Sw^-1/2 Sb Sw^-1/2: Sb the covariance of the images' means, Sw the mean covariance of
    an image's views, SW_REGULARIZER added on its diagonal. Thilak et al., arXiv 2312.04000, section 3. With Sb = B B^T,
    B of n columns, those that are not 0 are also those of B^T Sw^-1 B, of n rows in place of d.
    """
    x = x.cpu().double()
    (n, q, d), means = x.shape, x.mean(1)
    within_class_residual = (x - means[:, None]).flatten(0, 1)
    within = within_class_residual.T @ within_class_residual / (n * (q - 1))
    within.diagonal().add_(SW_REGULARIZER)
    between = (means - means.mean(0)).T / (n - 1) ** 0.5
    whitened_means = torch.linalg.solve_triangular(torch.linalg.cholesky(within), between, upper=False)
    values = torch.linalg.eigvalsh(whitened_means.T @ whitened_means).clamp(min=0).flip(0)[:d]
    return effective_rank(pad(values, (0, d - len(values))))


def positive_ranks(first, second):
    """Of n images' first views, the place of each one's own second view among all n second views, by cosine: 1 where it
    is the nearest; of those that are equal but for rounding the last. first, second: n x d. Returns n float, on the
    device."""
    cosine = normalize(first, dim=1) @ normalize(second, dim=1).T
    return (cosine >= cosine.diagonal()[:, None] - 4 * torch.finfo(cosine.dtype).eps).sum(1).float()


def view_retrieval_top1(first, second):
    """Percent of n images whose own second view is the nearest to their first; 100 / n by chance. first, second: n x d.
    Returns a scalar on the device."""
    return 100 * (positive_ranks(first, second) == 1).float().mean()


def geometric_mean_rank(first, second):
    """The geometric mean of `positive_ranks`: 1 where every image finds itself, about n / e by chance. It says what
    `view_retrieval_top1` does, and needs fewer images to say it, for all of them count."""
    return positive_ranks(first, second).log().mean().exp().item()


def alignment(first, second):
    """Mean squared distance between the two views of an image on the sphere, 0 to 4. first, second: n x d.

    Wang and Isola, arXiv 2005.10242, equation 1; read together with `uniformity`: collapse makes it 0.
    """
    return (normalize(first.double(), dim=1) - normalize(second.double(), dim=1)).square().sum(1).mean().item()


def uniformity(x):
    """log of the mean over pairs of exp(-2 |x - y|^2), on the sphere: 0 where all are one, near -4 where they spread.

    Wang and Isola, arXiv 2005.10242, equation 2.
    """
    distances = torch.pdist(normalize(x.double(), dim=1))
    return torch.exp(-2 * distances.square()).mean().log().item()


def output_statistics(z, p):
    """What z and p of a batch, N x d each, tell, by name: those of a training step are there anyway.

    mean_direction: norm of mean(z / |z|), 0 healthy, 1 all one direction. correlation: mean absolute correlation of
    different channels of z over the batch (Zhang et al., arXiv 2203.16262). rank_z_minus_p: effective rank of z minus
    that of p, above 0 in training that works (Zhuo et al., arXiv 2303.02387). norm_z, norm_p: means; they grow, and a
    large one is a slow start (Draganov et al., arXiv 2406.16468).
    """
    z, p = z.double(), p.double()
    return {
        'mean_direction': normalize(z, dim=1).mean(0).norm().item(),
        'correlation': mean_abs_channel_correlation(z),
        'rank_z_minus_p': rankme(z) - rankme(p),
        'norm_z': z.norm(dim=1).mean().item(),
        'norm_p': p.norm(dim=1).mean().item(),
    }


def mean_abs_channel_correlation(z):
    """Mean absolute value of the correlations of different channels of z, N x d, over N; a channel that does not vary
    has none with any."""
    z = z.double() - z.double().mean(0)
    z = z / z.norm(dim=0).clamp(min=1e-12)
    d = z.shape[1]
    return (((z.T @ z).abs().sum() - z.square().sum()) / (d * (d - 1))).item()
