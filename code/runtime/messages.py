"""What a run tells people: a line, a progress bar, a log file."""

import logging
import logging.handlers
import sys

from tqdm import tqdm

from runtime.console import print_message, with_options
from runtime.distributed import rank

LOGGER = logging.getLogger('simsiam')
LOGGER.setLevel(logging.INFO)
LOGGER.propagate = False  # who has a root handler would see each line twice


class Console(logging.Handler):
    """Standard output, above whatever progress bar is there."""

    def emit(self, record):
        with tqdm.external_write_mode():
            print(self.format(record), flush=True)


class LogFile(logging.handlers.WatchedFileHandler):
    """The log of a run. One that cannot be written any more is warned of once, and ends no run."""

    def emit(self, record):
        try:
            super().emit(record)
        except OSError:  # it was deleted, and cannot be opened again
            self.handleError(record)

    def handleError(self, record):
        error = sys.exc_info()[1]
        print_message('warning', f'no more lines in {self.baseFilename}: {getattr(error, "strerror", None) or error}')
        LOGGER.removeHandler(self)


CONSOLE = Console()
LOGGER.addHandler(CONSOLE)


def log(line):
    """One line on standard output and in the run's log (set_log_file), of the process that speaks for all."""
    if not rank():
        LOGGER.info(with_options(line))


def progress(items=None, title='', unit='batches', total=None, first=0):
    """A progress bar around `items`, with rate and time left, gone when they are through.

    Only on a terminal, of the process that speaks for all, and not with --quiet.
    """
    return tqdm(
        items,
        desc=title,
        unit=unit,
        total=total,
        initial=first,
        leave=False,
        disable=True if rank() or CONSOLE.level else None,
    )


def set_log_file(path):
    """From now on, what is said is also written to the end of this file, and of no other."""
    for handler in LOGGER.handlers[:]:
        if handler is not CONSOLE:
            LOGGER.removeHandler(handler)
            handler.close()
    handler = LogFile(path, encoding='utf-8', errors='backslashreplace', delay=True)
    handler.setFormatter(logging.Formatter('%(asctime)s  %(message)s', '%Y-%m-%d %H:%M:%S'))
    LOGGER.addHandler(handler)


def set_quiet(quiet):
    """Whether `log` and `progress` keep off the terminal. Warnings and errors do not."""
    CONSOLE.setLevel(logging.CRITICAL if quiet else logging.NOTSET)


def format_duration(seconds):
    """Seconds as people say them."""
    seconds = round(seconds)
    hours, minutes = seconds // 3600, seconds % 3600 // 60
    if hours:
        return f'{hours} h {minutes} min'
    return f'{minutes} min {seconds % 60} s' if minutes else f'{seconds} s'
