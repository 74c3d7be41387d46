"""SGD and its learning rate (paper section 3, "Optimizer" and "Baseline settings"); AdamW in its place."""

import math

import torch


def make_sgd(model, momentum, weight_decay):
    """SGD over all parameters, weight decay on all (biases and BN too), in the three groups of `param_groups`."""
    return torch.optim.SGD(
        param_groups(model), lr=0.0, momentum=momentum, weight_decay=weight_decay, fused=supports_fused(model)
    )


def make_adamw(model, weight_decay):
    """AdamW in the same groups: what networks without BN, as ViT and ConvNeXt, are trained with. Weight decay is on all
    parameters, as with SGD, and times the rate."""
    on_gpu = next(model.parameters()).is_cuda  # a graph can record its steps
    return torch.optim.AdamW(
        param_groups(model), lr=0.0, weight_decay=weight_decay, fused=supports_fused(model), capturable=on_gpu
    )


def param_groups(model):
    """The parameters of backbone, projector and predictor, in this order."""
    return [{'params': [*part.parameters()]} for part in (model.backbone, model.projector, model.predictor)]


def supports_fused(model):
    """Whether there is a kernel that goes through the weights once: 1.6 times as fast on a CPU."""
    return next(model.parameters()).device.type in ('cpu', 'cuda')


def lr_schedule(fraction_done, warmup, peak_lr):
    """The rate at `fraction_done`, both in epochs as fractions of the run: linear rise to `peak_lr`, then half a cosine
    to 0.

    A function of where the run is and of nothing else: there is no scheduler to save, or to step too late.
    """
    if fraction_done < warmup:
        return peak_lr * fraction_done / warmup
    return peak_lr * 0.5 * (1 + math.cos(math.pi * (fraction_done - warmup) / (1 - warmup)))


def set_learning_rates(optimizer, *rates):
    """Set the learning rates of backbone, projector and predictor for the next step."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group['lr'] = rate
