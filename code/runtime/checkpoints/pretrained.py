"""Weights of other origin: of torchvision and timm, and files of other tools."""

import errno
import functools
import hashlib
from dataclasses import asdict
from pathlib import Path

import torch

from config import PREPROCESSING
from model.foreign_checkpoints import (
    RESNET_BLOCKS,
    convert_state_dict,
    find_tensors,
    infer_architecture,
    list_other_networks,
)
from model.weights import (
    convert_with_timm,
    convert_with_torchvision,
    fetch_timm,
    fetch_torchvision,
    find_preprocessing,
    is_off_the_shelf,
    match_keys,
    preprocessing_from_timm_folder,
)
from runtime.checkpoints.format import is_ours
from runtime.checkpoints.load_state import MAX_LISTED_KEYS, adapt_state_to_channels, build_model, load_state_strictly
from runtime.checkpoints.read_file import load_file, read_metadata
from runtime.checkpoints.run_folder import CHECKPOINT_RE, checkpoints, find_named
from runtime.checkpoints.saved_options import apply_preset, leave_demo_preset, merge_saved_options
from runtime.console import first_line, join_first
from runtime.distributed import local_main_first
from runtime.errors import UserError, WorkError, resolve_path
from runtime.files import read_json, sanitize_name
from runtime.messages import log
from runtime.options import channel_values, parse, replace_args


def check_off_the_shelf(args, name):
    """Check that torchvision or timm can have the weights `name` for --backbone. Returns (args with the backbone of the
    weights, its name in timm or ''). Raises UserError."""
    timm_name = name.removeprefix('timm').removeprefix('/') if name != 'imagenet' else ''
    if name == 'timm/':
        raise UserError(f'{name} names no network: timm/<name>, or timm for the weights of --backbone=timm/<name>')
    if timm_name and 'backbone' in args.settled and args.backbone != f'timm/{timm_name.split(".")[0]}':
        hint = f'--backbone=timm/{timm_name.split(".")[0]}' if args.from_run else 'leave --backbone out'
        raise UserError(f'--backbone={args.backbone} and {name} name two networks: {hint}')
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


def starts_from_foreign_weights(args):
    """Whether --init_from names weights that are not from a run of this code."""
    return are_foreign(args, args.init_from)


def are_foreign(args, name):
    """Whether `name`, of --init_from, --ckpt_name or --beside, is of weights that are not from a run of this code."""
    if not name or is_off_the_shelf(name):
        return bool(name)
    path = find_named(args, name) or resolve_path(name)
    if CHECKPOINT_RE.fullmatch(path.name) or path.is_dir() and checkpoints(path):
        return False
    return not path.is_file() or not is_ours(load_file(path))  # perhaps a renamed checkpoint


def set_off_the_shelf_options(args, name):
    """Set network and preprocessing of the weights `name`, without downloading them. Returns (args, name in timm or
    ''). Raises UserError."""
    args, timm_name = check_off_the_shelf(leave_demo_preset(args), name)
    try:
        return apply_preprocessing(
            args, find_preprocessing(timm_name and f'timm/{timm_name}' or args.backbone)
        ), timm_name
    except ValueError as error:
        raise UserError(f'{name}: {error}') from None


def load_off_the_shelf(args, name):
    """get_model_ckpt for the weights of torchvision (imagenet) or timm (timm, timm/<name>.<tag>)."""
    args, timm_name = set_off_the_shelf_options(args, name)
    try:
        model = build_model(args)
        weights = fetch_weights(args, name, timm_name)
        state, unused_keys = match_keys(model.backbone.state_dict(), weights.state)
    except ValueError as error:
        raise UserError(f'{name}: {error}') from None
    state = adapt_state_to_channels(model, {f'backbone.{key}': value for key, value in state.items()})
    load_state_strictly(model, state, Path(weights.source))
    model.has_heads = False
    log(f'weights {weights.source}{describe_unused(unused_keys)}; {describe_preprocessing(args)}')
    label = sanitize_name(weights.source)
    run = resolve_path(args.ckpt_path) / label
    return args, model, make_foreign_checkpoint(name.split('/')[0], run / label, run)


