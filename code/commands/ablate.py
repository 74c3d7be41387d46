"""The paper's ablations (section 4) on any preset: a table's variants one after the other, ours beside the paper's."""

import json

import plots
from ckpt import checkpoints, read_checkpoint
from dataloader.load_dataset import load_splits, num_views
from engine.ablation_tables import TABLES, finished_result
from engine.run_dir import args_from_run
from logger import read_scalars
from runtime.atomic_write import atomic_write_on_main, save_png
from runtime.checkpoint_format import upgrade
from runtime.device import init_device
from runtime.errors import UserError, resolve_path
from runtime.messages import log
from runtime.options import replace_args
from train import train


def ablate(args):
    """Train and evaluate every variant of --ablation; the rows that result. Started again it goes on where it was.

    Each variant is a run of its own, model_name_<model_name>_<table>_<number>_ckpt_0. Writes <table>.json and .png in
    the log folder (<model_name>_<table> where --model_name is given). Where --max_minutes end a variant, it says how to
    go on and returns the rows that are whole.
    """
    for name in ('ckpt_name', 'resume', 'protocol', 'evaluate_after'):
        if name in args.given:
            raise UserError(f'--{name} is not for ablate, which trains and evaluates runs of its own: leave it out')
    args = replace_args(args_from_run(args), from_run='') if args.from_run else args
    rows, planned = [], plan_variants(args)
    for number, (variant, options, paper, variant_args) in enumerate(planned):
        log(f'\n{args.ablation}: {variant}, {number + 1} of {len(planned)}')
        if not (result := finished_result(variant_args)):
            train(variant_args)
            result = finished_result(variant_args)
        if not result:
            log(f'{args.ablation}: not all is trained; the same command goes on where it was')
            return rows
        rows.append({'variant': variant, 'options': options, **result_row(args, *result), 'paper': paper})
    named = 'model_name' in args.given
    base = resolve_path(args.log_path) / (f'{args.model_name}_{args.ablation}' if named else args.ablation)
    save_table(base, rows)
    log('\n' + format_markdown(rows))
    log(f'\nthe curves: {base}.png')
    return rows


def save_table(base, rows):
    """The rows as <base>.json, their curves as <base>.png."""
    data, image = (base.with_name(base.name + suffix) for suffix in ('.json', '.png'))
    atomic_write_on_main(data, lambda aside: aside.write_text(json.dumps(rows, indent=2) + '\n'))
    drawn = (
        ('std of z / |z|, times sqrt(d)', 'std_curve', (0, 1.1)),
        ('loss', 'loss_curve', None),
        ('kNN top-1, %', 'knn_curve', None),
    )
    picture = plots.draw_curves(
        [plots.LineChart(title, [(row['variant'], row[key]) for row in rows], bounds) for title, key, bounds in drawn]
    )
    save_png(plots.to_pil(picture), image)


def plan_variants(args):
    """[(variant, options, the paper's top-1, its args)] of --ablation: what cannot be trained is known before the first
    is. Raises UserError; variants of larger batches than there are images are left out, and said."""
    found, images = [], 0
    if any('batch_size' in options for _, options, _ in TABLES[args.ablation]):
        init_device(args)
        images = len(load_splits(args)['train'])
    for number, (variant, options, paper) in enumerate(TABLES[args.ablation]):
        if both := sorted(args.given & {name for name, value in options.items() if not callable(value)}):
            raise UserError(f'--{both[0]} is what --ablation={args.ablation} varies: leave it out')
        options = {option: value(args) if callable(value) else value for option, value in options.items()}
        name = f'{args.model_name}_{args.ablation}_{number}'
        variant_args = replace_args(
            args, **options, model_name=name, evaluate_after=True, protocol='linear', resume='auto'
        )
        variant_args.given = args.given | {*options, 'model_name', 'evaluate_after', 'protocol', 'resume'}
        num_views(variant_args)
        if 'batch_size' in options and variant_args.batch_size > images:
            log(f'{args.ablation}: {variant} is left out, for there are {images} images')
        else:
            found.append((variant, options, paper, variant_args))
    return found


def result_row(args, run, result):
    """What a run has come to: its accuracies, last loss and std, and their curves as pairs of epoch and value."""
    content, _ = upgrade(read_checkpoint(checkpoints(run)[-1]))
    logged = read_scalars(resolve_path(args.log_path) / run.name)
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


def format_markdown(rows):
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
