"""Pretrained weights of any network: torchvision's and timm's own, or a state dict in the network's layout.

Weights come with the preprocessing that they were trained with. Every key of a state dict is accounted for: it is
loaded, or it is named as left out, or the whole is refused.
"""

import logging
from dataclasses import dataclass, field

import torch
import torchvision
from torchvision.models import vision_transformer

from model.backbone import first_line, from_timm, timm_module

FIRST = 4  # keys of each side that an error shows
# Of several networks in one file (a teacher and its student, a momentum encoder) the first of these is taken.
PREFERRED = ('', 'backbone.', 'model.', 'encoder.', 'encoder_q.', 'base_encoder.', 'teacher.backbone.', 'teacher.')


@dataclass
class Weights:
    """The weights of a backbone. state: {name in the network: tensor}; source: what they are called, for people;
    preprocessing: options that come with them (find_preprocessing); left_out: what of a file is not used; license: ''
    where the source does not say it."""

    state: dict
    source: str
    preprocessing: dict
    left_out: list = field(default_factory=list)
    license: str = ''


def average_weights(start, trained, share):
    """State dict of `share` of the weights `start` and the rest of `trained`, two of one network; what is no floating
    point is `trained`'s. Wortsman et al., arXiv 2109.01903, equation 1."""
    return {
        name: torch.lerp(value.float(), start[name].to(value.device).float(), share).to(value.dtype)
        if value.is_floating_point()
        else value
        for name, value in trained.items()
    }


def is_off_the_shelf(name):
    """Whether an --init_from or --ckpt_name means weights of torchvision or timm, not a file or a run."""
    return name in ('imagenet', 'timm') or name.startswith('timm/')


def fetch_torchvision(backbone, size, progress=False):
    """torchvision's weights of ImageNet for one of its classification networks: the first version (IMAGENET1K_V1),
    or the default where there is no first. size: of the images, in pixels, to which position embeddings are fitted.
    Raises ValueError where torchvision has none, OSError where they cannot be fetched."""
    try:
        versions = torchvision.models.get_model_weights(backbone)
    except ValueError:
        raise ValueError(f'torchvision has no weights for --backbone={backbone}') from None
    weights = getattr(versions, 'IMAGENET1K_V1', versions.DEFAULT)
    state = weights.get_state_dict(progress=progress, check_hash=True)
    preprocessing = preprocessing_from_transforms(weights.transforms())
    if backbone.startswith('vit_') and size != preprocessing['image_size']:
        state = vision_transformer.interpolate_embeddings(size, int(backbone.split('_')[2]), state)
    return Weights(state, f'torchvision {weights}', preprocessing, license='see torchvision: trained on ImageNet-1k')


def fetch_timm(name, size):
    """timm's own weights of `name`, perhaps with a tag (resnet50.a1_in1k), for images of size x size pixels; timm
    fetches them, and fits position embeddings to the size. Raises ValueError where timm has none."""
    known = timm_config(name)
    if known is None or not known.has_weights:
        raise ValueError(f'timm has no weights for {name}')
    logging.getLogger('huggingface_hub').setLevel(logging.ERROR)  # it tells of every try
    network = from_timm(name, size, pretrained=True)
    tag = f'timm/{name}' if '.' in name else f'timm/{name}.{known.tag}'
    return Weights(network.state_dict(), tag, preprocessing_from_timm_config(known), license=known.license or '')


def timm_config(name):
    """timm's pretrained_cfg of a network, perhaps with a tag; None of an unknown network. Raises ValueError for an
    unknown tag."""
    try:
        return timm_module().get_pretrained_cfg(name)
    except RuntimeError:
        raise ValueError(f'timm has no weights for {name}') from None


def find_preprocessing(backbone):
    """The options that a network's usual weights were trained with: {'mean', 'std', 'image_size', 'crop_ratio',
    'interpolation'}; empty where nothing is known."""
    if backbone.startswith('timm/'):
        known = timm_config(backbone.removeprefix('timm/'))
        return preprocessing_from_timm_config(known) if known else {}
    try:
        versions = torchvision.models.get_model_weights(backbone)
    except ValueError:
        return {}
    return preprocessing_from_transforms(getattr(versions, 'IMAGENET1K_V1', versions.DEFAULT).transforms())


def preprocessing_from_transforms(transforms):
    """find_preprocessing, from torchvision's transforms of evaluation."""
    return preprocessing_options(
        transforms.mean,
        transforms.std,
        transforms.crop_size[0],
        transforms.crop_size[0] / transforms.resize_size[0],
        transforms.interpolation.value,
    )


