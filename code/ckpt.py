"""Checkpoints: <ckpt_path>/<run>/loss_<loss>_epoch_<n>, where <run> is a folder of engine/run_dir.py.

A checkpoint is a dict of tensors and plain values, which torch.load reads with weights_only=True:
TrainState.state_dict, the options of the run (args), and the versions of torch and of this code.
runtime/checkpoint_format.py converts earlier formats.
"""

import contextlib
import errno
import functools
import hashlib
import io
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

from config import INIT_FROM_DEFAULTS, NOT_RESTORED_OPTIONS, OPTIONS, Config
from model.foreign_checkpoints import (
    RESNET_BLOCKS,
    convert_state_dict,
    find_tensors,
    infer_architecture,
    list_other_networks,
)
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
    resize_vit_positions,
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

WATCHED = 10  # labels per class, for the few-label accuracy in training
FEW, GAIN, GAIN_ERROR = (
    'pretraining/few_labels_top1',
    'pretraining/few_labels_gain',
    'pretraining/few_labels_gain_error',
)
# File in a run folder: which images of val the initial weights classify correctly (protocols/monitor.py).
START_ACCURACY_FILE = 'few_labels_of_start.json'


# Packages whose objects (options, NumPy scalars) occur in harmless files beside the weights; loaded as InertStub.
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
# Globals that reconstruct NumPy arrays, by their names in NumPy 1 and 2: some files store weights as arrays.
NUMPY_SAFE_GLOBALS = [
    *((np.empty(0).__reduce__()[0], f'numpy.{core}.multiarray._reconstruct') for core in ('core', '_core')),
    np.ndarray,
    np.dtype,
    *(type(np.dtype(letter)) for letter in np.typecodes['All']),
]
MAX_LISTED_KEYS = 8  # keys of each kind in an error message
CHECKPOINT_RE = re.compile(r'loss_(-?\d+\.\d{4})_epoch_(\d+)(?:_(?:images|step)_(\d+))?')
DAMAGED = '{} is damaged or was not written by this project; take another checkpoint'
ARCHITECTURE = ('backbone', 'stem', 'proj_layers', 'proj_dim', 'pred_dim', 'predictor', 'proj_bn')
PIXEL_OPTIONS = ('white_level', 'mean', 'std')  # may be measured on the images of a new run
PREPROCESSING = ('mean', 'std', 'interpolation', 'crop_ratio', 'image_size')  # options that weights bring


def get_model_ckpt(args, training=False):
    """Load or build the model for `args`. Returns (args, model, checkpoint), with the model on the CPU.

    Without --ckpt_name: a new model, initialized by --random_seed or with the weights of --init_from, which also set
    preprocessing and config.INIT_FROM_DEFAULTS; checkpoint is None. With --ckpt_name: the weights and options of the
    checkpoint, except explicit options and those of this machine; checkpoint is the dict above with `path` and `run`,
    the folder for files about it. Weights of torchvision or timm (imagenet, timm/<name>) and files of other tools have
    only their architecture and preprocessing as options, and epoch 0.

    training: for resuming: of a run from pretrained weights the last checkpoint instead of the best, and without
    --start_share. Raises UserError if there is no such checkpoint, or an option contradicts its architecture; WorkError
    if the file is damaged, does not match its options, or cannot be downloaded.
    """
    loaded = load_model(args, training)
    for name in ('mean', 'std'):
        word = getattr(loaded[0], name)
        if word not in UNRESOLVED and len(channel_values(name, word)) not in (1, loaded[0].num_channels):
            raise UserError(
                f'--{name}={word} is not one number for all of {loaded[0].num_channels} channels nor one for each'
            )
    return loaded


def load_model(args, training):
    """get_model_ckpt without the check of mean and std."""
    if args.ckpt_name and is_off_the_shelf(args.ckpt_name):
        return load_off_the_shelf(args, args.ckpt_name)
    if args.ckpt_name:
        locked_options = (*ARCHITECTURE, 'preset', 'channels')
        locked_options += PIXEL_OPTIONS if training else ()
        return load_checkpoint(args, find_checkpoint(args, training), locked_options, training)
    if args.init_from:
        return start_from_weights(args)
    return args, build_model(args), None


