"""A training step that is launched at once: recorded as a CUDA graph, and replayed.

A step is some hundred kernels, and where the network is small a GPU is through with them before the CPU has launched
the next. Replayed, they are one launch.
"""

import time

import torch

from runtime import distributed
from runtime.console import first_line, print_message
from runtime.device import get_device
from runtime.errors import UserError
from runtime.messages import log
from runtime.precision import precision

WARMUP_STEPS, TIMED_STEPS = (
    5,
    3,
)  # steps before one is timed: of torch.compile, and of cuDNN's choice of kernels; timed ones


def should_use_graph(args):
    """Whether to record a step, as --cuda_graph says. Raises UserError where it is wanted and cannot be."""
    reasons = {
        'it wants a CUDA GPU': get_device(args).type != 'cuda',
        'several processes exchange gradients in a step': distributed.world_size() > 1,
        'the scale of float16 is looked after between steps': precision(args) == torch.float16,
    }
    reason = next((reason for reason, holds in reasons.items() if holds), '')
    if args.cuda_graph == 'True' and reason:
        raise UserError(f'--cuda_graph=True: {reason}; --cuda_graph=False goes without')
    return args.cuda_graph != 'False' and not reason


class CudaGraphStep:
    """step: a function of views (tensors on a GPU, always of the same shapes) that trains `model` on them by
    `optimizer`, and returns tensors; what a replay returns is overwritten by the next. force: also where launching a
    step takes less than half of its time, and nothing is to be gained."""

    def __init__(self, step, model, optimizer, force):
        self.step, self.model, self.optimizer, self.force = step, model, optimizer, force
        self.calls, self.times, self.disabled, self.graph, self.views = 0, [], False, None, None
        # A rate that is a number would be part of the record.
        device = optimizer.param_groups[0]['params'][0].device
        self.rates = [torch.zeros((), device=device) for _ in optimizer.param_groups]

    def __call__(self, views):
        self.calls += 1
        if self.graph:
            self.copy_inputs(views)
            self.graph.replay()
            return self.outputs
        if self.disabled or self.calls <= WARMUP_STEPS:
            return self.step(views)
        outputs = self.timed(views)
        if self.calls == WARMUP_STEPS + TIMED_STEPS:
            launch, whole = (1000 * sum(times) / TIMED_STEPS for times in zip(*self.times, strict=True))
            self.disabled = launch < whole / 2 and not self.force
            if not self.disabled and self.capture():
                log(f'launching a step takes {launch:.1f} of its {whole:.1f} ms: a CUDA graph does it at once now')
        return outputs

    def timed(self, views):
        """A step as it will be recorded, on the same memory; notes the seconds of its launch, and in all."""
        self.copy_inputs(views)
        torch.cuda.synchronize()
        started = time.perf_counter()
        outputs = self.run_with_tensor_lr(self.rates)
        launched = time.perf_counter() - started
        torch.cuda.synchronize()
        self.times.append((launched, time.perf_counter() - started))
        return outputs

    def copy_inputs(self, views):
        """Put views and rates where a replay finds them: between steps, for what is done within one is recorded."""
        self.views = self.views or [torch.empty_like(view) for view in views]
        for kept, view in zip(self.views, views, strict=True):
            kept.copy_(view)
        for rate, group in zip(self.rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group['lr'])

    @torch.enable_grad()
    def run_with_tensor_lr(self, rates):
        """The step with these as the optimizer's rates."""
        groups = self.optimizer.param_groups
        numbers = [group['lr'] for group in groups]
        for group, rate in zip(groups, rates, strict=True):
            group['lr'] = rate
        try:
            return self.step(self.views)
        finally:
            for group, number in zip(groups, numbers, strict=True):
                group['lr'] = number

    def capture(self):
        """Whether the step could be recorded, and a replay does the same; nothing has changed meanwhile."""
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: what other threads do meanwhile, such as pinning memory, is no part of it and no error.
            with torch.cuda.graph(graph, capture_error_mode='thread_local'):
                self.outputs = self.run_with_tensor_lr(self.rates)
            reason = '' if self.verify_replay(graph) else 'replayed it does something else'
        except RuntimeError as error:
            reason = first_line(error)[:200]
        if reason:
            self.disabled = True
            print_message('warning', f'a step cannot be recorded as a CUDA graph, and is launched as before: {reason}')
            return False
        self.graph = graph
        return True

    @torch.no_grad()
    def verify_replay(self, graph):
        """Whether a replay moves the weights as a step does, on other views and at other rates than were recorded: with
        what is old in a record a run would still learn, slowly, and nobody would notice."""
        momenta = [x for of in self.optimizer.state.values() for x in of.values() if isinstance(x, torch.Tensor)]
        state = [*self.model.parameters(), *self.model.buffers(), *momenta]
        before, moves = [x.clone() for x in state], []
        for view in self.views:
            view.neg_()
        for rate in self.rates:
            rate.fill_(1.0)
        for run in (lambda: self.run_with_tensor_lr([1.0] * len(self.rates)), graph.replay):
            try:
                run()
                moved = zip(self.model.parameters(), before, strict=False)
                moves.append(torch.cat([(x - y).flatten() for x, y in moved]))
            finally:  # there may be too little memory for a step beside the record
                for x, y in zip(state, before, strict=True):
                    x.copy_(y)
        return bool((moves[0] - moves[1]).norm() <= 0.1 * moves[0].norm())
