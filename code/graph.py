"""A training step that is launched at once: recorded as a CUDA graph, and replayed.

A step is some hundred kernels, and where the network is small a GPU is through with them before the CPU has launched
the next. Replayed, they are one launch.
"""

import time

import torch

import distributed
from config import UserError
from logger import say
from precision import precision
from terminal import complain
from utils import get_device

PLAIN, TIMED = 5, 3  # steps before one is timed: of torch.compile, and of cuDNN's choice of kernels; timed ones


def use_graph(args):
    """Whether to record a step, as --cuda_graph says. Raises UserError where it is wanted and cannot be."""
    reasons = {
        'it wants a CUDA GPU': get_device(args).type != 'cuda',
        'several processes exchange gradients in a step': distributed.world() > 1,
        'the scale of float16 is looked after between steps': precision(args) == torch.float16,
    }
    reason = next((reason for reason, holds in reasons.items() if holds), '')
    if args.cuda_graph == 'True' and reason:
        raise UserError(f'--cuda_graph=True: {reason}; --cuda_graph=False goes without')
    return args.cuda_graph != 'False' and not reason


class Recorded:
    """step: a function of views (tensors on a GPU, always of the same shapes) that trains on them by `optimizer`, and
    returns tensors; what a replay returns is overwritten by the next. always: also where launching a step takes less
    than half of its time, and nothing is to be gained."""

    def __init__(self, step, optimizer, always):
        self.step, self.optimizer, self.always = step, optimizer, always
        self.calls, self.times, self.off, self.graph, self.views = 0, [], False, None, None
        # A rate that is a number would be part of the record.
        device = optimizer.param_groups[0]['params'][0].device
        self.rates = [torch.zeros((), device=device) for _ in optimizer.param_groups]

    def __call__(self, views):
        self.calls += 1
        if self.graph:
            self.keep(views)
            self.graph.replay()
            return self.outputs
        if self.off or self.calls <= PLAIN:
            return self.step(views)
        outputs = self.timed(views)
        if self.calls == PLAIN + TIMED:
            launch, whole = (1000 * sum(times) / TIMED for times in zip(*self.times, strict=True))
            self.off = launch < whole / 2 and not self.always
            if not self.off and self.record():
                say(f'launching a step takes {launch:.1f} of its {whole:.1f} ms: a CUDA graph does it at once now')
        return outputs

    def timed(self, views):
        """A step as it will be recorded, on the same memory; notes the seconds of its launch, and in all."""
        self.keep(views)
        torch.cuda.synchronize()
        started = time.perf_counter()
        outputs = self.with_rates()
        launched = time.perf_counter() - started
        torch.cuda.synchronize()
        self.times.append((launched, time.perf_counter() - started))
        return outputs

    def keep(self, views):
        """Put views and rates where a replay finds them: between steps, for what is done within one is recorded."""
        self.views = self.views or [torch.empty_like(view) for view in views]
        for kept, view in zip(self.views, views, strict=True):
            kept.copy_(view)
        for rate, group in zip(self.rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group['lr'])

    def with_rates(self):
        """The step with tensors for the optimizer's rates."""
        groups = self.optimizer.param_groups
        numbers = [group['lr'] for group in groups]
        for group, rate in zip(groups, self.rates, strict=True):
            group['lr'] = rate
        try:
            return self.step(self.views)
        finally:
            for group, number in zip(groups, numbers, strict=True):
                group['lr'] = number

    def record(self):
        """Whether it could be recorded; nothing is computed meanwhile."""
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: what other threads do meanwhile, such as pinning memory, is no part of it and no error.
            with torch.cuda.graph(graph, capture_error_mode='thread_local'):
                self.outputs = self.with_rates()
        except RuntimeError as error:
            self.off, reason = True, (str(error).strip() or type(error).__name__).splitlines()[0]
            complain('warning', f'a step cannot be recorded as a CUDA graph, and is launched as before: {reason[:200]}')
            return False
        self.graph = graph
        return True
