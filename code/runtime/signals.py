"""Signals, from the handler to the exit code. --max_minutes ends a training the same way.

1. The handler `handle_signal` records the signal and raises Interrupted in the main thread at once.
2. Within `defer_signals` (a training step, writing a checkpoint) Interrupted is raised at the end of the block instead.
   With several ranks the whole training is deferred, because all must stop at the same step, which they agree on in
   `sync_should_save`.
3. `sync_should_save`, called after every step and after the metrics of an epoch, raises Interrupted after
   --max_minutes, and with several ranks if any of them has received a signal.
4. engine/conclude.py catches Interrupted, calls `mark_handled` so that no signal raises again, saves a checkpoint, and
   raises Interrupted with a message.
5. `train` closes the run and the tracker; cli.py destroys the process group, prints the message and exits with code
   128 + signal number, or 0 after --max_minutes.

A second SIGTERM or SIGINT kills the process, unless it arrives within a second: shells and batch systems may send a
signal twice.
"""

import contextlib
import os
import signal
import sys
import threading
import time

# From a batch system, Ctrl-C, a closed connection, and a batch system's early warning (sbatch --signal=USR1@120).
NAMES = ('SIGTERM', 'SIGINT', 'SIGHUP', 'SIGUSR1')
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))  # Windows has two
ALARM = tuple(getattr(signal, name) for name in ('SIGALRM',) if hasattr(signal, name))
REPEAT_WINDOW_S = 1.0  # seconds
# number, when: the recorded signal and its time; deferred: depth of defer_signals blocks; handled: see mark_handled;
# pending: function that returns the result of the last exchange between ranks.
STATE = {'number': 0, 'when': 0.0, 'deferred': 0, 'handled': False, 'pending': None}
SYNC_EVERY = 10  # steps between two exchanges of the ranks
CODE_TIME_UP, CODE_SAVE = 0.5, 0.25  # exchanged besides signal numbers: the time is up, a checkpoint is due


class Interrupted(BaseException):
    """Raised when the process must stop. number: of the signal, 0 for the time limit. A BaseException, so that `except
    Exception` does not catch it."""

    def __init__(self, number, line=''):
        super().__init__(line or f'{signal_name(number)}: stopped')
        self.number = number


def signal_name(number):
    return signal.Signals(number).name if number else 'time'


@contextlib.contextmanager
def signal_handlers():
    """Context manager: SIGNALS raise Interrupted, except those that the parent process has set to be ignored
    (nohup)."""
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
        STATE.update(number=0, deferred=0, handled=False, pending=None)


def handle_signal(number, _):
    """Handle a signal: record it and raise Interrupted, unless deferred; a second one kills the process."""
    if not STATE['number']:
        STATE.update(number=number, when=time.monotonic())
        raise_if_stopped()
    elif number in (signal.SIGTERM, signal.SIGINT) and time.monotonic() - STATE['when'] > REPEAT_WINDOW_S:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def raise_if_stopped(*_):
    """Raise Interrupted if a signal has been received, unless signals are deferred or handled already."""
    if STATE['number'] and not STATE['deferred'] and not STATE['handled']:
        raise Interrupted(STATE['number'])


def mark_handled():
    """Stop raising Interrupted: the caller saves and exits."""
    STATE['handled'] = True


def reraise_from_del(lost, otherwise):
    """sys.unraisablehook that raises Interrupted again 20 ms later: Python drops exceptions in a __del__. otherwise:
    the original hook."""
    if isinstance(lost.exc_value, Interrupted) and ALARM:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
    elif isinstance(lost.exc_value, Interrupted):
        number, STATE['number'] = STATE['number'], 0
        threading.Timer(0.02, signal.raise_signal, (number,)).start()
    else:
        otherwise(lost)


@contextlib.contextmanager
def defer_signals(active=True):
    """Context manager that defers signals: Interrupted is raised at the end of the block. active: False has no
    effect."""
    STATE['deferred'] += active
    try:
        yield
    finally:
        STATE['deferred'] -= active
    raise_if_stopped()


def sync_should_save(step, last, deadline, save_is_due, device):
    """Between two steps, decide whether to stop or to save, the same on all ranks. Raises Interrupted if any rank has
    received a signal or passed the deadline; otherwise returns whether a checkpoint is due on any rank.

    step: steps done in this epoch; last: whether it was the last one. deadline: in time.monotonic(), 0 for none.
    Several ranks exchange their state every SYNC_EVERY steps. On a GPU the result is read at the next exchange, except
    after the first and last step of an epoch, because waiting for it would synchronize with the GPU.
    """
    from runtime.distributed import all_reduce_max, world_size
    from runtime.tensors import async_tolist

    time_is_up = 0 < deadline < time.monotonic()
    if world_size() == 1:
        raise_if_stopped()
        if time_is_up:
            raise Interrupted(0)
        return save_is_due
    if not last and (step - 1) % SYNC_EVERY:
        return False
    before, now = (
        STATE['pending'],
        async_tolist(
            all_reduce_max(STATE['number'] or (CODE_TIME_UP if time_is_up else CODE_SAVE * save_is_due), device)
        ),
    )
    at_once = last or step == 1 or device.type == 'cpu'
    STATE['pending'] = None if at_once else now
    code = max((answer()[0] for answer in (before, now if at_once else None) if answer), default=0.0)
    if code:
        STATE['pending'] = None  # it was sent before the checkpoint and would request another one
    if code >= CODE_TIME_UP:
        raise Interrupted(int(code))
    return code > 0
