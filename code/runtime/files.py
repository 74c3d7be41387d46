"""The small files and system records that are read, and written, without torch: JSON, metrics.jsonl, CSV, /proc."""

import contextlib
import csv
import datetime
import errno
import json
import math
import os
import re
import socket
import tempfile
from pathlib import Path

from runtime.errors import resolve_path, same_path


def atomic_write(path, write):
    """Let `write(temporary path)` make a file, then rename it to `path`: whole or not there, whatever stops us. A link
    stays one; a pipe and a device are written to. Raises OSError with the name that was asked for."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        with rename_os_error(path, path):
            write(path)
        return
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f'.{path.name[:50]}.{socket.gethostname()[:50]}.{os.getpid()}.part')
    try:
        with rename_os_error(path, aside):
            aside.touch()  # torch would not say why it cannot
            write(aside)
            os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def clear_parts(folder):
    """Delete what writers of this machine that were killed have left in a folder (atomic_write)."""
    ending = re.compile(rf'\..*\.{re.escape(socket.gethostname()[:50])}\.(\d+)\.part')
    for entry in os.scandir(folder) if folder.is_dir() and proc_stat('self') else ():
        if (match := ending.fullmatch(entry.name)) and not proc_stat(match[1]):
            with contextlib.suppress(OSError):
                os.unlink(entry.path)


def try_writing(path):
    """Raise OSError, with this name, where a file could not be written there: before the work whose outcome it is to
    hold. Makes the folder."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        return  # a pipe, a device
    folder = path.resolve().parent
    with rename_os_error(path, folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None


@contextlib.contextmanager
def rename_os_error(path, aside):
    """Errors in writing `aside` name `path`."""
    try:
        yield
    except OSError as error:
        if error.filename not in (str(aside), aside, None):
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    except RuntimeError as error:
        if not any(word in str(error) for word in ('inline_container', 'PytorchStreamWriter', 'file write failed')):
            raise  # of what is written, not of the file
        # torch.save's way to say that it could not write
        raise OSError(errno.EIO, f'cannot write {path}, is the disk full? What was there is whole') from error


def csv_writer(rows):
    """What atomic_write calls to write rows as a CSV file. A name is bytes: it is written as it is, whatever it is
    in."""

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
    cut short or something else is left out. Empty where there is no file. What dumps_nan_safe made null is nan
    again."""
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


def utc_timestamp():
    """The time, to a microsecond, as text that sorts."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='microseconds')


def written_time(content, path):
    """When what a file holds came to be: as it says itself (`when`), for a copy has other times; of early files when
    they were written."""
    said = content.get('when')
    if isinstance(said, str):
        return said
    try:
        written = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.timezone.utc)
    except OSError:
        return ''
    return written.isoformat(timespec='microseconds')


def read_in_order(paths):
    """[(path, content)] of files of JSON, the oldest first by `written_time`."""
    found = [(path, read_json(path)) for path in paths]
    return sorted(found, key=lambda pair: (written_time(pair[1], pair[0]), pair[0].name))


def newest_run(folders):
    """The run folder that was begun, or gone on with, last, by its run.json; None of none."""
    found = [(written_time(read_json(folder / 'run.json'), folder / 'run.json'), folder) for folder in folders]
    return max(found)[1] if found else None


def dumps_nan_safe(value, **options):
    """JSON text; a float that is no number becomes null, for other readers of JSON know none such."""
    return json.dumps(without_nan(value), **options)


def without_nan(value):
    if isinstance(value, dict):
        return {key: without_nan(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def proc_stat(pid):
    """What Linux says of a process: the fields of /proc/<pid>/stat from its state on; nothing where there is none."""
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
    except OSError:
        return []


def is_result_for(result, path):
    """Whether a result is of the images at `path`, an --image_path; early ones do not say."""
    images = result.get('images')
    return (
        not isinstance(images, dict)
        or not isinstance(path, str)
        or same_path(images.get('path', ''), resolve_path(path))
    )


def stat_fingerprint(paths):
    """What changes when one of the files at `paths` does: sizes and times, the time of change among them."""
    found = [(str(path), os.stat(path)) for path in paths]
    return repr([(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns) for path, status in found])
