"""State dicts of other tools, to and from ours: names, and what the shapes say of the architecture.

Every key of a file is accounted for: it is translated, or left out by name (a classifier, a momentum encoder, a queue,
the heads of another method), or it stands as it is and the strict load_state_dict that follows complains of it.
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
# Where in a file the weights are, the first that is there: of a teacher and a student DINO judges the teacher.
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
    'weights',
)
# The encoder of each layout by its prefix; a momentum encoder has another and is not looked for. backbone: of lightly,
# solo-learn, DINO, Barlow Twins, SimCLR; official: SimSiam's release; torchvision: timm's too.
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
# Heads by other names than ours.
HEAD_PREFIXES = (
    ('encoder.fc.', 'projector.'),
    ('projection_head.layers.', 'projector.'),
    ('prediction_head.layers.', 'predictor.'),
)


def convert_state_dict(content):
    """(layout, state, left out) of what a file held, or None. state: a dict of tensors by our names, the backbone's and
    those heads that may be a SimSiam's. left out: the beginnings of the keys that are not used."""
    state = find_tensors(content)
    for layout, prefix in ENCODER_PREFIXES.items():
        sequential = f'{prefix}4.0.conv1.weight' in state
        if f'{prefix}layer1.0.conv1.weight' not in state and not sequential:
            continue
        ours, left = {}, set()
        for name, value in state.items():
            new = convert_backbone_key(name, prefix, sequential) or convert_head_key(name)
            if new:
                ours[new] = value
            else:
                left.add(name.removeprefix(prefix).split('.')[0] if name.startswith(prefix) else name.split('.')[0])
        return layout, fold_projector_bias(ours), sorted(left)
    return None


def find_tensors(content):
    """The tensors of a file by their names without wrappers, from wherever in it they are."""
    while isinstance(content, dict):
        inner = next((content[key] for key in STATE_DICT_KEYS if isinstance(content.get(key), dict)), None)
        if inner is None:
            break
        content = inner
    items = content.items() if isinstance(content, dict) else ()
    return {WRAPPERS.sub('', str(name)): torch.as_tensor(value) for name, value in items if is_weight(value)}


def is_weight(value):
    """A tensor, or an array of numbers."""
    return isinstance(value, torch.Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in 'biuf')


def convert_backbone_key(name, prefix, sequential):
    """Our name of an encoder's key; None of a classifier's, a head's, or of what is not in it."""
    if not name.startswith(prefix):
        return None
    first, _, rest = name.removeprefix(prefix).partition('.')
    if sequential:
        first = SEQUENTIAL_NAMES.get(first)
    known = ('conv1', 'bn1', 'layer1', 'layer2', 'layer3', 'layer4')
    return f'backbone.{first}.{rest}' if first in known else None


def convert_head_key(name):
    """Our name of a key of a head like SimSiam's: projector.N or predictor.N."""
    for converted, ours in HEAD_PREFIXES:
        name = ours + name.removeprefix(converted) if name.startswith(converted) else name
    return name if re.fullmatch(r'(projector|predictor)\.\d+\.\w+', name) else None


def fold_projector_bias(state):
    """The official release keeps the bias of the projector's last layer, frozen; ours has none. It goes into the BN
    after it: the batch's mean, and so the running one, is higher by just this bias."""
    for name in [name for name in state if re.fullmatch(r'projector\.\d+\.bias', name)]:
        number = int(name.split('.')[1])
        after = f'projector.{number + 1}.running_mean'
        last = f'projector.{number + 1}.weight' not in state  # no affine
        if state[f'projector.{number}.weight'].ndim == 2 and last and after in state:
            state[after] = state[after] - state.pop(name)
    return state


def infer_architecture(state):
    """The options of config.py that a state with our names settles by its shapes: backbone, stem, and where it has
    heads proj_layers, proj_dim and pred_dim. What cannot be told is left out."""
    known = {}
    counts = tuple(
        len({name.split('.')[2] for name in state if name.startswith(f'backbone.layer{i}.')}) for i in range(1, 5)
    )
    bottleneck = 'backbone.layer1.0.conv3.weight' in state
    for name, blocks in RESNET_BLOCKS.items():
        if (counts, bottleneck) == blocks:
            known['backbone'] = name
    stem = state.get('backbone.conv1.weight')
    if stem is not None and stem.ndim == 4:
        known['stem'] = 'cifar' if stem.shape[2] == 3 else 'imagenet'
    layers = [
        value for name, value in state.items() if re.fullmatch(r'projector\.\d+\.weight', name) and value.ndim == 2
    ]
    if layers:
        known |= {'proj_layers': len(layers), 'proj_dim': layers[-1].shape[0]}
    predictor = state.get('predictor.0.weight')
    if predictor is not None:
        known['pred_dim'] = predictor.shape[0]
    return known


def to_detectron2(state):
    """A torchvision ResNet's state dict by the names of detectron2's: stem, res2 ... res5, shortcut, norm."""
    converted = {}
    for name, value in state.items():
        name = re.sub(r'^layer(\d)', lambda match: f'res{int(match[1]) + 1}', name)
        name = name if name.startswith('res') else f'stem.{name}'
        name = name.replace('downsample.0', 'shortcut').replace('downsample.1', 'shortcut.norm')
        converted[re.sub(r'\bbn(\d)', r'conv\1.norm', name)] = value
    return converted
