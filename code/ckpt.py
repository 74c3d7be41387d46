"""Checkpoints: <ckpt_path>/<run>/loss_<loss>_epoch_<n>, where <run> is a folder of engine/run_dir.py.

A checkpoint is a dict of tensors and plain values (torch.load with weights_only=True reads it):
TrainState.state_dict, with every option of the run (args) and the versions of torch and of this code.
runtime/checkpoint_format.py reads earlier ones.
"""

import contextlib
import functools
import hashlib
import json
import os
import pickle
import platform
import re
import shutil
import subprocess
import warnings
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torchvision

from config import GOING_ON, NOT_RESTORED_OPTIONS, OPTIONS, Config
from model.foreign_checkpoints import RESNET_BLOCKS, convert_state_dict, find_tensors, infer_architecture
from model.simsiam import SimSiam
from model.weights import (
    adapt_channels,
    average_weights,
    convert_with_timm,
    fetch_timm,
    fetch_torchvision,
    find_preprocessing,
    is_off_the_shelf,
    match_keys,
    preprocessing_from_timm_folder,
)
from runtime.atomic_write import atomic_write_on_main
from runtime.checkpoint_format import is_ours, upgrade
from runtime.console import first_line, join_first, print_message
from runtime.distributed import local_main_first, rank
from runtime.environment import require_package
from runtime.errors import ROOT, UserError, WorkError, resolve_path
from runtime.files import newest_run, read_json, read_metrics
from runtime.messages import log
from runtime.options import UNRESOLVED, channel_numbers, channel_values, get_config, replace_args

WATCHED = 10  # labels a class, of the accuracy that is measured in training
FEW, GAIN, GAIN_ERROR = (
    'pretraining/few_labels_top1',
    'pretraining/few_labels_gain',
    'pretraining/few_labels_gain_error',
)
OF_START = 'few_labels_of_start.json'  # which images of val the pretrained weights class rightly (protocols/monitor.py)


# Packages whose objects (options, a NumPy scalar) lie in good files beside the weights; they are read as Inert.
INERT_PICKLE_PACKAGES = (
    'argparse',
    'numpy',
    'pathlib',
    'omegaconf',
    'typing',
    'collections',
    'enum',
    'pytorch_lightning',
    'lightning',
    'lightning_fabric',
    'easydict',
    'yacs',
    'ml_collections',
    'addict',
)
# What makes an array of NumPy, which some keep their weights as, by its names in NumPy 1 and 2.
NUMPY_SAFE_GLOBALS = [
    *((np.empty(0).__reduce__()[0], f'numpy.{core}.multiarray._reconstruct') for core in ('core', '_core')),
    np.ndarray,
    np.dtype,
    *(type(np.dtype(letter)) for letter in np.typecodes['All']),
]
MAX_LISTED_KEYS = 8  # keys of each kind that an error lists
CHECKPOINT_RE = re.compile(r'loss_(-?\d+\.\d{4})_epoch_(\d+)(?:_(?:images|step)_(\d+))?')
DAMAGED = '{} is damaged or was not written by this project; take another checkpoint'
ARCHITECTURE = ('backbone', 'stem', 'proj_layers', 'proj_dim', 'pred_dim', 'predictor', 'proj_bn')
PREPROCESSING = ('mean', 'std', 'interpolation', 'crop_ratio', 'image_size')  # options that come with weights


def get_model_ckpt(args, training=False):
    """(args, model, checkpoint) for `args`, the model on the CPU.

    Without --ckpt_name: args as they are, a new model whose weights --random_seed fixes (or those of --init_from, which
    bring their preprocessing and config.GOING_ON), and None. With it: the checkpoint's options take the place of args'
    (but for what this call gave explicitly, and what belongs to this machine), and its weights those of the model;
    `checkpoint` is the dict above with its `path` and `run` (the folder of what is written about it) added. training:
    of a run that began with weights the last checkpoint, not the best, and the weights as they are trained, without
    --start_share. Weights of torchvision and timm (imagenet, timm/<name>) and files of another tool have no options but
    their architecture and preprocessing, and epoch 0. Raises UserError where there is no such checkpoint or an option
    contradicts its architecture, WorkError where the file is damaged, holds other weights than it says, or cannot be
    fetched.
    """
    found = load_model(args, training)
    for name in ('mean', 'std'):
        word = getattr(found[0], name)
        if word not in UNRESOLVED and len(channel_values(name, word)) not in (1, found[0].num_channels):
            raise UserError(
                f'--{name}={word} is not one number for all of {found[0].num_channels} channels nor one for each'
            )
    return found