def start_from_weights(args):
    """get_model_ckpt of --init_from."""
    ours = replace_args(args)
    ours.explicit = args.explicit | {'preset', 'channels'}  # another tool's weights set only the architecture
    if is_off_the_shelf(args.init_from):
        loaded, model, checkpoint = load_off_the_shelf(ours, args.init_from)
    else:
        path = resolve_path(args.init_from)
        path = (
            path
            if path.exists() and not checkpoints_in(path)
            else find_checkpoint(replace_args(args, ckpt_name=args.init_from))
        )
        loaded, model, checkpoint = load_checkpoint(ours, path, ARCHITECTURE)
    model.has_heads = True  # new ones if the file has none
    weight_options = {name: getattr(loaded, name) for name in (*ARCHITECTURE, *PREPROCESSING)}
    if len(channel_values('mean', weight_options['mean'])) not in (1, args.num_channels):  # for other channels
        weight_options |= {'mean': args.mean, 'std': args.std}
    args = replace_args(args, **weight_options)
    if checkpoint['layout'] != 'ours' and not args.from_run:
        defaults = {name: value for name, value in INIT_FROM_DEFAULTS.items() if name not in args.explicit}
        args = replace_args(args, **defaults)
        options_text = ' '.join(f'--{name}={getattr(args, name)}' for name in INIT_FROM_DEFAULTS)
        log(f'from pretrained weights: {options_text}')
    return args, model, None


def checkpoints_in(path):
    return checkpoints(path) if path.is_dir() else []


def check_off_the_shelf(args, name):
    """Check that torchvision or timm can have the weights `name` for --backbone. Returns (args with the backbone of the
    weights, its name in timm or ''). Raises UserError."""
    timm_name = name.removeprefix('timm').removeprefix('/') if name != 'imagenet' else ''
    if name == 'timm/':
        raise UserError(f'{name} names no network: timm/<name>, or timm for the weights of --backbone=timm/<name>')
    if timm_name and 'backbone' in args.explicit and args.backbone != f'timm/{timm_name.split(".")[0]}':
        raise UserError(f'--backbone={args.backbone} and {name} name two networks: leave --backbone out')
    if timm_name:
        args = replace_args(args, backbone=f'timm/{timm_name.split(".")[0]}')
    if name == 'timm' and not args.backbone.startswith('timm/'):
        raise UserError(f'{name} names the weights of --backbone=timm/<network>, not of --backbone={args.backbone}')
    if name == 'imagenet' and (
        args.backbone == 'small' or args.backbone.startswith('timm/') or args.stem != 'imagenet'
    ):
        raise UserError(
            f"imagenet has the weights of torchvision's networks, not of --backbone={args.backbone} --stem={args.stem}"
        )
    return args, timm_name


def load_off_the_shelf(args, name):
    """get_model_ckpt for the weights of torchvision (imagenet) or timm (timm, timm/<name>.<tag>)."""
    args, timm_name = check_off_the_shelf(leave_demo_preset(args), name)
    try:
        args = apply_preprocessing(args, find_preprocessing(timm_name and f'timm/{timm_name}' or args.backbone))
        model = build_model(args)
        with local_main_first():
            if name == 'imagenet':
                weights = fetch_torchvision(args.backbone, args.image_size, not args.quiet)
            else:
                weights = fetch_timm(timm_name or args.backbone.removeprefix('timm/'), args.image_size)
    except ValueError as error:
        raise UserError(f'{name}: {error}') from None
    except UserError:
        raise
    except Exception as error:  # network errors of the libraries and their download backends
        # Of torch.load, not of the network.
        damaged = isinstance(error, RuntimeError | EOFError) or getattr(error, 'errno', None) == errno.EINVAL
        if name == 'imagenet' and damaged:
            raise WorkError(
                f'the downloaded weights {name} of {args.backbone} are damaged: {first_line(error)}; delete their file '
                f'in {torch.hub.get_dir()}/checkpoints'
            ) from None
        option = 'ckpt_name' if args.ckpt_name else 'init_from'
        raise WorkError(
            f'the weights {name} of {args.backbone} could not be downloaded: {first_line(error)}; download them '
            f'elsewhere and name the file: --{option}=FILE --backbone={args.backbone}'
        ) from None
    state, _ = match_keys(model.backbone.state_dict(), weights.state)
    state = adapt_state_to_channels(model, {f'backbone.{key}': value for key, value in state.items()})
    load_state_strictly(model, state, Path(weights.source))
    model.has_heads = False
    log(f'weights {weights.source}; {describe_preprocessing(args)}')
    label = sanitize_name(weights.source)
    run = resolve_path(args.ckpt_path) / label
    return args, model, make_foreign_checkpoint(name.split('/')[0], run / label, run)


