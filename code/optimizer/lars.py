"""LARS: SGD with a layer-wise learning rate proportional to |w| / |g| (You et al., arXiv 1708.03888, equations 4 to
6)."""

import torch


class Lars(torch.optim.Optimizer):
    """v = momentum v + lr local (g + wd w);  w = w - v;  local = trust |w| / (|g| + wd |w|), or 1 if w or g is 0.

    As in the paper the momentum accumulates steps, not gradients; torch's SGD differs when the learning rate changes.
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, trust_coefficient=0.001):
        super().__init__(
            params, {'lr': lr, 'momentum': momentum, 'weight_decay': weight_decay, 'trust': trust_coefficient}
        )

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            decay = group['weight_decay']
            for w in group['params']:
                if w.grad is None:
                    continue
                weight_norm, grad_norm = w.norm(), w.grad.norm()
                local_lr = torch.where(
                    (weight_norm > 0) & (grad_norm > 0),
                    group['trust'] * weight_norm / (grad_norm + decay * weight_norm),
                    1.0,
                )
                v = self.state[w].setdefault('v', torch.zeros_like(w))
                v.mul_(group['momentum']).add_((w.grad + decay * w) * (group['lr'] * local_lr))
                w.sub_(v)
