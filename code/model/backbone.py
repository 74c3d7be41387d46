"""The encoders: networks of torchvision and of timm without their classifiers, and a small one for CPUs."""

import difflib

import torch
import torchvision
from torch import nn
from torchvision.models import regnet, resnet

WIDTHS = (16, 32, 64)  # channels of the small backbone's three stages


def make_backbone(name, stem, size, zero_init=True, channels=3):
    """(backbone, its number of features d). backbone: N x C x size x size float to N x d.

    name: small, a classification network of torchvision (resnet50, convnext_tiny, vit_b_16, ...) or timm/<name>. stem:
    'imagenet', the network as it is, or of a ResNet 'cifar', 3 x 3 stride 1 without max-pool (paper, appendix D); small
    has 3 x 3 for both, with stride 2 or 1. zero_init: the last BN of every residual block starts at zero, as in the
    official release, and not at one. channels: C, of the images.
    Raises ValueError where there is no such network, or it does not take such images.
    """
    if name == 'small':
        backbone = tiny_resnet(1 if stem == 'cifar' else 2, channels)
    elif name.startswith('timm/'):
        backbone = from_timm(name.removeprefix('timm/'), size, channels)
    else:
        backbone = from_torchvision(name, size)
        if channels != 3:
            set_input_channels(backbone, channels)
    if stem == 'cifar' and name != 'small':
        use_cifar_stem(backbone, channels)
    for norm in find_last_bn_layers(backbone):
        nn.init.constant_(norm.weight, 0.0 if zero_init else 1.0)
    return backbone, feature_dim(backbone, size, channels)


def find_last_bn_layers(network):
    """The last BN of each residual block, of torchvision's ResNets and RegNets and of timm's."""
    for block in network.modules():
        if isinstance(block, regnet.ResBottleneckBlock):
            yield block.f.c[1]
        elif isinstance(block, resnet.BasicBlock | resnet.Bottleneck) or hasattr(block, 'zero_init_last'):
            norm = getattr(block, 'bn3', getattr(block, 'bn2', getattr(getattr(block, 'conv3', None), 'bn', None)))
            if isinstance(norm, nn.BatchNorm2d):
                yield norm


def from_torchvision(name, size):
    """A classification network of torchvision, its classifier's last layer taken off."""
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
    """Give a network's first convolution, for three channels, weights for another number, drawn anew. Raises
    ValueError where there is none."""
    first = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None or first.in_channels != 3 or first.groups != 1:
        raise ValueError(f'its first layer cannot be given {channels} channels')
    first.in_channels = channels
    first.weight = nn.Parameter(first.weight.new_empty(first.out_channels, channels, *first.kernel_size))
    nn.init.kaiming_normal_(first.weight, mode='fan_out', nonlinearity='relu')


def constructor_kwargs(name, size):
    """The options that a network of torchvision is made with for images of size x size pixels."""
    if name in ('googlenet', 'inception_v3'):
        return {'aux_logits': False, 'init_weights': False}
    if name.startswith('vit_'):
        return {'image_size': size}
    return {'input_size': (size, size)} if name.startswith('maxvit_') else {}


def remove_class_layer(classifier):
    """A torchvision classifier up to the layer that names the classes, and the dropout before it."""
    layers = [*classifier] if isinstance(classifier, nn.Sequential) else [classifier]
    pool = [nn.AdaptiveAvgPool2d(1)] if not any(isinstance(layer, nn.Linear) for layer in layers) else []  # SqueezeNet
    while layers and not isinstance(layers.pop(), nn.Linear | nn.Conv2d):
        pass
    while layers and isinstance(layers[-1], nn.Dropout):
        layers.pop()
    return nn.Sequential(*layers, *pool)


def timm_module():
    """timm, imported. Raises ValueError where it is not installed."""
    try:
        import timm
    except ImportError:
        raise ValueError('it needs timm: pip3 install -r code/requirements-extra.txt') from None
    return timm


def from_timm(name, size, channels=3, **more):
    """A network of timm without a classifier; built for images of this size where that is part of it. more: options of
    timm.create_model, such as pretrained=True, whose errors come as they are."""
    timm = timm_module()
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=1, cutoff=0.0)[0]
        raise ValueError(f'timm has no such network; the nearest is timm/{near}')
    inputs = {} if channels == 3 else {'in_chans': channels}
    try:
        network = construct_network(timm.create_model, name, size, num_classes=0, img_size=size, **inputs)
        takes_size = True
    except TypeError:  # most networks take any size, and no such option
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
    """make(name, **more). Raises TypeError where there is no such option; for all else that other people's networks
    raise on sizes that they do not take (ZeroDivisionError, ...) ValueError."""
    try:
        return make(name, **more)
    except TypeError:
        raise
    except Exception as error:
        raise ValueError(size_error_text(size, error)) from None


def first_line(error):
    """The first line of what an exception says; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def size_error_text(size, error):
    return f'it does not take images of {size} px ({first_line(error)})'


def feature_dim(backbone, size, channels=3):
    """The number of features, by what comes out."""
    backbone.eval()
    try:
        with torch.no_grad():
            features = backbone(torch.zeros(1, channels, size, size))
    except Exception as error:
        raise ValueError(size_error_text(size, error)) from None
    backbone.train()
    if features.ndim != 2:
        raise ValueError(f'it gives {tuple(features.shape)} and not one row of features an image')
    return features.shape[1]


def use_cifar_stem(backbone, channels=3):
    """Give a ResNet the stem for images of 32 pixels."""
    if not isinstance(backbone, resnet.ResNet):
        raise ValueError("--stem=cifar is for torchvision's ResNets; --stem=imagenet goes with every network")
    backbone.conv1 = nn.Conv2d(channels, 64, 3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(backbone.conv1.weight, mode='fan_out', nonlinearity='relu')
    backbone.maxpool = nn.Identity()


def tiny_resnet(stride, channels=3):
    """A residual network of three BasicBlocks, for 32-pixel images: 78 thousand parameters."""
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
