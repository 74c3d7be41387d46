"""What the machine and its Python offer: packages, CPU cores, the memory allocator, a place for sockets."""

import contextlib
import ctypes
import functools
import importlib
import multiprocessing.util
import os
import tempfile

from runtime.errors import ROOT, UserError


def require_package(package, purpose):
    """Import a package that only `purpose` (an option) needs. Raises UserError with the command that installs it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f'{purpose} needs {package}: pip3 install -r {ROOT}/code/requirements-extra.txt') from None


def tune_malloc():
    """Tell glibc to keep what is freed for the next step, where it would give it back to the system.

    A CPU's batch is made of tensors of many megabytes, and to get their pages back one by one takes longer than to
    work on them (measured in bench/README.md). Elsewhere than on Linux with glibc this does nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL('libc.so.6')
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block comes from mmap, which would return it when it is freed
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never


def reset_malloc(_=None):
    """Undo tune_malloc: for a process that reads images, of which one may be a thousand times another."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL('libc.so.6')
        libc.mallopt(-4, 65536)
        libc.mallopt(-3, 4 * 2**20)
        libc.mallopt(-1, 32 * 2**20)


def shorten_tmpdir():
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
