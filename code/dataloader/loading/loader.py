"""A DataLoader whose workers may die or hang: either ends the run within a minute, with what happened."""

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

TO_END = 5.0  # seconds in which a worker is seen to have ended, after torch has failed to reach it
POLL_S = 2.0  # seconds between two looks at the processes that a batch is waited for
HANG_TIMEOUT_S = 45.0  # seconds in which none of them has done anything: they hang
RESUME_HINT = '`resume=auto` goes on from the last checkpoint'
SIGNAL_HINTS = {  # what helps, by the name of the signal that ended a process
    'SIGKILL': 'as the system does where memory runs out: try a lower `num_workers`',
    'SIGBUS': 'as where /dev/shm is full: docker run --shm-size=8g, or a lower `num_workers` (0 needs none)',
    'SIGSEGV': 'a fault in a library that reads images: `num_workers=0` shows at which one',
}


END = object()  # after the last batch
# Loaders of which a worker has ended. Kept, for torch's way to shut down the others takes a lock that it may have held.
BROKEN = []
WAITED_FOR = []  # the WorkerWatch of the loader that a batch is waited for from


class WorkerDied(WorkError):
    """A process that reads images ended."""


class WorkerException(Exception):
    """A fault of ours in a process that reads images; its text is the traceback there."""


class WatchedDataLoader(torch.utils.data.DataLoader):
    """A DataLoader whose workers are watched. An exception in a worker is handed on as a value (`catch_as_value`) and
    raised here, so that what torch raises while a batch is waited for is the end of a worker.

    waited: seconds for which batches were waited for, since the iteration began.
    """

    def __init__(self, dataset, num_workers, **more):
        method = start_method()
        # Workers that do not stay and that import everything anew cost more than they save: threads read instead.
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
        self.workers, self.waited = [], 0.0

    def storage_description(self):
        """Where the images are, in words."""
        if self.num_workers or self.threads:
            return f'read by {self.num_workers or self.threads} workers'
        if not self.dataset.is_in_memory():
            return 'read as they come'
        return 'held on the GPU' if self.dataset.on_gpu() else 'held in memory'

    def __iter__(self):
        self.waited = 0.0
        if not self.num_workers:
            batches = self.read_by_threads() if self.threads else super().__iter__()
            while (batch := self.timed(next, batches, END)) is not END:
                yield reraise(batch)
            return
        with WorkerWatch(self.workers) as watch:
            batches = self.timed(self.begin, watch)
            for _ in range(len(self)):
                yield reraise(self.timed(self.next_batch, batches, watch))
            self.call_watched(lambda: None, watch)  # one that ended after its last batch
        next(batches, END)  # workers that do not stay end here

    def timed(self, function, *given):
        began = time.monotonic()
        try:
            return function(*given)
        finally:
            self.waited += time.monotonic() - began

    def begin(self, watch):
        """torch's iterator; its workers are started, or those of the last epoch are asked whether they are there."""
        if self.workers:
            return self.call_watched(super().__iter__, watch)
        before = multiprocessing.active_children()
        batches = super().__iter__()
        self.workers += [child for child in multiprocessing.active_children() if child not in before]
        if threading.current_thread() is threading.main_thread() and hasattr(signal, 'SIGCHLD'):
            signal.signal(signal.SIGCHLD, handle_sigchld)  # torch's raises in the middle of whatever is done
        if not self.persistent_workers:
            self.workers, watch.workers = [], self.workers
        return batches

    def next_batch(self, batches, watch):
        """The next batch of torch's iterator."""
        return self.call_watched(lambda: next(batches), watch)

    def call_watched(self, function, watch):
        """function(), in which workers are waited for. Raises WorkError where they hang or one of them has ended."""
        try:
            return call_watched(function, watch)
        except (Exception, ChildEnded):
            BROKEN.append(self)
            watch.raise_if_hung_or_dead(TO_END)  # torch has noticed, and it may not be known here yet
            raise

    def read_by_threads(self):
        """The batches, read by threads, in order, as many ahead as workers would read."""
        with concurrent.futures.ThreadPoolExecutor(self.threads) as pool:
            ahead = collections.deque()
            for keys in self.batch_sampler:
                ahead.append(pool.submit(self.dataset.__getitems__, keys))
                if len(ahead) > 2 * self.threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()


class WorkerWatch(threading.Thread):
    """Looks at the workers while a batch is waited for, and kills those that hang; torch then notices, within seconds,
    that they have ended. The reader itself may be blocked in the middle of what a stopped one has begun to say."""

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
            done = worker_progress(self.workers) if self.waiting else None
            if done is None or done != last:
                last, since = done, time.monotonic()
            elif time.monotonic() - since > HANG_TIMEOUT_S:
                self.hung = True
                for worker in self.workers:
                    worker.kill()
                return

    def raise_if_hung_or_dead(self, patience=0.0):
        """Raise what happened to the workers, if anything did. patience: seconds to wait for the end of one."""
        if self.hung:
            raise WorkError(
                f'the processes that read images have done nothing for {HANG_TIMEOUT_S:.0f} s: does the disk or '
                f'network answer? {RESUME_HINT}'
            ) from None
        raise_if_dead(self.workers, patience)


