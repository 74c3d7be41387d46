"""Helpers of the operations: apply a function to some images of a batch, and a separable linear map to each image."""

import numpy as np
import torch


def apply_to_subset(x, chosen, operation, parameter):
    """Apply `operation` to the chosen images of x, N x C x S x S. chosen: N bool (numpy); parameter: N.
    operation(images, parameters) gets n x C x S x S and n x 1 x 1 x 1, and may overwrite the images. Returns x, which
    may be overwritten."""
    rows = np.flatnonzero(chosen)
    if not len(rows):
        return x
    parameter = parameter[:, None, None, None]
    if len(rows) == len(x):
        return operation(x, parameter)
    rows = torch.from_numpy(rows)  # index_select: x[rows] takes nine times as long
    return x.index_copy_(0, rows, operation(x.index_select(0, rows), parameter[rows]))


def apply_separable(x, rows, columns):
    """Apply a linear map to the rows and one to the columns of each image.

    x: N x C x H x W; rows: N x S x H; columns: N x S x W. Returns N x C x S x S.
    """
    n, channels, height, width = x.shape
    x = torch.bmm(x.reshape(n, channels * height, width), columns.transpose(1, 2))  # one product for all channels
    return rows[:, None] @ x.view(n, channels, height, -1)
