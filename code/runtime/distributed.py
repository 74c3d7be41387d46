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

from runtime.console import print_message
from runtime.errors import UserError, WorkError
from runtime.files import proc_stat

STORE = {'store': None, 'others': []}  # what `init_process_group` found: the store, [machine, process] of each rank
WARN_AFTER_S, INIT_TIMEOUT_S = 20.0, 600.0  # seconds, of waiting for the other processes
SEQUENCE = itertools.count()  # of what goes through the store: all processes come to it in the same order


def env_int(name, default):
    """A number of the environment; what is none is refused by cli.py."""
    text = os.environ.get(name, '')
    return int(text) if text.isdecimal() else default


def rank():
    return env_int('RANK', 0)


def is_local_main():
    """Whether this is the first process of this machine: the one that writes what its others read."""
    return not env_int('LOCAL_RANK', 0)


def world_size():
    """The number of processes."""
    return env_int('WORLD_SIZE', 1)


def local_world_size():
    """The number of processes on this machine."""
    return env_int('LOCAL_WORLD_SIZE', 1)


def init_process_group(device):
    """Join the other processes: NCCL between GPUs, gloo between CPUs. device: this process's."""
    if world_size() > 1 and not dist.is_initialized():
        ours = rank() == 0 and os.environ.get('TORCHELASTIC_USE_AGENT_STORE') != 'True'
        address = os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT'])
        waited = WaitLimit()
        while not ours and not is_reachable(address):  # torch's own wait is deaf to signals
            waited.on(
                f'{address[0]}:{address[1]}, where number 0 of {world_size()} processes should be, does not answer'
            )
        store = dist.TCPStore(*address, is_master=ours)
        # Each start has keys of its own in the store: with the last one's, gloo may look for processes that are gone.
        store = dist.PrefixStore(agree_on_launch_id(store), store)
        backend = 'nccl' if device.type == 'cuda' else 'gloo'
        dist.init_process_group(backend, store=store, rank=rank(), world_size=world_size())
        STORE['store'] = store
        store.set(f'place_{rank()}', json.dumps([socket.gethostname(), os.getpid()]))
        STORE['others'] = [json.loads(wait_for_key(f'place_{other}')) for other in range(world_size())]


class WaitLimit:
    """Waiting for the other processes to start: said after a while, and over some day. They may come minutes apart,
    where a cold disk serves many machines."""

    def __init__(self):
        self.since, self.said = time.monotonic(), False

    def on(self, what):
        """Wait a moment; raises WorkError where the time is up. what: is waited for, a sentence."""
        waited = time.monotonic() - self.since
        if waited > INIT_TIMEOUT_S:
            raise WorkError(f'{what}; waited for {waited:.0f} s. Were all processes started, each with its own RANK?')
        if waited > WARN_AFTER_S and not self.said:
            self.said = True
            print_message('warning', f'{what} yet; waiting up to {INIT_TIMEOUT_S:.0f} s')
        time.sleep(0.05)


def is_reachable(address):
    """Whether a port of another process can be reached."""
    try:
        with socket.create_connection(address, timeout=1):
            return True
    except OSError:
        return False


def agree_on_launch_id(store):
    """A name for this start of all processes, the same in each, and new: torchrun keeps its store when it restarts, and
    counts restarts on each machine for itself. Each says hello by a name of its own, and rank 0 offers one to all until
    all have found their hello in the offer."""
    mine, others, waited = uuid.uuid4().hex, [str(other) for other in range(1, world_size())], WaitLimit()
    if not rank():
        while not store.check([f'{mine}_{other}' for other in others]):
            there = [other for other in others if store.check([f'hello_{other}'])]
            hellos = {other: store.get(f'hello_{other}').decode() for other in there}
            store.set('offer', json.dumps([mine, hellos]))
            waited.on(f'{len(hellos) + 1} of {world_size()} processes have come')
        return mine
    store.set(f'hello_{rank()}', mine)
    while True:
        name, hellos = json.loads(store.get('offer')) if store.check(['offer']) else ('', {})
        if hellos.get(str(rank())) == mine:
            store.set(f'{name}_{rank()}', 'yes')
            return name
        waited.on(f'number 0 of {world_size()} processes has not come')


