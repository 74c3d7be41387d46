"""export: write the backbone in the format of another tool."""

import pickle

import torch

from ckpt import get_model_ckpt
from commands import model_card
from config import PREPROCESSING
from model.backbone import constructor_kwargs, feature_dim
from model.foreign_checkpoints import RESNET_BLOCKS, to_detectron2
from runtime.atomic_write import atomic_write_on_main
from runtime.environment import require_package
from runtime.errors import UserError, resolve_path
from runtime.files import try_writing
from runtime.messages import log
from runtime.options import channel_numbers, expand_channel_values, replace_args

SUFFIX = {'torchvision': '.pth', 'timm': '_timm', 'detectron2': '.pkl', 'onnx': '.onnx', 'safetensors': '.safetensors'}
PACKAGES = {'timm': ('safetensors.torch', 'timm'), 'safetensors': ('safetensors.torch',), 'onnx': ('onnxscript',)}


def export(args):
    """Write the backbone of --ckpt_name to --output in --format. Returns the path.

    torchvision: a state dict with torchvision's names, without the classification layer. timm: a folder for
    timm.create_model('local-dir:...'), with a model card. detectron2: a ResNet with detectron2's names, as a pickle of
    arrays. safetensors: the state dict with the names of its library. onnx: the network, from N x C x S x S normalized
    images to N x d features, for any N. Raises UserError if the tool does not have the architecture.
    """
    if not args.ckpt_name:
        raise UserError('export needs --ckpt_name=<run>/<checkpoint>: python3 cli.py evaluate lists them')
    args, model, checkpoint = get_model_ckpt(args)
    args = resolve_words(args)
    check_format(args)
    backbone = model.backbone.eval()
    state = {name: value.contiguous() for name, value in backbone.state_dict().items()}
    output = resolve_path(args.output or f'data/backbone{SUFFIX[args.format]}')
    if args.format == 'timm' and (output.suffix in ('.pth', '.pt', '.safetensors') or output.is_file()):
        raise UserError(f'--output={output.name}: --format=timm writes a folder')
    if args.format == 'timm' and output.is_dir() and {*output.iterdir()} and not (output / 'config.json').is_file():
        raise UserError(f'--output={output} holds other files: name a new folder')
    try_writing(output / 'config.json' if args.format == 'timm' else output)
    name = args.backbone.removeprefix('timm/')
    how = LOAD_SNIPPET[args.format].format(
        name=name, file=output, more=constructor_args(args, state), **mean_std_text(args)
    )
    if args.format == 'torchvision':
        atomic_write_on_main(output, lambda aside: torch.save(state, aside))
    elif args.format == 'timm':
        to_timm_folder(args, checkpoint, backbone, state, output)
    elif args.format == 'detectron2':
        arrays = {name: value.numpy() for name, value in to_detectron2(state).items() if 'num_batches' not in name}
        content = {'model': arrays, '__author__': 'SimSiam', 'matching_heuristics': True}
        atomic_write_on_main(output, lambda aside: aside.write_bytes(pickle.dumps(content)))
    elif args.format == 'safetensors':
        save_file = require_package('safetensors.torch', '--format=safetensors').save_file
        atomic_write_on_main(output, lambda aside: save_file(state, aside, metadata=file_metadata(args)))
    else:
        atomic_write_on_main(output, lambda aside: to_onnx(args, backbone, aside))
    if args.format == 'detectron2' and not RESNET_BLOCKS[args.backbone][1]:
        how += (
            f'; C4 needs bottlenecks, which {name} has not: use an FPN config with MODEL.RESNETS.DEPTH '
            f'{name.removeprefix("resnet")} and MODEL.RESNETS.RES2_OUT_CHANNELS 64'
        )
    log(f'{args.backbone} of {checkpoint["path"].name}, {len(state)} tensors, written to {output}\n{how}')
    levels = f'; channels {args.channels}, white level {args.white_level}' if channel_numbers(args.channels) else ''
    log(f'preprocessing: {args.image_size} px, mean {args.mean}, std {args.std}, {args.interpolation}{levels}')
    return output


def resolve_words(args):
    """Return args with numbers in place of the words of mean and std (imagenet, auto), and of channels and white level:
    other tools read them."""
    numbers = {name: expand_channel_values(name, getattr(args, name), args.num_channels) for name in ('mean', 'std')}
    words = {name: ','.join(f'{value:.6g}' for value in values) for name, values in numbers.items()}
    words |= {'channels': 'rgb'} if args.channels == 'auto' else {}
    words |= {'white_level': 'type'} if args.white_level == 'auto' else {}
    return replace_args(args, **words)


