"""How good a pretrained backbone is, by one of seven protocols; every one ends with the same kind of result.

What is reported is the last epoch, never the best one, on the whole of `val`.
"""

import torch

from ckpt import checkpoints, get_model_ckpt, iter_valid_checkpoints, list_checkpoints
from dataloader.load_dataset import load_splits
from engine.run_dir import run_display_name
from protocols.collapse_verdict import SELECTION_METRIC, SUMMARY_METRICS
from protocols.protocol import find_protocol, ignored_by_protocol
from protocols.run_protocol import run_protocol
from runtime.console import print_message
from runtime.device import get_device, init_device
from runtime.errors import UserError, resolve_path
from runtime.messages import log
from runtime.options import repeat_options
from runtime.trackers import import_tracker


def evaluate(args):
    """Evaluate the backbone of --ckpt_name by --protocol. Returns the result, as it is written beside the checkpoint.

    Without --ckpt_name it lists the checkpoints there are and raises UserError. Raises UserError for what the
    protocol lacks, such as labels. --protocol=label_free judges all checkpoints where --ckpt_name is a run, and returns
    the result of the best one.
    """
    if not args.ckpt_name:
        known = list_checkpoints(args)
        log(
            '\n'.join(known)
            if known
            else f'no checkpoint in {resolve_path(args.ckpt_path)} yet: run python3 cli.py train'
        )
        raise UserError('evaluate wants --ckpt_name=<run>/<checkpoint>, one of those listed')
    init_device(args)
    import_tracker(args)  # refused before the work
    paths = run_checkpoints(args, args.ckpt_name) if args.protocol == 'label_free' else []
    if len(paths) > 1:
        warn_ignored_options(args)
        return select_checkpoint(args, paths)
    args, model, checkpoint = get_model_ckpt(args)
    warn_ignored_options(args)
    splits = None if find_protocol(args.protocol).path else load_splits(args)
    model = model.to(get_device(args), memory_format=torch.channels_last)
    result = run_protocol(args, model, splits, checkpoint)
    log(f'result     {checkpoint["run"] / result["file"]}')
    log(f'pictures   tensorboard --logdir {resolve_path(args.log_path) / checkpoint["run"].name}')
    if args.protocol == 'linear':
        log(f'next       python3 cli.py infer --ckpt_name={args.ckpt_name}{repeat_options(args, "image_path")}')
    return result


def warn_ignored_options(args):
    """Warn of given options that the protocol has no use for."""
    for name in ignored_by_protocol(args):
        print_message('warning', f'--{name} has no effect on --protocol={args.protocol}')
    if args.subset_list and 'label_fraction' in args.given and args.protocol == 'semi':
        print_message('warning', '--label_fraction has no effect beside --subset_list')


def run_checkpoints(args, name):
    """The checkpoints of the run of this name, the oldest first; none where it names a checkpoint or a file."""
    folder = next((path for path in (resolve_path(args.ckpt_path) / name, resolve_path(name)) if path.is_dir()), None)
    return checkpoints(folder) if folder else []


def select_checkpoint(args, paths):
    """Judge all checkpoints of a run by --protocol=label_free, and name the best. Returns its result."""
    found, splits = [], None
    for own_args, model, checkpoint in iter_valid_checkpoints(args, paths):
        splits = splits or load_splits(own_args)
        model = model.to(get_device(own_args), memory_format=torch.channels_last)
        if found:
            checkpoint['untrained'] = found[-1]['untrained']  # the same beside each
        found.append(run_protocol(own_args, model, splits, checkpoint))
    log('')
    for result in found:
        log(
            f'epoch {result["epoch"]:<5} '
            + '  '.join(f'{name} {result["measures"][name]:.2f}' for name in SUMMARY_METRICS)
        )
    best = min(found, key=lambda result: result['measures'][SELECTION_METRIC])
    name = f'{run_display_name(args, paths[0].parent)}/{best["checkpoint"]}{repeat_options(args)}'
    log(f'the best by {SELECTION_METRIC} is epoch {best["epoch"]}: --ckpt_name={name}')
    return best
