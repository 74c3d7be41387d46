"""What it costs to trust the checkpoint that `evaluate --protocol=label_free` names: linear top-1 of every epoch.

    python3 bench/trust.py --output=code/results/trust.json [--seeds=0,1,2] [--ckpt_path=FOLDER]

Runs of the demo that differ in one thing each, a checkpoint and its rank without labels after each epoch. Goes on where
it was.
"""

import json
import sys

import common  # noqa: F401
from evidence import VARIED, variant_options

from evaluate import evaluate
from runtime.checkpoints.run_folder import checkpoints
from runtime.device import init_device
from runtime.errors import resolve_path
from runtime.files import read_metrics
from runtime.options import get_config
from train import train

RUNS = 'unchanged', 'rate x 10', 'SimCLR', 'no decay'  # of evidence.VARIED


def measure_epochs(name, options, folders):
    """[{'epoch', 'rank', 'linear', 'knn'}] of a run's epochs; trains what is not there."""
    run = resolve_path(get_config(**folders).ckpt_path) / f'model_name_{name}_ckpt_0'
    train(get_config(model_name=name, save_every_epochs=1, knn_every=1, resume='auto', **options))
    metrics = {line['epoch']: line for line in read_metrics(run / 'metrics.jsonl')}
    rows = []
    for path in checkpoints(run):
        linear = evaluate(get_config(ckpt_name=f'{run.name}/{path.name}', protocol='linear', **folders))
        line = metrics[linear['epoch']]
        measures = {'rank': line['pretraining/rank'], 'knn': line['pretraining/knn_top1']}
        rows.append({'epoch': linear['epoch'], 'linear': linear['top1'], **measures})
    return rows


def main():
    given = dict(text.removeprefix('--').split('=', 1) for text in sys.argv[1:])
    output, seeds = resolve_path(given.pop('output')), given.pop('seeds', '0,1,2').split(',')
    init_device(get_config(preset='demo'))
    results = {}
    for seed in seeds:
        for number, title in enumerate(RUNS):
            options = variant_options('demo', {**given, 'max_epochs': 15, 'random_seed': seed}, VARIED[title])
            results.setdefault(title, {})[seed] = measure_epochs(f'trust_{number}_{seed}', options, given)
            output.write_text(json.dumps({'preset': 'demo', 'runs': results}, indent=1) + '\n')


if __name__ == '__main__':
    main()