def load_model(args, training):
    """get_model_ckpt, without a look at what it gives."""
    if args.ckpt_name and is_off_the_shelf(args.ckpt_name):
        return load_off_the_shelf(args, args.ckpt_name)
    if args.ckpt_name:
        return load_checkpoint(args, find_checkpoint(args, training), (*ARCHITECTURE, 'preset', 'channels'), training)
    if args.init_from:
        return start_from_weights(args)
    return args, build_model(args), None


def start_from_weights(args):
    """get_model_ckpt of --init_from."""
    if is_off_the_shelf(args.init_from):
        loaded, model, checkpoint = load_off_the_shelf(args, args.init_from)
    else:
        path = resolve_path(args.init_from)
        path = (
            path
            if path.exists() and not checkpoints_in(path)
            else find_checkpoint(replace_args(args, ckpt_name=args.init_from))
        )
        ours = replace_args(args)
        ours.given = args.given | {
            'preset',
            'channels',
        }  # a file of another tool brings no settings, but for its architecture
        loaded, model, checkpoint = load_checkpoint(ours, path, ARCHITECTURE)
    model.has_heads = True  # new ones, where the file has none: they are trained
    taken = {name: getattr(loaded, name) for name in (*ARCHITECTURE, *PREPROCESSING)}
    if len(channel_values('mean', taken['mean'])) not in (1, args.num_channels):  # of other channels
        taken |= {'mean': args.mean, 'std': args.std}
    args = replace_args(args, **taken)
    if checkpoint['layout'] != 'ours' and not args.from_run:
        going_on = {name: value for name, value in GOING_ON.items() if name not in args.given}
        args = replace_args(args, **going_on)
        said = ' '.join(f'--{name}={getattr(args, name)}' for name in GOING_ON)
        log(f'from pretrained weights: {said}')
    return args, model, None


def checkpoints_in(path):
    return checkpoints(path) if path.is_dir() else []


def check_off_the_shelf(args, name):
    """(args with the network that weights of this name are of, its name in timm or ''). Raises UserError where
    torchvision or timm have no such weights of --backbone."""
    wanted = name.removeprefix('timm').removeprefix('/') if name != 'imagenet' else ''
    if wanted and 'backbone' in args.given and args.backbone != f'timm/{wanted.split(".")[0]}':
        raise UserError(f'--backbone={args.backbone} and {name} name two networks: leave --backbone out')
    if wanted:
        args = replace_args(args, backbone=f'timm/{wanted.split(".")[0]}')
    if name == 'timm' and not args.backbone.startswith('timm/'):
        raise UserError(f'{name} names the weights of --backbone=timm/<network>, not of --backbone={args.backbone}')
    if name == 'imagenet' and (
        args.backbone == 'small' or args.backbone.startswith('timm/') or args.stem != 'imagenet'
    ):
        raise UserError(
            f"imagenet has the weights of torchvision's networks, not of --backbone={args.backbone} --stem={args.stem}"
        )
    return args, wanted


