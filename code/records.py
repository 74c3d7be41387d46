"""The small files and system records that are read, and written, without torch: JSON, metrics.jsonl, CSV, /proc."""

import contextlib
import csv
import errno
import json
import math
import os
import socket
from pathlib import Path


def put_aside(path, write):
    """Let `write(temporary path)` make a file, then rename it to `path`: whole or not there, whatever stops us. A link
    stays one; a pipe and a device are written to. Raises OSError with the name that was asked for."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        with called(path, path):
            write(path)
        return
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f'.{path.name[:50]}.{socket.gethostname()[:50]}.{os.getpid()}.part')
    try:
        with called(path, aside):
            aside.touch()  # torch would not say why it cannot
            write(aside)
            os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def called(path, aside):
    """Errors in writing `aside` name `path`."""
    try:
        yield
    except OSError as error:
        if error.filename not in (str(aside), aside, None):
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    except RuntimeError as error:  # torch.save's way to say that it could not write
        raise OSError(errno.EIO, f'cannot write {path}, is the disk full? What was there is whole') from error


def csv_of(rows):
    """What put_aside calls to write rows as a CSV file. A name is bytes: it is written as it is, whatever it is in."""

    def write(aside):
        with open(aside, 'w', newline='', encoding='utf-8', errors='surrogateescape') as file:
            csv.writer(file).writerows(rows)

    return write


def read_json(path):
    """A file of JSON as a dict; an empty one where it is not there, damaged, or no dict."""
    try:
        found = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def read_metrics(path):
    """The lines of a metrics file as dicts of `epoch`, an int, perhaps `time`, a text, and numbers; what is damaged,
    cut short or something else is left out. Empty where there is no file. What as_json made null is nan again."""
    found = []
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return found
    for line in lines:
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(values, dict) and type(values.get('epoch')) is int:
            values = {name: math.nan if value is None else value for name, value in values.items()}
            found.append({name: value for name, value in values.items() if name == 'time' or is_number(value)})
    return found


def is_number(value):
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1000)


def oldest_first(paths):
    """Those of the paths that lead to a file, by when it was written."""
    found = []
    for path in paths:
        with contextlib.suppress(OSError):
            found.append((path.stat().st_mtime, path))
    return [path for _, path in sorted(found)]


def as_json(value, **options):
    """JSON text; a float that is no number becomes null, for other readers of JSON know none such."""
    return json.dumps(without_nan(value), **options)


def without_nan(value):
    if isinstance(value, dict):
        return {key: without_nan(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def process_stat(pid):
    """What Linux says of a process: the fields of /proc/<pid>/stat from its state on; nothing where there is none."""
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
    except OSError:
        return []
