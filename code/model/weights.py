"""Pretrained weights of any network: from torchvision, from timm, or from a state dict in the network's own layout.

Weights come with the preprocessing that they were trained with. Every key of a state dict is loaded or reported as
unused; a state dict that does not fit is refused.
"""

import logging
import re
from dataclasses import dataclass

import torch
import torchvision
from torchvision.models import vision_transformer

from model.backbone import build_timm_backbone, first_line, timm_module

MAX_PREFIX_PARTS = 6  # parts of a common prefix (module.model.encoder. has three)
SHOWN_KEYS = 4  # keys of each side in an error message
OLD_DENSENET_NAME = re.compile(r'(denselayer\d+\.(?:norm|conv))\.([12]\.)')
# Networks whose weights are those of TensorFlow: torchvision sets transform_input, which turns ImageNet's mean and
# standard deviation into 0.5; here the images are normalized with 0.5 in the first place.
TENSORFLOW_NETWORKS = ('googlenet', 'inception_v3')
# If a file holds several networks (teacher and student, momentum encoder), the first of these prefixes is used.
PREFERRED = ('', 'backbone.', 'model.', 'encoder.', 'encoder_q.', 'base_encoder.', 'teacher.backbone.', 'teacher.')


@dataclass
class Weights:
    """Weights from torchvision or timm. state: a state dict; source: a name to print."""

    state: dict
    source: str


def average_weights(start, trained, share):
    """Average two state dicts of one network: share x start + (1 - share) x trained. Values that are not floating point
    are taken from `trained`. Wortsman et al., arXiv 2109.01903, equation 1."""
    return {
        name: torch.lerp(value.float(), start[name].to(value.device).float(), share).to(value.dtype)
        if value.is_floating_point()
        else value
        for name, value in trained.items()
    }


def copy_weights(network, state):
    """Copy the tensors of a state dict into a network that has these keys and shapes. Unlike load_state_dict it does
    not need the version numbers that a state dict of plain values lacks (MNASNet)."""
    own = network.state_dict()
    with torch.no_grad():
        for name, value in state.items():
            own[name].copy_(value)


def is_off_the_shelf(name):
    """Whether a value of --init_from or --ckpt_name names weights of torchvision or timm, not a file or a run."""
    return name in ('imagenet', 'timm') or name.startswith('timm/')


def fetch_torchvision(backbone, size, progress=False):
    """Download torchvision's ImageNet weights of a network: version IMAGENET1K_V1, or the default if it does not exist.
    size: of the images, in pixels; position embeddings are interpolated to it. Returns Weights. Raises ValueError if
    torchvision has no weights of this network, OSError if the download fails."""
    try:
        versions = torchvision.models.get_model_weights(backbone)
    except ValueError:
        raise ValueError(f'torchvision has no weights for --backbone={backbone}') from None
    weights = getattr(versions, 'IMAGENET1K_V1', versions.DEFAULT)
    state = weights.get_state_dict(progress=progress, check_hash=True)
    return Weights(convert_with_torchvision(backbone, size, state), f'torchvision {weights}')


def fetch_timm(name, size):
    """Download timm's weights of a network, name or name.tag (resnet50.a1_in1k), for images of size x size pixels; timm
    interpolates position embeddings. Returns Weights. Raises ValueError if timm has no such weights."""
    config = timm_config(name)
    if config is None or not config.has_weights:
        raise ValueError(f'timm has no weights for {name}')
    logging.getLogger('huggingface_hub').setLevel(logging.ERROR)  # it logs every retry
    network = build_timm_backbone(name, size, pretrained=True)
    tag = f'timm/{name}' if '.' in name else f'timm/{name}.{config.tag}'
    return Weights(network.state_dict(), tag)


def convert_with_torchvision(backbone, size, tensors):
    """Convert tensors of a torchvision network as torchvision does when it loads them: the old names of DenseNet's
    layers (denselayer1.norm.1), and a ViT's position embedding for images of size x size pixels."""
    if backbone.startswith('densenet'):
        return {OLD_DENSENET_NAME.sub(r'\1\2', name): value for name, value in tensors.items()}
    return resize_vit_positions(backbone, size, tensors)


def resize_vit_positions(backbone, size, tensors):
    """Interpolate the position embedding of a torchvision ViT in `tensors` to images of size x size pixels. Returns the
    tensors; other networks' unchanged."""
    key = next((key for key in tensors if key.endswith('encoder.pos_embedding')), None)
    if not backbone.startswith('vit_') or key is None:
        return tensors
    prefix = key.removesuffix('encoder.pos_embedding')
    patch = int(backbone.split('_')[2])
    state = {'encoder.pos_embedding': tensors[key]}
    resized = vision_transformer.interpolate_embeddings(size, patch, state)
    return {**tensors, f'{prefix}encoder.pos_embedding': resized['encoder.pos_embedding']}


def timm_config(name):
    """Return timm's pretrained_cfg of a network (name or name.tag), or None if timm does not know it. Raises ValueError
    for an unknown tag."""
    try:
        return timm_module().get_pretrained_cfg(name)
    except RuntimeError:
        raise ValueError(f'timm has no weights for {name}') from None