def check_format(args):
    """Raise UserError if --format does not support this backbone, or needs a package that is not installed."""
    if not is_supported(args.backbone, args.stem, args.format):
        raise UserError(
            f'--format={args.format} does not support --backbone={args.backbone} --stem={args.stem}: '
            f'--format={"timm, " * args.backbone.startswith("timm/")}onnx or safetensors'
        )
    for package in PACKAGES.get(args.format, ()):
        require_package(package, f'--format={args.format}')
    if args.format in ('torchvision', 'detectron2') and args.num_channels != 3:
        raise UserError(
            f'--format={args.format} is for three channels, and this backbone takes --channels={args.channels}; '
            'try timm, onnx or safetensors'
        )


def constructor_args(args, state):
    """Return the constructor arguments of the tool's network, as Python code."""
    if args.format == 'torchvision':
        return ', '.join(
            f'{name}={value}' for name, value in constructor_kwargs(args.backbone, args.image_size).items()
        )
    if args.format == 'timm' and args.backbone.startswith('timm/'):
        import timm

        with torch.device('meta'):
            reference_state = timm.create_model(
                args.backbone.removeprefix('timm/'), num_classes=0, in_chans=args.num_channels
            ).state_dict()
        if any(name in reference_state and reference_state[name].shape != value.shape for name, value in state.items()):
            return f', img_size={args.image_size}'
    return ''


def to_timm_folder(args, checkpoint, backbone, state, folder):
    """Write a timm folder: config.json, model.safetensors and README.md, the model card."""
    save_file = require_package('safetensors.torch', '--format=timm').save_file
    name = args.backbone.removeprefix('timm/')
    features = feature_dim(backbone, args.image_size, args.num_channels)
    config = model_card.make_timm_config(args, name, features)
    model_args = {'img_size': args.image_size} if constructor_args(args, state) else {}
    model_args |= {'in_chans': args.num_channels} if args.num_channels != 3 else {}
    config |= {'model_args': model_args} if model_args else {}
    atomic_write_on_main(folder / 'model.safetensors', lambda aside: save_file(state, aside, metadata={'format': 'pt'}))
    atomic_write_on_main(folder / 'config.json', lambda aside: aside.write_text(model_card.to_json_text(config)))
    text = model_card.render_model_card(args, checkpoint, name, features)
    atomic_write_on_main(folder / 'README.md', lambda aside: aside.write_text(text, encoding='utf-8'))


def mean_std_text(args):
    """Return {'mean', 'std'} of the pixels on the scale 0 to 255, as text."""
    texts = {}
    for name in ('mean', 'std'):
        values = expand_channel_values(name, getattr(args, name), args.num_channels)
        texts[name] = ', '.join(f'{255 * value:.3f}' for value in values)
    return texts


def is_supported(backbone, stem, tool):
    """Whether the format supports this backbone."""
    if tool in ('onnx', 'safetensors'):
        return True
    if stem == 'cifar':
        return False
    if tool == 'torchvision':
        return backbone != 'small' and not backbone.startswith('timm/')
    if tool == 'timm':
        return backbone in RESNET_BLOCKS or backbone.startswith('timm/')
    return backbone in RESNET_BLOCKS


def file_metadata(args):
    """Return the options that a user of the exported network needs, as texts."""
    names = ('backbone', 'stem', *PREPROCESSING, 'channels')
    return {name: str(getattr(args, name)) for name in names}


def to_onnx(args, backbone, path):
    """Export to one ONNX file with weights and metadata, for any batch size."""
    example = torch.zeros(2, args.num_channels, args.image_size, args.image_size)
    program = torch.onnx.export(
        backbone,
        (example,),
        input_names=['images'],
        output_names=['features'],
        dynamic_shapes=({0: torch.export.Dim('batch')},),
        dynamo=True,
        verbose=False,
    )
    program.model.metadata_props.update(file_metadata(args))
    program.save(path, external_data=False)


# How to load each format. Images are RGB in [0, 1], normalized by --mean and --std.
LOAD_SNIPPET = {
    'torchvision': 'load: m = torchvision.models.{name}({more}); '
    "m.load_state_dict(torch.load('{file}'), strict=False); the classifier's last layer alone is missing",
    'timm': "load: timm.create_model('local-dir:{file}', pretrained=True); README.md there is its model card",
    'detectron2': 'use: MODEL.WEIGHTS {file}, INPUT.FORMAT RGB, MODEL.RESNETS.STRIDE_IN_1X1 False, '
    'MODEL.PIXEL_MEAN [{mean}], MODEL.PIXEL_STD [{std}]',
    'onnx': "load: onnxruntime.InferenceSession('{file}').run(None, {{'images': images}})",
    'safetensors': "load: safetensors.torch.load_file('{file}')",
}
