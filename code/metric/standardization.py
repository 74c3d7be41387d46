"""Standardization of features over the images, as linear classifiers need it."""

MIN_STD = 1e-6  # a feature with a smaller standard deviation is divided by this


def mean_and_std(features):
    """Return the mean and the standard deviation of features, N x d, over the images: d each, the latter at least
    MIN_STD."""
    return features.mean(0), features.std(0, correction=0).clamp(min=MIN_STD)
