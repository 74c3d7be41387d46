"""The machine and its Python: optional packages, CPU cores, the memory allocator, the directory for sockets."""

import contextlib
import ctypes
import functools
import importlib
import multiprocessing.util
import os
import tempfile

from runtime.errors import ROOT, UserError


def require_package(package, purpose):
    """Import an optional package. purpose: the option that needs it. Raises UserError with the install command."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f'{purpose} needs {package}: pip3 install -r {ROOT}/code/requirements-extra.txt') from None


def tune_malloc():
    """Let glibc keep freed memory for the next step instead of returning it to the system.

    On a CPU a batch consists of large tensors, and faulting their pages in again takes longer than computing them
    (bench/README.md). Without glibc this does nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL('libc.so.6')
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no blocks from mmap, which are returned when freed
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never trim


def reset_malloc(_=None):
    """Undo tune_malloc, for dataloader workers: image sizes vary, so kept memory would grow."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL('libc.so.6')
        libc.mallopt(-4, 65536)
        libc.mallopt(-3, 4 * 2**20)
        libc.mallopt(-1, 32 * 2**20)


def shorten_tmpdir():
    """Let multiprocessing put its sockets into /tmp if TMPDIR is long: the path of a socket has at most 108 bytes.
    multiprocessing asks tempfile only once.
    """
    if len(os.fsencode(tempfile.gettempdir())) > 50 and os.access('/tmp', os.W_OK):
        before, tempfile.tempdir = tempfile.tempdir, '/tmp'
        multiprocessing.util.get_temp_dir()
        tempfile.tempdir = before


@functools.cache
def cpu_count():
    """Return the number of CPU cores that this process may use, with affinity and container quotas."""
    from joblib import cpu_count  # scikit-learn brings it; it knows cgroups

    return cpu_count()
