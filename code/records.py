"""The small files and system records that are read without torch: JSON, metrics.jsonl, /proc."""

import contextlib
import json
import math
from pathlib import Path


def read_json(path):
    """A file of JSON as a dict; an empty one where it is not there, damaged, or no dict."""
    try:
        found = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError):
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
        except ValueError:
            continue
        if isinstance(values, dict) and type(values.get('epoch')) is int:
            values = {name: math.nan if value is None else value for name, value in values.items()}
            found.append({name: value for name, value in values.items() if name == 'time' or is_number(value)})
    return found


def is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


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
