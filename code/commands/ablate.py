"""ablate: the paper's ablations (section 4) on any preset."""

import json

import plots
from dataloader.load_dataset import load_splits, num_views
from engine.ablation_tables import TABLES, finished_checkpoint, finished_result
from engine.conclude import evaluate_checkpoint
from engine.run_dir import args_from_run, find_run
from logger import load_scalars
from runtime.atomic_write import atomic_write_on_main, save_png
from runtime.checkpoints.format import upgrade
from runtime.checkpoints.read_file import read_checkpoint
from runtime.checkpoints.run_folder import checkpoints
from runtime.device import init_device
from runtime.distributed import broadcast_from_rank0
from runtime.errors import UserError, resolve_path
from runtime.files import read_json
from runtime.messages import log
from runtime.options import replace_args
from train import train


def ablate(args):
    """Train and evaluate every variant of --ablation. Returns the rows of the table. Called again, it continues.

    Each variant is a run, model_name_<model_name>_<table>_<number>_ckpt_0. It writes <table>.json and .png in the log
    folder (<model_name>_<table> with --model_name). If --max_minutes end a variant, it logs how to continue and returns
    the finished rows.
    """
    for name in ('ckpt_name', 'resume', 'protocol', 'evaluate_after'):
        if name in args.explicit:
            raise UserError(f'--{name} is not for ablate, which trains and evaluates runs of its own: leave it out')
    init_device(args)
    chosen = read_json(find_run(args, args.from_run) / 'run.json').get('explicit', ()) if args.from_run else ()
    args = replace_args(args_from_run(args), from_run='') if args.from_run else args
    rows, planned = [], plan_variants(args, {*chosen})
    for number, (variant, options, paper, variant_args) in enumerate(planned):
        log(f'\n{args.ablation}: {variant}, {number + 1} of {len(planned)}')
        if not (result := finished_result(variant_args)):
            train(variant_args)
            if variant_args.init_from and (path := finished_checkpoint(variant_args)):
                evaluate_checkpoint(variant_args, path)
            result = finished_result(variant_args)
        if not result:
            log(f'{args.ablation}: not all variants are trained; the same command continues')
            return rows
        numbers = broadcast_from_rank0(lambda result=result: result_row(args, *result))
        rows.append({'variant': variant, 'options': options, **numbers, 'paper': paper})
    named = 'model_name' in args.explicit
    base = resolve_path(args.log_path) / (f'{args.model_name}_{args.ablation}' if named else args.ablation)
    save_table(base, rows)
    log('\n' + format_markdown(rows))
    log(f'\nthe curves: {base}.png')
    return rows


def save_table(base, rows):
    """Write the rows to <base>.json, and their curves to <base>.png."""
    data, image = (base.with_name(base.name + suffix) for suffix in ('.json', '.png'))
    atomic_write_on_main(data, lambda aside: aside.write_text(json.dumps(rows, indent=2) + '\n'))
    charts = (
        ('std of z / |z|, times sqrt(d)', 'std_curve', (0, 1.1)),
        ('loss', 'loss_curve', None),
        ('kNN top-1, %', 'knn_curve', None),
    )
    figure = plots.draw_curves(
        [plots.LineChart(title, [(row['variant'], row[key]) for row in rows], bounds) for title, key, bounds in charts]
    )
    save_png(plots.figure_to_pil(figure), image)


def plan_variants(args, chosen=frozenset()):
    """Return [(variant, options, the paper's top-1, args)] of --ablation. chosen: names of the options that were
    explicit in the run of --from_run. Raises UserError for variants that cannot be trained; those with a batch larger
    than the dataset are skipped, with a message."""
    planned, images = [], 0
    if any('batch_size' in options for _, options, _ in TABLES[args.ablation]):
        images = len(load_splits(args)['train'])
    for number, (variant, options, paper) in enumerate(TABLES[args.ablation]):
        if varied := sorted(args.explicit & {name for name, value in options.items() if not callable(value)}):
            raise UserError(f'--{varied[0]} is what --ablation={args.ablation} varies: leave it out')
        options = {option: value(args) if callable(value) else value for option, value in options.items()}
        name = f'{args.model_name}_{args.ablation}_{number}'
        # A teacher, or an average with the start, would hold the backbone in place, whatever is varied.
        alone = {'distill_weight': 0.0, 'start_share': 0.0} if args.init_from else {}
        fixed = {name: value for name, value in alone.items() if name not in args.explicit | chosen}
        fixed |= {'model_name': name, 'evaluate_after': not args.init_from, 'protocol': 'linear', 'resume': 'auto'}
        variant_args = replace_args(args, **options, **fixed)
        variant_args.fixed = args.fixed | {*options, *fixed}
        num_views(variant_args)
        if 'batch_size' in options and variant_args.batch_size > images:
            log(f'{args.ablation}: {variant} is left out: there are only {images} images')
        else:
            planned.append((variant, options, paper, variant_args))
    return planned


def result_row(args, run, result):
    """Return the results of a run: accuracies, last loss and std, and curves as lists of (epoch, value)."""
    content, _ = upgrade(read_checkpoint(checkpoints(run)[-1]))
    logged = load_scalars(run, resolve_path(args.log_path))
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
    """Format the rows as a Markdown table."""
    with_paper = any(row['paper'] for row in rows)
    lines = [
        '| variant | linear | kNN | loss | std |' + with_paper * ' paper: linear, ImageNet |',
        '|---|---|---|---|---|' + with_paper * '---|',
    ]
    for row in rows:
        line = f'| {row["variant"]} | {row["linear"]:.1f} | {row["knn"]:.1f} | {row["loss"]:.3f} | {row["std"]:.2f} |'
        lines.append(line + with_paper * f' {row["paper"]} |')
    return '\n'.join(lines)
