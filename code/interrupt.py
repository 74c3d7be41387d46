"""SIGTERM and Ctrl-C as wishes: the step is finished, the state is saved. The second one ends the process at once."""

import signal

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """A run that ended early on request, with its state saved. signal: which."""

    def __init__(self, number, line):
        super().__init__(line)
        self.signal = number


class Interrupt:
    """`with Interrupt() as interrupt:`; interrupt.signal is the number of the signal that has arrived, or 0."""

    signal = 0

    def __enter__(self):
        self.before = {number: signal.signal(number, self.note) for number in SIGNALS}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number, _):
        self.signal = number
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