def make_foreign_checkpoint(source, path, run):
    """Return get_model_ckpt's checkpoint dict for weights of other origin: epoch 0, without an optimizer."""
    return {'optimizer': None, 'epoch': 0, 'loss': 0.0, 'layout': source, 'path': path, 'run': run}


def apply_preprocessing(args, preprocessing):
    """Set the preprocessing of weights, except explicit options. Their image size is only used with --preset=imagenet.
    Returns args."""
    keep = {*args.explicit} | ({'image_size'} if args.preset != 'imagenet' else set())
    keep -= {name for name in ('mean', 'std') if getattr(args, name) == 'weights'}
    preprocessing = {name: value for name, value in preprocessing.items() if name not in keep}
    for name in ('mean', 'std'):
        values = channel_values(name, preprocessing.get(name, '0.5'))
        if len(values) not in (1, args.num_channels):
            if args.init_from:  # measured on the images of train
                del preprocessing[name]
            else:
                preprocessing[name] = f'{sum(values) / len(values):.6g}'
    return replace_args(args, **preprocessing)


def describe_preprocessing(args):
    return f'{args.image_size} px, mean {args.mean}, std {args.std}, {args.interpolation}, crop {args.crop_ratio:g}'


def load_checkpoint(args, path, locked_options, training=False):
    """get_model_ckpt for this file. locked_options: options that must not contradict the checkpoint."""
    if path.is_dir():
        return load_timm_folder(args, path)
    content = load_file(path)
    if not is_ours(content):
        return load_foreign(args, path, content)
    verify_crc(path)
    content, unsaid = upgrade(content)
    state, saved = content['model'], content['args']
    log_missing_options(path, saved['preset'], unsaid)
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
        share = saved['start_share'] if args.init_from else merged.start_share  # --start_share is of the new run
        model.backbone.load_state_dict(average_weights(content['start'], model.backbone.state_dict(), share))
    return merged, model, {**content, 'layout': 'ours', 'run': path.parent, 'path': path}


def load_foreign(args, path, content):
    """load_checkpoint for another tool's file: the backbone, and projector and predictor if they are SimSiam's.

    Without --preset the options are those of imagenet, or of cifar10 if the stem is for small images.
    """
    named = 'backbone' in args.explicit and args.backbone not in RESNET_BLOCKS
    converted = None if named else convert_state_dict(content)
    if named or not converted and 'backbone' in args.explicit:
        return load_network(args, path, content)
    if not converted:
        keys = [str(key) for key in (find_tensors(content) or (content if isinstance(content, dict) else ()))]
        first = ', '.join(keys[:MAX_LISTED_KEYS]) or 'none'
        raise WorkError(
            f'{path} is damaged or was not written by this project, nor is it a ResNet in a known layout (the '
            'official release, MoCo, lightly, solo-learn, SimCLR, Barlow Twins, DINO, torchvision, timm); its first '
            f'keys: {first}; weights of another network are read with its name: --backbone=timm/<name>, or one of '
            'torchvision'
        )
    source, state, unused_keys = converted
    shapes = infer_architecture(state)
    if missing := missing_stages(state):
        raise UserError(f'{path} holds a ResNet without {missing}')
    if 'backbone' not in shapes:
        raise UserError(f'{path} holds a network with other residual blocks than {", ".join(RESNET_BLOCKS)}')
    if 'stem' not in shapes:
        raise UserError(f'{path} holds a ResNet with an unknown stem (a deep stem?)')
    if 'preset' not in args.explicit:
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
    load_state_strictly(model, adapt_state_to_channels(model, {**bn_batch_counters(model, has_heads), **state}), path)
    unused_keys = [*list_other_networks(content), *unused_keys]
    unused = f'; not used: {", ".join(unused_keys)}' if unused_keys else ''
    log(
        f'{path.name}: {merged.backbone}, layout {source}, {"with" if has_heads else "without"} projector and predictor'
        f'{unused}; {merged.image_size} px, the settings of --preset={merged.preset}'
    )
    # The hash: other tools' files often have the same name.
    run = resolve_path(args.ckpt_path) / f'{source}_{path.name}_{content_hash(path)}'
    return merged, model, make_foreign_checkpoint(source, path, run)


