"""A training step captured as a CUDA graph and replayed with one launch.

A step has hundreds of kernels. With a small network the GPU finishes them faster than the CPU launches them.
"""

import time

import torch

from runtime import distributed
from runtime.console import first_line
from runtime.device import get_device
from runtime.errors import UserError
from runtime.messages import log, warn
from runtime.precision import precision

WARMUP_STEPS = 5  # eager steps before timing: torch.compile, cuDNN's choice of kernels
TIMED_STEPS = 3


def should_use_graph(args):
    """Whether --cuda_graph asks for a CUDA graph and it is possible. Raises UserError if True and not possible."""
    reasons = {
        'it needs a CUDA GPU': get_device(args).type != 'cuda',
        'several processes exchange gradients in a step': distributed.world_size() > 1,
        'float16 needs its GradScaler between steps': precision(args) == torch.float16,
    }
    reason = next((reason for reason, holds in reasons.items() if holds), '')
    if args.cuda_graph == 'True' and reason:
        raise UserError(f'--cuda_graph=True: {reason}; --cuda_graph=False turns it off')
    return args.cuda_graph != 'False' and not reason


class CudaGraphStep:
    """A step function that captures itself as a CUDA graph if launching takes at least half of its time.

    step: a function of a list of GPU tensors, always of the same shapes (views, and perhaps a teacher's targets), that
    trains `model` with `optimizer` and returns tensors; each replay overwrites them. force: capture the graph in any
    case.
    """

    def __init__(self, step, model, optimizer, force):
        self.step, self.model, self.optimizer, self.force = step, model, optimizer, force
        self.calls, self.times, self.disabled, self.graph, self.inputs = 0, [], False, None, None
        # Tensors, because a graph would keep learning rates that are numbers.
        device = optimizer.param_groups[0]['params'][0].device
        self.rates = [torch.zeros((), device=device) for _ in optimizer.param_groups]

    def __call__(self, inputs):
        self.calls += 1
        if self.graph:
            self.copy_inputs(inputs)
            self.graph.replay()
            return self.outputs
        if self.disabled or self.calls <= WARMUP_STEPS:
            return self.step(inputs)
        outputs = self.run_timed(inputs)
        if self.calls == WARMUP_STEPS + TIMED_STEPS:
            launch, whole = (1000 * sum(times) / TIMED_STEPS for times in zip(*self.times, strict=True))
            self.disabled = launch < whole / 2 and not self.force
            if not self.disabled and self.capture():
                log(f'launching a step takes {launch:.1f} of its {whole:.1f} ms: it is a CUDA graph now')
        return outputs

    def run_timed(self, inputs):
        """Run a step on the graph's input buffers, and record its launch time and total time in seconds."""
        self.copy_inputs(inputs)
        torch.cuda.synchronize()
        started = time.perf_counter()
        outputs = self.run_with_tensor_lr(self.rates)
        launched = time.perf_counter() - started
        torch.cuda.synchronize()
        self.times.append((launched, time.perf_counter() - started))
        return outputs

    def copy_inputs(self, inputs):
        """Copy the step's inputs and learning rates to the graph's input buffers."""
        self.inputs = self.inputs or [torch.empty_like(x) for x in inputs]
        for buffer, x in zip(self.inputs, inputs, strict=True):
            buffer.copy_(x)
        for rate, group in zip(self.rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group['lr'])

    @torch.enable_grad()
    def run_with_tensor_lr(self, rates):
        """Run the step with these tensors as the optimizer's learning rates."""
        groups = self.optimizer.param_groups
        numbers = [group['lr'] for group in groups]
        for group, rate in zip(groups, rates, strict=True):
            group['lr'] = rate
        try:
            return self.step(self.inputs)
        finally:
            for group, number in zip(groups, numbers, strict=True):
                group['lr'] = number

    def capture(self):
        """Capture the step and verify a replay. Returns whether it worked; the model is unchanged."""
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: CUDA calls of other threads, such as pinning memory, do not invalidate the capture.
            with torch.cuda.graph(graph, capture_error_mode='thread_local'):
                self.outputs = self.run_with_tensor_lr(self.rates)
            gradients = [weight.grad for weight in self.model.parameters()]  # a replay writes into these
            reason = '' if self.verify_replay(graph) else 'a replay gives another result'
            for weight, gradient in zip(self.model.parameters(), gradients, strict=True):
                weight.grad = gradient
        except RuntimeError as error:
            reason = first_line(error)[:200]
        if reason:
            self.disabled = True
            warn(f'the step cannot be captured as a CUDA graph, and runs as before: {reason}')
            return False
        self.graph = graph
        return True

    @torch.no_grad()
    def verify_replay(self, graph):
        """Whether a replay updates the weights as an eager step does, with other inputs and learning rates than at the
        capture. A graph that kept old values would still train, badly and unnoticed."""
        momenta = [
            x
            for param_state in self.optimizer.state.values()
            for x in param_state.values()
            if isinstance(x, torch.Tensor)
        ]
        state = [*self.model.parameters(), *self.model.buffers(), *momenta]
        before, moves = [x.clone() for x in state], []
        for x in self.inputs:
            x.neg_()
        for rate in self.rates:
            rate.fill_(1.0)
        for run in (lambda: self.run_with_tensor_lr([1.0] * len(self.rates)), graph.replay):
            try:
                run()
                moved = zip(self.model.parameters(), before, strict=False)
                moves.append(torch.cat([(x - y).flatten() for x, y in moved]))
            finally:  # the step may run out of memory
                for x, y in zip(state, before, strict=True):
                    x.copy_(y)
        return bool((moves[0] - moves[1]).norm() <= 0.1 * moves[0].norm())
