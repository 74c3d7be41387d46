"""What several parts need and no part owns: the device, random numbers by name, a batch's move to the device."""

import hashlib
import os

import torch

from config import UserError, WorkError


def get_device(args):
    """The torch device that --device means. Raises UserError where this machine does not have it."""
    name = args.device
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'cpu'
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f'--device is auto, cpu, cuda, cuda:<number> or mps, not {name!r}') from None
    if device.type == 'cuda' and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f'--device={name}: torch sees {torch.cuda.device_count()} CUDA GPUs here; try --device=auto')
    if device.type == 'mps' and not torch.backends.mps.is_available():
        raise UserError('--device=mps: torch sees no Apple GPU here; try --device=auto')
    if device.type not in ('cpu', 'cuda', 'mps'):
        raise UserError(f'--device is auto, cpu, cuda, cuda:<number> or mps, not {name!r}')
    return device


def random_from(*key):
    """A CPU generator whose stream depends on `key` alone, such as (seed, 'views', epoch, step).

    Nothing has to be saved or replayed to draw step 1000 of epoch 7 again: that is what makes a resumed run equal to
    one that never stopped.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, 'big') >> 1)


def prepare_batch(args, batch):
    """A batch of load_dataset.get_iterator on the device, and its target.

    batch: (images, labels). images: uint8, N x 3 x H x W whole or N x V x 3 x S x S cropped. Returns (images, target)
    with target N, int64: the class numbers, -1 where there is none. SimSiam itself needs no target: its loss compares
    two views. Raises the WorkError of an image that could not be read.
    """
    if isinstance(batch, WorkError):
        raise batch
    images, labels = batch
    device = get_device(args)
    return images.to(device, non_blocking=True), labels.to(device, torch.int64, non_blocking=True)


def cpu_count():
    """CPU cores this process may use (a container's or a job's share, not the machine's)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def write_aside(path, write):
    """Let `write(temporary path)` make a file, then rename it to `path`: whole or not there, whatever stops us."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f'.{path.name}.{os.getpid()}.part')
    try:
        write(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