def load_off_the_shelf(args, name):
    """get_model_ckpt of the weights that torchvision (imagenet) or timm (timm, timm/<name>.<tag>) has."""
    args, wanted = check_off_the_shelf(args, name)
    try:
        args = apply_preprocessing(args, find_preprocessing(wanted and f'timm/{wanted}' or args.backbone))
        model = build_model(args)
        with local_main_first():
            if name == 'imagenet':
                found = fetch_torchvision(args.backbone, args.image_size, not args.quiet)
            else:
                found = fetch_timm(wanted or args.backbone.removeprefix('timm/'), args.image_size)
    except ValueError as error:
        raise UserError(f'{name}: {error}') from None
    except UserError:
        raise
    except Exception as error:  # of the network, of two libraries and what they fetch with
        option = 'ckpt_name' if args.ckpt_name else 'init_from'
        raise WorkError(
            f'the weights {name} of {args.backbone} could not be fetched: {first_line(error)}; fetch them where '
            f'there is a network and name the file: --{option}=FILE --backbone={args.backbone}'
        ) from None
    state, _ = match_keys(model.backbone.state_dict(), found.state)
    state = adapt_state_to_channels(model, {f'backbone.{key}': value for key, value in state.items()})
    strict_load(model, state, Path(found.source))
    model.has_heads = False
    log(f'weights {found.source}; {describe_preprocessing(args)}')
    label = sanitize_name(found.source)
    run = resolve_path(args.ckpt_path) / label
    return args, model, make_foreign_checkpoint(name.split('/')[0], run / label, run)


def make_foreign_checkpoint(source, path, run):
    """The checkpoint of get_model_ckpt for weights that no run of ours wrote: epoch 0, without an optimizer."""
    return {'optimizer': None, 'epoch': 0, 'loss': 0.0, 'layout': source, 'path': path, 'run': run}


def apply_preprocessing(args, preprocessing):
    """args with the preprocessing of weights, but for what this call gave. The size of the views is theirs where no
    preset says another."""
    keep = {*args.given} | ({'image_size'} if args.preset != 'imagenet' else set())
    keep -= {name for name in ('mean', 'std') if getattr(args, name) == 'weights'}
    if args.num_channels != 3:
        keep |= {'mean', 'std'}
    return replace_args(args, **{name: value for name, value in preprocessing.items() if name not in keep})


def describe_preprocessing(args):
    return f'{args.image_size} px, mean {args.mean}, std {args.std}, {args.interpolation}, crop {args.crop_ratio:g}'


def load_checkpoint(args, path, locked_options, training=False):
    """get_model_ckpt of this file. locked_options: options that this call may not give otherwise."""
    if path.is_dir():
        return load_timm_folder(args, path)
    content = load_file(path)
    if not is_ours(content):
        return load_foreign(args, path, content)
    verify_crc(path)
    content, unsaid = upgrade(content)
    state, saved = content['model'], content['args']
    report_missing_options(path, saved['preset'], unsaid)
    merged = merge_saved_options(args, saved, path, locked_options)
    model = build_model(merged)
    if args.init_from:
        state = adapt_state_to_channels(model, state)
        if saved['channels'] not in ('rgb', 'auto', merged.channels) and merged.num_channels != len(
            channel_numbers(saved['channels'])
        ):
            raise UserError(
                f'{path.parent.name} was trained on --channels={saved["channels"]}, and the images here are '
                f'--channels={merged.channels}: only a first layer for three channels can be adapted'
            )
    try:
        strict_load(model, state, path)
    except UserError:
        if merged.image_size == saved['image_size']:
            raise
        strict_load(build_model(replace_args(merged, image_size=saved['image_size'])), state, path)
        raise UserError(
            f'--image_size={merged.image_size}: {merged.backbone} was made for {saved["image_size"]} px: leave the '
            'option out'
        ) from None
    if content.get('start') and not training:
        model.backbone.load_state_dict(
            average_weights(content['start'], model.backbone.state_dict(), merged.start_share)
        )
    return merged, model, {**content, 'layout': 'ours', 'run': path.parent, 'path': path}


