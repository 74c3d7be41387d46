"""The paper's ablations (section 4) on any preset: a table's variants one after the other, ours beside the paper's."""

import json

import plots
from ckpt import checkpoints, read
from commands.list_runs import is_of
from config import OPTIONS, UserError, changed, path_of
from dataloader.load_dataset import load_splits, views_of
from engine.run_dir import of_run, resumed
from logger import read_scalars
from protocols import results
from runtime.atomic_write import save_picture, write_aside
from runtime.checkpoint_format import upgraded
from runtime.device import use_device
from runtime.messages import say
from train import train

WARMUP = {'warmup_epochs': lambda args: max(1, args.max_epochs // 5)}
TENTH = {'warmup_epochs': lambda args: args.warmup_epochs or max(1, args.max_epochs // 10)}  # the paper's 10 of 100
# Of each table: (variant, its options, the paper's ImageNet linear top-1 in percent, as remembered). An option's value
# may depend on the preset: then it is a function of args.
TABLES = {
    'stopgrad': (  # figure 2; the constant rate is of what follows there
        ('with stop-gradient', {'fix_pred_lr': False}, 67.7),
        ('without', {'stop_gradient': False, 'fix_pred_lr': False}, 0.1),
    ),
    'predictor': (  # table 1
        ('MLP, rate decays', {'fix_pred_lr': False}, 67.7),
        ('none', {'predictor': 'none', 'fix_pred_lr': False}, 0.1),
        ('fixed at random', {'predictor': 'fixed', 'fix_pred_lr': False}, 1.5),
        ('MLP, rate constant', {'fix_pred_lr': True}, 68.1),
    ),
    'batch_size': tuple(  # table 2
        (str(size), {'batch_size': size, **(TENTH if size >= 1024 else {})}, top1)
        for size, top1 in ((64, 66.1), (128, 67.3), (256, 68.1), (512, 68.1), (1024, 68.0), (2048, 67.9), (4096, 64.0))
    ),
    'bn': (  # table 3
        ('none', {'proj_bn': 'none', **TENTH}, 34.6),
        ('hidden layers', {'proj_bn': 'hidden'}, 67.4),
        ('default', {'proj_bn': 'default'}, 68.1),
        ('all', {'proj_bn': 'all'}, 'unstable'),
    ),
    'similarity': (  # section 4.5
        ('cosine', {'similarity': 'cosine'}, 68.1),
        ('cross-entropy', {'similarity': 'softmax'}, 63.2),
    ),
    'symmetric': (  # section 4.6
        ('symmetric', {'symmetric': 'true'}, 68.1),
        ('asymmetric', {'symmetric': 'false'}, 64.8),
        ('asymmetric, 2 pairs', {'symmetric': '2x'}, 67.3),
    ),
    'collapse': (  # not the paper's: what goes wrong and what helps (README.md, When it collapses)
        ('as it is', {}, ''),
        ('no stop-gradient', {'stop_gradient': False}, ''),
        ('no predictor', {'predictor': 'none'}, ''),
        ('no BN in projector and predictor', {'proj_bn': 'none'}, ''),
        ('learning rate x 10', {'learning_rate': lambda args: 10 * args.learning_rate}, ''),
        ('learning rate / 10', {'learning_rate': lambda args: args.learning_rate / 10}, ''),
        ('weight decay x 10', {'weight_decay': lambda args: 10 * args.weight_decay}, ''),
        ('no weight decay', {'weight_decay': 0.0}, ''),
        ('batch / 8', {'batch_size': lambda args: max(2, args.batch_size // 8)}, ''),
        ('SimCLR augmentation', {'augmentation': 'simclr'}, ''),
        ('SimCLR, rate rises for a fifth', {'augmentation': 'simclr', 'warmup_augmentation': 'simclr', **WARMUP}, ''),
        ('SimCLR, MoCo while the rate rises', {'augmentation': 'simclr', 'warmup_augmentation': 'moco', **WARMUP}, ''),
    ),
}


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
        if not (done := judged(own)):
            train(own)
            done = judged(own)
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


def judged(own):
    """(folder, result of the linear evaluation) of a run that was trained to its end with these very options, and
    evaluated so on its own images; None where there is none."""
    run = path_of(own.ckpt_path) / resumed(own).ckpt_name
    if run == path_of(own.ckpt_path):
        return None
    found = results.of_run(
        run, protocol='linear', checkpoint=checkpoints(run)[-1].name, epoch=own.max_epochs, preset=own.preset
    )
    wanted = {name: getattr(own, name) for name, f in OPTIONS.items() if 'linear' in f.metadata['only']}
    found = [
        result
        for result in found
        if wanted.items() <= result.get('settings', {}).items() and is_of(result, own.image_path)
    ]
    return (run, found[-1]) if found else None


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
