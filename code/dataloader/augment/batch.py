"""What the operations share: a function of some images of a batch, and a linear map of each image's own."""

import numpy as np
import torch


def apply_to_subset(x, chosen, operation, parameter):
    """x with the chosen images put through `operation`. chosen: N bool (numpy); parameter: N, one for each image of x.
    operation(images, parameters) gets n x 3 x S x S and n x 1 x 1 x 1, and may overwrite the images."""
    rows = np.flatnonzero(chosen)
    if not len(rows):
        return x
    parameter = parameter[:, None, None, None]
    if len(rows) == len(x):
        return operation(x, parameter)
    rows = torch.from_numpy(rows)  # x[rows] would take nine times as long
    return x.index_copy_(0, rows, operation(x.index_select(0, rows), parameter[rows]))


def apply_separable(x, rows, columns):
    """Every image's own linear map of its rows and of its columns.

    x: N x 3 x H x W; rows: N x S x H; columns: N x S x W. Returns N x 3 x S x S.
    """
    n, channels, height, width = x.shape
    x = torch.bmm(x.reshape(n, channels * height, width), columns.transpose(1, 2))  # one product for all channels
    return rows[:, None] @ x.view(n, channels, height, -1)