def preprocessing_from_timm_config(known):
    """find_preprocessing, from timm's pretrained_cfg."""
    return preprocessing_options(known.mean, known.std, known.input_size[-1], known.crop_pct, known.interpolation)


def preprocessing_from_timm_folder(known):
    """find_preprocessing, from the pretrained_cfg in a folder that timm, or export, wrote."""
    size = known['input_size'][-1]
    return preprocessing_options(known['mean'], known['std'], size, known['crop_pct'], known['interpolation'])


def preprocessing_options(mean, std, size, ratio, interpolation):
    """Preprocessing as options of config.Config."""
    return {
        'mean': ','.join(f'{value:g}' for value in mean),
        'std': ','.join(f'{value:g}' for value in std),
        'image_size': size,
        'crop_ratio': round(min(1.0, ratio), 4),
        'interpolation': 'bicubic' if interpolation == 'bicubic' else 'bilinear',
    }


def match_keys(network, tensors):
    """(state, left out) of a file's tensors that are a network's, under whatever prefix. network: its state dict;
    tensors: {name: tensor}. left out: the first parts of the names that are not used.

    Counters of batches may be missing. Raises ValueError, with the first keys of both sides, where there is no prefix
    under which every weight of the network stands in its shape.
    """
    needed = [name for name in network if not name.endswith('num_batches_tracked')]
    prefixes = {key.removesuffix(needed[0]) for key in tensors if key.endswith(needed[0])}
    fitting = [
        prefix
        for prefix in prefixes
        if all(prefix + name in tensors and has_fitting_shape(tensors[prefix + name], network[name]) for name in needed)
    ]
    if not fitting:
        raise ValueError(
            f'its keys begin with {join_first_keys(tensors)}, and the network wants {join_first_keys(needed)}'
            + describe_shape_mismatch(network, tensors)
        )
    prefix = min(fitting, key=lambda name: (PREFERRED.index(name) if name in PREFERRED else len(PREFERRED), name))
    state = {name: tensors.get(prefix + name, value) for name, value in network.items()}
    used = {prefix + name for name in network}
    left = {key.removeprefix(prefix).split('.')[0] for key in tensors if key not in used}
    return state, sorted(left)


def has_fitting_shape(value, wanted):
    """Whether a tensor of a file has the shape of the network's, or that of a first layer for three channels."""
    return value.shape == wanted.shape or is_for_three(value, wanted)


def is_for_three(value, wanted):
    """Whether both are convolutions that differ in their input channels alone, and the first has three."""
    shapes = value.shape, wanted.shape
    return (
        all(len(each) == 4 for each in shapes)
        and value.shape[1] == 3 != wanted.shape[1]
        and all(value.shape[axis] == wanted.shape[axis] for axis in (0, 2, 3))
    )


def adapt_channels(network, state):
    """State dict `state` with its first layer for three channels made one for those of the network (its state dict)."""
    return {
        name: adapt_first_layer(value, network[name].shape[1])
        if name in network and is_for_three(value, network[name])
        else value
        for name, value in state.items()
    }


def adapt_first_layer(weight, channels):
    """A convolution's weights for `channels` input channels from those for three, D x 3 x K x K: of one the sum over
    the three; of more they are repeated, times 3 / channels, so that the outputs stay as large. (timm's rule,
    adapt_input_conv.)"""
    weight = weight.float()
    if channels == 1:
        return weight.sum(1, keepdim=True)
    return weight.repeat(1, -(-channels // 3), 1, 1)[:, :channels] * (3 / channels)


def join_first_keys(names):
    return ', '.join([*names][:FIRST]) or 'none'


def describe_shape_mismatch(network, tensors):
    """The first tensor that both sides have in different shapes, in words; '' where there is none."""
    for name, value in network.items():
        if name in tensors and tensors[name].shape != value.shape:
            return f'; {name} is {tuple(tensors[name].shape)} in place of {tuple(value.shape)}'
    return ''


def convert_with_timm(name, size, tensors):
    """The state dict of timm's network `name` from tensors in a layout that timm itself converts: of another image
    size, or of the authors' own release. Raises ValueError where they do not fit."""
    known = timm_config(name)
    heads = known.classifier if known else ()
    heads = tuple(f'{head}.' for head in ((heads,) if isinstance(heads, str) else heads or ()))
    body = {key: value for key, value in tensors.items() if not key.startswith(heads or ('\0',))}
    overlay = {'state_dict': body, 'num_classes': 0, 'custom_load': False}
    try:
        return from_timm(name, size, pretrained=True, pretrained_cfg_overlay=overlay).state_dict()
    except Exception as error:  # of other people's converters
        raise ValueError(first_line(error)[:200]) from None
