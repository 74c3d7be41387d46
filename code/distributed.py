"""Several processes that work on one run, as torchrun starts them; with one process every function here is trivial.

Each process has a rank. All train the same model on their share of every batch; rank 0 alone writes and speaks.
"""

import contextlib
import os
import socket
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

JOINED = {'store': None, 'others': [], 'turns': 0}  # what `start` found: the store, (machine, process) of each rank


def rank():
    return int(os.environ.get('RANK', 0))


def first_here():
    """Whether this is the first process of this machine: the one that writes what its others read."""
    return not int(os.environ.get('LOCAL_RANK', 0))


def world():
    """The number of processes."""
    return int(os.environ.get('WORLD_SIZE', 1))


def start(device):
    """Join the other processes: NCCL between GPUs, gloo between CPUs. device: this process's."""
    if world() > 1 and not dist.is_initialized():
        if device.type == 'cuda':
            torch.cuda.set_device(device)
        # Each restart has keys of its own in the store: with the last one's, gloo may look for processes that are gone.
        ours = rank() == 0 and os.environ.get('TORCHELASTIC_USE_AGENT_STORE') != 'True'
        store = dist.TCPStore(os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']), is_master=ours)
        store = dist.PrefixStore(f'restart_{os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)}', store)
        backend = 'nccl' if device.type == 'cuda' else 'gloo'
        dist.init_process_group(backend, store=store, rank=rank(), world_size=world())
        JOINED['store'], JOINED['others'] = store, [None] * world()
        dist.all_gather_object(JOINED['others'], (socket.gethostname(), os.getpid()))


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
    JOINED['turns'] += 1
    key = f'turn_{JOINED["turns"]}_{os.environ.get("GROUP_RANK", 0)}'
    while not first_here() and not JOINED['store'].check([key]):
        time.sleep(0.2)  # in Python, where a signal is heard
    yield
    if first_here():
        JOINED['store'].set(key, 'done')


def gone():
    """Which other processes of this run, on this machine, have ended, in words; '' where none has."""
    host, ended = socket.gethostname(), []
    end = time.monotonic() + 2.0  # what one's end does to the others may reach them first
    while JOINED['others'] and not ended and time.monotonic() < end:
        ended = [f'{number} (process {pid})' for number, (place, pid) in enumerate(JOINED['others'])
                 if place == host and not runs(pid)]  # fmt: skip
        time.sleep(0.1)
    return f'of the {world()} processes of this run number {", ".join(ended)} has ended' if ended else ''


def runs(pid):
    """Whether a process of this machine is there and no zombie; True where the system does not tell."""
    if not Path('/proc/self/stat').exists():
        return True
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except OSError:
        return False


def wrap(model, device):
    """What to call in place of `model` in training: gradients averaged and BN statistics shared between processes."""
    if world() == 1:
        return model
    if device.type == 'cuda':
        shared = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return nn.parallel.DistributedDataParallel(shared, device_ids=[device.index])
    return nn.parallel.DistributedDataParallel(share_statistics(model))


def share_statistics(model):
    """Turn every BN of `model` into a SharedBatchNorm, in place: torch's SyncBatchNorm runs on GPUs only."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.__class__ = SharedBatchNorm
    return model


class SharedBatchNorm(_BatchNorm):
    """BN over the batches of all processes. x: N x C or N x C x H x W."""

    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        axes = [axis for axis in range(x.ndim) if axis != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        count = world() * x.numel() // x.shape[1]  # every process has as many
        mean = Sum.apply(x.sum(axes)) / count
        centred = x - mean.view(shape)
        variance = Sum.apply((centred**2).sum(axes)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
            self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var), self.momentum)
        x = centred * (variance + self.eps).rsqrt().view(shape)
        return x * self.weight.view(shape) + self.bias.view(shape) if self.affine else x


class Sum(torch.autograd.Function):
    """The sum over the processes; so is its gradient, for each one's loss depends on every one's x."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, slope):
        slope = slope.clone()
        dist.all_reduce(slope)
        return slope


def means(numbers, device):
    """The mean of each of some numbers over the processes, as a tuple."""
    if world() == 1:
        return tuple(numbers)
    x = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(x)
    return tuple((x / world()).tolist())


def most(number, device):
    """The largest of the processes' numbers. All of them have to ask at the same place."""
    if world() == 1:
        return number
    asked = torch.tensor(float(number), device=device)
    dist.all_reduce(asked, dist.ReduceOp.MAX)
    return asked.item()


def gather(x, count=None):
    """The rows of all processes' x, one after the other, the first `count`; each gives as many but the last few."""
    if world() == 1:
        return x
    sizes = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(world())]
    dist.all_gather(sizes, torch.tensor([len(x)], device=x.device))
    most = max(int(size) for size in sizes)
    padded = torch.cat((x, x.new_zeros(most - len(x), *x.shape[1:]))).contiguous()
    parts = [torch.empty_like(padded) for _ in range(world())]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)])[:count]


def same_for_all(make):
    """What make() gives in rank 0, in every process."""
    if world() == 1:
        return make()
    box = [None if rank() else make()]
    dist.broadcast_object_list(box, src=0)
    return box[0]