def destroy():
    STORE['store'], STORE['others'] = None, []
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def local_main_first():
    """Within, the first process of each machine goes alone; the others follow when it is through, however long that
    takes, and find what it has left on the disk. What it raises ends it, and with it the run."""
    if world_size() == 1 or not STORE['store']:
        yield
        return
    key = f'turn_{next(SEQUENCE)}_{os.environ.get("GROUP_RANK", 0)}'
    if not is_local_main():
        wait_for_key(key)
    yield
    if is_local_main():
        STORE['store'].set(key, 'done')


def wait_for_key(key):
    """What another process has set, or sets some day, in the store. Waits in Python, where a signal is heard."""
    while not STORE['store'].check([key]):
        time.sleep(0.05)
    return STORE['store'].get(key)


def claim_message(line):
    """Whether none of the other processes has said it: what all of them meet is one line, not one from each."""
    if world_size() == 1 or not STORE['store']:
        return True
    try:
        return STORE['store'].add(f'said_{hashlib.sha256(line.encode(errors="replace")).hexdigest()}', 1) == 1
    except RuntimeError:  # who keeps the store has gone
        return True


def dead_ranks():
    """Which other processes of this run, on this machine, have ended, in words; '' where none has."""
    host, ended = socket.gethostname(), []
    end = time.monotonic() + 2.0  # what one's end does to the others may reach them first
    while STORE['others'] and not ended and time.monotonic() < end:
        ended = [
            f'{number} (process {pid})'
            for number, (place, pid) in enumerate(STORE['others'])
            if place == host and not is_alive(pid)
        ]
        time.sleep(0.1)
    return f'of the {world_size()} processes of this run number {", ".join(ended)} has ended' if ended else ''


def is_alive(pid):
    """Whether a process of this machine is there and no zombie; True where the system does not tell."""
    return not proc_stat('self') or proc_stat(pid)[:1] not in ([], ['Z'])


def wrap_ddp(model, device):
    """What to call in place of `model` in training: gradients averaged and BN statistics shared between processes."""
    if world_size() == 1:
        return model
    convert_sync_batchnorm(model)
    ddp = nn.parallel.DistributedDataParallel
    # The running statistics are equal already: nothing has to be sent for them. (torch 2.14 has a new name for it.)
    known = inspect.signature(ddp).parameters
    options = {'forward_sync_buffers' if 'forward_sync_buffers' in known else 'broadcast_buffers': False}
    return ddp(model, [device.index] if device.type == 'cuda' else None, gradient_as_bucket_view=True, **options)


def convert_sync_batchnorm(model):
    """Turn every BN of `model` into a SyncBatchNorm, in place. Raises UserError for one that does more than BN and is
    not known."""
    for module in model.modules():
        if not isinstance(module, _BatchNorm) or isinstance(module, SyncBatchNorm):
            continue
        if type(module).forward is _BatchNorm.forward:
            module.__class__ = SyncBatchNorm
        elif hasattr(module, 'act') and hasattr(module, 'drop'):
            module.__class__ = SharedBatchNormAct
        else:
            kind = type(module).__name__
            raise UserError(
                f'--backbone: its {kind} cannot be shared by processes: take one process, or another backbone'
            )
    return model


class SyncBatchNorm(_BatchNorm):
    """BN over the batches of all processes, all of one size. x: N x C or N x C x H x W.

    torch's SyncBatchNorm runs on GPUs only, gathers where a sum does, and breaks a compiled graph at every layer.
    """

    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        y, mean, variance = SyncBatchNormFunction.apply(x, self.weight, self.bias, self.eps)
        with torch.no_grad():
            count = world_size() * x.numel() // x.shape[1]
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
            self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var), self.momentum)
        return y


