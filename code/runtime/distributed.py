"""Distributed training with the processes (ranks) that torchrun starts. With one process every function is trivial.

All ranks train the same model on their share of every batch; only rank 0 prints, and rank 0, or the first
rank of each machine, writes.
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

from runtime.console import first_line, print_message
from runtime.errors import UserError, WorkError
from runtime.files import proc_stat

STORE = {'store': None, 'places': []}  # set by init_process_group: the store, and [host name, pid] of each rank
WARN_AFTER_S, INIT_TIMEOUT_S = 20.0, 600.0  # seconds of waiting for the other ranks
SEQUENCE = itertools.count()  # numbers the keys in the store; all ranks use them in the same order


def env_int(name, default):
    """Return an integer of the environment, or the default; cli.py refuses invalid values."""
    text = os.environ.get(name, '')
    return int(text) if text.isdecimal() else default


def rank():
    return env_int('RANK', 0)


def is_local_main():
    """Whether this is the first rank of its machine, which writes the files that the others read."""
    return not env_int('LOCAL_RANK', 0)


def world_size():
    """Return the number of ranks."""
    return env_int('WORLD_SIZE', 1)


def local_world_size():
    """Return the number of ranks on this machine."""
    return env_int('LOCAL_WORLD_SIZE', 1)


def init_process_group(device):
    """Initialize the process group, NCCL for GPUs or gloo for CPUs. device: of this rank. Raises WorkError if the other
    ranks do not start."""
    if world_size() > 1 and not dist.is_initialized():
        ours = rank() == 0 and os.environ.get('TORCHELASTIC_USE_AGENT_STORE') != 'True'
        address = os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT'])
        waited = WaitLimit()
        while not ours and not is_reachable(address):  # waiting in torch would block signals
            waited.wait(f'rank 0 of {world_size()} at {address[0]}:{address[1]} does not answer')
        store = dist.TCPStore(*address, is_master=ours)
        # A prefix per launch: with the keys of an earlier launch gloo may look for processes that are gone.
        store = dist.PrefixStore(agree_on_launch_id(store), store)
        backend = 'nccl' if device.type == 'cuda' else 'gloo'
        dist.init_process_group(backend, store=store, rank=rank(), world_size=world_size())
        STORE['store'] = store
        store.set(f'place_{rank()}', json.dumps([socket.gethostname(), os.getpid()]))
        STORE['places'] = [json.loads(wait_for_key(f'place_{other}')) for other in range(world_size())]


class WaitLimit:
    """Waits for other ranks to start, with a warning after WARN_AFTER_S and an error after INIT_TIMEOUT_S. Ranks may
    start minutes apart, if many machines load from a slow disk."""

    def __init__(self):
        self.since, self.warned = time.monotonic(), False

    def wait(self, what):
        """Sleep for 50 ms. what: a sentence on what is missing. Raises WorkError after INIT_TIMEOUT_S."""
        waited = time.monotonic() - self.since
        if waited > INIT_TIMEOUT_S:
            raise WorkError(f'{what}; waited for {waited:.0f} s. Were all processes started, each with its own RANK?')
        if waited > WARN_AFTER_S and not self.warned:
            self.warned = True
            print_message('warning', f'{what} yet; waiting up to {INIT_TIMEOUT_S:.0f} s')
        time.sleep(0.05)


def is_reachable(address):
    """Whether a TCP connection to (host, port) succeeds."""
    try:
        with socket.create_connection(address, timeout=1):
            return True
    except OSError:
        return False


def agree_on_launch_id(store):
    """Agree on a new id for this launch, the same on all ranks. torchrun keeps its store when it restarts the ranks,
    and counts restarts per machine. Each rank writes a random hello, and rank 0 offers its id with all hellos until
    every rank has found its own among them."""
    launch_id, other_ranks, waited = uuid.uuid4().hex, [str(other) for other in range(1, world_size())], WaitLimit()
    if not rank():
        while not store.check([f'{launch_id}_{other}' for other in other_ranks]):
            present = [other for other in other_ranks if store.check([f'hello_{other}'])]
            hellos = {other: store.get(f'hello_{other}').decode() for other in present}
            store.set('offer', json.dumps([launch_id, hellos]))
            waited.wait(f'{len(hellos) + 1} of {world_size()} processes have started')
        return launch_id
    store.set(f'hello_{rank()}', launch_id)
    while True:
        name, hellos = json.loads(store.get('offer')) if store.check(['offer']) else ('', {})
        if hellos.get(str(rank())) == launch_id:
            store.set(f'{name}_{rank()}', 'yes')
            return name
        waited.wait(f'number 0 of {world_size()} processes has not started')


def destroy_process_group():
    """Destroy the process group."""
    STORE['store'], STORE['places'] = None, []
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def local_main_first():
    """Context manager: the first rank of each machine runs the block alone, then the others, which find its files. If
    the block raises an exception in the first rank, other than ValueError, the others raise UserError or WorkError
    without running it."""
    if world_size() == 1 or not STORE['store']:
        yield
        return
    key = f'turn_{next(SEQUENCE)}_{os.environ.get("GROUP_RANK", 0)}'
    if not is_local_main():
        kind, text = json.loads(wait_for_key(key))
        if kind:
            raise (UserError if kind == 'UserError' else WorkError)(text)
        yield
        return
    failure = ['', '']
    try:
        yield
    except (UserError, WorkError) as error:
        failure = [type(error).__name__, str(error)]
        raise
    except ValueError:  # not of files: each rank finds it
        raise
    except Exception as error:
        failure = ['WorkError', f'the first process of this machine failed: {first_line(error)}']
        raise
    finally:
        STORE['store'].set(key, json.dumps(failure))


def wait_for_key(key):
    """Return the value of a key in the store, when another rank has set it. Polls, because waiting in torch would block
    signals."""
    while not STORE['store'].check([key]):
        time.sleep(0.05)
    return STORE['store'].get(key)


def claim_message(line):
    """Whether this rank is the first to print a message, so that an error on all ranks is printed once."""
    if world_size() == 1 or not STORE['store']:
        return True
    try:
        return STORE['store'].add(f'said_{hashlib.sha256(line.encode(errors="replace")).hexdigest()}', 1) == 1
    except RuntimeError:  # the process with the store has ended
        return True


def dead_ranks():
    """Describe which other ranks on this machine have ended; '' if none has. Waits up to 2 s, because the errors that
    follow from a rank's end can arrive earlier."""
    host, ended = socket.gethostname(), []
    end = time.monotonic() + 2.0
    while STORE['places'] and not ended and time.monotonic() < end:
        ended = [
            f'{number} (process {pid})'
            for number, (place, pid) in enumerate(STORE['places'])
            if place == host and not is_process_running(pid)
        ]
        time.sleep(0.1)
    return f'rank {", ".join(ended)} of {world_size()} has died' if ended else ''


