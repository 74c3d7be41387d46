"""Accuracies, in percent."""

import torch


def topk_accuracy(scores, labels, k):
    """Return the percentage of rows whose label is among the k highest scores. scores: N x C; labels: N."""
    best = scores.topk(min(k, scores.shape[1]), dim=1).indices
    return 100.0 * (best == labels[:, None]).any(1).double().mean().item()


def class_accuracies(scores, labels):
    """Return the accuracy of each class in percent, C; nan for a class without images. scores: N x C; labels: N."""
    classes = scores.shape[1]
    right = torch.bincount(labels[scores.argmax(1) == labels], minlength=classes)
    return 100.0 * right.double() / torch.bincount(labels, minlength=classes)


def confusion_matrix(scores, labels):
    """Return C x C counts: rows are true classes, columns predicted ones. scores: N x C; labels: N."""
    classes = scores.shape[1]
    return torch.bincount(labels * classes + scores.argmax(1), minlength=classes**2).view(classes, classes)