def find_preprocessing(backbone):
    """Return the preprocessing that a network's usual weights were trained with, as options: {'mean', 'std',
    'image_size', 'crop_ratio', 'interpolation'}; empty if unknown."""
    if backbone.startswith('timm/'):
        config = timm_config(backbone.removeprefix('timm/'))
        return preprocessing_from_timm_config(config) if config else {}
    try:
        versions = torchvision.models.get_model_weights(backbone)
    except ValueError:
        return {}
    preprocessing = preprocessing_from_transforms(getattr(versions, 'IMAGENET1K_V1', versions.DEFAULT).transforms())
    half = {'mean': '0.5,0.5,0.5', 'std': '0.5,0.5,0.5'}
    return {**preprocessing, **half} if backbone in TENSORFLOW_NETWORKS else preprocessing


def preprocessing_from_transforms(transforms):
    """find_preprocessing from torchvision's evaluation transforms."""
    return preprocessing_options(
        transforms.mean,
        transforms.std,
        transforms.crop_size[0],
        transforms.crop_size[0] / transforms.resize_size[0],
        transforms.interpolation.value,
    )


def preprocessing_from_timm_config(config):
    """find_preprocessing from timm's pretrained_cfg."""
    return preprocessing_options(config.mean, config.std, config.input_size[-1], config.crop_pct, config.interpolation)


def preprocessing_from_timm_folder(config, backbone):
    """find_preprocessing from the pretrained_cfg of a folder that timm or `export --format=timm` wrote; what it lacks
    is that of the network's usual weights."""
    usual = timm_config(backbone.removeprefix('timm/'))
    merged = {
        **(usual.to_dict() if usual else {}),
        **{key: value for key, value in config.items() if value is not None},
    }
    keys = 'mean', 'std', 'input_size', 'crop_pct', 'interpolation'
    if not {*keys} <= merged.keys():
        return {}
    mean, std, sides, ratio, interpolation = (merged[key] for key in keys)
    return preprocessing_options(mean, std, sides[-1], ratio, interpolation)


def preprocessing_options(mean, std, size, ratio, interpolation):
    """Convert preprocessing values to options of config.Config."""
    return {
        'mean': ','.join(f'{value:g}' for value in mean),
        'std': ','.join(f'{value:g}' for value in std),
        'image_size': size,
        'crop_ratio': round(min(1.0, ratio), 4),
        'interpolation': 'bicubic' if interpolation == 'bicubic' else 'bilinear',
    }


def match_keys(network, tensors, resize=None):
    """Match the tensors of a file to a network under any common prefix. network: its state dict; tensors: {name:
    tensor}; resize: function that converts a state dict with the network's names to its shapes (timm's interpolation of
    position embeddings), or None. Returns (state, unused); unused: first parts of the unused names, sorted.

    The counters num_batches_tracked may be missing. Raises ValueError, with the first keys of both sides, if no prefix
    gives every weight of the network in its shape.
    """
    needed = [name for name in network if not name.endswith('num_batches_tracked')]
    prefixes = {key.removesuffix(needed[0]) for key in tensors if key.endswith(needed[0])}
    named = [prefix for prefix in prefixes if all(prefix + name in tensors for name in needed)]
    fitting = [
        prefix for prefix in named if all(has_fitting_shape(tensors[prefix + name], network[name]) for name in needed)
    ]
    if not (fitting or named and resize):
        raise ValueError(describe_mismatch(network, needed, tensors))
    order = [*PREFERRED, *sorted(prefixes - {*PREFERRED})]
    prefix = min(fitting or named, key=order.index)
    state = {name: tensors.get(prefix + name, value) for name, value in network.items()}
    used = {prefix + name for name in network}
    unused = [key.removeprefix(prefix) for key in tensors if key not in used]
    if blocks := find_missing_blocks(network, unused):
        raise ValueError(f'it is of a deeper network: it has {join_first_keys(blocks)}, which this network has not')
    if parts := find_parts_of_other_network(network, tensors, prefix):
        raise ValueError(f'it is of another network: it has {join_first_keys(parts)}, which this network has not')
    if not fitting:
        try:
            state = resize(state)
        except ValueError:
            raise ValueError(describe_mismatch(network, needed, tensors)) from None
    return state, sorted({shorten_key(key, network) for key in unused})


def shorten_key(key, network):
    """Shorten a key to its first part that no key of the network begins with: head.fc if the network has head.norm."""
    parts = key.split('.')
    starts = ('.'.join(parts[:count]) for count in range(1, len(parts)))
    return next((start for start in starts if not any(name.startswith(f'{start}.') for name in network)), key)


def find_missing_blocks(network, unused):
    """Return the blocks (layer3.4) of unused keys that continue a sequence of blocks of the network, sorted. A
    classifier's last layer (classifier.6.weight) is no block: it has no layers of its own."""
    block = re.compile(r'\.\d+(?=\.\w+\.)')
    sequences = {name[: match.start()] for name in network for match in block.finditer(name)}
    blocks = {
        key[: match.end()] for key in unused for match in block.finditer(key) if key[: match.start()] in sequences
    }
    return sorted(one for one in blocks if not any(name.startswith(f'{one}.') for name in network))


