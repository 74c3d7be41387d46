"""A DataLoader whose processes may die or hang: either ends the run within a minute, with what happened."""

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

from config import WorkError
from runtime.console import hush, hushed
from runtime.distributed import local_world
from runtime.environment import cpu_count, give_freed_memory_back

CHECK = 2.0  # seconds between two looks at the processes that a batch is waited for
PATIENCE = 45.0  # seconds in which none of them has done anything: they hang
GO_ON = '--resume=auto goes on from the last checkpoint'
DEATHS = {  # what helps, by the name of the signal that ended a process
    'SIGKILL': 'as the system does where memory runs out: try a lower --num_workers',
    'SIGBUS': 'as where /dev/shm is full: docker run --shm-size=8g, or a lower --num_workers (0 needs none)',
    'SIGSEGV': 'a fault in a library that reads images: --num_workers=0 shows at which one',
}


END = object()  # after the last batch


class WorkerDied(WorkError):
    """A process that reads images ended."""


class Fault(Exception):
    """A fault of ours in a process that reads images; its text is the traceback there."""


class Batches(torch.utils.data.DataLoader):
    """The same, watched. Its dataset hands on exceptions as values (caught), so that what is raised while a batch is
    waited for is the end of a process, or the time; they are raised here."""

    def __init__(self, dataset, num_workers, **more):
        super().__init__(
            dataset,
            num_workers=num_workers,
            collate_fn=as_it_is,
            worker_init_fn=in_worker,
            timeout=CHECK if num_workers else 0,
            multiprocessing_context=start_method() if num_workers else None,
            **more,
        )

    def place(self):
        """Where the images are, in words."""
        if self.num_workers:
            return f'read by {self.num_workers} workers'
        if not self.dataset.in_memory():
            return 'read as they come'
        return 'held on the GPU' if self.dataset.on_gpu() else 'held in memory'

    def __iter__(self):
        again = self.num_workers and self._iterator
        batches = self.again(again) if again else super().__iter__()
        if not self.num_workers:
            for batch in batches:
                yield raised(batch)
            return
        if not again:
            batches._workers_done_event = Over(batches._workers_done_event, batches._workers)
        if threading.current_thread() is threading.main_thread() and hasattr(signal, 'SIGCHLD'):
            # torch's own handler raises in the middle of whatever is done when a process ends; here it is noticed when
            # its batch is waited for.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        with Watch(batches._workers) as watch:
            while (batch := watch.next_of(batches)) is not END:
                yield raised(batch)

    def again(self, batches):
        """The iterator of the last epoch, begun anew: its processes are asked whether they are there."""
        batches._timeout = 0  # a slow answer is none that did not come
        with Watch(batches._workers) as watch:
            watch.waiting = True
            try:
                return super().__iter__()
            except Exception:
                watch.judge()
                raise
            finally:
                batches._timeout = CHECK


class Over:
    """The event by which torch tells the processes that all is over. One that ended while it looked has left it locked:
    to set it would take for ever then, and the others are ended in its place."""

    def __init__(self, event, workers):
        self.event, self.workers, self.done = event, workers, False

    def is_set(self):
        return self.done

    def set(self):
        self.done = True
        if self.event._cond.acquire(timeout=CHECK):
            self.event._cond.release()
            self.event.set()
        else:
            for worker in self.workers:
                worker.kill()


class Watch(threading.Thread):
    """Looks at the processes while a batch is waited for, and ends those that hang: the reader may be blocked in the
    middle of what a stopped one has begun to say."""

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
        while not self.over.wait(CHECK):
            done = work_of(self.workers) if self.waiting else None
            if done is None or done != last:
                last, since = done, time.monotonic()
            elif time.monotonic() - since > PATIENCE:
                self.hung = True
                for worker in self.workers:
                    worker.kill()
                return

    def judge(self):
        """Raise what happened to the processes, if anything did."""
        if self.hung:
            raise WorkError(
                f'the processes that read images have done nothing for {PATIENCE:.0f} s: does the disk or '
                f'network answer? {GO_ON}'
            ) from None
        explain(self.workers)

    def next_of(self, batches):
        """The next batch of an iterator, or END."""
        while True:
            asked, self.waiting = time.monotonic(), True
            try:
                return next(batches, END)
            except Exception as error:
                self.judge()
                if not isinstance(error, RuntimeError) or time.monotonic() - asked < CHECK / 2:
                    raise  # not the time: a fault
            finally:
                self.waiting = False


def caught(make, *given):
    """make(*given), or the exception that it raised: through a process as itself it would lose its type and place."""
    try:
        with hushed():
            return make(*given)
    except WorkError as error:
        return error
    except Exception:  # a fault of ours
        return Fault(traceback.format_exc())


def raised(batch):
    """A batch; raises what `caught` had to hand on in its place."""
    if isinstance(batch, Exception):
        raise batch
    return batch


def explain(workers):
    """Raise WorkerDied where one of the processes has ended."""
    for worker in workers:
        worker.join(0.1 if worker.exitcode is None else 0)
        if worker.exitcode is None:
            continue
        if worker.exitcode < 0:
            number = signal.Signals(-worker.exitcode)
            helps = DEATHS.get(number.name, 'by somebody else')
            raise WorkerDied(f'a process that reads images was ended by {number.name}, {helps}; {GO_ON}') from None
        raise WorkerDied(f'a process that reads images ended with exit code {worker.exitcode}; {GO_ON}') from None


def work_of(workers):
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


def in_worker(_):
    """What a process that reads images begins with."""
    give_freed_memory_back()
    hush()
    warnings.filterwarnings('ignore', module=r'PIL\.')
    # A run ends by itself: the signal that a terminal or a batch system sends to all processes is for the first one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = not_of_the_handover


def not_of_the_handover(kind, error, trace):
    """sys.excepthook, but for the thread that hands batches to the first process: where that has ended while it took
    one, there is nobody left to hand it to, and nothing wrong."""
    if not any(frame.filename == multiprocessing.resource_sharer.__file__ for frame in traceback.extract_tb(trace)):
        sys.__excepthook__(kind, error, trace)


def together(images):
    """Equal tensors as one; in a worker straight into shared memory. Raises WorkError where that is full."""
    try:
        return torch.utils.data.default_collate(images)
    except RuntimeError:
        wanted = len(images) * images[0].nbytes
        if torch.utils.data.get_worker_info() and shutil.disk_usage('/dev/shm').free < wanted:
            raise WorkError(
                f'/dev/shm has no room for a batch of {wanted / 1e6:.0f} MB: docker run --shm-size=8g, a '
                'smaller --batch_size or --num_workers=0, which needs none'
            ) from None
        raise


def as_it_is(batch):
    return batch


def workers_for(wish):
    """The number of processes that --num_workers means: -1 is one per core, shared by the processes of a machine."""
    return max(1, cpu_count() // local_world()) if wish < 0 else wish