@local_main_first()
def fetch_weights(args, name, timm_name):
    """Download the weights `name`, on the first rank of each machine first. Raises ValueError if there are none for
    this network, WorkError if they cannot be downloaded."""
    try:
        if name == 'imagenet':
            return fetch_torchvision(args.backbone, args.image_size, not args.quiet)
        return fetch_timm(timm_name or args.backbone.removeprefix('timm/'), args.image_size)
    except (ValueError, UserError):
        raise
    except Exception as error:  # network errors of the libraries and their download backends
        # Of torch.load, not of the network. A download with another hash is not kept.
        damaged = isinstance(error, RuntimeError | EOFError) or getattr(error, 'errno', None) == errno.EINVAL
        damaged = damaged and 'invalid hash value' not in str(error)
        if name == 'imagenet' and damaged:
            raise WorkError(
                f'the downloaded weights {name} of {args.backbone} are damaged: {first_line(error)}; delete their file '
                f'in {torch.hub.get_dir()}/checkpoints'
            ) from None
        beside = args.ckpt_name in args.beside.split(',')
        option = 'beside' if beside else 'ckpt_name' if args.ckpt_name else 'init_from'
        network = '' if beside else f' --backbone={args.backbone}'
        raise WorkError(
            f'the weights {name} of {args.backbone} could not be downloaded: {first_line(error)}; download them '
            f'elsewhere and name the file: --{option}=FILE{network}'
        ) from None


def describe_unused(keys):
    """Describe the unused keys of a file for a message; '' if there are none."""
    return f'; not used: {join_first(keys, MAX_LISTED_KEYS)}' if keys else ''


def make_foreign_checkpoint(source, path, run):
    """Return get_model_ckpt's checkpoint dict for weights of other origin: epoch 0, without an optimizer."""
    return {'optimizer': None, 'epoch': 0, 'loss': 0.0, 'layout': source, 'path': path, 'run': run}


def apply_preprocessing(args, preprocessing):
    """Set the preprocessing of weights, except explicit options. Their image size is only used with --preset=imagenet.
    Returns args."""
    keep = {*args.settled} | ({'image_size'} if args.preset != 'imagenet' else set())
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
    text = f'{args.image_size} px, mean {args.mean}, std {args.std}, {args.interpolation}, crop {args.crop_ratio:g}'
    return text if args.white_level == 'type' else f'{text}, white level {args.white_level}'


def load_foreign(args, path, content):
    """load_checkpoint for another tool's file: the backbone, and projector and predictor if they are SimSiam's.

    Without --preset the options are those of imagenet, or of cifar10 if the stem is for small images.
    """
    args = apply_export_options(args, path)
    named = 'backbone' in args.settled and args.backbone not in RESNET_BLOCKS
    converted = None if named else convert_state_dict(content)
    if named or not converted and 'backbone' in args.settled:
        return load_network(args, path, content)
    if not converted:
        tensors = find_tensors(content)
        keys = [str(key) for key in (tensors or (content if isinstance(content, dict) else ()))]
        first = ', '.join(keys[:MAX_LISTED_KEYS]) or 'none'
        damaged = '' if tensors else 'is damaged or '
        raise WorkError(
            f'{path} {damaged}was not written by this project, nor is it a ResNet in a known layout (the '
            'official release, MoCo, lightly, solo-learn, SimCLR, Barlow Twins, DINO, torchvision, timm); its first '
            f'keys: {first}; weights of another network are read with its name: --backbone=timm/<name>, or one of '
            'torchvision'
        )
    source, state, unused_keys = converted
    shapes = infer_architecture(state)
    if missing := missing_stages(state):
        raise UserError(f'{path} holds a ResNet without {missing}')
    if 'backbone' not in shapes:
        raise UserError(
            f'{path} holds a network with other residual blocks than {", ".join(RESNET_BLOCKS)}; weights of another '
            'network are read with its name: --backbone=timm/<name>, or one of torchvision'
        )
    if 'stem' not in shapes:
        raise UserError(f'{path} holds a ResNet with an unknown stem (a deep stem?)')
    if 'preset' not in args.settled:
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
    unused = describe_unused([*list_other_networks(content), *unused_keys])
    log(
        f'{path.name}: {merged.backbone}, layout {source}, {"with" if has_heads else "without"} projector and predictor'
        f'{unused}; {merged.image_size} px, the settings of --preset={merged.preset}'
    )
    # The hash: other tools' files often have the same name.
    run = resolve_path(args.ckpt_path) / f'{source}_{path.name}_{content_hash(path)}'
    return merged, model, make_foreign_checkpoint(source, path, run)


