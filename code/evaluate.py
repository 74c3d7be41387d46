"""evaluate: measure a pretrained backbone by a protocol of protocols/.

Results are of the last epoch of the evaluation, never of its best one, on all labeled images of val. compare takes
test if there is one; label_free takes train; transfer and detection have datasets of their own.
"""

from ckpt import get_model_ckpt, iter_valid_checkpoints
from config import READING
from dataloader.load_dataset import find_split_sources, load_splits
from dataloader.loading.pixel_settings import resolve_mean_std, resolve_pixels
from model.weights import is_off_the_shelf
from protocols.collapse_verdict import RANK_AFTER_WEIGHTS, SELECTION_METRIC, SUMMARY_METRICS
from protocols.protocol import find_protocol, has_effect, ignored_by_protocol
from protocols.run_protocol import run_protocol
from runtime.checkpoints.pretrained import are_foreign
from runtime.checkpoints.run_folder import checkpoints, find_named, list_checkpoints, run_display_name
from runtime.device import init_device, move_network
from runtime.errors import UserError, resolve_path
from runtime.messages import log, warn
from runtime.options import repeat_ckpt_name, repeat_options
from runtime.trackers import import_tracker


def evaluate(args):
    """Evaluate the backbone of --ckpt_name by --protocol, and write the result beside the checkpoint. Returns the
    result.

    With --protocol=label_free and a run as --ckpt_name, all of its checkpoints are evaluated: see select_checkpoint.
    Raises UserError without --ckpt_name, after listing the checkpoints, or if the protocol lacks something, such as
    labels.
    """
    if not args.ckpt_name:
        if not (names := list_checkpoints(args)):
            raise UserError(f'there is no checkpoint in {resolve_path(args.ckpt_path)} yet: python3 cli.py train')
        log('\n'.join(names))
        raise UserError('evaluate needs --ckpt_name=<run> or <run>/<checkpoint>: those above')
    init_device(args)
    import_tracker(args)  # raises before the work if it is not installed
    paths = run_checkpoints(args, args.ckpt_name) if args.protocol == 'label_free' else []
    if len(paths) > 1:
        warn_ignored_options(args)
        return select_checkpoint(args, paths)
    args, sources = resolve_channels(args)
    args, model, checkpoint = get_model_ckpt(args)
    args = resolve_mean_std(args, sources['train'].store) if sources else args
    warn_ignored_options(args)
    splits = None if find_protocol(args.protocol).path else load_splits(args, sources)
    model = move_network(args, model)
    result = run_protocol(args, model, splits, checkpoint)
    log(f'result     {checkpoint["run"] / result["file"]}')
    log(f'pictures   tensorboard --logdir {resolve_path(args.log_path) / checkpoint["run"].name}')
    if args.protocol == 'linear':
        log(f'next       python3 cli.py infer {repeat_ckpt_name(args, "infer", "image_path", "start_share", *READING)}')
    return result


def resolve_channels(args):
    """Resolve --channels=auto on the images of an explicit --image_path, for weights that are not of a run of this code
    and are adapted to them. Returns (args, result of find_split_sources), or (args, None) if there is nothing to
    resolve."""
    name, has_own_images = args.ckpt_name, find_protocol(args.protocol).path
    there = is_off_the_shelf(name) or find_named(args, name)
    if 'image_path' not in args.explicit or has_own_images or not (there and are_foreign(args, name)):
        return args, None
    sources = find_split_sources(args)
    resolved = resolve_pixels(args, sources['train'].store)
    resolved.explicit = args.explicit | ({'channels'} if resolved.num_channels != 3 else set())  # not of a preset
    return resolved, sources


def warn_ignored_options(args):
    """Warn of explicit options that the protocol does not use."""
    for name in ignored_by_protocol(args):
        warn(f'--{name} has no effect on --protocol={args.protocol}')
    if args.subset_list and 'label_fraction' in args.explicit and args.protocol == 'semi':
        warn('--label_fraction has no effect beside --subset_list')
    if 'baseline_learning_rate' in args.explicit and not args.baseline and has_effect(args, 'baseline'):
        warn('--baseline_learning_rate has no effect without --baseline=True')


def run_checkpoints(args, name):
    """Return the checkpoints of a run, the oldest first; [] if `name` is a checkpoint or a file."""
    folder = find_named(args, name)
    return checkpoints(folder) if folder and folder.is_dir() else []


def select_checkpoint(args, paths):
    """Evaluate all checkpoints of a run by --protocol=label_free, and log the best. Returns its result; of a run from
    pretrained weights, where none can be named, that of the last."""
    results, splits = [], None
    for own_args, model, checkpoint in iter_valid_checkpoints(args, paths):
        splits = splits or load_splits(own_args)
        model = move_network(own_args, model)
        if results:
            checkpoint['untrained'] = results[-1]['untrained']  # measured once
        results.append(run_protocol(own_args, model, splits, checkpoint))
    log('')
    for result in results:
        log(
            f'epoch {result["epoch"]:<5} '
            + '  '.join(f'{name} {result["measures"][name]:.2f}' for name in SUMMARY_METRICS)
        )
    if own_args.init_from:
        log(f'no epoch is named the best: {RANK_AFTER_WEIGHTS}; with labels --beside=start tells')
        return results[-1]
    best = min(results, key=lambda result: result['measures'][SELECTION_METRIC])
    name = f'{run_display_name(args, paths[0].parent)}/{best["checkpoint"]}{repeat_options(args)}'
    log(f'the best by {SELECTION_METRIC} is epoch {best["epoch"]}: --ckpt_name={name}')
    return best
