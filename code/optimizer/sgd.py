"""SGD and its learning rate (paper section 3, "Optimizer" and "Baseline settings")."""

import math

import torch


def make_sgd(model, momentum, weight_decay):
    """SGD over all parameters, weight decay on all (biases and BN too), in two groups: the predictor is the second."""
    predictor = list(model.predictor.parameters())
    rest = [*model.backbone.parameters(), *model.projector.parameters()]
    fused = rest[0].device.type in ('cpu', 'cuda')  # one pass over the weights: 1.6 times as fast on a CPU
    groups = [{'params': rest}, {'params': predictor}]
    return torch.optim.SGD(groups, lr=0.0, momentum=momentum, weight_decay=weight_decay, fused=fused)


def learning_rate(progress, warmup, top):
    """The rate at `progress`, both in epochs as fractions of the run: linear rise to `top`, then half a cosine to 0.

    A function of where the run is and of nothing else: there is no scheduler to save, or to step too late.
    """
    if progress < warmup:
        return top * progress / warmup
    return top * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def set_learning_rates(optimizer, rate, predictor_rate):
    """Set the rates for the next step."""
    optimizer.param_groups[0]['lr'], optimizer.param_groups[1]['lr'] = rate, predictor_rate