def is_process_running(pid):
    """Whether a process of this machine runs and is no zombie; True if the system has no /proc."""
    return not proc_stat('self') or proc_stat(pid)[:1] not in ([], ['Z'])


def wrap_ddp(model, device):
    """Wrap the model in DistributedDataParallel with synchronized BN. With one rank, returns the model."""
    if world_size() == 1:
        return model
    convert_sync_batchnorm(model)
    ddp = nn.parallel.DistributedDataParallel
    # The running statistics are equal on all ranks and need no broadcast. (torch 2.14 renamed the option.)
    known = inspect.signature(ddp).parameters
    options = {'forward_sync_buffers' if 'forward_sync_buffers' in known else 'broadcast_buffers': False}
    return ddp(model, [device.index] if device.type == 'cuda' else None, gradient_as_bucket_view=True, **options)


def convert_sync_batchnorm(model):
    """Convert every BN of `model` to SyncBatchNorm, in place. Raises UserError for unknown subclasses of BN."""
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
                f'--backbone: its {kind} cannot be synchronized over processes: use one process, or another backbone'
            )
    return model


class SyncBatchNorm(_BatchNorm):
    """BN with statistics over the batches of all ranks, which have equal sizes. x: N x C or N x C x H x W.

    torch's SyncBatchNorm runs on GPUs only, uses all_gather instead of all_reduce, and breaks compiled graphs.
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
    """SyncBatchNorm for timm's BatchNormAct2d, a BN followed by an activation."""

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class SyncBatchNormFunction(torch.autograd.Function):
    """Normalize x by mean and variance over all ranks. Returns (y, mean, variance). One all_reduce in each direction.

    Means and squares are summed in double precision, because the difference loses digits if the variance is small
    beside the mean. The backward pass stores x in its own precision.
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
        grad_bias, grad_weight = exact.sum(axes), (exact * normal).sum(axes)
        first, second = (
            all_reduce_sum(torch.cat((grad_bias, grad_weight))) * (x.shape[1] / x.numel() / world_size())
        ).chunk(2)
        factor = scale if weight is None else scale * weight
        back = (exact - first.view(shape) - normal * second.view(shape)) * factor.view(shape)
        parameters = (None, None) if weight is None else (grad_weight.to(weight.dtype), grad_bias.to(weight.dtype))
        return cast(back, x.dtype), *parameters, None


def cast(x, dtype):
    """x.to(dtype), skipped if x has the dtype: torch 2.11 loses the gradient of such a no-op in compiled graphs."""
    return x if x.dtype == dtype else x.to(dtype)


def reduce_dims_and_shape(x):
    """Return the axes of x except the channels', and a shape that broadcasts one value per channel over x."""
    return [axis for axis in range(x.ndim) if axis != 1], [1, -1] + [1] * (x.ndim - 2)


