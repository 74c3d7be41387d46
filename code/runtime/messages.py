"""Messages of a run: lines, progress bars, the log file."""

import logging
import logging.handlers
import sys

from tqdm import tqdm

from runtime.console import print_message, with_options
from runtime.distributed import rank

LOGGER = logging.getLogger('simsiam')
LOGGER.setLevel(logging.INFO)
LOGGER.propagate = False  # a root handler would print each line again


class Console(logging.Handler):
    """A handler that prints to standard output, above a progress bar."""

    def emit(self, record):
        with tqdm.external_write_mode():
            print(self.format(record), flush=True)


class LogFile(logging.handlers.WatchedFileHandler):
    """A handler for the log file of a run. A write error is warned of once and does not end the run."""

    def emit(self, record):
        try:
            super().emit(record)
        except OSError:  # the file was deleted and cannot be opened again
            self.handleError(record)

    def handleError(self, record):
        error = sys.exc_info()[1]
        print_message(
            'warning',
            f'cannot write {self.baseFilename}, its lines end here: {getattr(error, "strerror", None) or error}',
        )
        LOGGER.removeHandler(self)


CONSOLE = Console()
LOGGER.addHandler(CONSOLE)


def log(line):
    """Print one line on standard output and in the run's log file (set_log_file), on rank 0."""
    if not rank():
        LOGGER.info(with_options(line))


def warn(line):
    """Print a warning on standard error, above a progress bar, on rank 0."""
    if not rank():
        with tqdm.external_write_mode():
            print_message('warning', line)


def progress(items=None, title='', unit='batches', total=None, first=0):
    """Return a progress bar around `items`, with rate and time left, which disappears at the end.

    It is shown on rank 0 if the output is a terminal, and not with --quiet.
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
    """Append all further log lines to this file, instead of an earlier one."""
    for handler in LOGGER.handlers[:]:
        if handler is not CONSOLE:
            LOGGER.removeHandler(handler)
            handler.close()
    handler = LogFile(path, encoding='utf-8', errors='backslashreplace', delay=True)
    handler.setFormatter(logging.Formatter('%(asctime)s  %(message)s', '%Y-%m-%d %H:%M:%S'))
    LOGGER.addHandler(handler)


def set_quiet(quiet):
    """Turn off `log` and `progress` on the terminal, or on again. Warnings and errors are still printed."""
    CONSOLE.setLevel(logging.CRITICAL if quiet else logging.NOTSET)


def format_duration(seconds):
    """Format a number of seconds: 2 h 5 min, 3 min 10 s, 8 s."""
    seconds = round(seconds)
    hours, minutes = seconds // 3600, seconds % 3600 // 60
    if hours:
        return f'{hours} h {minutes} min'
    return f'{minutes} min {seconds % 60} s' if minutes else f'{seconds} s'
