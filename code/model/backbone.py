"""Backbones: torchvision and timm networks without their classification layer, and a small ResNet for CPUs."""

import difflib
import functools

import torch
import torchvision
from torch import nn
from torchvision.models import regnet, resnet

WIDTHS = (16, 32, 64)  # channels of the small backbone's three stages
ONEDNN_BLOCK = 16  # channels that oneDNN processes at once with AVX-512


def make_backbone(name, stem, size, zero_init=True, channels=3):
    """Build a backbone with random weights. Returns (backbone, number of features d); the backbone maps
    N x C x size x size float images to N x d features.

    name: small, a torchvision classification network (resnet50, convnext_tiny, vit_b_16, ...) or timm/<name>. stem:
    'imagenet', the network as it is, or 'cifar', for ResNets a 3 x 3 convolution with stride 1 and no max-pool (paper,
    appendix D); small has a 3 x 3 convolution with stride 2 or 1. zero_init: initialize the weight of the last BN of
    each residual block to zero, as in the official release, instead of one. channels: C.
    Raises ValueError for an unknown network, or one that does not accept such images.
    """
    if name == 'small':
        backbone = tiny_resnet(1 if stem == 'cifar' else 2, channels)
    elif name.startswith('timm/'):
        backbone = build_timm_backbone(name.removeprefix('timm/'), size, channels)
    else:
        backbone = build_torchvision_backbone(name, size)
        if channels != 3:
            set_input_channels(backbone, channels)
    if stem == 'cifar' and name != 'small':
        use_cifar_stem(backbone, channels)
    for norm in find_last_bn_layers(backbone):
        nn.init.constant_(norm.weight, 0.0 if zero_init else 1.0)
    subsample_before_strided_1x1(backbone)
    return backbone, feature_dim(backbone, size, channels)


def find_last_bn_layers(network):
    """Yield the last BN of each residual block of a torchvision or timm ResNet or RegNet."""
    for block in network.modules():
        if isinstance(block, regnet.ResBottleneckBlock):
            yield block.f.c[1]
        elif isinstance(block, resnet.BasicBlock | resnet.Bottleneck) or hasattr(block, 'zero_init_last'):
            norm = getattr(block, 'bn3', getattr(block, 'bn2', getattr(getattr(block, 'conv3', None), 'bn', None)))
            if isinstance(norm, nn.BatchNorm2d):
                yield norm


def subsample_before_strided_1x1(network):
    """Subsample the input of 1 x 1 convolutions with stride > 1 and few channels, and set their stride to 1: the same
    function. On CPUs oneDNN computes their weight gradient with writes outside its memory if the input is channels_last
    (oneDNN issue 6035): training of RepVGG, MobileOne or FastViT crashed."""
    for module in network.modules():
        if not isinstance(module, nn.Conv2d) or module.in_channels >= ONEDNN_BLOCK or max(module.stride) == 1:
            continue
        if module.kernel_size == (1, 1) and module.padding in ((0, 0), 'valid'):
            module.register_forward_pre_hook(functools.partial(subsample, stride=module.stride))
            module.stride = (1, 1)


def subsample(_, inputs, stride):
    """Forward pre-hook: keep every stride-th row and column of N x C x H x W."""
    return (inputs[0][..., :: stride[0], :: stride[1]],)


def build_torchvision_backbone(name, size):
    """Build a torchvision classification network without the last layer of its classifier."""
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"it is none of torchvision's classification networks (the nearest is {near}), small, or timm/<name>"
        )
    network = construct_network(torchvision.models.get_model, name, size, **constructor_kwargs(name, size))
    last, classifier = [*network.named_children()][-1]
    setattr(network, last, remove_class_layer(classifier))
    return network


def set_input_channels(network, channels):
    """Replace the weights of a network's first convolution, made for three channels, with random weights for
    `channels`. Raises ValueError if the network has no such convolution."""
    first = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None or first.in_channels != 3 or first.groups != 1:
        raise ValueError(f'its first layer cannot be given {channels} channels')
    first.in_channels = channels
    first.weight = nn.Parameter(first.weight.new_empty(first.out_channels, channels, *first.kernel_size))
    nn.init.kaiming_normal_(first.weight, mode='fan_out', nonlinearity='relu')


