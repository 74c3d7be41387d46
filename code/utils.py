"""What several parts need and no part owns: the device, random numbers by name, a batch's move to the device."""

import contextlib
import ctypes
import functools
import hashlib
import importlib
import multiprocessing.util
import os
import shutil
import sysconfig
import tempfile

import torch

from config import ROOT, UserError, WorkError
from distributed import first_here, rank, start, world
from records import csv_of, put_aside
from terminal import first_line


def get_device(args):
    """The torch device that --device means. Raises UserError where this machine does not have it."""
    name = args.device
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'cpu'
    if name.startswith('cuda:') and world() > 1:
        raise UserError(
            f'--device={name} would put all {world()} processes on one GPU: --device=cuda gives each its own'
        )
    if name == 'cuda' and world() > 1:
        name = f'cuda:{os.environ.get("LOCAL_RANK", 0)}'
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f'--device is auto, cpu, cuda, cuda:<number> or mps, not {name!r}') from None
    if device.type == 'cuda' and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        helps = f'start one a GPU: --nproc_per_node={count}' if world() > 1 and count else 'try --device=auto'
        raise UserError(f'--device={name}: torch sees {count} CUDA GPUs here; {helps}')
    if device.type == 'mps' and not torch.backends.mps.is_available():
        raise UserError('--device=mps: torch sees no Apple GPU here; try --device=auto')
    if device.type not in ('cpu', 'cuda', 'mps'):
        raise UserError(f'--device is auto, cpu, cuda, cuda:<number> or mps, not {name!r}')
    return device


def use_device(args):
    """get_device, made this process's own, and the other processes joined: what every command begins with."""
    device = get_device(args)
    if device.type == 'cuda':
        torch.cuda.set_device(device.index or 0)  # where threads and pinned memory have their home, too
        torch.set_float32_matmul_precision('high')  # TF32 where it is not bfloat16
        torch.backends.cudnn.benchmark = True
    start(device)
    return device


def random_from(*key):
    """A CPU generator whose stream depends on `key` alone, such as (seed, 'views', epoch, step).

    Nothing has to be saved or replayed to draw step 1000 of epoch 7 again: that is what makes a resumed run equal to
    one that never stopped.
    """
    return torch.Generator().manual_seed(seed_of(key))


def seed_of(key):
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), 'big') >> 1


def seed_step(*key):
    """Let what a network itself draws in a step (dropout, stochastic depth, a detector's regions), which comes from
    torch's own generators, depend on `key` alone. Each process draws its own."""
    seed = seed_of((*key, rank()))
    torch.default_generator.manual_seed(seed)
    # torch.manual_seed would ask after every kind of device, and note who asks: a quarter of a millisecond each step.
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)
    elif torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


def prepare_batch(args, batch):
    """A batch of load_dataset.get_iterator on the device, and its target.

    batch: (images, labels). images: uint8, N x 3 x H x W whole or N x V x 3 x S x S cropped. Returns (images, target)
    with target N, int64: the class numbers, -1 where there is none. SimSiam itself needs no target: its loss compares
    two views.
    """
    images, labels = batch
    device = get_device(args)
    return to_device(images, device), to_device(labels.to(torch.int64), device)


def to_device(x, device):
    """x on the device. To a GPU from pinned memory: from any other, a copy waits for all that the GPU has to do."""
    if device.type == 'cuda' and x.device.type == 'cpu':
        x = x if x.is_pinned() else x.pin_memory()
    return x.to(device, non_blocking=True)


def evenly_spaced(total, count):
    """Up to `count` of `total` row numbers, from the first to the last."""
    return torch.linspace(0, total - 1, min(count, total)).round().long()


def channels_last(x):
    """The memory order that convolutions are fastest in, on CPUs (measured: 1.9 times) as on tensor cores."""
    return x.contiguous(memory_format=torch.channels_last)


def extra(package, purpose):
    """Import a package that only `purpose` (an option) needs. Raises UserError with the command that installs it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f'{purpose} needs {package}: pip3 install -r {ROOT}/code/requirements-extra.txt') from None


def use_compile(args):
    """Whether to torch.compile, as --compile says. Raises UserError where it is wanted and cannot be."""
    device = get_device(args)
    if args.compile == 'auto':
        return device.type == 'cuda' and not why_not_compiled(device)
    if args.compile == 'True' and (reason := why_not_compiled(device)):
        raise UserError(f'--compile=True: {reason}; --compile=False goes without')
    return args.compile == 'True'


@functools.cache
def why_not_compiled(device):
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


def later(values):
    """Begin to copy a small tensor to the CPU; returns a function that gives its numbers.

    Called some steps later, it finds the copy done: to read at once would let a GPU's queue run dry.
    """
    copy = values.to('cpu', non_blocking=True)
    if not values.is_cuda:
        return copy.tolist
    arrived = torch.cuda.current_stream(values.device).record_event()

    def read():
        arrived.synchronize()
        return copy.tolist()

    return read


def keep_freed_memory():
    """Tell glibc to keep what is freed for the next step, where it would give it back to the system.

    A CPU's batch is made of tensors of many megabytes, and to get their pages back one by one takes longer than to
    work on them (measured in README.md, Performance). Elsewhere than on Linux with glibc this does nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL('libc.so.6')
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block comes from mmap, which would return it when it is freed
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never


def give_freed_memory_back(_=None):
    """Undo keep_freed_memory: for a process that reads images, of which one may be a thousand times another."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL('libc.so.6')
        libc.mallopt(-4, 65536)
        libc.mallopt(-3, 4 * 2**20)
        libc.mallopt(-1, 32 * 2**20)


def short_of_memory(error):
    """'the GPU' or 'the machine' where an exception says that it has no more memory, else None."""
    if isinstance(error, torch.OutOfMemoryError):
        return 'the GPU'
    # What torch raises on a CPU has no type of its own.
    if isinstance(error, MemoryError) or 'DefaultCPUAllocator: can' in str(error):
        return 'the machine'
    return None


@contextlib.contextmanager
def memory_for(what, helps):
    """Work whose lack of memory is a WorkError that names it, and what helps there."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if place := short_of_memory(error):
            raise WorkError(f'{place} has not enough memory for {what}: {helps}') from None
        raise


def short_paths_for_processes():
    """Give processes a place for their sockets whose path is short enough, whatever TMPDIR is.

    The name of a socket has 108 bytes at most; with a longer one a process that reads images could not hand on what it
    has read. multiprocessing asks tempfile once, and keeps the answer.
    """
    if len(os.fsencode(tempfile.gettempdir())) > 50 and os.access('/tmp', os.W_OK):
        before, tempfile.tempdir = tempfile.tempdir, '/tmp'
        multiprocessing.util.get_temp_dir()
        tempfile.tempdir = before


@functools.cache
def cpu_count():
    """CPU cores this process may use: a job's share, or the quota of a container, not the machine's."""
    from joblib import cpu_count  # scikit-learn brings it; it knows cgroups

    return cpu_count()


def write_aside(path, write):
    """Let `write(temporary path)` make a file, then rename it to `path`: whole or not there, whatever stops us. Of
    several processes the first of each machine writes."""
    if not first_here():
        return
    put_aside(path, write)


def write_csv(path, rows):
    """Write rows as a CSV file, as write_aside does."""
    write_aside(path, csv_of(rows))


def save_picture(image, path):
    """Write a PIL image as a PNG file, whole or not at all."""
    write_aside(path, lambda aside: image.save(aside, 'PNG'))