class SharedBatchNormAct(SyncBatchNorm):
    """timm's BatchNormAct2d, which is a BN and the activation behind it."""

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class SyncBatchNormFunction(torch.autograd.Function):
    """x, normalised by mean and variance over all processes; also the two. One sum over the processes each way.

    Means and squares are summed in double precision, C numbers of each: in single a variance that is small beside the
    mean would lose its digits. Of a half-precision x only itself is kept for the way back.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        axes, shape = reduce_dims_and_shape(x)
        exact = torch.promote_types(x.dtype, torch.float32)
        variance, mean = (part.double() for part in torch.var_mean(x.to(exact), axes, correction=0))
        mean, square = (all_reduce_sum(torch.cat((mean, variance + mean.square()))) / world_size()).chunk(2)
        variance = (square - mean.square()).clamp(min=0)
        mean, variance, scale = mean.to(exact), variance.to(exact), (variance + eps).rsqrt().to(exact)
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.mark_non_differentiable(mean, variance)
        y = (x - mean.view(shape)) * (scale if weight is None else scale * weight).view(shape)
        return cast(y if bias is None else y + bias.view(shape), x.dtype), mean, variance

    @staticmethod
    def backward(ctx, grad_output, *_):
        x, weight, mean, scale = ctx.saved_tensors
        axes, shape = reduce_dims_and_shape(x)
        normal, exact = (x - mean.view(shape)) * scale.view(shape), grad_output.to(mean.dtype)
        of_bias, of_weight = exact.sum(axes), (exact * normal).sum(axes)
        first, second = (
            all_reduce_sum(torch.cat((of_bias, of_weight))) * (x.shape[1] / x.numel() / world_size())
        ).chunk(2)
        factor = scale if weight is None else scale * weight
        back = (exact - first.view(shape) - normal * second.view(shape)) * factor.view(shape)
        parameters = (None, None) if weight is None else (of_weight.to(weight.dtype), of_bias.to(weight.dtype))
        return cast(back, x.dtype), *parameters, None


def cast(x, dtype):
    """x.to(dtype), but where nothing is to do: in a graph that torch 2.11 compiles that loses the gradient."""
    return x if x.dtype == dtype else x.to(dtype)


def reduce_dims_and_shape(x):
    """The axes of x but its channels', and a shape that spreads a value per channel over x."""
    return [axis for axis in range(x.ndim) if axis != 1], [1, -1] + [1] * (x.ndim - 2)


def all_reduce_sum(x):
    """The sum over the processes, as an operation that torch.compile keeps in its graph."""
    return collectives.wait_tensor(collectives.all_reduce(x, 'sum', dist.group.WORLD))


def all_reduce_mean(numbers, device):
    """The mean of each of some numbers over the processes, as a tuple."""
    if world_size() == 1:
        return tuple(numbers)
    x = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(x)
    return tuple((x / world_size()).tolist())


def all_reduce_max(number, device):
    """The largest of the processes' numbers, 1 on the device. All of them have to ask at the same place."""
    asked = torch.full((1,), float(number), device=device)
    dist.all_reduce(asked, dist.ReduceOp.MAX)
    return asked


def all_gather_rows(x, count=None):
    """The rows of all processes' x, one after the other. count: of all rows, cut into sampler.rank_slice; None: each
    has as many."""
    if world_size() == 1:
        return x
    most = len(x) if count is None else -(-count // world_size())
    padded = torch.cat((x, x.new_zeros(most - len(x), *x.shape[1:]))).contiguous()
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(parts, padded)
    return torch.cat(parts)[:count]


def shard_range(count, whole=None):
    """Where this process's `count` images lie in a batch: (the first, of how many). whole: of how many, where they are
    cut into sampler.rank_slice; None: each has as many."""
    if whole is None:
        return rank() * count, world_size() * count
    return min(rank() * -(-whole // world_size()), whole - count), whole


def broadcast_from_rank0(make):
    """What make() gives in rank 0, in every process: plain data."""
    if world_size() == 1:
        return make()
    key = f'same_{next(SEQUENCE)}'
    if not rank():
        STORE['store'].set(key, json.dumps(make()))
    return json.loads(wait_for_key(key))
