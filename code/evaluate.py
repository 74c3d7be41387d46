"""How good a pretrained backbone is, by one of seven protocols; every one ends with the same kind of result.

What is reported is the last epoch, never the best one, on the whole of `val`.
"""

import torch

from ckpt import checkpoints, get_model_ckpt, list_checkpoints, whole_ones
from dataloader.load_dataset import load_splits
from engine.run_dir import name_of_run
from errors import UserError, path_of
from protocols.collapse_verdict import FAVOURED, QUICK
from protocols.protocol import find_protocol, without_effect
from protocols.run_protocol import evaluate_model
from runtime.console import complain
from runtime.device import get_device, use_device
from runtime.messages import say
from runtime.options import places
from runtime.trackers import package_of


def evaluate(args):
    """Evaluate the backbone of --ckpt_name by --protocol. Returns the result, as it is written beside the checkpoint.

    Without --ckpt_name it lists the checkpoints there are and raises UserError. Raises UserError for what the
    protocol lacks, such as labels. --protocol=label_free judges all checkpoints where --ckpt_name is a run, and returns
    the result of the best one.
    """
    if not args.ckpt_name:
        known = list_checkpoints(args)
        say('\n'.join(known) if known else f'no checkpoint in {path_of(args.ckpt_path)} yet: run python3 cli.py train')
        raise UserError('evaluate wants --ckpt_name=<run>/<checkpoint>, one of those listed')
    use_device(args)
    package_of(args)  # refused before the work
    paths = of_run(args, args.ckpt_name) if args.protocol == 'label_free' else []
    if len(paths) > 1:
        say_what_is_idle(args)
        return best_of(args, paths)
    args, model, checkpoint = get_model_ckpt(args)
    say_what_is_idle(args)
    splits = None if find_protocol(args.protocol).path else load_splits(args)
    model = model.to(get_device(args), memory_format=torch.channels_last)
    result = evaluate_model(args, model, splits, checkpoint)
    say(f'result     {checkpoint["run"] / result["file"]}')
    say(f'pictures   tensorboard --logdir {path_of(args.log_path) / checkpoint["run"].name}')
    if args.protocol == 'linear':
        say(f'next       python3 cli.py infer --ckpt_name={args.ckpt_name}{places(args, "image_path")}')
    return result


def say_what_is_idle(args):
    """Warn of given options that the protocol has no use for."""
    for name in without_effect(args):
        complain('warning', f'--{name} has no effect on --protocol={args.protocol}')
    if args.subset_list and 'label_fraction' in args.given and args.protocol == 'semi':
        complain('warning', '--label_fraction has no effect beside --subset_list')


def of_run(args, name):
    """The checkpoints of the run of this name, the oldest first; none where it names a checkpoint or a file."""
    folder = next((path for path in (path_of(args.ckpt_path) / name, path_of(name)) if path.is_dir()), None)
    return checkpoints(folder) if folder else []


def best_of(args, paths):
    """Judge all checkpoints of a run by --protocol=label_free, and name the best. Returns its result."""
    found, splits = [], None
    for own, model, checkpoint in whole_ones(args, paths):
        splits = splits or load_splits(own)
        model = model.to(get_device(own), memory_format=torch.channels_last)
        if found:
            checkpoint['untrained'] = found[-1]['untrained']  # the same beside each
        found.append(evaluate_model(own, model, splits, checkpoint))
    say('')
    for result in found:
        say(f'epoch {result["epoch"]:<5} ' + '  '.join(f'{name} {result["measures"][name]:.2f}' for name in QUICK))
    best = min(found, key=lambda result: result['measures'][FAVOURED])
    name = f'{name_of_run(args, paths[0].parent)}/{best["checkpoint"]}{places(args)}'
    say(f'the best by {FAVOURED} is epoch {best["epoch"]}: --ckpt_name={name}')
    return best