def all_reduce_sum(x):
    """Return the sum of x over all ranks, as an operation that torch.compile can trace."""
    return collectives.wait_tensor(collectives.all_reduce(x, 'sum', dist.group.WORLD))


def all_reduce_mean(numbers, device):
    """Return the means of some numbers over all ranks, as a tuple."""
    if world_size() == 1:
        return tuple(numbers)
    x = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(x)
    return tuple((x / world_size()).tolist())


def all_reduce_max(number, device):
    """Return the largest number over all ranks, a tensor of one element. All ranks must call it at the same point."""
    value = torch.full((1,), float(number), device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return value


def rows_per_rank(count):
    """Return the most rows of `count` that a rank has, if they are split by sampler.rank_slice."""
    return -(-count // world_size())


def all_gather_rows(x, count=None):
    """Concatenate the rows of x of all ranks. count: total number of rows, split by sampler.rank_slice; None if all
    ranks have equally many."""
    if world_size() == 1:
        return x
    most = len(x) if count is None else rows_per_rank(count)
    padded = torch.cat((x, x.new_zeros(most - len(x), *x.shape[1:]))).contiguous()
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(parts, padded)
    return torch.cat(parts)[:count]


def shard_range(count, whole=None):
    """Return (first, total): the position of this rank's `count` images in a batch of all ranks. whole: the total, if
    split by sampler.rank_slice; None if all ranks have equally many."""
    if whole is None:
        return rank() * count, world_size() * count
    return min(rank() * rows_per_rank(whole), whole - count), whole


def first_failure(text):
    """Return the first text that is not empty, of the texts of all ranks: why one of them failed. All ranks must call
    it at the same point."""
    if world_size() == 1 or not STORE['store']:
        return text
    key = f'failed_{next(SEQUENCE)}'
    STORE['store'].set(f'{key}_{rank()}', text)
    texts = [wait_for_key(f'{key}_{other}').decode() for other in range(world_size())]
    return next(filter(None, texts), '')


def broadcast_from_rank0(make):
    """Call make() on rank 0 and return its result, JSON data, on all ranks. A UserError or WorkError of it is raised on
    all."""
    if world_size() == 1:
        return make()
    key, errors = f'same_{next(SEQUENCE)}', (UserError, WorkError)
    if not rank():
        try:
            answer = {'result': make()}
        except errors as error:
            answer = {'error': str(error), 'kind': next(i for i, kind in enumerate(errors) if isinstance(error, kind))}
        STORE['store'].set(key, json.dumps(answer))
    answer = json.loads(wait_for_key(key))
    if 'error' in answer:
        raise errors[answer['kind']](answer['error'])
    return answer['result']
