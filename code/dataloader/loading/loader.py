"""A DataLoader that detects workers that die or hang, and raises an error with the cause within a minute."""

import collections
import concurrent.futures
import multiprocessing.connection
import multiprocessing.resource_sharer
import shutil
import signal
import sys
import threading
import time
import traceback
import warnings
from pathlib import Path

import torch
import torch.utils.data

from runtime.console import silence_stderr, silence_stderr_forever
from runtime.distributed import local_world_size
from runtime.environment import cpu_count, reset_malloc
from runtime.errors import WorkError

EXIT_TIMEOUT_S = 5.0  # seconds to wait for a worker's exit code after torch has reported an error
POLL_S = 2.0  # seconds between two checks of the workers while waiting for a batch
HANG_TIMEOUT_S = 45.0  # seconds without CPU time or reads after which workers count as hung
RESUME_HINT = '`resume=auto` resumes training from the last checkpoint'
SIGNAL_HINTS = {  # likely cause and remedy for a signal that killed a worker
    'SIGKILL': 'as the system does when memory runs out: try a lower `num_workers`',
    'SIGBUS': 'as happens when /dev/shm is full: docker run --shm-size=8g, or a lower `num_workers` (0 needs none)',
    'SIGSEGV': 'a crash in an image library: `num_workers=0` shows which image',
}


END = object()  # marks the end of an iterator
# Loaders with a dead worker. References are kept because torch's shutdown may wait for a lock that the worker held.
BROKEN = []
WAITING_WATCH = []  # the WorkerWatch whose loader waits for a batch


class WorkerDied(WorkError):
    """A dataloader worker has died."""


class WorkerException(Exception):
    """An unexpected exception in a dataloader worker; its text is the worker's traceback."""


class WatchedDataLoader(torch.utils.data.DataLoader):
    """A DataLoader that watches its workers. Exceptions in workers are returned as values (`catch_as_value`) and raised
    here, so that any exception of torch while waiting for a batch means that a worker died.

    wait_seconds: time spent waiting for batches since the iteration began.
    """

    def __init__(self, dataset, num_workers, **more):
        method = start_method()
        # Starting non-persistent workers by spawn takes longer than they save: use threads.
        forked = (method or multiprocessing.get_start_method(allow_none=True)) == 'fork'
        self.threads = 0 if forked or more.get('persistent_workers') else num_workers
        workers = 0 if self.threads else num_workers
        super().__init__(
            dataset,
            num_workers=workers,
            collate_fn=identity,
            worker_init_fn=worker_init_fn,
            multiprocessing_context=method if workers else None,
            **more,
        )
        self.workers, self.wait_seconds = [], 0.0

    def storage_description(self):
        """Describe in words how images are read."""
        if self.num_workers or self.threads:
            return f'read by {self.num_workers or self.threads} workers'
        if not self.dataset.is_in_memory():
            return 'read without workers'
        return 'kept on the GPU' if self.dataset.on_gpu() else 'kept in memory'

    def __iter__(self):
        self.wait_seconds = 0.0
        if not self.num_workers:
            batches = self.read_by_threads() if self.threads else super().__iter__()
            while (batch := self.time_call(next, batches, END)) is not END:
                yield reraise(batch)
            return
        with WorkerWatch(self.workers) as watch:
            batches = self.time_call(self.start_iterator, watch)
            for _ in range(len(self)):
                yield reraise(self.time_call(self.next_batch, batches, watch))
            self.call_watched(lambda: None, watch)  # detect a worker that died after its last batch
        next(batches, END)  # ends non-persistent workers

    def time_call(self, function, *args):
        """Call function(*args), and add its time to wait_seconds."""
        began = time.monotonic()
        try:
            return function(*args)
        finally:
            self.wait_seconds += time.monotonic() - began

    def start_iterator(self, watch):
        """Create torch's iterator, which starts the workers or resets persistent ones."""
        if self.workers:
            return self.call_watched(super().__iter__, watch)
        before = multiprocessing.active_children()
        batches = super().__iter__()
        self.workers += [child for child in multiprocessing.active_children() if child not in before]
        if threading.current_thread() is threading.main_thread() and hasattr(signal, 'SIGCHLD'):
            signal.signal(signal.SIGCHLD, handle_sigchld)  # torch's handler raises at arbitrary points
        if not self.persistent_workers:
            self.workers, watch.workers = [], self.workers
        return batches

    def next_batch(self, batches, watch):
        """Return the next batch of torch's iterator."""
        return self.call_watched(lambda: next(batches), watch)

    def call_watched(self, function, watch):
        """Call function(), which waits for workers. Raises WorkError if they hang or one of them has died."""
        try:
            return call_watched(function, watch)
        except (Exception, ChildEnded):
            BROKEN.append(self)
            watch.raise_if_hung_or_dead(EXIT_TIMEOUT_S)  # the exit code may not be available yet
            raise

    def read_by_threads(self):
        """Read batches in order with threads, with the prefetching of workers."""
        with concurrent.futures.ThreadPoolExecutor(self.threads) as pool:
            ahead = collections.deque()
            for keys in self.batch_sampler:
                ahead.append(pool.submit(self.dataset.__getitems__, keys))
                if len(ahead) > 2 * self.threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()