def apply_export_options(args, path):
    """Set the options that `export --format=safetensors` writes into its file, except explicit ones. Returns args."""
    saved = read_metadata(path)
    if not {'backbone', 'stem', 'mean', 'std'} <= saved.keys():
        return args
    names = [name for name in ('backbone', 'stem', 'channels') if name in saved and name not in args.settled]
    args = replace_args(leave_demo_preset(args), **{name: saved[name] for name in names})
    preprocessing = {name: parse(name, saved[name]) for name in PREPROCESSING if name in saved}
    args = apply_preprocessing(args, preprocessing)
    args.fixed = args.fixed | {*names, *preprocessing}
    return args


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
    model, is_timm = build_model(args), args.backbone.startswith('timm/')
    repeated = args.from_run and 'backbone' not in args.explicit
    hint = '; this network is that of --from_run: --backbone=<that of the file> replaces it' if repeated else ''
    convert = functools.partial(convert_with_timm, args.backbone.removeprefix('timm/'), args.image_size)
    try:
        tensors = convert_with_torchvision(args.backbone, args.image_size, tensors)
        state, unused_keys = match_keys(model.backbone.state_dict(), tensors, convert if is_timm else None)
    except ValueError as error:
        if not is_timm or not tensors:
            raise UserError(f'{path} has no weights of --backbone={args.backbone}: {error}{hint}') from None
        try:
            state, unused_keys = convert(tensors), []  # the layout of the authors' release
        except ValueError as other:
            text = f'{path} has no weights of --backbone={args.backbone}: {error} (timm: {other}){hint}'
            raise UserError(text) from None
    state = adapt_state_to_channels(model, {f'backbone.{name}': value for name, value in state.items()})
    load_state_strictly(model, state, path)
    model.has_heads = False
    unused = describe_unused([*others, *unused_keys])
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
    if 'backbone' in args.settled and args.backbone != f'timm/{name}':
        raise UserError(f'--backbone={args.backbone}: {path} holds timm/{name}; leave the option out')
    cfg = config.get('pretrained_cfg')
    args = replace_args(leave_demo_preset(args), backbone=f'timm/{name}')
    args = apply_folder_channels(args, config)
    preprocessing = preprocessing_from_timm_folder(cfg if isinstance(cfg, dict) else {}, f'timm/{name}')
    if 'crop_ratio' in config.get('simsiam', {}):
        preprocessing['crop_ratio'] = config['simsiam']['crop_ratio']  # exactly; crop_pct is rounded for timm
    args = apply_preprocessing(args, preprocessing)
    args.fixed = args.fixed | {*preprocessing}
    return load_network(args, weights, load_file(weights))


def apply_folder_channels(args, config):
    """Set the channels and white level of a timm folder's config.json, except explicit options. Returns args."""
    count = (config.get('model_args') or {}).get('in_chans', 3)
    options = config.get('simsiam', {'channels': '1' if count == 1 else f'1-{count}'} if count != 3 else {})
    names = [name for name in ('channels', 'white_level') if name in options and name not in args.settled]
    return replace_args(args, **{name: options[name] for name in names})


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