def load_foreign(args, path, content):
    """load_checkpoint of another tool's file: the backbone, and the heads where they are a SimSiam's.

    Where --preset is not given, the settings are ImageNet's, or CIFAR-10's where the stem is for small images, whatever
    lies about here.
    """
    named = 'backbone' in args.given and args.backbone not in RESNET_BLOCKS
    found = None if named else convert_state_dict(content)
    if named:
        return load_network(args, path, find_tensors(content))
    if not found:
        keys = [str(key) for key in (find_tensors(content) or (content if isinstance(content, dict) else ()))]
        first = ', '.join(keys[:MAX_LISTED_KEYS]) or 'none'
        raise WorkError(
            f'{path} is damaged or was not written by this project, nor is it a ResNet in a layout that is '
            'known here (the official release, MoCo, lightly, solo-learn, SimCLR, Barlow Twins, DINO, '
            f'torchvision, timm); its first keys: {first}; weights of another network are read with its name: '
            '--backbone=timm/<name>, or one of torchvision'
        )
    source, state, unused_keys = found
    shapes = infer_architecture(state)
    if 'backbone' not in shapes:
        raise UserError(f'{path} holds a network with other residual blocks than {", ".join(RESNET_BLOCKS)}')
    if 'stem' not in shapes:
        raise UserError(f'{path} holds a ResNet whose first layers are none that are known here (a deep stem?)')
    if 'preset' not in args.given:
        args = apply_preset(args, 'cifar10' if shapes['stem'] == 'cifar' else 'imagenet')
    of_backbone = {name: shapes[name] for name in ('backbone', 'stem')}
    merged = merge_saved_options(args, {**asdict(args), **shapes}, path, of_backbone)
    if not heads_match(state, build_model(merged)):
        heads = [name for name in state if not name.startswith('backbone.')]
        unused_keys = sorted({*unused_keys, *(name.split('.')[0] for name in heads)})
        state = {name: value for name, value in state.items() if name not in heads}
        merged = merge_saved_options(args, {**asdict(args), **of_backbone}, path, of_backbone)
    model = build_model(merged)
    has_heads = model.has_heads = any(not name.startswith('backbone.') for name in state)
    strict_load(model, adapt_state_to_channels(model, {**bn_batch_counters(model, has_heads), **state}), path)
    unused = f'; not used: {", ".join(unused_keys)}' if unused_keys else ''
    log(
        f'{path.name}: {merged.backbone}, layout {source}, {"with" if has_heads else "without"} projector and predictor'
        f'{unused}; {merged.image_size} px, the settings of --preset={merged.preset}'
    )
    run = (
        resolve_path(args.ckpt_path) / f'{source}_{path.name}_{content_hash(path)}'
    )  # other tools' files have all one name
    return merged, model, make_foreign_checkpoint(source, path, run)


def content_hash(path):
    """A short digest of a file's content."""
    digest = hashlib.blake2b(digest_size=4)
    with open(path, 'rb') as file:
        while part := file.read(2**24):
            digest.update(part)
    return digest.hexdigest()


def load_network(args, path, tensors):
    """load_checkpoint of a state dict in the own layout of the network that --backbone names, under any prefix."""
    if 'preset' not in args.given and args.preset == 'demo':
        args = apply_preset(args, 'imagenet')
    args = apply_preprocessing(args, find_preprocessing(args.backbone))
    model = build_model(args)
    try:
        state, unused_keys = match_keys(model.backbone.state_dict(), tensors)
    except ValueError as error:
        if not args.backbone.startswith('timm/') or not tensors:
            raise UserError(f'{path} has no weights of --backbone={args.backbone}: {error}') from None
        try:
            state, unused_keys = convert_with_timm(args.backbone.removeprefix('timm/'), args.image_size, tensors), []
        except ValueError as other:
            raise UserError(f'{path} has no weights of --backbone={args.backbone}: {error} (timm: {other})') from None
    state = adapt_state_to_channels(model, {f'backbone.{name}': value for name, value in state.items()})
    strict_load(model, state, path)
    model.has_heads = False
    unused = f'; not used: {join_first(unused_keys, MAX_LISTED_KEYS)}' if unused_keys else ''
    log(f'{path.name}: {args.backbone}, without projector and predictor{unused}; {describe_preprocessing(args)}')
    run = resolve_path(args.ckpt_path) / f'{sanitize_name(args.backbone)}_{path.name}_{content_hash(path)}'
    return args, model, make_foreign_checkpoint('network', path, run)


