"""SGD and its learning-rate schedule (paper section 3, "Optimizer" and "Baseline settings"), and AdamW."""

import math

import torch


def make_sgd(model, momentum, weight_decay):
    """Build SGD with weight decay on all parameters (biases and BN too), in the three groups of `param_groups`."""
    return torch.optim.SGD(
        param_groups(model), lr=0.0, momentum=momentum, weight_decay=weight_decay, fused=supports_fused(model)
    )


def make_adamw(model, weight_decay):
    """Build AdamW with the same groups, for networks without BN (ViT, ConvNeXt). Weight decay is on all parameters, as
    with SGD, and decoupled."""
    on_gpu = next(model.parameters()).is_cuda  # capturable: for CUDA graphs
    return torch.optim.AdamW(
        param_groups(model), lr=0.0, weight_decay=weight_decay, fused=supports_fused(model), capturable=on_gpu
    )


def param_groups(model):
    """Return three parameter groups: backbone, projector, predictor."""
    return [{'params': [*part.parameters()]} for part in (model.backbone, model.projector, model.predictor)]


def supports_fused(model):
    """Whether the device has a fused optimizer kernel (on a CPU 1.6 times as fast)."""
    return next(model.parameters()).device.type in ('cpu', 'cuda')


def lr_schedule(fraction_done, warmup, peak_lr):
    """Compute the learning rate: a linear rise from 0 to `peak_lr` during `warmup`, then half a cosine to 0.

    fraction_done, warmup: fractions of the run, 0 to 1. The schedule has no state, so there is none to save.
    """
    if fraction_done < warmup:
        return peak_lr * fraction_done / warmup
    return peak_lr * 0.5 * (1 + math.cos(math.pi * (fraction_done - warmup) / (1 - warmup)))


def set_learning_rates(optimizer, *rates):
    """Set the learning rates of backbone, projector and predictor."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group['lr'] = rate
