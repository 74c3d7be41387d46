"""Checkpoints: <ckpt_path>/<run>/loss_<loss>_epoch_<n>, where <run> is a folder of engine/run_dir.py.

A checkpoint is a dict of tensors and plain values, which torch.load reads with weights_only=True:
TrainState.state_dict, the options of the run (args), and the versions of torch and of this code.
runtime/checkpoints/ finds and reads the files: format.py converts earlier formats, pretrained.py other tools' files.
"""

from dataclasses import asdict

import torch

from config import ARCHITECTURE, PIXEL_OPTIONS, PREPROCESSING
from model.weights import adapt_channels, average_weights, copy_weights, is_off_the_shelf
from runtime.atomic_write import atomic_write_on_main
from runtime.checkpoints.best_epoch import find_best_epoch
from runtime.checkpoints.format import is_ours, upgrade
from runtime.checkpoints.load_state import adapt_state_to_channels, build_model, load_state_strictly
from runtime.checkpoints.pretrained import describe_preprocessing, load_foreign, load_off_the_shelf, load_timm_folder
from runtime.checkpoints.read_file import load_file, verify_crc
from runtime.checkpoints.run_folder import (
    checkpoint_name,
    checkpoints,
    find_checkpoint,
    finished_epoch,
    record_checkpoint,
    was_written_by_run,
)
from runtime.checkpoints.saved_options import log_missing_options, merge_saved_options, set_init_from_defaults
from runtime.distributed import rank
from runtime.errors import UserError, WorkError
from runtime.messages import log, warn
from runtime.options import channel_numbers, channel_values, check_mean_std, replace_args
from runtime.versions import library_versions


def get_model_ckpt(args, training=False):
    """Load or build the model for `args`. Returns (args, model, checkpoint), with the model on the CPU.

    Without --ckpt_name: a new model, initialized by --random_seed or with the weights of --init_from, which also set
    preprocessing and config.init_from_defaults; checkpoint is None. With --ckpt_name: the weights and options of the
    checkpoint, except explicit options and those of this machine; checkpoint is the dict above with `path` and `run`,
    the folder for files about it. Weights of torchvision or timm (imagenet, timm/<name>) and files of other tools have
    only their architecture and preprocessing as options, and epoch 0.

    training: for resuming: of a run from pretrained weights the last checkpoint instead of the best, and without
    --start_share. Raises UserError if there is no such checkpoint, or an option contradicts its architecture; WorkError
    if the file is damaged, does not match its options, or cannot be downloaded.
    """
    loaded_args, model, checkpoint = load_model(args, training)
    check_mean_std(loaded_args)
    asked = 'start_share' in args.explicit and args.start_share and not training
    if asked and checkpoint and not checkpoint.get('start'):
        name = checkpoint['path'].name
        warn(f'--start_share={args.start_share:g} has no effect: {name} keeps no initial weights')
    return loaded_args, model, checkpoint


def load_model(args, training):
    """get_model_ckpt without the check of mean and std."""
    if args.ckpt_name and is_off_the_shelf(args.ckpt_name):
        return load_off_the_shelf(args, args.ckpt_name)
    if args.ckpt_name:
        locked_options = (*ARCHITECTURE, 'preset', *(PIXEL_OPTIONS if training else ('channels',)))
        return load_checkpoint(args, find_checkpoint(args, training), locked_options, training)
    if args.init_from:
        return start_from_weights(args)
    return args, build_model(args), None


def start_from_weights(args):
    """get_model_ckpt of --init_from."""
    ours = replace_args(args)
    ours.fixed = args.fixed | {'preset', 'channels'}  # another tool's weights set only the architecture
    if is_off_the_shelf(args.init_from):
        loaded, model, checkpoint = load_off_the_shelf(ours, args.init_from)
    else:
        path = find_checkpoint(replace_args(args, ckpt_name=args.init_from))
        loaded, model, checkpoint = load_checkpoint(ours, path, ARCHITECTURE, initial=True)
    model.has_heads = True  # new ones if the file has none
    weight_options = {name: getattr(loaded, name) for name in (*ARCHITECTURE, *PREPROCESSING)}
    lengths = {len(channel_values(name, weight_options[name])) for name in ('mean', 'std')}
    if not lengths <= {1, args.num_channels}:  # they are for other channels
        weight_options |= {name: getattr(args, name) for name in ('mean', 'std', 'white_level')}
    args = replace_args(args, **weight_options)
    if checkpoint['layout'] == 'ours':
        log(f'weights {checkpoint["path"].parent.name}/{checkpoint["path"].name}: {describe_preprocessing(args)}')
    else:
        args, names = set_init_from_defaults(args)
        log('from pretrained weights: ' + ' '.join(f'--{name}={getattr(args, name)}' for name in names))
    return args, model, None