def load_timm_folder(args, path):
    """load_checkpoint of a folder as timm saves one (export --format=timm): config.json and model.safetensors."""
    about, weights = read_json(path / 'config.json'), path / 'model.safetensors'
    name = about.get('architecture')
    if not isinstance(name, str) or not weights.is_file():
        raise UserError(
            f'{path} is no folder of weights: it wants config.json, with "architecture", and model.safetensors'
        )
    if 'backbone' in args.given and args.backbone != f'timm/{name}':
        raise UserError(f'--backbone={args.backbone}: {path} holds timm/{name}; leave the option out')
    known = about.get('pretrained_cfg')
    args = replace_args(args, backbone=f'timm/{name}')
    if isinstance(known, dict):
        args = apply_preprocessing(args, preprocessing_from_timm_folder(known))
        args.given = args.given | {*PREPROCESSING}
    return load_network(args, weights, load_file(weights))


def adapt_state_to_channels(model, state):
    """`state` with its first layer, for three channels, adapted to those of the model; says so."""
    adapted = adapt_channels(model.state_dict(), state)
    if changed := [name for name, value in adapted.items() if value is not state[name]]:
        log(
            f'{changed[0]} of 3 channels is adapted to {adapted[changed[0]].shape[1]}: repeated and scaled, or summed '
            "(timm's rule)"
        )
    return adapted


def sanitize_name(name):
    """A name as a part of a file's: letters, digits, and - _ . in place of the rest."""
    return ''.join(c if c.isascii() and (c.isalnum() or c in '-_.') else '_' for c in name)


def apply_preset(args, preset):
    """args with this preset's defaults in place of another's."""
    own = {name: getattr(args, name) for name in (*args.given, *NOT_RESTORED_OPTIONS)}
    found = replace_args(get_config(preset=preset), **own)
    found.given = args.given
    return found


def heads_match(state, model):
    """Whether `state` has the whole of the model's projector and predictor, and nothing else but a backbone."""
    theirs = {
        name: value.shape for name, value in {**bn_batch_counters(model), **state}.items() if 'backbone.' not in name
    }
    return theirs == {name: value.shape for name, value in model.state_dict().items() if 'backbone.' not in name}


def bn_batch_counters(model, has_heads=True):
    """The BNs' counters of batches, which some tools leave out: nothing depends on them. has_heads: the heads' too."""
    return {
        name: value
        for name, value in model.state_dict().items()
        if name.endswith('num_batches_tracked') and (has_heads or name.startswith('backbone.'))
    }


def merge_saved_options(args, saved, path, locked_options):
    """The options of a checkpoint, but for what this call gave, and what belongs to the call. Raises UserError where
    one of `locked_options` is given otherwise."""
    for name in locked_options:
        if name in args.given and getattr(args, name) != saved.get(name):
            raise UserError(
                f'--{name}={getattr(args, name)} contradicts the checkpoint {path.parent.name}/{path.name}, '
                f'which has {name}={saved.get(name)}: leave the option out, or name another checkpoint'
            )
    kept = {name: getattr(args, name) for name in (*args.given, *NOT_RESTORED_OPTIONS)}
    for name in ('white_level', 'mean', 'std'):
        if kept.get(name) in UNRESOLVED:
            log(f'--{name}={kept.pop(name)} is what a run begins with; this one has --{name}={saved[name]}')
    merged = Config(**{**saved, **kept})
    merged.given = args.given
    return merged


def report_missing_options(path, preset, names):
    """Name the options that a file does not know, for it is older than they are."""
    of_training = [name for name in names if {'train', 'evaluate'} & {*OPTIONS[name].metadata['used_by']}]
    names = [name for name in of_training if name not in NOT_RESTORED_OPTIONS]
    if names:
        said = join_first([f'--{name}' for name in names], MAX_LISTED_KEYS)
        log(f'{path.name} is older than {said}: they are as in --preset={preset}')


