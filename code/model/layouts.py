"""State dicts of other tools, to and from ours: names, and what the shapes say of the architecture.

Every key of a file is accounted for: it is translated, or left out by name (a classifier, a momentum encoder, a
queue), or it stands as it is and the strict load_state_dict that follows complains of it.
"""

import re

BLOCKS = {  # residual blocks of the four stages, and whether they are bottlenecks
    'resnet18': ((2, 2, 2, 2), False),
    'resnet34': ((3, 4, 6, 3), False),
    'resnet50': ((3, 4, 6, 3), True),
    'resnet101': ((3, 4, 23, 3), True),
}
FROZEN_BIAS = 'projector.6.bias'  # the official release's; see from_official


def read_layout(content):
    """(layout, state) of what torch.load gave: 'official', 'moco' or 'torchvision', state with our names; or None.

    official: SimSiam's release, backbone, projector and predictor. moco: encoder_q of a MoCo checkpoint, the backbone
    alone. torchvision: a ResNet's own state dict, perhaps under 'state_dict' or 'model'. state is a dict of tensors.
    """
    if not isinstance(content, dict):
        return None
    state = next((content[key] for key in ('state_dict', 'model') if isinstance(content.get(key), dict)), content)
    state = {str(name).removeprefix('module.'): value for name, value in state.items() if hasattr(value, 'shape')}
    if 'encoder_q.conv1.weight' in state:
        return 'moco', from_moco(state)
    if 'encoder.conv1.weight' in state:
        return 'official', from_official(state)
    if 'conv1.weight' in state:
        heads = ('fc.weight', 'fc.bias')
        return 'torchvision', {f'backbone.{name}': value for name, value in state.items() if name not in heads}
    return None


def from_official(state):
    """encoder.fc.N is the projector. Its last layer's frozen bias, which ours has not, goes into the BN after it: the
    batch's mean, and so the running one, is higher by just this bias."""
    ours = {}
    for name, value in state.items():
        name = name.replace('encoder.fc.', 'projector.', 1).replace('encoder.', 'backbone.', 1)
        ours[name] = value
    last = re.sub(r'(\d+)\.bias', lambda match: f'{int(match[1]) + 1}.running_mean', FROZEN_BIAS)
    if FROZEN_BIAS in ours and last in ours and ours[last].shape == ours[FROZEN_BIAS].shape:
        ours[last] = ours[last] - ours.pop(FROZEN_BIAS)
    return ours


def from_moco(state):
    """The query encoder without its head; the key encoder and the queue are of no use after the pretraining."""
    left_out = ('encoder_k.', 'encoder_q.fc.', 'queue')
    return {
        name.replace('encoder_q.', 'backbone.', 1): value
        for name, value in state.items()
        if not name.startswith(left_out)
    }


def architecture(state):
    """The options of config.py that a state with our names settles by its shapes: backbone, stem, and where it has
    heads proj_layers, proj_dim and pred_dim. What cannot be told is left out."""
    known = {}
    counts = tuple(len({name.split('.')[2] for name in state if name.startswith(f'backbone.layer{i}.')})
                   for i in range(1, 5))  # fmt: skip
    bottleneck = 'backbone.layer1.0.conv3.weight' in state
    for name, blocks in BLOCKS.items():
        if (counts, bottleneck) == blocks:
            known['backbone'] = name
    stem = state.get('backbone.conv1.weight')
    if stem is not None and stem.ndim == 4:
        known['stem'] = 'cifar' if stem.shape[2] == 3 else 'imagenet'
    layers = [value for name, value in state.items()
              if re.fullmatch(r'projector\.\d+\.weight', name) and value.ndim == 2]  # fmt: skip
    if layers:
        known |= {'proj_layers': len(layers), 'proj_dim': layers[-1].shape[0]}
    predictor = state.get('predictor.0.weight')
    if predictor is not None:
        known['pred_dim'] = predictor.shape[0]
    return known


def to_detectron2(state):
    """A torchvision ResNet's state dict by the names of detectron2's: stem, res2 ... res5, shortcut, norm."""
    theirs = {}
    for name, value in state.items():
        name = re.sub(r'^layer(\d)', lambda match: f'res{int(match[1]) + 1}', name)
        name = name if name.startswith('res') else f'stem.{name}'
        name = name.replace('downsample.0', 'shortcut').replace('downsample.1', 'shortcut.norm')
        theirs[re.sub(r'\bbn(\d)', r'conv\1.norm', name)] = value
    return theirs
