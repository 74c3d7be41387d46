"""SGD and its learning rate (paper section 3, "Optimizer" and "Baseline settings"); AdamW in its place."""

import math

import torch


def make_sgd(model, momentum, weight_decay):
    """SGD over all parameters, weight decay on all (biases and BN too), in the three groups of `groups`."""
    return torch.optim.SGD(groups(model), lr=0.0, momentum=momentum, weight_decay=weight_decay, fused=fused(model))


def make_adamw(model, weight_decay):
    """AdamW in the same groups: what networks without BN, as ViT and ConvNeXt, are trained with. Weight decay is on all
    parameters, as with SGD, and times the rate."""
    on_gpu = next(model.parameters()).is_cuda  # a graph can record its steps
    return torch.optim.AdamW(groups(model), lr=0.0, weight_decay=weight_decay, fused=fused(model), capturable=on_gpu)


def groups(model):
    """The parameters of backbone, projector and predictor, in this order."""
    return [{'params': [*part.parameters()]} for part in (model.backbone, model.projector, model.predictor)]


def fused(model):
    """Whether there is a kernel that goes through the weights once: 1.6 times as fast on a CPU."""
    return next(model.parameters()).device.type in ('cpu', 'cuda')


def learning_rate(progress, warmup, top):
    """The rate at `progress`, both in epochs as fractions of the run: linear rise to `top`, then half a cosine to 0.

    A function of where the run is and of nothing else: there is no scheduler to save, or to step too late.
    """
    if progress < warmup:
        return top * progress / warmup
    return top * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def set_learning_rates(optimizer, *rates):
    """Set the learning rates of backbone, projector and predictor for the next step."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group['lr'] = rate