def constructor_kwargs(name, size):
    """Return the keyword arguments of a torchvision network's constructor for images of size x size pixels."""
    if name in ('googlenet', 'inception_v3'):
        return {'aux_logits': False, 'init_weights': False}
    if name.startswith('vit_'):
        return {'image_size': size}
    return {'input_size': (size, size)} if name.startswith('maxvit_') else {}


def remove_class_layer(classifier):
    """Remove the classification layer of a torchvision classifier, and the dropout before it."""
    layers = [*classifier] if isinstance(classifier, nn.Sequential) else [classifier]
    pool = [nn.AdaptiveAvgPool2d(1)] if not any(isinstance(layer, nn.Linear) for layer in layers) else []  # SqueezeNet
    while layers and not isinstance(layers.pop(), nn.Linear | nn.Conv2d):
        pass
    while layers and isinstance(layers[-1], nn.Dropout):
        layers.pop()
    return nn.Sequential(*layers, *pool)


def timm_module():
    """Import timm. Raises ValueError if it is not installed."""
    try:
        import timm
    except ImportError:
        raise ValueError('it needs timm: pip3 install -r code/requirements-extra.txt') from None
    return timm


def build_timm_backbone(name, size, channels=3, **more):
    """Build a timm network without its classifier, for images of size x size pixels if it depends on their size. more:
    arguments of timm.create_model, such as pretrained=True; its exceptions are not converted."""
    timm = timm_module()
    if not name:
        raise ValueError('it names no network of timm: timm/<name>')
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=1, cutoff=0.0)[0]
        raise ValueError(f'timm has no such network; the nearest is timm/{near}')
    inputs = {} if channels == 3 else {'in_chans': channels}
    try:
        network = construct_network(timm.create_model, name, size, num_classes=0, img_size=size, **inputs)
        takes_size = True
    except TypeError:  # most networks accept any size and have no img_size argument
        try:
            network = construct_network(timm.create_model, name, size, num_classes=0, **inputs)
            takes_size = False
        except TypeError as error:
            raise ValueError(size_error_text(size, error)) from None
    if not more:
        return network
    sized = {'img_size': size} if takes_size else {}
    return timm.create_model(name, num_classes=0, **sized, **inputs, **more)


def construct_network(make, name, size, **more):
    """Call make(name, **more). Raises TypeError for an unknown argument, and ValueError for any other exception:
    networks raise various ones (ZeroDivisionError, ...) for sizes that they do not accept."""
    try:
        return make(name, **more)
    except TypeError:
        raise
    except Exception as error:
        raise ValueError(size_error_text(size, error)) from None


def first_line(error):
    """Return the first line of an exception's message, or its type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def size_error_text(size, error):
    return f'it does not accept images of {size} px ({first_line(error)})'


def feature_dim(backbone, size, channels=3):
    """Return the number of features, measured on a zero image. Raises ValueError if the output is not N x d."""
    backbone.eval()
    try:
        with torch.no_grad():
            features = backbone(torch.zeros(1, channels, size, size))
    except Exception as error:
        raise ValueError(size_error_text(size, error)) from None
    backbone.train()
    if features.ndim != 2:
        raise ValueError(f'its output is {tuple(features.shape)}, not one row of features per image')
    return features.shape[1]


def use_cifar_stem(backbone, channels=3):
    """Replace the stem of a torchvision ResNet with the one for 32-pixel images. Raises ValueError for other
    networks."""
    if not isinstance(backbone, resnet.ResNet):
        raise ValueError("--stem=cifar is for torchvision's ResNets; --stem=imagenet goes with every network")
    backbone.conv1 = nn.Conv2d(channels, 64, 3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(backbone.conv1.weight, mode='fan_out', nonlinearity='relu')
    backbone.maxpool = nn.Identity()


def tiny_resnet(stride, channels=3):
    """Build a residual network of three BasicBlocks for 32-pixel images, with 77 thousand parameters."""
    layers = [
        nn.Conv2d(channels, WIDTHS[0], 3, stride, 1, bias=False),
        nn.BatchNorm2d(WIDTHS[0]),
        nn.ReLU(inplace=True),
    ]
    before = WIDTHS[0]
    for width in WIDTHS:
        down = None
        if width != before:
            down = nn.Sequential(nn.Conv2d(before, width, 1, 2, bias=False), nn.BatchNorm2d(width))
        block = resnet.BasicBlock(before, width, 1 if down is None else 2, down)
        layers.append(block)
        before = width
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
    return network
