"""From a signal to the exit code, in order. Also the time limit, which ends a training the same way.

1. `note`, the handler, keeps the number of the signal and raises Stopped: at once, in the middle of whatever is done.
2. Within `deferred` (a training step, the writing of a checkpoint) it is raised at the end of the block instead. With
   several ranks the whole epoch is deferred, for all ranks have to stop at the same step: they agree on it in `check`.
3. `check`, after every step, raises Stopped where the time is up, and on several ranks where a signal has come to any.
4. engine/conclude.py catches Stopped, calls `heard` (no signal raises again), saves, and raises Stopped with a line.
5. `train` ends its run and closes the tracker; cli.py leaves the process group, prints the line and exits with
   128 + the number of the signal, and with 0 where the time was up.

A second SIGTERM or Ctrl-C, a second later or more, ends the process as if there were no handler; what comes sooner is
taken for the same signal, for shells and batch systems send it twice.
"""

import contextlib
import os
import signal
import sys
import threading
import time

# Of a batch system, a terminal, a connection that was closed, and a batch system's warning (sbatch --signal=USR1@120).
NAMES = ('SIGTERM', 'SIGINT', 'SIGHUP', 'SIGUSR1')
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))  # Windows has two of them
ALARM = tuple(getattr(signal, name) for name in ('SIGALRM',) if hasattr(signal, name))
SAME_WISH = 1.0  # seconds
NOTED = {'number': 0, 'when': 0.0, 'held': 0, 'heard': False, 'asked': None}  # asked: of check, by the last answer
ASK_EVERY = 10  # steps after which several processes ask one another
TIME, SAVE = 0.5, 0.25  # what they may wish beside a signal, by its number: the time is up, a checkpoint is due


class Stopped(BaseException):
    """Raised where the work was asked to stop. number: the signal, 0 where the time is up. A BaseException, so that no
    `except Exception` swallows it."""

    def __init__(self, number, line=''):
        super().__init__(line or f'{name_of(number)}: stopped')
        self.number = number


def name_of(number):
    return signal.Signals(number).name if number else 'time'


@contextlib.contextmanager
def listening():
    """Within, SIGNALS raise Stopped; but for those that whoever started us had us ignore (nohup, a job with &)."""
    before = {number: signal.getsignal(number) for number in (*SIGNALS, *ALARM)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, note if number in SIGNALS else tell)
    hook, sys.unraisablehook = sys.unraisablehook, lambda lost: say_again(lost, hook)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)
        NOTED.update(number=0, held=0, heard=False, asked=None)


def note(number, _):
    """The handler."""
    if not NOTED['number']:
        NOTED.update(number=number, when=time.monotonic())
        tell()
    elif number in (signal.SIGTERM, signal.SIGINT) and time.monotonic() - NOTED['when'] > SAME_WISH:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def tell(*_):
    """Raise Stopped if a signal has come, unless it is deferred or has been raised to whoever saves and exits."""
    if NOTED['number'] and not NOTED['held'] and not NOTED['heard']:
        raise Stopped(NOTED['number'])


def heard():
    """From here on no signal raises Stopped: the code that saves and exits has control."""
    NOTED['heard'] = True


def say_again(lost, otherwise):
    """sys.unraisablehook: Python drops an exception that is raised in a __del__, so a Stopped that was raised
    there is raised again 20 ms later."""
    if isinstance(lost.exc_value, Stopped) and ALARM:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
    elif isinstance(lost.exc_value, Stopped):
        number, NOTED['number'] = NOTED['number'], 0
        threading.Timer(0.02, signal.raise_signal, (number,)).start()
    else:
        otherwise(lost)


@contextlib.contextmanager
def deferred(active=True):
    """Within, a signal waits; at the end it raises Stopped. active: False does nothing, for code that is deferred only
    where several ranks have to stop at the same step."""
    NOTED['held'] += active
    try:
        yield
    finally:
        NOTED['held'] -= active
    tell()


def check(step, last, deadline, due, device):
    """Between two steps: raise Stopped where the run must stop now; else return whether it must save a checkpoint now.

    It must stop where the time is up or a signal has come, on any of several ranks, and save where a checkpoint is
    `due` on any: all do it at the same step.

    step: how many are done of the epoch; last: whether that is all. deadline: by time.monotonic(), 0 is none.
    Several processes all ask here, now and then, and on a GPU hear the answer when they ask again, but for an epoch's
    first step and its last: to wait for it would let the queue run dry.
    """
    from runtime.distributed import most, world
    from runtime.tensors import later

    late = 0 < deadline < time.monotonic()
    if world() == 1:
        tell()
        if late:
            raise Stopped(0)
        return due
    if not last and (step - 1) % ASK_EVERY:
        return False
    before, now = NOTED['asked'], later(most(NOTED['number'] or (TIME if late else SAVE * due), device))
    at_once = last or step == 1 or device.type == 'cpu'
    NOTED['asked'] = None if at_once else now
    wish = max((answer()[0] for answer in (before, now if at_once else None) if answer), default=0.0)
    if wish:
        NOTED['asked'] = None  # what was asked before a checkpoint would ask for another one
    if wish >= TIME:
        raise Stopped(int(wish))
    return wish > 0
