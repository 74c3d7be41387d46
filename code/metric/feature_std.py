"""The collapse measure (paper section 4.1, figure 2 middle)."""

from torch.nn.functional import normalize


def feature_std(z):
    """Standard deviation of z / |z| per channel over the batch, its mean over channels, times sqrt(d). z: N x d, N > 1.

    Near 1 where z spreads evenly over the sphere, 0 where every image has the same z: collapse. Corrected for
    N, for the number of processes that share a batch is not to lower it.
    """
    z = normalize(z, dim=1)
    z = z - z.mean(0)  # with z.std(0) all of it takes two and a half times as long on a CPU
    return (z * z).sum(0).sqrt().mean() * (z.shape[1] / (len(z) - 1)) ** 0.5
