"""The small files and system records that are read without torch: JSON, metrics.jsonl, /proc."""

import json
from pathlib import Path


def read_json(path):
    """A file of JSON as a dict; an empty one where it is not there, damaged, or no dict."""
    try:
        found = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_metrics(path):
    """The lines of a metrics file as dicts; a last one that was cut short is left out. Empty where there is none."""
    found = []
    try:
        text = path.read_text(encoding='utf-8')
    except OSError:
        return found
    for line in text.splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def process_stat(pid):
    """What Linux says of a process: the fields of /proc/<pid>/stat from its state on; nothing where there is none."""
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
    except OSError:
        return []