def missing_stages(state):
    """Return the names of the stages that a ResNet's state dict lacks, as text."""
    names = [f'layer{i}' for i in range(1, 5)]
    return ', '.join(name for name in names if not any(key.startswith(f'backbone.{name}.') for key in state))


def content_hash(path):
    """Return a short digest of a file's content."""
    digest = hashlib.blake2b(digest_size=4)
    with open(path, 'rb') as file:
        while part := file.read(2**24):
            digest.update(part)
    return digest.hexdigest()


def load_network(args, path, content):
    """load_checkpoint for a state dict in the layout of the network --backbone, under any prefix."""
    tensors, others = find_tensors(content), list_other_networks(content)
    args = leave_demo_preset(args)
    args = apply_preprocessing(args, find_preprocessing(args.backbone))
    model = build_model(args)
    try:
        tensors = resize_vit_positions(args.backbone, args.image_size, tensors)
        state, unused_keys = match_keys(model.backbone.state_dict(), tensors)
    except ValueError as error:
        if not args.backbone.startswith('timm/') or not tensors:
            raise UserError(f'{path} has no weights of --backbone={args.backbone}: {error}') from None
        try:
            state, unused_keys = convert_with_timm(args.backbone.removeprefix('timm/'), args.image_size, tensors), []
        except ValueError as other:
            raise UserError(f'{path} has no weights of --backbone={args.backbone}: {error} (timm: {other})') from None
    state = adapt_state_to_channels(model, {f'backbone.{name}': value for name, value in state.items()})
    load_state_strictly(model, state, path)
    model.has_heads = False
    unused_keys = [*others, *unused_keys]
    unused = f'; not used: {join_first(unused_keys, MAX_LISTED_KEYS)}' if unused_keys else ''
    log(f'{path.name}: {args.backbone}, without projector and predictor{unused}; {describe_preprocessing(args)}')
    run = resolve_path(args.ckpt_path) / f'{sanitize_name(args.backbone)}_{path.name}_{content_hash(path)}'
    return args, model, make_foreign_checkpoint('network', path, run)


def load_timm_folder(args, path):
    """load_checkpoint for a folder in timm's format (export --format=timm): config.json and model.safetensors."""
    config, weights = read_json(path / 'config.json'), path / 'model.safetensors'
    name = config.get('architecture')
    if not isinstance(name, str) or not weights.is_file():
        raise UserError(
            f'{path} is not a folder of weights: it needs config.json, with "architecture", and model.safetensors'
        )
    if 'backbone' in args.explicit and args.backbone != f'timm/{name}':
        raise UserError(f'--backbone={args.backbone}: {path} holds timm/{name}; leave the option out')
    cfg = config.get('pretrained_cfg')
    args = replace_args(leave_demo_preset(args), backbone=f'timm/{name}')
    args = apply_folder_channels(args, config)
    preprocessing = preprocessing_from_timm_folder(cfg if isinstance(cfg, dict) else {}, f'timm/{name}')
    if 'crop_ratio' in config.get('simsiam', {}):
        preprocessing['crop_ratio'] = config['simsiam']['crop_ratio']  # exactly; crop_pct is rounded for timm
    args = apply_preprocessing(args, preprocessing)
    args.explicit = args.explicit | {*preprocessing}
    return load_network(args, weights, load_file(weights))


