"""Accuracies, in percent."""

import torch


def topk_accuracy(scores, labels, k, least=-torch.inf):
    """Return the percentage of rows whose label is among the k highest scores. Of equal scores the first class counts
    as the highest, as in argmax. scores: N x C; labels: N. least: scores must be above it (0 for votes)."""
    own = scores.gather(1, labels[:, None])
    first = torch.arange(scores.shape[1], device=scores.device) < labels[:, None]
    ahead = (scores > own).sum(1) + ((scores == own) & first).sum(1)
    return 100.0 * ((ahead < k) & (own[:, 0] > least)).sum().item() / len(labels)


def class_accuracies(scores, labels):
    """Return the accuracy of each class in percent, C; nan for a class without images. scores: N x C; labels: N."""
    classes = scores.shape[1]
    right = torch.bincount(labels[scores.argmax(1) == labels], minlength=classes)
    return 100.0 * right.cpu().double() / torch.bincount(labels, minlength=classes).cpu()


def confusion_matrix(scores, labels):
    """Return C x C counts: rows are true classes, columns predicted ones. scores: N x C; labels: N."""
    classes = scores.shape[1]
    return torch.bincount(labels * classes + scores.argmax(1), minlength=classes**2).view(classes, classes)
