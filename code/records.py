"""The small files and system records that are read without torch: JSON, metrics.jsonl, /proc."""

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
    """The lines of a metrics file as dicts; a last one that was cut short is left out. Empty where there is none.
    What as_json made null is nan again."""
    found = []
    try:
        text = path.read_text(encoding='utf-8')
    except OSError:
        return found
    for line in text.splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            break
        found.append({name: math.nan if value is None else value for name, value in values.items()})
    return found


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
