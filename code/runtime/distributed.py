"""Several processes that work on one run, as torchrun starts them; with one process every function here is trivial.

Each process has a rank. All train the same model on their share of every batch; rank 0 alone writes and speaks.
"""

import contextlib
import hashlib
import inspect
import itertools
import json
import os
import socket
import time
import uuid

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from errors import UserError, WorkError
from runtime.console import complain
from runtime.files import process_stat

JOINED = {'store': None, 'others': []}  # what `start` found: the store, [machine, process] of each rank
SAY_AFTER, LONGEST_START = 20.0, 600.0  # seconds, of waiting for the other processes
TURNS = itertools.count()  # of what goes through the store: all processes come to it in the same order


def told_by_torchrun(name, default):
    """A number of the environment; what is none is refused by cli.py."""
    text = os.environ.get(name, '')
    return int(text) if text.isdecimal() else default


def rank():
    return told_by_torchrun('RANK', 0)


def first_here():
    """Whether this is the first process of this machine: the one that writes what its others read."""
    return not told_by_torchrun('LOCAL_RANK', 0)


def world():
    """The number of processes."""
    return told_by_torchrun('WORLD_SIZE', 1)


def local_world():
    """The number of processes on this machine."""
    return told_by_torchrun('LOCAL_WORLD_SIZE', 1)


def start(device):
    """Join the other processes: NCCL between GPUs, gloo between CPUs. device: this process's."""
    if world() > 1 and not dist.is_initialized():
        ours = rank() == 0 and os.environ.get('TORCHELASTIC_USE_AGENT_STORE') != 'True'
        address = os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT'])
        waited = Patience()
        while not ours and not answers(address):  # torch's own wait is deaf to signals
            waited.on(f'{address[0]}:{address[1]}, where number 0 of {world()} processes should be, does not answer')
        store = dist.TCPStore(*address, is_master=ours)
        # Each start has keys of its own in the store: with the last one's, gloo may look for processes that are gone.
        store = dist.PrefixStore(this_start(store), store)
        backend = 'nccl' if device.type == 'cuda' else 'gloo'
        dist.init_process_group(backend, store=store, rank=rank(), world_size=world())
        JOINED['store'] = store
        store.set(f'place_{rank()}', json.dumps([socket.gethostname(), os.getpid()]))
        JOINED['others'] = [json.loads(told(f'place_{other}')) for other in range(world())]


class Patience:
    """Waiting for the other processes to start: said after a while, and over some day. They may come minutes apart,
    where a cold disk serves many machines."""

    def __init__(self):
        self.since, self.said = time.monotonic(), False

    def on(self, what):
        """Wait a moment; raises WorkError where the time is up. what: is waited for, a sentence."""
        waited = time.monotonic() - self.since
        if waited > LONGEST_START:
            raise WorkError(f'{what}; waited for {waited:.0f} s. Were all processes started, each with its own RANK?')
        if waited > SAY_AFTER and not self.said:
            self.said = True
            complain('warning', f'{what} yet; waiting up to {LONGEST_START:.0f} s')
        time.sleep(0.05)


def answers(address):
    """Whether a port of another process can be reached."""
    try:
        with socket.create_connection(address, timeout=1):
            return True
    except OSError:
        return False


def this_start(store):
    """A name for this start of all processes, the same in each, and new: torchrun keeps its store when it restarts, and
    counts restarts on each machine for itself. Each says hello by a name of its own, and rank 0 offers one to all until
    all have found their hello in the offer."""
    mine, others, waited = uuid.uuid4().hex, [str(other) for other in range(1, world())], Patience()
    if not rank():
        while not store.check([f'{mine}_{other}' for other in others]):
            there = [other for other in others if store.check([f'hello_{other}'])]
            hellos = {other: store.get(f'hello_{other}').decode() for other in there}
            store.set('offer', json.dumps([mine, hellos]))
            waited.on(f'{len(hellos) + 1} of {world()} processes have come')
        return mine
    store.set(f'hello_{rank()}', mine)
    while True:
        name, hellos = json.loads(store.get('offer')) if store.check(['offer']) else ('', {})
        if hellos.get(str(rank())) == mine:
            store.set(f'{name}_{rank()}', 'yes')
            return name
        waited.on(f'number 0 of {world()} processes has not come')


