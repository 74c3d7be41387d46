"""The device of a process: selection, torch.compile, memory."""

import contextlib
import functools
import math
import os
import shutil
import sysconfig
from pathlib import Path

import torch

from runtime.console import first_line
from runtime.distributed import init_process_group, world_size
from runtime.errors import UserError, WorkError
from runtime.messages import warn


def get_device(args):
    """Return the torch.device of --device. Raises UserError if this machine does not have it."""
    name = args.device
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() and not unsupported_gpu(local_gpu()) else 'cpu'
    if name.startswith('cuda:') and world_size() > 1:
        raise UserError(
            f'--device={name} would put all {world_size()} processes on one GPU: --device=cuda gives each its own'
        )
    if name == 'cuda' and world_size() > 1:
        name = f'cuda:{local_gpu()}'
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f'--device is auto, cpu, cuda, cuda:<number> or mps, not {name!r}') from None
    if device.type == 'cuda' and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        helps = f'start one a GPU: --nproc_per_node={count}' if world_size() > 1 and count else 'try --device=auto'
        raise UserError(f'--device={name}: torch sees {count} CUDA GPUs here; {helps}')
    if device.type == 'cuda' and (reason := unsupported_gpu(device.index or 0)):
        raise UserError(f'--device={name}: {reason}; --device=cpu works')
    if device.type == 'mps' and not torch.backends.mps.is_available():
        raise UserError('--device=mps: torch sees no Apple GPU here; try --device=auto')
    if device.type not in ('cpu', 'cuda', 'mps'):
        raise UserError(f'--device is auto, cpu, cuda, cuda:<number> or mps, not {name!r}')
    return device


def local_gpu():
    """Return the number of this rank's GPU on its machine."""
    return int(os.environ.get('LOCAL_RANK', 0)) if world_size() > 1 else 0


@functools.cache
def unsupported_gpu(index):
    """Return why this build of torch cannot use GPU number `index`; '' if it can, or on ROCm."""
    if not torch.cuda.is_available() or torch.version.cuda is None or index >= torch.cuda.device_count():
        return ''
    major, minor = torch.cuda.get_device_capability(index)
    if has_kernels(major, minor, torch.cuda.get_arch_list()):
        return ''
    return f'GPU {index} has compute capability {major}.{minor}, and torch {torch.__version__} is not built for it'


def has_kernels(major, minor, architectures):
    """Whether a GPU of compute capability major.minor can run code for one of `architectures`: sm_80 runs on 8.0 and
    8.6, compute_80 is compiled for it and later ones. No names mean an unknown build, which may."""
    for name in architectures:
        kind, _, digits = name.partition('_')
        digits = digits.rstrip('af')
        if digits.isdecimal() and len(digits) > 1:
            built = int(digits[:-1]), int(digits[-1])
            if built <= (major, minor) and (kind == 'compute' or built[0] == major):
                return True
    return not architectures


def init_device(args):
    """Initialize the device of --device and the process group. Returns the device."""
    device = get_device(args)
    if args.device == 'auto' and (reason := unsupported_gpu(local_gpu())):
        warn(f'{reason}: running on the CPU')
    if device.type == 'cuda':
        torch.cuda.set_device(device.index or 0)  # also for threads and pinned memory
        torch.set_float32_matmul_precision('high')  # TF32
        torch.backends.cudnn.benchmark = True
    init_process_group(device)
    return device


def move_network(args, network):
    """Move a network to the device, in channels_last memory format. Returns it."""
    return network.to(get_device(args), memory_format=torch.channels_last)


def use_compile(args):
    """Whether --compile asks for torch.compile and it works. Raises UserError if it is True and does not work."""
    device = get_device(args)
    if args.compile == 'auto':
        return device.type == 'cuda' and not compile_unavailable_reason(device)
    if args.compile == 'True' and (reason := compile_unavailable_reason(device)):
        raise UserError(f'--compile=True: {reason}; --compile=False turns it off')
    return args.compile == 'True'


@functools.cache
def compile_unavailable_reason(device):
    """Return why torch.compile does not work here; '' if it does. It is tried on a small function."""
    if not any(shutil.which(name) for name in (os.environ.get('CC', 'cc'), 'gcc', 'clang')):
        return 'there is no C compiler (apt install gcc)'
    if not os.path.exists(os.path.join(sysconfig.get_path('include'), 'Python.h')):
        return "Python's headers are missing (apt install python3-dev)"
    try:
        torch.compile(lambda x: (x + 1).relu())(torch.zeros(8, device=device))
    except Exception as error:  # from the compiler, Triton or the driver
        return f'torch.compile fails: {first_line(error)[:200]}'
    return ''


def peak_memory(device):
    """Return {'speed/memory_gigabytes': peak reserved GPU memory since the last call, including CUDA graphs}; {} on a
    CPU."""
    if device.type != 'cuda':
        return {}
    peak = torch.cuda.max_memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    return {'speed/memory_gigabytes': peak / 1e9}


def is_oom(error):
    """Return 'the GPU' or 'the machine' if an exception means that it is out of memory, else None."""
    if isinstance(error, torch.OutOfMemoryError):
        return 'the GPU'
    # On a CPU torch raises a plain RuntimeError, and so does Python where no memory is left for a thread's stack.
    words = ('DefaultCPUAllocator: can', "can't start new thread")
    if isinstance(error, MemoryError) or any(word in str(error) for word in words):
        return 'the machine'
    return None


@contextlib.contextmanager
def explain_oom(what, helps):
    """Context manager that converts an out-of-memory error to a WorkError. what: what needed the memory; helps: a
    hint."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if place := is_oom(error):
            raise WorkError(f'{place} is out of memory for {what}: {helps}') from None
        raise


def main_memory():
    """Return the bytes of main memory that this process may use: of the machine, or of its container (cgroup v2)."""
    try:
        total = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    except (AttributeError, ValueError, OSError):  # Windows
        return math.inf
    with contextlib.suppress(OSError, ValueError):  # 'max' is no number
        total = min(total, int(Path('/sys/fs/cgroup/memory.max').read_text()))
    return total
