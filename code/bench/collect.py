"""Take what a run says of itself into git: run.json, metrics.jsonl and the results of evaluations, some kilobytes.

    python3 bench/collect.py data/checkpoints/model_name_demo_ckpt_0 results/demo [data/logs/model_name_demo_ckpt_0]

Absolute paths become data/<last part>. A run of before metrics.jsonl is read from its TensorBoard log, the third word.
"""

import json
import re
import sys
from pathlib import Path

from common import CODE

from logger import read_scalars
from runtime.files import read_metrics


def to_plain(value):
    """A value of JSON without the places of this machine."""
    if isinstance(value, dict):
        return {name: to_plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [to_plain(inner) for inner in value]
    return re.sub(r'(?<![\w.])/(?:[\w.-]+/)+([\w.-]+)', r'data/\1', value) if isinstance(value, str) else value


def read_lines(run, log):
    """One dict an epoch of a run."""
    if known := read_metrics(run / 'metrics.jsonl'):
        return known
    lines = {}
    for tag, values in read_scalars(log).items():
        for epoch, value in values if tag.startswith(('pretraining/', 'schedule/', 'speed/')) else ():
            lines.setdefault(epoch, {'epoch': epoch})[tag] = value
    return [lines[epoch] for epoch in sorted(lines)]


def main(run, folder, log=None):
    run, folder = Path(run), CODE / folder
    folder.mkdir(parents=True, exist_ok=True)
    for path in (run / 'run.json', *sorted(run.glob('evaluate_*.json'))):
        (folder / path.name).write_text(json.dumps(to_plain(json.loads(path.read_text())), indent=1) + '\n')
    lines = read_lines(run, log and Path(log))
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))


if __name__ == '__main__':
    main(*sys.argv[1:])