def apply_folder_channels(args, config):
    """Set the channels and white level of a timm folder's config.json, except explicit options. Returns args."""
    count = (config.get('model_args') or {}).get('in_chans', 3)
    options = config.get('simsiam', {'channels': '1' if count == 1 else f'1-{count}'} if count != 3 else {})
    names = [name for name in ('channels', 'white_level') if name in options and name not in args.explicit]
    return replace_args(args, **{name: options[name] for name in names})


def adapt_state_to_channels(model, state):
    """Adapt the first layer in `state`, for three channels, to the channels of the model, and log it. Returns the
    state."""
    valid = {name: value for name, value in state.items() if not unsupported_kind(value, value.is_floating_point())}
    adapted = {**state, **adapt_channels(model.state_dict(), valid)}
    if changed := [name for name, value in adapted.items() if value is not state[name]]:
        log(
            f'{changed[0]} of 3 channels is adapted to {adapted[changed[0]].shape[1]}: repeated and scaled, or summed '
            "(timm's rule)"
        )
    return adapted


def sanitize_name(name):
    """Replace all characters except letters, digits, '-', '_' and '.' by '_'."""
    return ''.join(c if c.isascii() and (c.isalnum() or c in '-_.') else '_' for c in name)


def apply_preset(args, preset):
    """Return args with the defaults of another preset."""
    explicit = {name: getattr(args, name) for name in (*args.explicit, *NOT_RESTORED_OPTIONS)}
    new_args = replace_args(get_config(preset=preset), **explicit)
    new_args.explicit = args.explicit
    return new_args


def leave_demo_preset(args):
    """Return args with the preset imagenet in place of demo, which was only taken for want of images: weights of other
    networks have nothing of it."""
    return apply_preset(args, 'imagenet') if args.preset == 'demo' and 'preset' not in args.explicit else args


def heads_match(state, model):
    """Whether the projector and predictor in `state` have exactly the keys and shapes of the model's."""
    saved_shapes = {
        name: value.shape for name, value in {**bn_batch_counters(model), **state}.items() if 'backbone.' not in name
    }
    return saved_shapes == {name: value.shape for name, value in model.state_dict().items() if 'backbone.' not in name}


def bn_batch_counters(model, has_heads=True):
    """Return the num_batches_tracked of the model's BN layers, which some files lack and which have no effect.
    has_heads: include those of the heads."""
    return {
        name: value
        for name, value in model.state_dict().items()
        if name.endswith('num_batches_tracked') and (has_heads or name.startswith('backbone.'))
    }


def merge_saved_options(args, saved, path, locked_options):
    """Merge the options of a checkpoint with args: explicit options and local ones are from args. Returns a Config.
    Raises UserError if one of `locked_options` is given with another value."""
    for name in locked_options:
        unresolved = name in PIXEL_OPTIONS and getattr(args, name) in UNRESOLVED
        if name in args.explicit and getattr(args, name) != saved.get(name) and not unresolved:
            raise UserError(
                f'--{name}={getattr(args, name)} contradicts the checkpoint {path.parent.name}/{path.name}, '
                f'which has {name}={saved.get(name)}: leave the option out, or name another checkpoint'
            )
    explicit = {name: getattr(args, name) for name in (*args.explicit, *NOT_RESTORED_OPTIONS)}
    for name in PIXEL_OPTIONS:
        if explicit.get(name) in UNRESOLVED:
            log(f'--{name}={explicit.pop(name)} applies to new runs; this one has --{name}={saved[name]}')
    merged = Config(**{**saved, **explicit})
    merged.explicit = args.explicit
    return merged


def log_missing_options(path, preset, names):
    """Log the options that a checkpoint does not have because it is older, with the preset that sets them."""
    of_training = [name for name in names if {'train', 'evaluate'} & {*OPTIONS[name].metadata['used_by']}]
    names = [name for name in of_training if name not in NOT_RESTORED_OPTIONS]
    if names:
        options_text = join_first([f'--{name}' for name in names], MAX_LISTED_KEYS)
        log(f'{path.name} is older than the options {options_text}: they are those of --preset={preset}')


