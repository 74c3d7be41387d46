"""Runs from pretrained weights compared with these weights, on val and on test.

python3 bench/from_pretrained.py --runs=RUN1,RUN2 --ckpt_path=... --output=results/pretrained.json

For each run: its first and last checkpoint (--every=True: all), and the last backbone averaged with the start by
--shares (none: not averaged). kNN with 20 neighbors, logistic regression on all labels and on 30, 10, 5 and 1 per class
(five subsets, the same for all); top-1 in percent with its standard error; gains over the start are paired by image.
"""

import json
import sys
from pathlib import Path

import fire

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ckpt import get_model_ckpt
from config import OPTIONS
from dataloader.load_dataset import eval_loader, labeled_subset, load_splits
from metric.knn import clip_k
from model.weights import average_weights, copy_weights
from protocols.compare import compute_columns
from protocols.features import extract_features
from protocols.few_labels import mean_and_error
from runtime.checkpoints.run_folder import CHECKPOINT_RE, checkpoints
from runtime.console import format_columns
from runtime.errors import resolve_path
from runtime.files import read_json
from runtime.options import get_config, rename_options

LABELS, DRAWS = (30, 10, 5, 1), 5
SHOWN = (  # options of a run that are kept with its rows
    *('init_from', 'backbone', 'image_size', 'learning_rate', 'max_epochs', 'random_seed', 'num_views', 'freeze_bn'),
    *('freeze_bn_affine', 'heads_epochs', 'backbone_lr_scale', 'augmentation', 'batch_size', 'interpolation'),
    *('distill_weight', 'distill_size', 'distill_neighbors', 'trained_share'),
)


def judge(args, backbone, splits):
    """{split: {column: which images are classified correctly, draws x images}} of val and test."""
    features = {
        name: extract_features(args, backbone.eval(), eval_loader(args, labeled_subset(images)), name)
        for name, images in splits.items()
        if images is not None
    }
    classes, results = len(splits['train'].classes), {}
    for name in ('val', 'test'):
        if name in features:
            columns = compute_columns(args, features['train'], features[name], classes, LABELS, DRAWS)
            results[name] = {column: values['right'] for column, values in columns.items()}
    return results


def summarize(results, start):
    """What `judge` gave as numbers, with the gains over the start."""
    names = ('top1', 'error', 'gain', 'gain_error')
    return {
        split: {
            column: dict(
                zip(names, (*mean_and_error(right), *mean_and_error(right - start[split][column])), strict=True)
            )
            for column, right in columns.items()
        }
        for split, columns in results.items()
    }


def measure_run(folder, options, every, shares):
    """{row: numbers} of a run: its start, its checkpoints as they are, and the last one averaged with the start."""
    paths, rows, splits = checkpoints(folder), {}, None
    first = next(path for path in paths if CHECKPOINT_RE.fullmatch(path.name)[2] == '0')
    weights = None
    for path in (first, *(path for path in paths[0 if every else -1 :] if path != first)):
        args, model, _ = get_model_ckpt(get_config(ckpt_name=str(path), knn_k=20, **options), training=True)
        splits = splits or load_splits(args)
        epoch = f'epoch {CHECKPOINT_RE.fullmatch(path.name)[2]}'
        results = judge(args, model.backbone, splits)
        if path == first:
            start, weights, epoch = results, {**model.backbone.state_dict()}, 'start'
        rows[epoch] = summarize(results, start)
    trained = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    for share in shares:
        copy_weights(model.backbone, average_weights(weights, trained, share))
        rows[f'{epoch}, {share:g} of the start'] = summarize(judge(args, model.backbone, splits), start)
    return rows, clip_k(20, labeled_subset(splits['train']).labels)


def main(runs, output, ckpt_path='data/checkpoints', every=False, shares=(0.75, 0.5, 0.25), **options):
    shares = () if shares == 'none' else shares if isinstance(shares, tuple) else (shares,)
    written = resolve_path(output)
    known = read_json(written)
    for name in runs if isinstance(runs, tuple | list) else str(runs).split(','):
        folder = resolve_path(ckpt_path) / name
        saved = rename_options(read_json(folder / 'run.json')['args'])
        about = {option: saved.get(option, OPTIONS[option].default) for option in (*SHOWN, 'model_name')}
        rows, _ = measure_run(folder, {'ckpt_path': str(ckpt_path), 'amp': 'off', **options}, every, shares)
        options_of_run = {option: about[option] for option in SHOWN} | {'init_from': Path(about['init_from']).name}
        known[about['model_name']] = {'options': options_of_run, 'rows': rows}
        written.parent.mkdir(parents=True, exist_ok=True)
        written.write_text(json.dumps(known, indent=1) + '\n')
        for split in ('val', 'test'):
            columns = [*rows['start'].get(split, {})]
            lines = [[f'{name}, {split}', *columns]] if columns else []
            for row, values in rows.items():
                cells = [values[split][column] for column in columns]
                texts = [f'{c["top1"]:.1f} ({c["gain"]:+.1f} ± {c["gain_error"]:.1f})' for c in cells]
                lines.append([row, *texts])
            print('\n'.join(format_columns(lines)) + '\n' if columns else '', flush=True)


if __name__ == '__main__':
    fire.Fire(main)
