"""Reading and writing of small files without torch: JSON, metrics.jsonl, CSV, /proc."""

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
    """Call `write(temporary path)`, then rename that file to `path`, so that `path` is never incomplete. A link stays a
    link; pipes and devices are written directly. Raises OSError with the name `path`."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        with rename_os_error(path, path):
            write(path)
        return
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f'.{path.name[:50]}.{socket.gethostname()[:50]}.{os.getpid()}.part')
    try:
        with rename_os_error(path, aside):
            aside.touch()  # torch.save's error would not say why it fails
            mode = aside.stat().st_mode
            write(aside)
            aside.chmod(mode)  # safetensors makes a file that others cannot read
            with open(aside, 'rb+') as file:
                os.fsync(file.fileno())  # before the name, or a power cut could leave an empty file
            os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def clear_parts(folder):
    """Delete temporary files of atomic_write in a folder whose process, on this machine, no longer exists."""
    ending = re.compile(rf'\..*\.{re.escape(socket.gethostname()[:50])}\.(\d+)\.part')
    for entry in os.scandir(folder) if folder.is_dir() and proc_stat('self') else ():
        if (match := ending.fullmatch(entry.name)) and not proc_stat(match[1]):
            with contextlib.suppress(OSError):
                os.unlink(entry.path)


def try_writing(path):
    """Raise OSError, with the name `path`, if a file cannot be written there. Use it before long work. It creates the
    folder."""
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
    """Context manager: OSErrors about `aside` name `path` instead."""
    try:
        yield
    except OSError as error:
        if error.filename not in (str(aside), aside, None):
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    except RuntimeError as error:
        if not any(word in str(error) for word in ('inline_container', 'PytorchStreamWriter', 'file write failed')):
            raise  # another error
        # torch.save raises RuntimeError if it cannot write
        raise OSError(errno.EIO, f'cannot write {path}, is the disk full? The old file is intact') from error


def csv_writer(rows):
    """Return the function that writes rows as a CSV file, for atomic_write. Undecodable bytes in names are
    preserved."""

    def write(aside):
        with open(aside, 'w', newline='', encoding='utf-8', errors='surrogateescape') as file:
            csv.writer(file).writerows(rows)

    return write


def read_json(path):
    """Read a JSON file as a dict; {} if it is missing, damaged, or no dict."""
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def read_metrics(path):
    """Read metrics.jsonl: a list of dicts with `epoch` (int), perhaps `time` (text), and numbers. Damaged lines are
    skipped; null becomes nan. [] if there is no file."""
    entries = []
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return entries
    for line in lines:
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(values, dict) and type(values.get('epoch')) is int:
            values = {name: math.nan if value is None else value for name, value in values.items()}
            entries.append({name: value for name, value in values.items() if name == 'time' or is_number(value)})
    return entries


def is_number(value):
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1000)


def utc_timestamp():
    """Return the current time in UTC with microseconds, as sortable text."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='microseconds')


def written_time(content, path):
    """Return when a file was written, as text: its entry `when`, which copying preserves, else its mtime."""
    time_text = content.get('when')
    if isinstance(time_text, str):
        return time_text
    try:
        written = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.timezone.utc)
    except OSError:
        return ''
    return written.isoformat(timespec='microseconds')


def read_in_order(paths):
    """Read JSON files. Returns [(path, content)], sorted by written_time, the oldest first."""
    contents = [(path, read_json(path)) for path in paths]
    return sorted(contents, key=lambda pair: (written_time(pair[1], pair[0]), pair[0].name))


def newest_run(folders):
    """Return the run folder that was started or resumed last, by its run.json; None if there are none."""
    by_time = [(written_time(read_json(folder / 'run.json'), folder / 'run.json'), folder) for folder in folders]
    return max(by_time)[1] if by_time else None


def dumps_nan_safe(value, **options):
    """Convert a value to JSON text. nan and infinity, which JSON does not have, become null."""
    return json.dumps(without_nan(value), **options)


def without_nan(value):
    if isinstance(value, dict):
        return {key: without_nan(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def proc_stat(pid):
    """Return the fields of /proc/<pid>/stat from the state on; [] if there is no such process, or no /proc."""
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
    except OSError:
        return []


def is_result_for(result, path):
    """Whether a result is for the images at `path`, an --image_path; True for early results without a path."""
    images = result.get('images')
    return (
        not isinstance(images, dict)
        or not isinstance(path, str)
        or same_path(images.get('path', ''), resolve_path(path))
    )


def stat_fingerprint(paths):
    """Return a text with sizes, mtimes and ctimes of files, which changes when a file changes."""
    stats = [(str(path), os.stat(path)) for path in paths]
    return repr([(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns) for path, status in stats])


def sanitize_name(name):
    """Replace all characters except letters, digits, '-', '_' and '.' by '_'."""
    return ''.join(c if c.isascii() and (c.isalnum() or c in '-_.') else '_' for c in name)