def find_parts_of_other_network(network, tensors, prefix):
    """Return the keys of a file under this prefix that the network has not, and without which its features would be
    others, sorted: of layers inside a block that the network has (squeeze and excitation, layer scale), and of tokens
    that a transformer attends to. Buffers that are computed from the size, such as attention masks, do not count."""
    block = re.compile(r'\.\d+\.')
    blocks = {name[: match.end()] for name in network for match in block.finditer(name)}
    found = []
    for name, tensor in tensors.items():
        key = name.removeprefix(prefix)
        if not name.startswith(prefix) or key in network:
            continue
        is_buffer = not tensor.is_floating_point() or key.endswith('attn_mask')
        inside = any(key[: match.end()] in blocks for match in block.finditer(key))
        is_token = re.fullmatch(r'(reg|register|storage|dist|cls)_tokens?', key)
        if is_token or inside and not is_buffer:
            found.append(key)
    return sorted(found)


def describe_mismatch(network, needed, tensors):
    """Describe why no prefix of `tensors` gives the weights `needed` of a network: the first keys of both sides, and
    what is missing or has another shape under the prefix that has most of them."""
    tails = [(key, '.'.join(key.split('.')[i:])) for key in tensors for i in range(MAX_PREFIX_PARTS)]
    prefixes = {key.removesuffix(tail) for key, tail in tails if tail in network} or {''}
    prefix = max(prefixes, key=lambda one: sum(one + name in tensors for name in needed))
    present = [name for name in needed if prefix + name in tensors]
    missing = [name for name in needed if prefix + name not in tensors]
    wrong = [name for name in present if not has_fitting_shape(tensors[prefix + name], network[name])]
    parts = [f'its keys begin with {join_first_keys(tensors)}, and the network needs {join_first_keys(needed)}']
    if present and missing:
        parts.append(f'{len(missing)} of {len(needed)} weights are missing, such as {join_first_keys(missing)}')
    if wrong:
        shapes = f'{tuple(tensors[prefix + wrong[0]].shape)} in place of {tuple(network[wrong[0]].shape)}'
        hint = channels_hint(network, prefix, tensors)
        parts.append(f'{len(wrong)} have another shape, such as {wrong[0]}: {shapes}{hint}')
    return '; '.join(parts)


def channels_hint(network, prefix, tensors):
    """Return a hint if the first convolution of `tensors` is for another number of channels than the network's."""
    for name, expected in network.items():
        value = tensors.get(prefix + name)
        if value is not None and value.ndim == 4:
            count, same = value.shape[1], value.shape[2:] == expected.shape[2:]
            other = same and count != expected.shape[1] and value.shape[0] == expected.shape[0]
            return f' (weights for {count} channels: --channels={"1" if count == 1 else f"1-{count}"})' if other else ''
    return ''


def has_fitting_shape(value, expected):
    """Whether a tensor has the expected shape, or that of a first layer for three channels."""
    return value.shape == expected.shape or is_for_three(value, expected)


def is_for_three(value, expected):
    """Whether `value` is a convolution for three input channels that otherwise has the shape of `expected`."""
    shapes = value.shape, expected.shape
    return (
        all(len(each) == 4 for each in shapes)
        and value.shape[1] == 3 != expected.shape[1]
        and all(value.shape[axis] == expected.shape[axis] for axis in (0, 2, 3))
    )


def adapt_channels(network, state):
    """Adapt the first layer in `state`, made for three channels, to the channels of `network` (a state dict)."""
    return {
        name: adapt_first_layer(value, network[name].shape[1])
        if name in network and is_for_three(value, network[name])
        else value
        for name, value in state.items()
    }


def adapt_first_layer(weight, channels):
    """Convert a convolution's weights, D x 3 x K x K, to `channels` input channels: for one channel their sum, for more
    they are repeated and multiplied by 3 / channels, so that the outputs keep their scale (timm's adapt_input_conv)."""
    weight = weight.float()
    if channels == 1:
        return weight.sum(1, keepdim=True)
    return weight.repeat(1, -(-channels // 3), 1, 1)[:, :channels] * (3 / channels)


def join_first_keys(names):
    return ', '.join([*names][:SHOWN_KEYS]) or 'none'


def convert_with_timm(name, size, tensors):
    """Convert tensors with timm's own checkpoint filters (another image size, the authors' release) to the state dict
    of timm's network `name`. Raises ValueError if they do not fit."""
    config = timm_config(name)
    heads = config.classifier if config else ()
    heads = tuple(f'{head}.' for head in ((heads,) if isinstance(heads, str) else heads or ()))
    body = {key: value for key, value in tensors.items() if not key.startswith(heads or ('\0',))}
    overlay = {'state_dict': body, 'num_classes': 0, 'custom_load': False}
    try:
        return build_timm_backbone(name, size, pretrained=True, pretrained_cfg_overlay=overlay).state_dict()
    except Exception as error:  # timm's filters raise various types
        raise ValueError(first_line(error)[:200]) from None