def call_watched(function, watch):
    """function(); while it runs the watch looks at the workers, and the end of one raises ChildEnded."""
    try:
        watch.waiting, WAITED_FOR[:] = True, [watch]
        watch.raise_if_hung_or_dead()
        return function()
    finally:
        watch.waiting, WAITED_FOR[:] = False, []


class ChildEnded(BaseException):
    """Raised by the handler of SIGCHLD; no Exception, which torch would catch."""


def handle_sigchld(*_):
    """The handler of SIGCHLD: ends the wait for a batch of a worker that has ended, at once. torch would find out
    seconds later, and first take a lock that the worker may have held."""
    for watch in WAITED_FOR:
        if any(worker.exitcode is not None for worker in watch.workers):
            WAITED_FOR.clear()  # once: the ends of other workers follow
            raise ChildEnded


def catch_as_value(make, *given):
    """make(*given), or the exception that it raised: through a process as itself it would lose its type and place."""
    try:
        with silence_stderr():
            return make(*given)
    except WorkError as error:
        return error
    except Exception:  # a fault of ours
        return WorkerException(traceback.format_exc())


def reraise(batch):
    """A batch; raises what `catch_as_value` had to hand on in its place."""
    if isinstance(batch, Exception):
        raise batch
    return batch


def raise_if_dead(workers, patience):
    """Raise WorkerDied where one of the processes has ended, or does within `patience` seconds."""
    if patience:
        ended = multiprocessing.connection.wait([worker.sentinel for worker in workers], patience)
        for worker in workers:
            worker.join(1.0 if worker.sentinel in ended else 0.0)
    for worker in workers:
        if worker.exitcode is None:
            continue
        if worker.exitcode < 0:
            number = signal.Signals(-worker.exitcode)
            helps = SIGNAL_HINTS.get(number.name, 'by somebody else')
            raise WorkerDied(
                f'a process that reads images was ended by {number.name}, {helps}; {RESUME_HINT}'
            ) from None
        raise WorkerDied(f'a process that reads images ended with exit code {worker.exitcode}; {RESUME_HINT}') from None


def worker_progress(workers):
    """What the processes have done until now, as numbers that grow with it; None where the system does not tell."""
    done = []
    for worker in workers:
        try:
            fields = Path(f'/proc/{worker.pid}/stat').read_text().rpartition(')')[2].split()
            read = Path(f'/proc/{worker.pid}/io').read_text().split('\n', 1)[0]
        except OSError:
            return None
        done.append((fields[11], fields[12], read))  # user and system time; characters read
    return done


def start_method():
    """How dataloader workers are started: as multiprocessing was told, else on Linux by fork, also with Python 3.14,
    whose default imports everything anew in each, for every kNN test and every measure; elsewhere by the default."""
    if multiprocessing.get_start_method(allow_none=True) is None and sys.platform == 'linux':
        return 'fork'
    return None


def worker_init_fn(_):
    """What a process that reads images begins with."""
    reset_malloc()
    silence_stderr_forever()
    warnings.filterwarnings('ignore', module=r'PIL\.')
    # A run ends by itself: the signal that a terminal or a batch system sends to all processes is for the first one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = worker_excepthook


def worker_excepthook(kind, error, trace):
    """sys.excepthook, but for the thread that hands batches to the first process: where that has ended while it took
    one, there is nobody left to hand it to, and nothing wrong."""
    if not any(frame.filename == multiprocessing.resource_sharer.__file__ for frame in traceback.extract_tb(trace)):
        sys.__excepthook__(kind, error, trace)


def collate(images):
    """Equal tensors as one; in a worker straight into shared memory. Raises WorkError where that is full."""
    try:
        return torch.utils.data.default_collate(images)
    except RuntimeError:
        wanted = len(images) * images[0].nbytes
        if torch.utils.data.get_worker_info() and shutil.disk_usage('/dev/shm').free < wanted:
            raise WorkError(
                f'/dev/shm has no room for a batch of {wanted / 1e6:.0f} MB: docker run --shm-size=8g, a '
                'smaller `batch_size` or `num_workers=0`, which needs none'
            ) from None
        raise


def identity(batch):
    return batch


def resolve_num_workers(wish):
    """The number of processes that `num_workers` means: -1 is one per core, shared by the processes of a machine."""
    return max(1, cpu_count() // local_world_size()) if wish < 0 else wish
