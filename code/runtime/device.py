"""The device that a process computes on: choosing it, compiling for it, and its memory."""

import contextlib
import functools
import os
import shutil
import sysconfig

import torch

from runtime.console import first_line
from runtime.distributed import init_process_group, world_size
from runtime.errors import UserError, WorkError


def get_device(args):
    """The torch device that --device means. Raises UserError where this machine does not have it."""
    name = args.device
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'cpu'
    if name.startswith('cuda:') and world_size() > 1:
        raise UserError(
            f'--device={name} would put all {world_size()} processes on one GPU: --device=cuda gives each its own'
        )
    if name == 'cuda' and world_size() > 1:
        name = f'cuda:{os.environ.get("LOCAL_RANK", 0)}'
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f'--device is auto, cpu, cuda, cuda:<number> or mps, not {name!r}') from None
    if device.type == 'cuda' and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        helps = f'start one a GPU: --nproc_per_node={count}' if world_size() > 1 and count else 'try --device=auto'
        raise UserError(f'--device={name}: torch sees {count} CUDA GPUs here; {helps}')
    if device.type == 'mps' and not torch.backends.mps.is_available():
        raise UserError('--device=mps: torch sees no Apple GPU here; try --device=auto')
    if device.type not in ('cpu', 'cuda', 'mps'):
        raise UserError(f'--device is auto, cpu, cuda, cuda:<number> or mps, not {name!r}')
    return device


def init_device(args):
    """get_device, made this process's own, and the other processes joined: what every command begins with."""
    device = get_device(args)
    if device.type == 'cuda':
        torch.cuda.set_device(device.index or 0)  # where threads and pinned memory have their home, too
        torch.set_float32_matmul_precision('high')  # TF32 where it is not bfloat16
        torch.backends.cudnn.benchmark = True
    init_process_group(device)
    return device


def use_compile(args):
    """Whether to torch.compile, as --compile says. Raises UserError where it is wanted and cannot be."""
    device = get_device(args)
    if args.compile == 'auto':
        return device.type == 'cuda' and not compile_unavailable_reason(device)
    if args.compile == 'True' and (reason := compile_unavailable_reason(device)):
        raise UserError(f'--compile=True: {reason}; --compile=False goes without')
    return args.compile == 'True'


@functools.cache
def compile_unavailable_reason(device):
    """Why torch.compile does not work here, in a few words; '' where it does: tried on a small function."""
    if not any(shutil.which(name) for name in (os.environ.get('CC', 'cc'), 'gcc', 'clang')):
        return 'there is no C compiler (apt install gcc)'
    if not os.path.exists(os.path.join(sysconfig.get_path('include'), 'Python.h')):
        return "Python's headers are missing (apt install python3-dev)"
    try:
        torch.compile(lambda x: (x + 1).relu())(torch.zeros(8, device=device))
    except Exception as error:  # of a compiler, of Triton, of the driver
        return f'torch.compile fails: {first_line(error)[:200]}'
    return ''


def peak_memory(device):
    """{'speed/memory_gigabytes': the most that this process held of its GPU since this was asked last, what a recorded
    step keeps for itself included}; nothing of a CPU."""
    if device.type != 'cuda':
        return {}
    peak = torch.cuda.max_memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    return {'speed/memory_gigabytes': peak / 1e9}


def is_oom(error):
    """'the GPU' or 'the machine' where an exception says that it has no more memory, else None."""
    if isinstance(error, torch.OutOfMemoryError):
        return 'the GPU'
    # What torch raises on a CPU has no type of its own.
    if isinstance(error, MemoryError) or 'DefaultCPUAllocator: can' in str(error):
        return 'the machine'
    return None


@contextlib.contextmanager
def explain_oom(what, helps):
    """Work whose lack of memory is a WorkError that names it, and what helps there."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if place := is_oom(error):
            raise WorkError(f'{place} has not enough memory for {what}: {helps}') from None
        raise
