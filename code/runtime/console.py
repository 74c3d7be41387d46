"""Text for terminals, and lines on standard error, in colour where somebody sees it. Standard library only."""

import contextlib
import errno
import io
import itertools
import logging
import os
import re
import sys
import threading
import unicodedata

COLORS = {'error': 31, 'warning': 33}
logging.getLogger('matplotlib').setLevel(logging.ERROR)  # before its import: where it keeps fonts is nobody's concern
SILENCED = {'depth': 0, 'kept': None, 'lock': threading.Lock()}


def with_options(line):
    """A line with the settings that it names as `name` or `name=value` written as a command line takes them. What is
    raised in dataloader/ names them so, for it is also used without a command line."""
    return re.sub(r'`(\w+(=[^`]*)?)`', r'--\1', str(line))


def print_message(kind, line):
    """Print `<kind>: <line>`; in the colour of its kind on a terminal, unless the environment has NO_COLOR
    (no-color.org). kind: error or warning."""
    text = f'{kind}: {with_options(line)}'
    if sys.stderr.isatty() and not os.environ.get('NO_COLOR'):
        text = f'\033[{COLORS[kind]}m{text}\033[0m'
    print(text, file=sys.stderr, flush=True)


def first_line(error):
    """The first line of what an exception says; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def join_first(words, most=5):
    """The first `most` of some words, and how many more there are."""
    return ', '.join(words[:most]) + (f' and {len(words) - most} more' if len(words) > most else '')


def format_columns(rows):
    """Rows of as many cells each as lines of columns: what is no text escaped, wide letters (Chinese, Japanese, Korean)
    taken for two."""
    rows = [[printable(cell) for cell in row] for row in rows]
    sizes = [max(map(display_width, column)) for column in zip(*rows, strict=True)]
    return [
        '  '.join(cell + ' ' * (size - display_width(cell)) for cell, size in zip(row, sizes, strict=True)).rstrip()
        for row in rows
    ]


def truncate(line, width):
    """A line, of one that is wider than a terminal the beginning."""
    if display_width(line) <= width:
        return line
    ends = itertools.accumulate(map(display_width, line))
    return line[: sum(end < width for end in ends)] + '…'


def display_width(text):
    """How many of a terminal's cells a text takes."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in 'WF') for c in text)


def printable(path):
    """A path as it can be printed on one line of any terminal: what is no text, or would move the cursor, escaped."""
    text = os.fspath(path)
    text = text if isinstance(text, str) else os.fsdecode(text)
    return ''.join(c if c.isprintable() else c.encode('unicode_escape', 'surrogatepass').decode() for c in text)


class PipeSafeIO(io.FileIO):
    """An output whose reader may go away (`| head`, a closed terminal), or whose disk may be full: what is written then
    is dropped, for what is said is no reason to end the work. A reader that goes has seen what it wanted; of a file it
    is kept why it is not whole (`output_error`)."""

    lost = ''

    def write(self, data):
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                self.lost = error.strerror
            return len(data)


def output_error():
    """Why what went to standard output is not whole there; '' where it is."""
    sys.stdout.flush()
    return getattr(getattr(getattr(sys.stdout, 'buffer', None), 'raw', None), 'lost', '')


def wrap_std_streams():
    """Let standard output and error take any name of a file (what is no text is escaped) and outlast their readers, and
    give Python an error stream that `silence_stderr` does not reach. One that is closed (2>&-) is as /dev/null."""
    for name, number in (('stdin', 0), ('stdout', 1), ('stderr', 2)):
        if getattr(sys, name) is None:
            with contextlib.suppress(OSError):
                os.open(os.devnull, os.O_RDWR)  # it gets the lowest number that is free: the closed one's
            setattr(sys, name, open(os.devnull, 'w' if number else 'r'))  # noqa: SIM115
    for name, number in (('stdout', 1), ('stderr', 2)):
        stream = getattr(sys, name)
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if stream.fileno() == number:
                raw = PipeSafeIO(os.dup(number) if number == 2 else number, 'w', closefd=False)
                lines = number == 2 or stream.isatty()
                setattr(
                    sys,
                    name,
                    io.TextIOWrapper(io.BufferedWriter(raw), stream.encoding, 'backslashreplace', line_buffering=lines),
                )


@contextlib.contextmanager
def silence_stderr():
    """What libraries below Python print on standard error (libjpeg, libtiff: pages on a damaged file) is dropped; they
    also report it, and that is raised. Python's own stream is another (wrap_std_streams)."""
    with SILENCED['lock']:
        SILENCED['depth'] += 1
        if SILENCED['depth'] == 1:
            SILENCED['kept'] = os.dup(2)
            silence_stderr_forever()
    try:
        yield
    finally:
        with SILENCED['lock']:
            SILENCED['depth'] -= 1
            if not SILENCED['depth']:
                os.dup2(SILENCED['kept'], 2)
                os.close(SILENCED['kept'])


def silence_stderr_forever():
    """`silence_stderr`, for the rest of this process: one that reads images and nothing else."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)