def load_state_strictly(model, state, path):
    """Load `state` into the model: all of its keys, or all of its backbone's. Raises UserError for missing, unexpected
    or differently shaped keys, WorkError for values that are no valid weights."""
    has_heads = any(not name.startswith('backbone.') for name in state)
    expected = {name: value for name, value in model.state_dict().items() if has_heads or name.startswith('backbone.')}
    sizes = [
        f'{name} is {tuple(state[name].shape)} in place of {tuple(value.shape)}'
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape
    ]
    kinds = {
        'missing': sorted(expected.keys() - state.keys()),
        'unexpected': sorted(state.keys() - expected.keys()),
        'size mismatch': sizes,
    }
    problems = [f'{kind}: {join_first(details, MAX_LISTED_KEYS)}' for kind, details in kinds.items() if details]
    for name, value in expected.items():
        if name in state and (kind := unsupported_kind(state[name], value.is_floating_point())):
            raise WorkError(f'{path}: {name} is {kind}, and a weight is plain floating-point numbers: convert it')
    # Some networks have buffers with infinite bounds from the start.
    if invalid := non_finite_names(state) - non_finite_names(expected):
        raise WorkError(
            f'{path} holds weights that are nan or infinite, such as {min(invalid)}: take another checkpoint'
        )
    if problems:
        raise UserError(f'{path} has weights that do not match its options; {"; ".join(problems)}')
    model.load_state_dict({**model.state_dict(), **state})


def non_finite_names(state):
    """Return the names of the tensors that hold nan or infinite values."""
    return {name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()}


def unsupported_kind(value, real):
    """Return why a tensor is not a valid weight (quantized, sparse, ...), or None. real: whether floating point is
    required."""
    if value.is_quantized or value.is_complex() or value.layout != torch.strided or value.device.type == 'meta':
        kinds = ('quantized', value.is_quantized), ('complex', value.is_complex()), ('sparse', value.is_sparse)
        return next((kind for kind, holds in kinds if holds), 'without content')
    if real and (not value.is_floating_point() or value.itemsize == 1):
        return str(value.dtype).removeprefix('torch.')
    return None


def build_model(args):
    """Build a SimSiam with random weights from --random_seed. Raises UserError for an invalid backbone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.random_seed)
        try:
            return SimSiam(args)
        except ValueError as error:
            raise UserError(f'--backbone={args.backbone}: {error}') from None


def save_checkpoint(run, args, state):
    """Write a checkpoint of `state` into the folder `run`, atomically. Returns its path.

    Earlier checkpoints within an epoch are deleted, and the oldest beyond --keep_checkpoints.
    """
    content = {**state.state_dict(), 'args': asdict(args), 'versions': library_versions()}
    suffix = f'_images_{state.images}' if state.images else ''
    path = run / f'loss_{content["loss"]:.4f}_epoch_{state.epoch}{suffix}'
    if not rank():
        record_checkpoint(run, path)  # first, so that a kill cannot leave an unrecorded checkpoint
        atomic_write_on_main(path, lambda aside: torch.save(content, aside))
        kept_epochs = {0, find_best_epoch(run)} if args.init_from else {}  # the start and the best are never deleted
        older = [
            other
            for other in checkpoints(run)
            if other != path and int(CHECKPOINT_RE.fullmatch(other.name)[2]) not in kept_epochs
        ]
        older = [other for other in older if was_written_by_run(run, other)]
        within_epoch = [other for other in older if CHECKPOINT_RE.fullmatch(other.name)[3]]
        finished = [other for other in older if other not in within_epoch]
        spare = len(finished) - args.keep_checkpoints + (not state.images) if args.keep_checkpoints else 0
        for other in (*within_epoch, *finished[: max(0, spare)]):
            other.unlink(missing_ok=True)
    return path


WRITTEN = 'checkpoints.json'  # file in a run folder: names of the checkpoints that the run wrote, in order


def record_checkpoint(run, path):
    """Add a checkpoint to the run's list of written checkpoints."""
    before = [name for name in read_json(run / WRITTEN).get('written', []) if (run / name).is_file()]
    names = [*(name for name in before if name != path.name), path.name]
    atomic_write_on_main(run / WRITTEN, lambda aside: aside.write_text(json.dumps({'written': names}) + '\n'))