class WorkerWatch(threading.Thread):
    """A thread that checks the workers while the main thread waits for a batch, and kills them if they hang; torch then
    reports the dead workers. The main thread cannot check: it may block while reading from a stopped worker."""

    def __init__(self, workers):
        super().__init__(daemon=True)
        self.workers, self.waiting, self.hung, self.over = workers, False, False, threading.Event()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.over.set()

    def run(self):
        last, since = None, time.monotonic()
        while not self.over.wait(POLL_S):
            progress = worker_progress(self.workers) if self.waiting else None
            if progress is None or progress != last:
                last, since = progress, time.monotonic()
            elif time.monotonic() - since > HANG_TIMEOUT_S:
                self.hung = True
                for worker in self.workers:
                    worker.kill()
                return

    def raise_if_hung_or_dead(self, patience=0.0):
        """Raise WorkError if the workers hung or one died. patience: seconds to wait for an exit code."""
        if self.hung:
            raise WorkError(
                f'the dataloader workers have done nothing for {HANG_TIMEOUT_S:.0f} s: is the disk or network '
                f'available? {RESUME_HINT}'
            ) from None
        raise_if_dead(self.workers, patience)


def call_watched(function, watch):
    """Call function() while `watch` checks the workers; SIGCHLD of one of them raises ChildEnded."""
    try:
        watch.waiting, WAITING_WATCH[:] = True, [watch]
        watch.raise_if_hung_or_dead()
        return function()
    finally:
        watch.waiting, WAITING_WATCH[:] = False, []


class ChildEnded(BaseException):
    """Raised by the SIGCHLD handler. Not an Exception, which torch would catch."""


def handle_sigchld(*_):
    """Handle SIGCHLD: raise ChildEnded if a worker has died while a batch is waited for. torch would notice it seconds
    later, after taking a lock that the worker may have held."""
    for watch in WAITING_WATCH:
        if any(worker.exitcode is not None for worker in watch.workers):
            WAITING_WATCH.clear()  # raise only once
            raise ChildEnded


def catch_as_value(make, *args):
    """Return make(*args), or the exception that it raised: raised in a worker it would lose its type and traceback."""
    try:
        with silence_stderr():
            return make(*args)
    except WorkError as error:
        return error
    except Exception:  # a bug
        return WorkerException(traceback.format_exc())


def reraise(batch):
    """Return the batch, or raise it if it is an exception from `catch_as_value`."""
    if isinstance(batch, Exception):
        raise batch
    return batch


def raise_if_dead(workers, patience):
    """Raise WorkerDied if a worker has exited, or exits within `patience` seconds."""
    if patience:
        ended = multiprocessing.connection.wait([worker.sentinel for worker in workers], patience)
        for worker in workers:
            worker.join(1.0 if worker.sentinel in ended else 0.0)
    for worker in workers:
        if worker.exitcode is None:
            continue
        if worker.exitcode < 0:
            number = signal.Signals(-worker.exitcode)
            helps = SIGNAL_HINTS.get(number.name, 'by another process')
            raise WorkerDied(f'a dataloader worker was killed by {number.name}, {helps}; {RESUME_HINT}') from None
        raise WorkerDied(f'a dataloader worker ended with exit code {worker.exitcode}; {RESUME_HINT}') from None


def worker_progress(workers):
    """Return counters of each worker that grow with its work (CPU time, bytes read); None if the system has none."""
    counters = []
    for worker in workers:
        try:
            fields = Path(f'/proc/{worker.pid}/stat').read_text().rpartition(')')[2].split()
            read = Path(f'/proc/{worker.pid}/io').read_text().split('\n', 1)[0]
        except OSError:
            return None
        counters.append((fields[11], fields[12], read))  # user and system time; characters read
    return counters


def start_method():
    """Return the start method of workers: None (multiprocessing's setting or default), or 'fork' on Linux if none is
    set, also with Python 3.14, whose default would import torch in every worker of every kNN test."""
    if multiprocessing.get_start_method(allow_none=True) is None and sys.platform == 'linux':
        return 'fork'
    return None


def worker_init_fn(_):
    """Initialize a dataloader worker."""
    reset_malloc()
    silence_stderr_forever()
    warnings.filterwarnings('ignore', module=r'PIL\.')
    # Ctrl-C goes to all processes of a terminal; the main process handles it and ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = worker_excepthook


def worker_excepthook(kind, error, trace):
    """sys.excepthook of workers that ignores errors of multiprocessing's resource sharer: they occur when the main
    process ends while a batch is transferred."""
    if not any(frame.filename == multiprocessing.resource_sharer.__file__ for frame in traceback.extract_tb(trace)):
        sys.__excepthook__(kind, error, trace)


def collate(images):
    """Stack tensors, in a worker directly in shared memory. Raises WorkError if /dev/shm is full."""
    try:
        return torch.utils.data.default_collate(images)
    except RuntimeError:
        batch_bytes = len(images) * images[0].nbytes
        if torch.utils.data.get_worker_info() and shutil.disk_usage('/dev/shm').free < batch_bytes:
            raise WorkError(
                f'/dev/shm has no room for a batch of {batch_bytes / 1e6:.0f} MB: docker run --shm-size=8g, a '
                'smaller `batch_size` or `num_workers=0`, which needs none'
            ) from None
        raise


def identity(batch):
    return batch


def resolve_num_workers(wish):
    """Return the number of workers for `num_workers`: -1 is one per core, divided by the ranks of this machine."""
    return max(1, cpu_count() // local_world_size()) if wish < 0 else wish
