"""The paper's ablations (section 4) on any preset: a table's variants one after the other, ours beside the paper's."""

import json

import plots
from ckpt import checkpoints, read
from dataloader.load_dataset import load_splits, views_of
from engine.ablation_tables import TABLES, finished_result
from engine.run_dir import of_run
from errors import UserError, path_of
from logger import read_scalars
from runtime.atomic_write import save_picture, write_aside
from runtime.checkpoint_format import upgraded
from runtime.device import use_device
from runtime.messages import say
from runtime.options import changed
from train import train


def ablate(args):
    """Train and evaluate every variant of --table; the rows that result. Started again it goes on where it was.

    Each variant is a run of its own, model_name_<model_name>_<table>_<number>_ckpt_0. Writes <table>.json and .png in
    the log folder (<model_name>_<table> where --model_name is given). Where --max_minutes end a variant, it says how to
    go on and returns the rows that are whole.
    """
    for name in ('ckpt_name', 'resume', 'protocol', 'evaluate_after'):
        if name in args.given:
            raise UserError(f'--{name} is not for ablate, which trains and evaluates runs of its own: leave it out')
    args = changed(of_run(args), from_run='') if args.from_run else args
    rows, planned = [], variants(args)
    for number, (variant, options, paper, own) in enumerate(planned):
        say(f'\n{args.table}: {variant}, {number + 1} of {len(planned)}')
        if not (done := finished_result(own)):
            train(own)
            done = finished_result(own)
        if not done:
            say(f'{args.table}: not all is trained; the same command goes on where it was')
            return rows
        rows.append({'variant': variant, 'options': options, **outcome(args, *done), 'paper': paper})
    named = 'model_name' in args.given
    base = path_of(args.log_path) / (f'{args.model_name}_{args.table}' if named else args.table)
    write_rows(base, rows)
    say('\n' + table(rows))
    say(f'\nthe curves: {base}.png')
    return rows


def write_rows(base, rows):
    """The rows as <base>.json, their curves as <base>.png."""
    data, image = (base.with_name(base.name + suffix) for suffix in ('.json', '.png'))
    write_aside(data, lambda aside: aside.write_text(json.dumps(rows, indent=2) + '\n'))
    drawn = (
        ('std of z / |z|, times sqrt(d)', 'std_curve', (0, 1.1)),
        ('loss', 'loss_curve', None),
        ('kNN top-1, %', 'knn_curve', None),
    )
    picture = plots.curves(
        [plots.Panel(title, [(row['variant'], row[key]) for row in rows], bounds) for title, key, bounds in drawn]
    )
    save_picture(plots.image_of(picture), image)


def variants(args):
    """[(variant, options, the paper's top-1, its args)] of --table: what cannot be trained is known before the first
    is. Raises UserError; variants of larger batches than there are images are left out, and said."""
    found, images = [], 0
    if any('batch_size' in options for _, options, _ in TABLES[args.table]):
        use_device(args)
        images = len(load_splits(args)['train'])
    for number, (variant, options, paper) in enumerate(TABLES[args.table]):
        if both := sorted(args.given & {name for name, value in options.items() if not callable(value)}):
            raise UserError(f'--{both[0]} is what --table={args.table} varies: leave it out')
        options = {option: value(args) if callable(value) else value for option, value in options.items()}
        name = f'{args.model_name}_{args.table}_{number}'
        own = changed(args, **options, model_name=name, evaluate_after=True, protocol='linear', resume='auto')
        own.given = args.given | {*options, 'model_name', 'evaluate_after', 'protocol', 'resume'}
        views_of(own)
        if 'batch_size' in options and own.batch_size > images:
            say(f'{args.table}: {variant} is left out, for there are {images} images')
        else:
            found.append((variant, options, paper, own))
    return found


def outcome(args, run, result):
    """What a run has come to: its accuracies, last loss and std, and their curves as pairs of epoch and value."""
    content, _ = upgraded(read(checkpoints(run)[-1]))
    logged = read_scalars(path_of(args.log_path) / run.name)
    curves = {
        f'{short}_curve': logged.get(f'pretraining/{tag}', [])
        for short, tag in (('std', 'std'), ('loss', 'loss'), ('knn', 'knn_top1'))
    }
    return {
        'linear': result['top1'],
        'knn': result['knn_top1'],
        'untrained': result['knn_top1_untrained'],
        'epochs': content['epoch'],
        'loss': content['loss'],
        'std': content['last'][1],
        **curves,
    }


def table(rows):
    """The rows as Markdown, which is readable as it is."""
    with_paper = any(row['paper'] for row in rows)
    lines = [
        '| variant | linear | kNN | loss | std |' + with_paper * ' paper: linear, ImageNet |',
        '|---|---|---|---|---|' + with_paper * '---|',
    ]
    for row in rows:
        line = f'| {row["variant"]} | {row["linear"]:.1f} | {row["knn"]:.1f} | {row["loss"]:.3f} | {row["std"]:.2f} |'
        lines.append(line + with_paper * f' {row["paper"]} |')
    return '\n'.join(lines)