def strict_load(model, state, path):
    """Load `state`, which has either all of the model's keys or all of its backbone's, and no other."""
    has_heads = any(not name.startswith('backbone.') for name in state)
    wanted = {name: value for name, value in model.state_dict().items() if has_heads or name.startswith('backbone.')}
    sizes = [
        f'{name} is {tuple(state[name].shape)} in place of {tuple(value.shape)}'
        for name, value in wanted.items()
        if name in state and state[name].shape != value.shape
    ]
    kinds = {
        'missing': sorted(wanted.keys() - state.keys()),
        'unexpected': sorted(state.keys() - wanted.keys()),
        'size mismatch': sizes,
    }
    problems = [f'{kind}: {join_first(found, MAX_LISTED_KEYS)}' for kind, found in kinds.items() if found]
    for name, value in wanted.items():
        if name in state and (kind := unsupported_kind(state[name], value.is_floating_point())):
            raise WorkError(f'{path}: {name} is {kind}, and a weight is plain floating-point numbers: convert it')
    if any(value.is_floating_point() and not value.isfinite().all() for value in state.values()):
        raise WorkError(f'{path} holds weights that are no numbers (nan or infinite): take another checkpoint')
    if problems:
        raise UserError(f'{path} holds the weights of another architecture than it says; {"; ".join(problems)}')
    model.load_state_dict({**model.state_dict(), **state})


def unsupported_kind(value, real):
    """What a tensor is that is no weight as torch keeps it, in a word; None for one that is. real: whether it is wanted
    in floating point."""
    if value.is_quantized or value.is_complex() or value.layout != torch.strided or value.device.type == 'meta':
        kinds = ('quantized', value.is_quantized), ('complex', value.is_complex()), ('sparse', value.is_sparse)
        return next((kind for kind, holds in kinds if holds), 'without content')
    if real and (not value.is_floating_point() or value.itemsize == 1):
        return str(value.dtype).removeprefix('torch.')
    return None


