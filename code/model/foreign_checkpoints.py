"""Conversion of other tools' state dicts to our names and back, and the architecture that their shapes imply.

Every key of a file is accounted for: it is converted, or reported as unused (a classifier, a momentum encoder, a queue,
the heads of another method).
"""

import re

import numpy as np
import torch

RESNET_BLOCKS = {  # residual blocks of the four stages, and whether they are bottlenecks
    'resnet18': ((2, 2, 2, 2), False),
    'resnet34': ((3, 4, 6, 3), False),
    'resnet50': ((3, 4, 6, 3), True),
    'resnet101': ((3, 4, 23, 3), True),
    'resnet152': ((3, 8, 36, 3), True),
}
WRAPPERS = re.compile(r'^(?:module\.|_orig_mod\.|_forward_module\.)+')  # DDP's, torch.compile's, Fabric's
# Keys under which files store a state dict, in order of preference: DINO evaluates the teacher, not the student. Those
# of averaged weights (ema) come last.
STATE_DICT_KEYS = (
    'state_dict',
    'model_state_dict',
    'model_state',
    'model',
    'teacher',
    'student',
    'network',
    'net',
    'backbone',
    'encoder',
    'online_encoder',
    'weights',
    'module',
    'params_ema',
    'params',
    'model_ema',
    'state_dict_ema',
    'ema_state_dict',
    'ema_model',
    'ema',
)
# Prefix of the encoder in each layout. Momentum encoders have other prefixes and are not used. backbone: lightly,
# solo-learn, DINO, Barlow Twins, SimCLR; official: SimSiam's release; torchvision: timm as well.
ENCODER_PREFIXES = {
    'backbone': 'backbone.',
    'moco': 'encoder_q.',
    'moco_v3': 'base_encoder.',
    'official': 'encoder.',
    'torchvision': '',
    'model': 'model.',
    'net': 'net.',
}
SEQUENTIAL_NAMES = {
    '0': 'conv1',
    '1': 'bn1',
    '4': 'layer1',
    '5': 'layer2',
    '6': 'layer3',
    '7': 'layer4',
}  # lightly's children
# Prefixes of projector and predictor in other layouts.
HEAD_PREFIXES = (
    ('encoder.fc.', 'projector.'),
    ('projection_head.layers.', 'projector.'),
    ('prediction_head.layers.', 'predictor.'),
)


def convert_state_dict(content):
    """Convert the content of a file. Returns (layout, state, unused), or None for an unknown layout. state: tensors by
    our names, of the backbone and of heads that may be SimSiam's; unused: first parts of the unused keys, sorted."""
    state = find_tensors(content)
    for layout, prefix in ENCODER_PREFIXES.items():
        sequential = f'{prefix}4.0.conv1.weight' in state
        if f'{prefix}layer1.0.conv1.weight' not in state and not sequential:
            continue
        converted, unused = {}, set()
        for name, value in state.items():
            new = convert_backbone_key(name, prefix, sequential) or convert_head_key(name)
            if new:
                converted[new] = value
            else:
                unused.add(name.removeprefix(prefix).split('.')[0] if name.startswith(prefix) else name.split('.')[0])
        return layout, fold_projector_bias(converted), sorted(unused)
    return None


def find_tensors(content):
    """Return {name: tensor} of the state dict in a file's content, with the prefixes of wrappers removed."""
    while key := find_state_dict_key(content):
        content = content[key]
    items = content.items() if isinstance(content, dict) else ()
    return {WRAPPERS.sub('', str(name)): torch.as_tensor(value) for name, value in items if is_weight(value)}


def find_state_dict_key(content):
    """Return the key of a file's content, or of a part of it, under which the state dict is; None if there is none."""
    if not isinstance(content, dict):
        return None
    return next((key for key in STATE_DICT_KEYS if isinstance(content.get(key), dict) and content[key]), None)


def list_other_networks(content):
    """Return the keys of other state dicts in a file, such as an average of the weights (state_dict_ema, student)."""
    others = []
    while key := find_state_dict_key(content):
        for other, value in content.items():
            if other != key and any(weight.ndim > 1 for weight in find_tensors(value).values()):
                others.append(str(other))
        content = content[key]
    return others


def is_weight(value):
    """Whether a value is a tensor or a numeric array."""
    return isinstance(value, torch.Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in 'biuf')


def convert_backbone_key(name, prefix, sequential):
    """Return our name for a key of the encoder, or None for a key of a classifier, a head or another network."""
    if not name.startswith(prefix):
        return None
    first, _, rest = name.removeprefix(prefix).partition('.')
    if sequential:
        first = SEQUENTIAL_NAMES.get(first)
    layers = ('conv1', 'bn1', 'layer1', 'layer2', 'layer3', 'layer4')
    return f'backbone.{first}.{rest}' if first in layers else None


def convert_head_key(name):
    """Return our name (projector.N... or predictor.N...) for a key of a head, or None."""
    for converted, ours in HEAD_PREFIXES:
        name = ours + name.removeprefix(converted) if name.startswith(converted) else name
    return name if re.fullmatch(r'(projector|predictor)\.\d+\.\w+', name) else None


def fold_projector_bias(state):
    """Fold the bias of the projector's last layer into the running mean of the BN after it. The official release has
    such a bias, frozen; ours has none. A constant bias shifts the mean of the batch by its value."""
    for name in [name for name in state if re.fullmatch(r'projector\.\d+\.bias', name)]:
        number = int(name.split('.')[1])
        running_mean = f'projector.{number + 1}.running_mean'
        has_no_affine = f'projector.{number + 1}.weight' not in state
        if state[f'projector.{number}.weight'].ndim == 2 and has_no_affine and running_mean in state:
            state[running_mean] = state[running_mean] - state.pop(name)
    return state


def infer_architecture(state):
    """Infer options of config.py from the shapes of a state dict with our names: backbone, stem and, if it has heads,
    proj_layers, proj_dim and pred_dim. Options that the shapes do not determine are missing from the result."""
    options = {}
    counts = tuple(
        len({name.split('.')[2] for name in state if name.startswith(f'backbone.layer{i}.')}) for i in range(1, 5)
    )
    bottleneck = 'backbone.layer1.0.conv3.weight' in state
    for name, blocks in RESNET_BLOCKS.items():
        if (counts, bottleneck) == blocks:
            options['backbone'] = name
    stem = state.get('backbone.conv1.weight')
    if stem is not None and stem.ndim == 4:
        options['stem'] = 'cifar' if stem.shape[2] == 3 else 'imagenet'
    layers = [
        value for name, value in state.items() if re.fullmatch(r'projector\.\d+\.weight', name) and value.ndim == 2
    ]
    if layers:
        options |= {'proj_layers': len(layers), 'proj_dim': layers[-1].shape[0]}
    predictor = state.get('predictor.0.weight')
    if predictor is not None:
        options['pred_dim'] = predictor.shape[0]
    return options


def to_detectron2(state):
    """Convert a torchvision ResNet's state dict to detectron2's names: stem, res2 ... res5, shortcut, norm."""
    converted = {}
    for name, value in state.items():
        name = re.sub(r'^layer(\d)', lambda match: f'res{int(match[1]) + 1}', name)
        name = name if name.startswith('res') else f'stem.{name}'
        name = name.replace('downsample.0', 'shortcut').replace('downsample.1', 'shortcut.norm')
        converted[re.sub(r'\bbn(\d)', r'conv\1.norm', name)] = value
    return converted
