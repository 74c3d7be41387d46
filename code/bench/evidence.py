"""Which measure without labels tells which features are good? Runs that differ, all measures of each, correlations.

    python3 bench/evidence.py --set=demo --output=data/evidence [--seeds=0,1,2]
    python3 bench/evidence.py --set=cifar10 --image_path=data/cifar10-15k --output=data/evidence

Trains every variant of a set with every seed, evaluates it linearly, and does not train again what is there.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import torch
from common import CODE
from scipy.stats import rankdata

from ckpt import get_model_ckpt
from dataloader.load_dataset import load_splits
from engine.ablation_tables import TABLES, finished_result
from evaluate import evaluate
from protocols import results
from protocols.collapse_verdict import MEASURES
from protocols.linear import evaluate_linear
from runtime.checkpoints.load_state import build_model
from runtime.checkpoints.run_folder import checkpoints
from runtime.device import get_device
from runtime.errors import resolve_path
from runtime.files import read_metrics
from runtime.options import get_config, replace_args

SMALL = {
    'backbone': 'small',
    'proj_layers': 2,
    'proj_dim': 512,
    'pred_dim': 128,
    'learning_rate': 0.4,
    'weight_decay': 5e-4,
    'probe_optimizer': 'sgd',
    'probe_epochs': 100,
    'cache_features': True,
    'cache_epochs': 2,
    'num_workers': 0,
}
SETS = {
    'demo': {'preset': 'demo', 'max_epochs': 5},
    'cifar10': {'preset': 'cifar10', **SMALL, 'batch_size': 128, 'max_epochs': 3},
    'clothing': {
        'preset': 'imagenet',
        **SMALL,
        'batch_size': 64,
        'image_size': 64,
        'cache_short_side': 72,
        'max_epochs': 10,
    },
}
TIMES = {'rate': 'learning_rate', 'decay': 'weight_decay', 'epochs': 'max_epochs', 'batch': 'batch_size'}
# What is changed: an option and its value, or one of TIMES and what the set's own value is multiplied by.
VARIED = {
    'unchanged': {},
    'rate x 10': {'rate': 10},
    'rate x 3': {'rate': 3},
    'rate / 3': {'rate': 1 / 3},
    'rate / 10': {'rate': 0.1},
    'no decay': {'decay': 0},
    'decay x 10': {'decay': 10},
    'SimCLR': {'augmentation': 'simclr'},
    'SimCLR, longer': {'augmentation': 'simclr', 'epochs': 3},
    'a third of the epochs': {'epochs': 1 / 3},
    'three times the epochs': {'epochs': 3},
    'batch / 4': {'batch': 0.25},
    'no stop-gradient': {'stop_gradient': False},
    'no predictor': {'predictor': 'none'},
    'fixed predictor': {'predictor': 'fixed'},
    'no BN': {'proj_bn': 'none'},
}
# Not used to choose anything: settings and seeds of their own.
HELD_OUT = {
    'demo': {
        'a': {'epochs': 2, 'rate': 2.5},
        'b': {'epochs': 2, 'rate': 0.25},
        'c': {'epochs': 2, 'augmentation': 'simclr'},
        'd': {'epochs': 2, 'stop_gradient': False, 'rate': 0.25},
        'e': {'proj_bn': 'hidden', 'decay': 4},
    },
    'cifar10': {
        'a': {'rate': 4, 'decay': 4},
        'b': {'loss_symmetry': 'false', 'epochs': 2},
        'c': {'proj_bn': 'all'},
        'd': {'predictor': 'none', 'rate': 0.25},
    },
    'clothing': {
        'a': {'epochs': 2, 'augmentation': 'simclr', 'rate': 2},
        'b': {'epochs': 4, 'decay': 4},
        'c': {'stop_gradient': False, 'rate': 3},
    },
}


def variants(kind, held_out):
    """{name: options} of a set."""
    if held_out:
        return {f'held_out_{name}': options for name, options in HELD_OUT[kind].items()}
    if kind != 'demo':
        return VARIED
    return {
        f'{table}: {name}': options
        for table in ('collapse', 'stopgrad', 'predictor', 'bn')
        for name, options, _ in TABLES[table]
    }


def effective_options(args):
    """Its options as far as they make a difference: without a predictor its rate makes none."""
    return asdict(replace_args(args, fix_pred_lr=True) if args.predictor == 'none' else args)


def variant_options(kind, given, changes):
    """All options of a run: the set's, those of the command line, the variant's."""
    base = {**SETS[kind], **given}
    args, changed = get_config(**base), {}
    for name, value in changes.items():
        if callable(value):
            changed[name] = value(args)
        elif name in TIMES:
            number = getattr(args, TIMES[name]) * value
            changed[TIMES[name]] = number if name in ('rate', 'decay') else max(1, round(number))
        else:
            changed[name] = value
    return {**base, **changed}


def train_all(kind, given, seeds, held_out, folder):
    """Train and evaluate what is not there yet. Returns [(variant, seed, run folder)]."""
    runs = []
    for seed in seeds:
        trained = []
        for number, (variant, changes) in enumerate(variants(kind, held_out).items()):
            run_options = {
                'random_seed': seed,
                'model_name': f'{kind}{"_held" * held_out}_{number}_{seed}',
                'ckpt_path': f'{folder}/ckpt',
                'log_path': f'{folder}/log',
                'evaluate_after': True,
                'resume': 'auto',
            }
            options = {**variant_options(kind, given, changes), **run_options}
            options['knn_every'] = get_config(**options).max_epochs
            args = get_config(**options)
            if (same := {**effective_options(args), 'model_name': ''}) in trained:
                continue  # another table's name for it
            trained.append(same)
            if not finished_result(args):
                print(f'{kind}, {variant}, seed {seed}', flush=True)
                command = [sys.executable, 'cli.py', 'train', *(f'--{name}={value}' for name, value in options.items())]
                subprocess.run(command, cwd=CODE, check=True, stdout=subprocess.DEVNULL)
            runs.append((variant, seed, finished_result(args)[0]))
    return runs


def measure(run):
    """{measure: number} of the last checkpoint of a run, its accuracies in percent beside them; kept in the run."""
    linear = results.load_results(run, protocol='linear')[-1]
    name = checkpoints(run)[-1].name
    if not (label_free := results.load_results(run, protocol='label_free', checkpoint=name)):
        args = get_config(
            protocol='label_free',
            ckpt_name=str(run / name),
            log_path=str(run.parent.parent / 'log'),
            cache_path=str(run.parent.parent / 'cache'),
            quiet=True,
        )
        label_free = [evaluate(args)]
    loss = read_metrics(run / 'metrics.jsonl')[-1]['pretraining/loss']
    return {
        **label_free[-1]['measures'],
        'loss': loss,
        'linear': linear['top1'],
        'knn': linear['knn_top1'],
        'untrained': label_free[-1]['untrained'],
        'knn_untrained': linear['knn_top1_untrained'],
    }


def untrained_linear(run, file):
    """Linear top-1 of the network that a run began as; kept in a file, for the runs of a seed share it."""
    if not file.is_file():
        args, _, _ = get_model_ckpt(get_config(ckpt_name=str(run), cache_path=str(run.parent.parent / 'cache')))
        model = build_model(args).to(get_device(args), memory_format=torch.channels_last)
        file.write_text(json.dumps(evaluate_linear(args, model, load_splits(args), None).result['top1']))
    return json.loads(file.read_text())


def correlations(rows):
    """{measure: (Spearman's correlation with linear top-1 over the runs, a 95 % interval)}."""
    accuracies = [row['linear'] for row in rows]
    known = [name for name in (*MEASURES, 'loss') if all(name in row for row in rows)]
    return {name: with_interval([row[name] for row in rows], accuracies) for name in known}


def with_interval(x, y, tries=1000):
    """(Spearman's correlation of x and y, 2.5 and 97.5 % of its bootstrap over the pairs)."""
    generator, pairs = np.random.default_rng(0), np.array([x, y])
    pairs = pairs[:, np.isfinite(pairs).all(0)]
    count = pairs.shape[1]
    resampled = pairs[:, [generator.integers(count, size=count) for _ in range(tries)]]
    return spearman(pairs), *np.nanpercentile(spearman(resampled), [2.5, 97.5])


def spearman(pairs):
    """The correlation of the ranks of x and y. pairs: 2 x ... x N; nan where one does not vary."""
    x, y = (ranks - ranks.mean(-1, keepdims=True) for ranks in rankdata(pairs, axis=-1))
    with np.errstate(invalid='ignore', divide='ignore'):
        return (x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--set', choices=SETS, required=True)
    parser.add_argument('--output', required=True)
    parser.add_argument('--seeds', default='0,1,2')
    parser.add_argument('--held_out', action='store_true')
    known, rest = parser.parse_known_args()
    given = dict(text.removeprefix('--').split('=', 1) for text in rest)
    folder, name = resolve_path(known.output), f'{known.set}{"_held_out" * known.held_out}'
    runs = train_all(known.set, given, [*map(int, known.seeds.split(','))], known.held_out, folder)
    rows = []
    for variant, seed, run in runs:
        before = untrained_linear(run, folder / f'untrained_{known.set}_{seed}.json')
        rows.append({'variant': variant, 'seed': seed, **measure(run), 'linear_untrained': before})
    (folder / f'{name}.json').write_text(json.dumps(rows, indent=1) + '\n')
    for key, (rho, low, high) in correlations(rows).items():
        print(f'{key:16} {rho:6.2f}   {low:.2f} to {high:.2f}')


if __name__ == '__main__':
    main()