def load_checkpoint(args, path, locked_options, training=False, initial=False):
    """get_model_ckpt for this file. locked_options: options that must not contradict the checkpoint. initial: load the
    initial weights of a new run, which may have other channels, and whose --start_share is its own."""
    if path.is_dir():
        return load_timm_folder(args, path)
    content = load_file(path)
    if not is_ours(content):
        return load_foreign(args, path, content)
    verify_crc(path)
    content, unsaid = upgrade(content)
    state, saved = content['model'], content['args']
    log_missing_options(path, saved['preset'], unsaid)
    merged = merge_saved_options(args, saved, path, locked_options, initial)
    model = build_model(merged)
    if initial:
        state = adapt_state_to_channels(model, state)
        if saved['channels'] not in ('rgb', 'auto', merged.channels) and merged.num_channels != len(
            channel_numbers(saved['channels'])
        ):
            raise UserError(
                f'{path.parent.name} was trained on --channels={saved["channels"]}, and the images here are '
                f'--channels={merged.channels}: only a first layer for three channels can be adapted'
            )
    try:
        load_state_strictly(model, state, path)
    except UserError:
        if merged.image_size == saved['image_size']:
            raise
        load_state_strictly(build_model(replace_args(merged, image_size=saved['image_size'])), state, path)
        raise UserError(
            f'--image_size={merged.image_size}: {merged.backbone} was made for {saved["image_size"]} px: leave the '
            'option out'
        ) from None
    if content.get('start') and not training:
        share = saved['start_share'] if initial else merged.start_share
        if share:
            trained = model.backbone.state_dict()
            copy_weights(model.backbone, average_weights(adapt_channels(trained, content['start']), trained, share))
    return merged, model, {**content, 'layout': 'ours', 'run': path.parent, 'path': path}


def save_checkpoint(run, args, state):
    """Write a checkpoint of `state` into the folder `run`, atomically. Returns its path.

    Earlier checkpoints within an epoch are deleted, and the oldest beyond --keep_checkpoints.
    """
    content = {**state.state_dict(), 'args': asdict(args), 'versions': library_versions()}
    path = run / checkpoint_name(content['loss'], state.epoch, state.images)
    if not rank():
        record_checkpoint(run, path)  # first, so that a kill cannot leave an unrecorded checkpoint
        atomic_write_on_main(path, lambda aside: torch.save(content, aside))
        kept_epochs = {0, find_best_epoch(run)} - {None} if args.init_from else {}  # the start and the best stay
        older = [other for other in checkpoints(run) if other != path and finished_epoch(other) not in kept_epochs]
        older = [other for other in older if was_written_by_run(run, other)]
        within_epoch = [other for other in older if finished_epoch(other) is None]
        finished = [other for other in older if other not in within_epoch]
        spare = len(finished) - args.keep_checkpoints + (not state.images) if args.keep_checkpoints else 0
        for other in (*within_epoch, *finished[: max(0, spare)]):
            other.unlink(missing_ok=True)
    return path


def iter_valid_checkpoints(args, names):
    """Yield get_model_ckpt for each --ckpt_name in `names`. Invalid ones are skipped with a warning. Raises the last
    error if all are invalid."""
    any_valid = False
    for name in names:
        try:
            one = get_model_ckpt(replace_args(args, ckpt_name=str(name)))
        except (WorkError, UserError) as error:  # damaged, or deleted meanwhile by its run
            if name == names[-1] and not any_valid:
                raise
            warn(f'{error}; left out')
            continue
        any_valid = True
        yield one