def was_written_by_run(folder, path):
    """Whether the run of a folder wrote this checkpoint: others, copied there, are neither deleted nor continued in
    that folder. Runs of early versions have no list and count as the writer of all."""
    if not (folder / 'run.json').is_file() and not re.fullmatch(r'model_name_.+_ckpt_\d+', folder.name):
        return False
    written = read_json(folder / WRITTEN).get('written')
    return written is None or path.name in written


@functools.cache
def library_versions():
    """Return the versions of Python, torch, torchvision and this code (git commit, or SIMSIAM_COMMIT from
    setup-docker.sh)."""
    git = (
        subprocess.run(
            ['git', f'--git-dir={ROOT}/.git', 'describe', '--always', '--dirty', '--abbrev=40', '--exclude=*'],
            cwd=ROOT,  # not of an outer repository
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
    """Load a file of torch.save or safetensors, on the CPU, without executing code from it. Raises WorkError."""
    if is_safetensors(path):
        reader = require_package('safetensors.torch', path.name)
        try:
            return reader.load_file(path)
        except Exception as error:  # SafetensorError and OSError
            raise WorkError(f'{DAMAGED.format(path)} ({error})') from None
    inert = []
    while True:
        try:
            with (
                torch.serialization.safe_globals([*NUMPY_SAFE_GLOBALS, *((InertStub, name) for name in inert)]),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter('ignore')  # TorchScript and old pickles: the error below is enough
                # torch.load takes a path with this ending for a file of safetensors.
                source = io.BytesIO(path.read_bytes()) if path.suffix == '.safetensors' else path
                return torch.load(source, map_location='cpu', weights_only=True)
        except pickle.UnpicklingError as error:
            refused = re.search(r'GLOBAL ([\w.]+)', str(error))
            if not refused:
                raise WorkError(DAMAGED.format(path)) from None
            if refused[1].split('.')[0] not in INERT_PICKLE_PACKAGES or refused[1] in inert:
                raise WorkError(
                    f'{path} is not loaded: it would run {refused[1]}, and only tensors and plain values are read '
                    'from a checkpoint'
                ) from None
            inert.append(refused[1])
        except Exception:  # the unpickler raises various types on damaged files
            raise WorkError(DAMAGED.format(path)) from None


def is_safetensors(path):
    """Whether a file is in the format of safetensors: the length of a JSON header, and the header."""
    try:
        with open(path, 'rb') as file:
            return file.read(9)[8:] == b'{'
    except OSError as error:
        raise WorkError(f'{path} cannot be read: {error.strerror}') from None


def verify_crc(path):
    """Verify the checksums of a checkpoint, which torch does not. Raises WorkError if one is wrong."""
    try:
        with zipfile.ZipFile(path) as parts:
            wrong = parts.testzip()
    except zipfile.BadZipFile:
        return  # an old format without checksums, which torch can read
    if wrong:
        raise WorkError(f'{path} is damaged, in {wrong}: take another checkpoint')


class InertStub:
    """Replaces objects of other tools' settings in a file; it accepts any arguments and does nothing."""

    def __init__(self, *args, **more):
        pass

    def __setstate__(self, state):
        pass


def read_checkpoint(path):
    """Load a checkpoint of this project, of any format. Raises WorkError for other files."""
    content = load_file(path)
    if not is_ours(content):
        raise WorkError(DAMAGED.format(path))
    return content


def checkpoints(folder):
    """List the checkpoints of a run folder, sorted by epoch, position and order of writing: the newest is last. The
    order of writing is that of checkpoints.json, which copying preserves, else of the mtimes.
    """
    entries, written = [], read_json(folder / WRITTEN).get('written', [])
    for path in folder.iterdir():
        if match := CHECKPOINT_RE.fullmatch(path.name):
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile by its run
                later = written.index(path.name) if path.name in written else -1
                entries.append((int(match[2]), int(match[3] or 0), later, path.stat().st_mtime, path))
    return [path for *_, path in sorted(entries)]


def pick_checkpoint(folder, paths):
    """Return the best checkpoint of a measured run from pretrained weights (find_best_epoch), else the newest. paths:
    the run's checkpoints."""
    best = find_best_epoch(folder)
    by_epoch = {
        int(CHECKPOINT_RE.fullmatch(path.name)[2]): path for path in paths if not CHECKPOINT_RE.fullmatch(path.name)[3]
    }
    if best is not None and best not in by_epoch:
        print_message(
            'warning', f'{folder.name}: the checkpoint of its best epoch, {best}, is missing: the newest is used'
        )
    if best is None or best not in by_epoch or by_epoch[best] == paths[-1]:
        return paths[-1]
    reason = f'epoch {best} is its best on val'
    if not best:
        labeled = any(FEW in line for line in read_metrics(folder / 'metrics.jsonl'))
        why = 'no epoch was better on val' if labeled else 'no labels show that training helped'
        reason = f'epoch 0, the start, is used: {why}'
    log(f'{folder.name}: {reason}; --ckpt_name={folder.name}/<checkpoint> selects another')
    return by_epoch[best]


def list_checkpoints(args):
    """List all checkpoints under --ckpt_path as values for --ckpt_name, sorted by run, with the newest run last."""
    root = resolve_path(args.ckpt_path)
    runs = sorted(entry for entry in root.iterdir() if entry.is_dir()) if root.is_dir() else []
    by_run = {run: paths for run in runs if (paths := checkpoints(run))}
    newest = newest_run(by_run)
    ordered = sorted(by_run, key=lambda run: run == newest)
    return [f'{run.name}/{path.name}' for run in ordered for path in by_run[run]]


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
            print_message('warning', f'{error}; left out')
            continue
        any_valid = True
        yield one


def find_checkpoint(args, training=False):
    """Return the file of --ckpt_name: relative to --ckpt_path, or a path. For a run folder it is the newest checkpoint,
    or, unless `training`, the best one of a run from pretrained weights (find_best_epoch). Raises UserError."""
    for path in (resolve_path(args.ckpt_path) / args.ckpt_name, resolve_path(args.ckpt_name)):
        path = path.resolve()  # results are written beside the checkpoint, not beside a link to it
        if path.is_file():
            return path
        if path.is_dir():
            if paths := checkpoints(path):
                return paths[-1] if training else pick_checkpoint(path, paths)
            if (path / 'config.json').is_file():
                return path
            files = sorted(
                file.name for file in path.iterdir() if file.suffix in ('.bin', '.safetensors', '.pth', '.pt')
            )
            if files:
                raise UserError(f'{path} is not a run; name the file: --ckpt_name={path / files[0]}')
            raise UserError(f'the run {path} holds no checkpoint yet (they are named loss_<loss>_epoch_<n>)')
    names = list_checkpoints(args)
    option = next((name for name in ('resume', 'init_from') if getattr(args, name) == args.ckpt_name), 'ckpt_name')
    option = 'beside' if args.ckpt_name in args.beside.split(',') else option
    hint = f'the newest there is --{option}={names[-1]}' if names else 'there is none yet: run python3 cli.py train'
    raise UserError(f'no checkpoint {args.ckpt_name} in {resolve_path(args.ckpt_path)}; {hint}')


def find_best_epoch(folder):
    """Return the best epoch of a run from pretrained weights, 0 for the initial weights; None for other runs, or if it
    was not measured (metrics.jsonl).

    With labels: the epoch with the highest few-label accuracy, if its gain over the start (paired by image) is more
    than its standard error, else 0. Without labels 0, because no label-free measure was found to select correctly.
    """
    if not read_json(folder / 'run.json').get('args', {}).get('init_from'):
        return None
    return find_best_epoch_in_metrics(read_metrics(folder / 'metrics.jsonl'))


def find_best_epoch_in_metrics(lines):
    """find_best_epoch from the lines of a metrics.jsonl."""
    measured = {line['epoch']: line for line in lines if FEW in line}
    if 0 in measured:
        better = [epoch for epoch, line in measured.items() if line.get(GAIN, 0) > max(0.01, line.get(GAIN_ERROR, 0))]
        return max(better, key=lambda epoch: measured[epoch][FEW], default=0)
    return 0 if any('pretraining/rank' in line for line in lines) else None
