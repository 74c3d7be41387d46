"""What a run tells people: a line, a progress bar, a log file."""

import time

from tqdm import tqdm

from runtime.console import complain
from runtime.distributed import rank

SAID = {'quiet': False, 'log': None}  # --quiet; the log file of the run, once there is one


def say(line):
    """One line on standard output, above whatever progress bar is there, and in the run's log (log_to)."""
    if rank():
        return
    if not SAID['quiet']:
        with tqdm.external_write_mode():
            print(line, flush=True)
    if SAID['log']:
        try:
            with open(SAID['log'], 'a', encoding='utf-8', errors='backslashreplace') as file:
                file.write(f'{time.strftime("%Y-%m-%d %H:%M:%S")}  {line}\n')
        except OSError as error:  # a line that cannot be kept is no reason to end the work
            complain('warning', f'no more lines in {SAID["log"]}: {error.strerror}')
            SAID['log'] = None


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
        disable=True if rank() or SAID['quiet'] else None,
    )


def log_to(path):
    """From now on, what is said is also written to the end of this file."""
    SAID['log'] = path


def be_quiet(quiet):
    """Whether `say` and `progress` keep off the terminal. Warnings and errors do not."""
    SAID['quiet'] = quiet


def duration(seconds):
    """Seconds as people say them."""
    seconds = round(seconds)
    hours, minutes = seconds // 3600, seconds % 3600 // 60
    if hours:
        return f'{hours} h {minutes} min'
    return f'{minutes} min {seconds % 60} s' if minutes else f'{seconds} s'