def end():
    JOINED['store'], JOINED['others'] = None, []
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def in_turn():
    """Within, the first process of each machine goes alone; the others follow when it is through, however long that
    takes, and find what it has left on the disk. What it raises ends it, and with it the run."""
    if world() == 1 or not JOINED['store']:
        yield
        return
    key = f'turn_{next(TURNS)}_{os.environ.get("GROUP_RANK", 0)}'
    if not first_here():
        told(key)
    yield
    if first_here():
        JOINED['store'].set(key, 'done')


def told(key):
    """What another process has set, or sets some day, in the store. Waits in Python, where a signal is heard."""
    while not JOINED['store'].check([key]):
        time.sleep(0.05)
    return JOINED['store'].get(key)


def first_to_say(line):
    """Whether none of the other processes has said it: what all of them meet is one line, not one from each."""
    if world() == 1 or not JOINED['store']:
        return True
    try:
        return JOINED['store'].add(f'said_{hashlib.sha256(line.encode(errors="replace")).hexdigest()}', 1) == 1
    except RuntimeError:  # who keeps the store has gone
        return True


def gone():
    """Which other processes of this run, on this machine, have ended, in words; '' where none has."""
    host, ended = socket.gethostname(), []
    end = time.monotonic() + 2.0  # what one's end does to the others may reach them first
    while JOINED['others'] and not ended and time.monotonic() < end:
        ended = [
            f'{number} (process {pid})'
            for number, (place, pid) in enumerate(JOINED['others'])
            if place == host and not runs(pid)
        ]
        time.sleep(0.1)
    return f'of the {world()} processes of this run number {", ".join(ended)} has ended' if ended else ''


def runs(pid):
    """Whether a process of this machine is there and no zombie; True where the system does not tell."""
    return not process_stat('self') or process_stat(pid)[:1] not in ([], ['Z'])


def wrap(model, device):
    """What to call in place of `model` in training: gradients averaged and BN statistics shared between processes."""
    if world() == 1:
        return model
    share_statistics(model)
    ddp = nn.parallel.DistributedDataParallel
    # The running statistics are equal already: nothing has to be sent for them. (torch 2.14 has a new name for it.)
    known = inspect.signature(ddp).parameters
    options = {'forward_sync_buffers' if 'forward_sync_buffers' in known else 'broadcast_buffers': False}
    return ddp(model, [device.index] if device.type == 'cuda' else None, gradient_as_bucket_view=True, **options)


def share_statistics(model):
    """Turn every BN of `model` into a SharedBatchNorm, in place. Raises UserError for one that does more than BN and is
    not known."""
    for module in model.modules():
        if not isinstance(module, _BatchNorm) or isinstance(module, SharedBatchNorm):
            continue
        if type(module).forward is _BatchNorm.forward:
            module.__class__ = SharedBatchNorm
        elif hasattr(module, 'act') and hasattr(module, 'drop'):
            module.__class__ = SharedBatchNormAct
        else:
            kind = type(module).__name__
            raise UserError(
                f'--backbone: its {kind} cannot be shared by processes: take one process, or another backbone'
            )
    return model


class SharedBatchNorm(_BatchNorm):
    """BN over the batches of all processes, all of one size. x: N x C or N x C x H x W.

    torch's SyncBatchNorm runs on GPUs only, gathers where a sum does, and breaks a compiled graph at every layer.
    """

    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        y, mean, variance = Normalise.apply(x, self.weight, self.bias, self.eps)
        with torch.no_grad():
            count = world() * x.numel() // x.shape[1]
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
            self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var), self.momentum)
        return y


