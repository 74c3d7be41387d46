"""Logistic regression on frozen features, with its l2 strength chosen on held-out images."""

import torch
from torch.nn.functional import cross_entropy

from metric.accuracy import topk_accuracy
from protocols.finetune import rows_per_class
from runtime.messages import progress

L2 = torch.logspace(5, -6, 45).tolist()  # l2 strengths to try, strong to weak (Kornblith et al., arXiv 1805.08974)
MAX_PENALTY = 1e8  # on weights of scaled features: it makes them 0, and float32 does not overflow
HELD_OUT = 0.2  # share of train that is held out to choose the strength


def fit_logistic_regression(args, x, labels, num_classes):
    """Fit logistic regression to features, N x d, with labels, N. Its l2 strength is chosen on a held-out part of them;
    then it is fitted to all. Returns (weight, num_classes x d; bias, num_classes; {'l2', 'held_out_top1'})."""
    best, held_out = select_l2(args, x, labels, num_classes)
    weight, bias = logistic_regression(x, labels, num_classes, best)
    return weight, bias, {'l2': best, 'held_out_top1': held_out}


def select_l2(args, x, labels, num_classes):
    """Choose the l2 strength. Returns (strength, its top-1 on the held-out images). If no class has two images, nothing
    can be held out: returns the middle strength and None."""
    holdout = holdout_mask(labels.cpu(), args.random_seed).to(x.device)
    if not holdout.any():
        return L2[len(L2) // 2], None
    warm_start, tried = None, {}
    for l2 in progress(L2, 'l2 strength', 'fits'):
        warm_start = logistic_regression(x[~holdout], labels[~holdout], num_classes, l2, warm_start)
        scores = x[holdout] @ warm_start[0].T + warm_start[1]
        loss = cross_entropy(scores, labels[holdout]).item()
        tried[l2] = topk_accuracy(scores, labels[holdout], 1), -loss  # of equal accuracies the surer one
    best = max(tried, key=tried.get)
    return best, tried[best][0]


def holdout_mask(labels, seed):
    """Return which rows are held out, N bool: HELD_OUT of each class, at least one and at most half."""
    holdout = torch.zeros(len(labels), dtype=torch.bool)
    for rows in rows_per_class(labels, seed):
        holdout[rows[: min(len(rows) // 2, max(1, round(HELD_OUT * len(rows))))]] = True
    return holdout


def logistic_regression(x, labels, num_classes, l2, warm_start=None, iterations=200):
    """Fit logistic regression by L-BFGS: minimize the sum of cross-entropies + l2 / 2 |weight|^2.

    x: N x d; labels: N. warm_start: (weight, bias) to start from, such as the solution for a stronger l2. Returns
    (weight, num_classes x d; bias, num_classes).
    """
    mean = x.mean(0)
    scale = (x - mean).square().mean().sqrt().item() or 1.0
    x = (x - mean) / scale  # does not change the minimum; converges faster, and the tolerances fit any feature scale
    penalty = min(l2 / (2 * len(x) * scale**2), MAX_PENALTY)
    shares = torch.bincount(labels, minlength=num_classes).to(x) / len(x)  # log: the optimal biases for weight 0
    weight, bias = warm_start or (x.new_zeros(num_classes, x.shape[1]), shares.clamp(min=1e-6).log())
    weight, bias = (weight * scale).requires_grad_(), (bias + weight @ mean).requires_grad_()
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=iterations, tolerance_grad=1e-6, tolerance_change=1e-9, line_search_fn='strong_wolfe'
    )

    def loss():
        solver.zero_grad()
        value = cross_entropy(x @ weight.T + bias, labels) + penalty * weight.square().sum()
        value.backward()
        return value

    solver.step(loss)
    weight, bias = weight.detach() / scale, bias.detach()
    return weight, bias - weight @ mean
