"""LARS: SGD whose step is as long as a fixed share of each tensor (You et al., arXiv 1708.03888, equations 4 to 6)."""

import torch


class Lars(torch.optim.Optimizer):
    """v = momentum v + lr local (g + wd w);  w = w - v;  local = trust |w| / (|g| + wd |w|), 1 where w or g is 0.

    The momentum holds steps, not gradients, as in the paper; with a rate that changes, torch's SGD differs there.
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, trust=0.001):
        super().__init__(params, {'lr': lr, 'momentum': momentum, 'weight_decay': weight_decay, 'trust': trust})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            decay = group['weight_decay']
            for w in group['params']:
                if w.grad is None:
                    continue
                size, slope = w.norm(), w.grad.norm()
                local = torch.where((size > 0) & (slope > 0), group['trust'] * size / (slope + decay * size), 1.0)
                v = self.state[w].setdefault('v', torch.zeros_like(w))
                v.mul_(group['momentum']).add_((w.grad + decay * w) * (group['lr'] * local))
                w.sub_(v)