def build_model(args):
    """An untrained SimSiam; --random_seed fixes its weights. Raises UserError where there is no such backbone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.random_seed)
        try:
            return SimSiam(args)
        except ValueError as error:
            raise UserError(f'--backbone={args.backbone}: {error}') from None


def save_checkpoint(run, args, state):
    """Write a checkpoint of `state` into the folder `run`, whole or not at all; return its path.

    What --keep_checkpoints and this newer one make superfluous is deleted: earlier ones from within an epoch, the
    oldest.
    """
    content = {**state.state_dict(), 'args': asdict(args), 'versions': library_versions()}
    suffix = f'_images_{state.images}' if state.images else ''
    path = run / f'loss_{content["loss"]:.4f}_epoch_{state.epoch}{suffix}'
    if not rank():
        record_checkpoint(run, path)  # first: a checkpoint that a kill leaves without it would be nobody's
        atomic_write_on_main(path, lambda aside: torch.save(content, aside))
        kept = {0, find_best_epoch(run)} if args.init_from else {}  # the start and the best are never deleted
        older = [
            other
            for other in checkpoints(run)
            if other != path and int(CHECKPOINT_RE.fullmatch(other.name)[2]) not in kept
        ]
        older = [other for other in older if was_written_by_run(run, other)]
        within_epoch = [other for other in older if CHECKPOINT_RE.fullmatch(other.name)[3]]
        finished = [other for other in older if other not in within_epoch]
        spare = len(finished) - args.keep_checkpoints + (not state.images) if args.keep_checkpoints else 0
        for other in (*within_epoch, *finished[: max(0, spare)]):
            other.unlink(missing_ok=True)
    return path


WRITTEN = 'checkpoints.json'  # in a run folder: the names of the checkpoints that the run wrote there, in that order


def record_checkpoint(run, path):
    """Add a checkpoint to those that a run says it has written, or is about to write."""
    before = [name for name in read_json(run / WRITTEN).get('written', []) if (run / name).is_file()]
    names = [*(name for name in before if name != path.name), path.name]
    atomic_write_on_main(run / WRITTEN, lambda aside: aside.write_text(json.dumps({'written': names}) + '\n'))


def was_written_by_run(folder, path):
    """Whether the run of a folder wrote this checkpoint there: only such are deleted, and gone on with in that folder.
    A run of before this was kept has written all in its folder; the first ones had no run.json."""
    if not (folder / 'run.json').is_file() and not re.fullmatch(r'model_name_.+_ckpt_\d+', folder.name):
        return False
    written = read_json(folder / WRITTEN).get('written')
    return written is None or path.name in written


@functools.cache
def library_versions():
    """Of what a result depends on: Python, torch, torchvision, and this code's commit where it is a git checkout, or
    where setup-docker.sh says it."""
    git = (
        subprocess.run(
            ['git', f'--git-dir={ROOT}/.git', 'describe', '--always', '--dirty', '--abbrev=40', '--exclude=*'],
            cwd=ROOT,  # of this code alone, not of a repository that it lies in
            capture_output=True,
            text=True,
            check=False,
        )
        if shutil.which('git')
        else None
    )
    return {
        'python': platform.python_version(),
        'torch': str(torch.__version__),
        'torchvision': str(torchvision.__version__),
        'commit': os.environ.get('SIMSIAM_COMMIT') or (git.stdout.strip() if git and not git.returncode else ''),
    }


def load_file(path):
    """What torch.save, or safetensors, wrote into a file, on the CPU. No file can run code. Raises WorkError."""
    if path.suffix == '.safetensors':
        reader = require_package('safetensors.torch', path.name)
        try:
            return reader.load_file(path)
        except Exception as error:  # its own has no common base with the system's
            raise WorkError(f'{DAMAGED.format(path)} ({error})') from None
    inert = []
    while True:
        try:
            with (
                torch.serialization.safe_globals([*NUMPY_SAFE_GLOBALS, *((InertStub, name) for name in inert)]),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter('ignore')  # of TorchScript, of pickles: what follows says it
                return torch.load(path, map_location='cpu', weights_only=True)
        except pickle.UnpicklingError as error:
            refused = re.search(r'GLOBAL ([\w.]+)', str(error))
            if not refused:
                raise WorkError(DAMAGED.format(path)) from None
            if refused[1].split('.')[0] not in INERT_PICKLE_PACKAGES or refused[1] in inert:
                raise WorkError(
                    f'{path} is not loaded: it wants to run {refused[1]}, and only tensors and plain '
                    'values are read from a checkpoint'
                ) from None
            inert.append(refused[1])
        except Exception:  # what the unpickler raises on damaged bytes has no common base
            raise WorkError(DAMAGED.format(path)) from None


def verify_crc(path):
    """Raise WorkError where a checkpoint of ours has other bytes than were written: torch reads them without a word."""
    try:
        with zipfile.ZipFile(path) as parts:
            wrong = parts.testzip()
    except zipfile.BadZipFile:
        return  # torch has read it: an old format of its own
    if wrong:
        raise WorkError(f'{path} is damaged, in {wrong}: take another checkpoint')


class InertStub:
    """Stands for an object of another tool's settings in its file: takes what it is given, and does nothing."""

    def __init__(self, *given, **more):
        pass

    def __setstate__(self, state):
        pass


def read_checkpoint(path):
    """The content of a checkpoint of ours, of any format. Raises WorkError."""
    content = load_file(path)
    if not is_ours(content):
        raise WorkError(DAMAGED.format(path))
    return content


def checkpoints(folder):
    """The checkpoints of a run folder, the newest (highest epoch and step, then latest written) last. The order of
    writing stands in checkpoints.json, as a copy of the folder has other times; for early runs it is the file's time.
    """
    found, written = [], read_json(folder / WRITTEN).get('written', [])
    for path in folder.iterdir():
        if match := CHECKPOINT_RE.fullmatch(path.name):
            with contextlib.suppress(FileNotFoundError):  # its run keeps the last ones alone, and has just removed it
                later = written.index(path.name) if path.name in written else -1
                found.append((int(match[2]), int(match[3] or 0), later, path.stat().st_mtime, path))
    return [path for *_, path in sorted(found)]


