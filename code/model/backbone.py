"""The encoders: torchvision's ResNets, with the CIFAR stem as an option, and a small one for CPUs."""

from torch import nn
from torchvision.models import resnet
from torchvision.models.resnet import BasicBlock

WIDTHS = (16, 32, 64)  # channels of the small backbone's three stages


def make_backbone(name, stem):
    """(backbone, its number of features d). backbone: N x 3 x S x S float to N x d.

    name: small, resnet18, 34, 50, 101 or 152. stem: 'imagenet' (7 x 7 stride 2, max-pool) or 'cifar'
    (3 x 3 stride 1, no max-pool; paper appendix D); small has 3 x 3 for both, with stride 2 or 1. The last BN
    of every residual block starts at zero, as in the official release.
    """
    if name == 'small':
        return small(1 if stem == 'cifar' else 2), WIDTHS[-1]
    backbone = getattr(resnet, name)(zero_init_residual=True)
    features = backbone.fc.in_features
    backbone.fc = nn.Identity()
    if stem == 'cifar':
        backbone.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(backbone.conv1.weight, mode='fan_out', nonlinearity='relu')
        backbone.maxpool = nn.Identity()
    return backbone, features


def small(stride):
    """A residual network of three BasicBlocks, for 32-pixel images: 78 thousand parameters."""
    layers = [nn.Conv2d(3, WIDTHS[0], 3, stride, 1, bias=False), nn.BatchNorm2d(WIDTHS[0]), nn.ReLU(inplace=True)]
    before = WIDTHS[0]
    for width in WIDTHS:
        down = None
        if width != before:
            down = nn.Sequential(nn.Conv2d(before, width, 1, 2, bias=False), nn.BatchNorm2d(width))
        block = BasicBlock(before, width, 1 if down is None else 2, down)
        nn.init.zeros_(block.bn2.weight)
        layers.append(block)
        before = width
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
    return network