class SharedBatchNormAct(SharedBatchNorm):
    """timm's BatchNormAct2d, which is a BN and the activation behind it."""

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class Normalise(torch.autograd.Function):
    """x, normalised by mean and variance over all processes; also the two. One sum over the processes each way.

    Means and squares are summed in double precision, C numbers of each: in single a variance that is small beside the
    mean would lose its digits. Of a half-precision x only itself is kept for the way back.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        axes, shape = around(x)
        exact = torch.promote_types(x.dtype, torch.float32)
        variance, mean = (part.double() for part in torch.var_mean(x.to(exact), axes, correction=0))
        mean, square = (total(torch.cat((mean, variance + mean.square()))) / world()).chunk(2)
        variance = (square - mean.square()).clamp(min=0)
        mean, variance, scale = mean.to(exact), variance.to(exact), (variance + eps).rsqrt().to(exact)
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.mark_non_differentiable(mean, variance)
        y = (x - mean.view(shape)) * (scale if weight is None else scale * weight).view(shape)
        return typed(y if bias is None else y + bias.view(shape), x.dtype), mean, variance

    @staticmethod
    def backward(ctx, slope, *_):
        x, weight, mean, scale = ctx.saved_tensors
        axes, shape = around(x)
        normal, exact = (x - mean.view(shape)) * scale.view(shape), slope.to(mean.dtype)
        of_bias, of_weight = exact.sum(axes), (exact * normal).sum(axes)
        first, second = (total(torch.cat((of_bias, of_weight))) * (x.shape[1] / x.numel() / world())).chunk(2)
        factor = scale if weight is None else scale * weight
        back = (exact - first.view(shape) - normal * second.view(shape)) * factor.view(shape)
        parameters = (None, None) if weight is None else (of_weight.to(weight.dtype), of_bias.to(weight.dtype))
        return typed(back, x.dtype), *parameters, None


def typed(x, dtype):
    """x.to(dtype), but where nothing is to do: in a graph that torch 2.11 compiles that loses the gradient."""
    return x if x.dtype == dtype else x.to(dtype)


def around(x):
    """The axes of x but its channels', and a shape that spreads a value per channel over x."""
    return [axis for axis in range(x.ndim) if axis != 1], [1, -1] + [1] * (x.ndim - 2)


def total(x):
    """The sum over the processes, as an operation that torch.compile keeps in its graph."""
    return collectives.wait_tensor(collectives.all_reduce(x, 'sum', dist.group.WORLD))


def means(numbers, device):
    """The mean of each of some numbers over the processes, as a tuple."""
    if world() == 1:
        return tuple(numbers)
    x = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(x)
    return tuple((x / world()).tolist())


def most(number, device):
    """The largest of the processes' numbers, 1 on the device. All of them have to ask at the same place."""
    asked = torch.full((1,), float(number), device=device)
    dist.all_reduce(asked, dist.ReduceOp.MAX)
    return asked


def gather(x, count=None):
    """The rows of all processes' x, one after the other. count: of all rows, cut into sampler.share; None: each has as
    many."""
    if world() == 1:
        return x
    most = len(x) if count is None else -(-count // world())
    padded = torch.cat((x, x.new_zeros(most - len(x), *x.shape[1:]))).contiguous()
    parts = [torch.empty_like(padded) for _ in range(world())]
    dist.all_gather(parts, padded)
    return torch.cat(parts)[:count]


def place_of(count, whole=None):
    """Where this process's `count` images lie in a batch: (the first, of how many). whole: of how many, where they are
    cut into sampler.share; None: each has as many."""
    if whole is None:
        return rank() * count, world() * count
    return min(rank() * -(-whole // world()), whole - count), whole


def same_for_all(make):
    """What make() gives in rank 0, in every process: plain data."""
    if world() == 1:
        return make()
    key = f'same_{next(TURNS)}'
    if not rank():
        JOINED['store'].set(key, json.dumps(make()))
    return json.loads(told(key))