def pick_checkpoint(folder, found):
    """The best checkpoint of a run that began with pretrained weights and was measured; of another the newest."""
    best = find_best_epoch(folder)
    has_heads = {
        int(CHECKPOINT_RE.fullmatch(path.name)[2]): path for path in found if not CHECKPOINT_RE.fullmatch(path.name)[3]
    }
    if best is None or best not in has_heads or has_heads[best] == found[-1]:
        return found[-1]
    log(f'{folder.name}: epoch {best} is its best on val; --ckpt_name={folder.name}/<checkpoint> takes another')
    return has_heads[best]


def list_checkpoints(args):
    """All checkpoints under --ckpt_path, as --ckpt_name wants them: by name, those of the newest run at the end."""
    root = resolve_path(args.ckpt_path)
    runs = sorted(entry for entry in root.iterdir() if entry.is_dir()) if root.is_dir() else []
    found = {run: kept for run in runs if (kept := checkpoints(run))}
    newest = newest_run(found)
    ordered = sorted(found, key=lambda run: run == newest)
    return [f'{run.name}/{path.name}' for run in ordered for path in found[run]]


def iter_valid_checkpoints(args, names):
    """get_model_ckpt of each of these --ckpt_name; one that is damaged or gone is warned of and left out. Raises its
    error where none is left."""
    found = False
    for name in names:
        try:
            one = get_model_ckpt(replace_args(args, ckpt_name=str(name)))
        except (WorkError, UserError) as error:  # it may have gone since, where its run keeps the last ones alone
            if name == names[-1] and not found:
                raise
            print_message('warning', f'{error}; left out')
            continue
        found = True
        yield one


def find_checkpoint(args, training=False):
    """The file that --ckpt_name means: below --ckpt_path, or a path. A run folder means its newest checkpoint; of a run
    that began with pretrained weights, unless it is for `training`, its best (find_best_epoch). Raises UserError."""
    for path in (resolve_path(args.ckpt_path) / args.ckpt_name, resolve_path(args.ckpt_name)):
        path = path.resolve()  # what is written about a checkpoint lies beside it, not beside a link to it
        if path.is_file():
            return path
        if path.is_dir():
            if found := checkpoints(path):
                return found[-1] if training else pick_checkpoint(path, found)
            if (path / 'config.json').is_file():
                return path
            raise UserError(f'the run {path} holds no checkpoint yet (they are named loss_<loss>_epoch_<n>)')
    known = list_checkpoints(args)
    option = next((name for name in ('resume', 'init_from') if getattr(args, name) == args.ckpt_name), 'ckpt_name')
    hint = f'the newest there is --{option}={known[-1]}' if known else 'there is none yet: run python3 cli.py train'
    raise UserError(f'no checkpoint {args.ckpt_name} in {resolve_path(args.ckpt_path)}; {hint}')


def find_best_epoch(folder):
    """The best epoch of a run that began with pretrained weights, 0 for these weights; None of a run that did not, or
    that was not measured (metrics.jsonl).

    Where val has labels: the epoch with the highest accuracy with few labels, if that is more than its standard error
    above the start, paired by image; else 0. Without labels 0: no measure without labels was seen to choose rightly.
    """
    if not read_json(folder / 'run.json').get('args', {}).get('init_from'):
        return None
    return find_best_epoch_in_metrics(read_metrics(folder / 'metrics.jsonl'))


def find_best_epoch_in_metrics(lines):
    """find_best_epoch, of the lines of a metrics.jsonl."""
    judged = {line['epoch']: line for line in lines if FEW in line}
    if 0 in judged:
        sure = [epoch for epoch, line in judged.items() if line.get(GAIN, 0) > max(0.01, line.get(GAIN_ERROR, 0))]
        return max(sure, key=lambda epoch: judged[epoch][FEW], default=0)
    return 0 if any('pretraining/rank' in line for line in lines) else None
