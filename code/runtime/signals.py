"""From a signal to the exit code, in order. Also the time limit, which ends a training the same way.

1. `handle_signal`, the handler, keeps the number of the signal and raises Interrupted: at once, in the middle of
   whatever is done.
2. Within `defer_signals` (a training step, the writing of a checkpoint) it is raised at the end of the block instead.
   With several ranks the whole epoch is deferred, for all ranks have to stop at the same step: they agree on it in
   `sync_should_save`.
3. `sync_should_save`, after every step, raises Interrupted where the time is up, and on several ranks where a signal
   has come to any.
4. engine/conclude.py catches Interrupted, calls `mark_handled` (no signal raises again), saves, and raises Interrupted
   with a line.
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
REPEAT_WINDOW_S = 1.0  # seconds
STATE = {'number': 0, 'when': 0.0, 'held': 0, 'heard': False, 'asked': None}  # asked: in the last exchange of the ranks
ASK_EVERY = 10  # steps after which several processes ask one another
CODE_TIME_UP, SAVE = 0.5, 0.25  # what they may wish beside a signal, by its number: the time is up, a checkpoint is due


class Interrupted(BaseException):
    """Raised where the work was asked to stop. number: the signal, 0 where the time is up. A BaseException, so that no
    `except Exception` swallows it."""

    def __init__(self, number, line=''):
        super().__init__(line or f'{signal_name(number)}: stopped')
        self.number = number


def signal_name(number):
    return signal.Signals(number).name if number else 'time'


@contextlib.contextmanager
def signal_handlers():
    """Within, SIGNALS raise Interrupted; but for those that whoever started us had us ignore (nohup, a job with &)."""
    before = {number: signal.getsignal(number) for number in (*SIGNALS, *ALARM)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, handle_signal if number in SIGNALS else raise_if_stopped)
    hook, sys.unraisablehook = sys.unraisablehook, lambda lost: reraise_from_del(lost, hook)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)
        STATE.update(number=0, held=0, heard=False, asked=None)


def handle_signal(number, _):
    """The handler."""
    if not STATE['number']:
        STATE.update(number=number, when=time.monotonic())
        raise_if_stopped()
    elif number in (signal.SIGTERM, signal.SIGINT) and time.monotonic() - STATE['when'] > REPEAT_WINDOW_S:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def raise_if_stopped(*_):
    """Raise Interrupted if a signal has come, unless it is deferred or has been raised to whoever saves and exits."""
    if STATE['number'] and not STATE['held'] and not STATE['heard']:
        raise Interrupted(STATE['number'])


def mark_handled():
    """From here on no signal raises Interrupted: the code that saves and exits has control."""
    STATE['heard'] = True


def reraise_from_del(lost, otherwise):
    """sys.unraisablehook: Python drops an exception that is raised in a __del__, so a Interrupted that was raised
    there is raised again 20 ms later."""
    if isinstance(lost.exc_value, Interrupted) and ALARM:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
    elif isinstance(lost.exc_value, Interrupted):
        number, STATE['number'] = STATE['number'], 0
        threading.Timer(0.02, signal.raise_signal, (number,)).start()
    else:
        otherwise(lost)


@contextlib.contextmanager
def defer_signals(active=True):
    """Within, a signal waits; at the end it raises Interrupted. active: False does nothing, for code that is deferred
    only where several ranks have to stop at the same step."""
    STATE['held'] += active
    try:
        yield
    finally:
        STATE['held'] -= active
    raise_if_stopped()


def sync_should_save(step, last, deadline, save_is_due, device):
    """Between two steps: raise Interrupted where the run must stop now; else return whether it must save a checkpoint
    now.

    It must stop where the time is up or a signal has come, on any of several ranks, and save where a checkpoint is
    due on any: all do it at the same step.

    step: how many are done of the epoch; last: whether that is all. deadline: by time.monotonic(), 0 is none.
    Several processes all ask here, now and then, and on a GPU hear the answer when they ask again, but for an epoch's
    first step and its last: to wait for it would let the queue run dry.
    """
    from runtime.distributed import all_reduce_max, world_size
    from runtime.tensors import async_tolist

    time_is_up = 0 < deadline < time.monotonic()
    if world_size() == 1:
        raise_if_stopped()
        if time_is_up:
            raise Interrupted(0)
        return save_is_due
    if not last and (step - 1) % ASK_EVERY:
        return False
    before, now = (
        STATE['asked'],
        async_tolist(all_reduce_max(STATE['number'] or (CODE_TIME_UP if time_is_up else SAVE * save_is_due), device)),
    )
    at_once = last or step == 1 or device.type == 'cpu'
    STATE['asked'] = None if at_once else now
    code = max((answer()[0] for answer in (before, now if at_once else None) if answer), default=0.0)
    if code:
        STATE['asked'] = None  # what was asked before a checkpoint would ask for another one
    if code >= CODE_TIME_UP:
        raise Interrupted(int(code))
    return code > 0
