"""Text for terminals, messages on standard error, and output streams that survive closed pipes. Standard library
only."""

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
logging.getLogger('matplotlib').setLevel(logging.ERROR)  # before its import, which logs where its font cache is
SILENCED = {'depth': 0, 'kept': None, 'lock': threading.Lock()}


def with_options(line):
    """Write settings in a message, `name` or `name=value` in backticks, as options of the command line (--name=value).
    dataloader/ uses backticks, because it can be used without the command line."""
    return re.sub(r'`(\w+(=[^`]*)?)`', r'--\1', str(line))


def print_message(kind, line):
    """Print `<kind>: <line>` on standard error, in color on a terminal unless NO_COLOR is set (no-color.org). kind:
    error or warning."""
    text = f'{kind}: {with_options(line)}'
    if sys.stderr.isatty() and not os.environ.get('NO_COLOR'):
        text = f'\033[{COLORS[kind]}m{text}\033[0m'
    print(text, file=sys.stderr, flush=True)


def first_line(error):
    """Return the first line of an exception's message, or its type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def join_first(words, most=5):
    """Join the first `most` words, and the number of the others: 'a, b and 3 more'."""
    return ', '.join(words[:most]) + (f' and {len(words) - most} more' if len(words) > most else '')


def format_columns(rows):
    """Format rows of cells as aligned lines. Unprintable characters are escaped; wide ones (Chinese, Japanese, Korean)
    take two columns."""
    rows = [[printable(cell) for cell in row] for row in rows]
    sizes = [max(map(display_width, column)) for column in zip(*rows, strict=True)]
    return [
        '  '.join(cell + ' ' * (size - display_width(cell)) for cell, size in zip(row, sizes, strict=True)).rstrip()
        for row in rows
    ]


def truncate(line, width):
    """Truncate a line to the width of a terminal."""
    if display_width(line) <= width:
        return line
    ends = itertools.accumulate(map(display_width, line))
    return line[: sum(end < width for end in ends)] + '…'


def display_width(text):
    """Return the number of terminal columns of a text."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in 'WF') for c in text)


def printable(path):
    """Escape a path for printing on one line: undecodable bytes and control characters."""
    text = os.fspath(path)
    text = text if isinstance(text, str) else os.fsdecode(text)
    return ''.join(c if c.isprintable() else c.encode('unicode_escape', 'surrogatepass').decode() for c in text)


class PipeSafeIO(io.FileIO):
    """A raw output stream that ignores write errors, so that a closed pipe (`| head`), a closed terminal or a full disk
    does not end the run. `lost` has the error, unless the reader closed the pipe (see output_error)."""

    lost = ''

    def write(self, data):
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                self.lost = error.strerror
            return len(data)


def output_error():
    """Return why the standard output is incomplete; '' if it is complete."""
    sys.stdout.flush()
    return getattr(getattr(getattr(sys.stdout, 'buffer', None), 'raw', None), 'lost', '')


def wrap_std_streams():
    """Replace sys.stdout and sys.stderr by streams that escape unencodable text and ignore write errors. sys.stderr
    gets its own file descriptor, which silence_stderr does not affect. Closed streams (2>&-) become /dev/null."""
    for name, number in (('stdin', 0), ('stdout', 1), ('stderr', 2)):
        if getattr(sys, name) is None:
            with contextlib.suppress(OSError):
                os.open(os.devnull, os.O_RDWR)  # gets the lowest free number: that of the closed stream
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
    """Context manager that drops what C libraries print on standard error (libjpeg and libtiff for damaged files); the
    errors are raised as well. sys.stderr is another stream (wrap_std_streams)."""
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
    """silence_stderr for the rest of this process, a dataloader worker."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)
