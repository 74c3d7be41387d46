"""The backbone alone, as another tool wants it."""

import pickle

import torch

from ckpt import get_model_ckpt
from config import UserError, path_of
from logger import say
from model.backbone import wanted_by
from model.layouts import BLOCKS, to_detectron2
from utils import extra, write_aside

SUFFIX = {'torchvision': '.pth', 'timm': '.pth', 'detectron2': '.pkl', 'onnx': '.onnx', 'safetensors': '.safetensors'}


def export(args):
    """Write the backbone of --ckpt_name to --output in --format. Returns the path.

    torchvision, timm: the state dict without the last layer of the classifier, of a network that the tool has by the
    same names. detectron2: a ResNet's by its names, as a pickle of arrays. safetensors: the state dict by our names
    (torchvision's or timm's, of their networks). onnx: the network itself, from N x 3 x S x S normalised images to
    N x d features, any N. Raises UserError where the tool has no such architecture.
    """
    if not args.ckpt_name:
        raise UserError('export wants --ckpt_name=<run>/<checkpoint>: python3 cli.py evaluate lists them')
    args, model, checkpoint = get_model_ckpt(args)
    if not known_there(args.backbone, args.stem, args.format):
        raise UserError(
            f'--format={args.format} has no --backbone={args.backbone} --stem={args.stem} by these names; '
            f'try --format={"timm, " * args.backbone.startswith("timm/")}onnx or safetensors'
        )
    backbone = model.backbone.eval()
    state = {name: value.contiguous() for name, value in backbone.state_dict().items()}
    output = path_of(args.output or f'data/backbone{SUFFIX[args.format]}')
    name = args.backbone.removeprefix('timm/')
    how = HOW[args.format].format(name=name, file=output, more=more_of(args, state))
    if args.format in ('torchvision', 'timm'):
        write_aside(output, lambda aside: torch.save(state, aside))
    elif args.format == 'detectron2':
        arrays = {name: value.numpy() for name, value in to_detectron2(state).items() if 'num_batches' not in name}
        content = {'model': arrays, '__author__': 'SimSiam', 'matching_heuristics': True}
        write_aside(output, lambda aside: aside.write_bytes(pickle.dumps(content)))
    elif args.format == 'safetensors':
        save_file = extra('safetensors.torch', '--format=safetensors').save_file
        about = {'backbone': args.backbone, 'stem': args.stem, 'image_size': str(args.image_size)}
        write_aside(output, lambda aside: save_file(state, aside, metadata=about))
    else:
        extra('onnxscript', '--format=onnx')
        write_aside(output, lambda aside: to_onnx(backbone, args.image_size, aside))
    say(f'{args.backbone} of {checkpoint["path"].name}, {len(state)} tensors, written to {output}\n{how}')
    return output


def more_of(args, state):
    """The options that the tool's network is made with, as code."""
    if args.format == 'torchvision':
        return ', '.join(f'{name}={value}' for name, value in wanted_by(args.backbone, args.image_size).items())
    if args.format == 'timm' and args.backbone.startswith('timm/'):
        import timm

        with torch.device('meta'):
            usual = timm.create_model(args.backbone.removeprefix('timm/'), num_classes=0).state_dict()
        if any(name in usual and usual[name].shape != value.shape for name, value in state.items()):
            return f', img_size={args.image_size}'
    return ''


def known_there(backbone, stem, tool):
    """Whether a tool has this network, its layers by the same names as here or by names that are known here."""
    if tool in ('onnx', 'safetensors'):
        return True
    if stem == 'cifar':
        return False
    if tool == 'torchvision':
        return backbone != 'small' and not backbone.startswith('timm/')
    if tool == 'timm':
        return backbone in BLOCKS or backbone.startswith('timm/')
    return backbone in BLOCKS


def to_onnx(backbone, size, path):
    """One file, weights inside; the batch is of any size."""
    example = torch.zeros(2, 3, size, size)
    program = torch.onnx.export(
        backbone,
        (example,),
        input_names=['images'],
        output_names=['features'],
        dynamic_shapes=({0: torch.export.Dim('batch')},),
        dynamo=True,
        verbose=False,
    )
    program.save(path, external_data=False)


# How each is loaded there, in a line. Images are RGB, in [0, 1], normalised by ImageNet's mean and deviation.
HOW = {
    'torchvision': 'load: m = torchvision.models.{name}({more}); '
    "m.load_state_dict(torch.load('{file}'), strict=False); the classifier's last layer alone is missing",
    'timm': "load: timm.create_model('{name}', num_classes=0{more}).load_state_dict(torch.load('{file}'))",
    'detectron2': 'use: MODEL.WEIGHTS {file}, INPUT.FORMAT RGB, MODEL.RESNETS.STRIDE_IN_1X1 False, '
    'MODEL.PIXEL_MEAN [123.675, 116.280, 103.530], MODEL.PIXEL_STD [58.395, 57.120, 57.375]',
    'onnx': "load: onnxruntime.InferenceSession('{file}').run(None, {{'images': images}})",
    'safetensors': "load: safetensors.torch.load_file('{file}')",
}
