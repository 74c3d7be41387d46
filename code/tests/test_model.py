"""Model, loss and gradients against a second derivation from the paper's equations, in numpy and double precision."""

import copy

import numpy as np
import pytest
import torch

from dataloader import vision
from dataloader.augment.augmentations import get_augmentation
from dataloader.sources import demo
from loss.negative_cosine import negative_cosine, simsiam_loss
from metric.feature_std import feature_std
from model.backbone import make_backbone
from model.simsiam import SimSiam
from optimizer.sgd import lr_schedule, make_sgd, set_learning_rates
from runtime.options import get_config
from runtime.seeding import generator_for
from SOTA_SSL_Models import SimSiam as SimSiamOfTheReadme

SMALL = {'preset': 'demo', 'proj_dim': 12, 'pred_dim': 5}


def double_model(**options):
    """A SimSiam in double precision, every parameter random (the zero-initialized ones would hide mistakes)."""
    model = SimSiam(get_config(**SMALL | options)).double()
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = noise / max(1, parameter[0].numel()) ** 0.5 + (parameter.ndim == 1)
    return model


# The second derivation. w: the model's state dict as numpy arrays; a name selects a layer's weights.
def conv(x, weight, stride):
    k = weight.shape[2]
    x = np.pad(x, ((0, 0), (0, 0), (k // 2, k // 2), (k // 2, k // 2)))
    height, width = ((side - k) // stride + 1 for side in x.shape[2:])
    total = 0
    for dy in range(k):
        for dx in range(k):
            part = x[:, :, dy : dy + stride * height : stride, dx : dx + stride * width : stride]
            total = total + np.einsum('ncyx,oc->noyx', part, weight[:, :, dy, dx])
    return total


def batch_norm(x, w=None, name=None):
    """Over all but the channel axis, by the batch's own mean and biased variance; affine where a name is given."""
    axes = (0,) if x.ndim == 2 else (0, 2, 3)
    x = (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + 1e-5)
    if name is None:
        return x
    shape = (1, -1) + (1,) * (x.ndim - 2)
    return x * w[f'{name}.weight'].reshape(shape) + w[f'{name}.bias'].reshape(shape)


def relu(x):
    return np.maximum(x, 0)


def naive_backbone(x, w):
    x = relu(batch_norm(conv(x, w['backbone.0.weight'], 1), w, 'backbone.1'))
    for block, stride in (('backbone.3', 1), ('backbone.4', 2), ('backbone.5', 2)):
        skip = x
        if stride == 2:
            skip = conv(x, w[f'{block}.downsample.0.weight'], 2)
            skip = batch_norm(skip, w, f'{block}.downsample.1')
        y = relu(batch_norm(conv(x, w[f'{block}.conv1.weight'], stride), w, f'{block}.bn1'))
        y = batch_norm(conv(y, w[f'{block}.conv2.weight'], 1), w, f'{block}.bn2')
        x = relu(y + skip)
    return x.mean((2, 3))


def naive_forward(x, w):
    """(p, z) of one view: z = projector(backbone(x)), p = predictor(z)."""
    z = naive_backbone(x, w)
    z = relu(batch_norm(z @ w['projector.0.weight'].T, w, 'projector.1'))
    z = batch_norm(z @ w['projector.3.weight'].T)  # the output: BN without affine, no ReLU
    p = relu(batch_norm(z @ w['predictor.0.weight'].T, w, 'predictor.1'))
    return p @ w['predictor.3.weight'].T + w['predictor.3.bias'], z  # the output: a bias, no BN, no ReLU


def naive_loss(p1, p2, z1, z2):
    """Equations 1 and 2, written with sums."""
    total = 0
    for p, z in ((p1, z2), (p2, z1)):
        for a, b in zip(p, z, strict=True):
            total -= (a * b).sum() / (np.sqrt((a * a).sum()) * np.sqrt((b * b).sum())) / 2 / len(p)
    return total


def numbers(model):
    return {name: value.detach().numpy().copy() for name, value in model.state_dict().items()}


def views(n=6, side=8):
    return torch.randn(2, n, 3, side, side, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def test_forward_and_loss_equal_paper_formula():
    model, (view1, view2) = double_model(), views()
    outputs = [value.detach().numpy() for value in model(view1, view2)]
    (p1, z1), (p2, z2) = (naive_forward(view.numpy(), numbers(model)) for view in (view1, view2))
    for ours, wanted in zip(outputs, (p1, p2, z1, z2), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-9, atol=1e-9)
    loss = simsiam_loss(*model(view1, view2)).item()
    assert loss == pytest.approx(naive_loss(p1, p2, z1, z2), abs=1e-12)


def test_gradients_treat_z_as_constant():
    """Of every parameter, along a random direction: a finite difference of the naive loss with z kept as it was."""
    model, (view1, view2) = double_model(), views()
    simsiam_loss(*model(view1, view2)).backward()
    weights = numbers(model)
    (_, z1), (_, z2) = (naive_forward(view.numpy(), weights) for view in (view1, view2))

    def loss(changed):
        (p1, _), (p2, _) = (naive_forward(view.numpy(), changed) for view in (view1, view2))
        return naive_loss(p1, p2, z1, z2)

    def loss_without_stop(changed):
        (p1, a), (p2, b) = (naive_forward(view.numpy(), changed) for view in (view1, view2))
        return naive_loss(p1, p2, a, b)

    rng, differs = np.random.default_rng(0), 0
    for name, parameter in model.named_parameters():
        direction = rng.standard_normal(parameter.shape)
        direction /= np.linalg.norm(direction)
        step = 1e-6

        def slope(function, name=name, direction=direction, step=step):
            up, down = ({**weights, name: weights[name] + sign * step * direction} for sign in (1, -1))
            return (function(up) - function(down)) / (2 * step)

        ours = (parameter.grad.numpy() * direction).sum()
        assert ours == pytest.approx(slope(loss), rel=1e-4, abs=1e-8), name
        differs += abs(ours - slope(loss_without_stop)) > 1e-3 * abs(ours)
    assert differs > 10  # the stop-gradient shows in the encoder's gradients


def test_forward_processes_views_separately():
    """Changing one view leaves the other's z as it was, to the bit; BN's running statistics are updated twice."""
    model, (view1, view2) = double_model(), views()
    once = copy.deepcopy(model)
    _, _, z1, _ = model(view1, view2)
    assert torch.equal(z1, once(view1, 10 * view2 + 3)[2])
    assert model.projector[1].num_batches_tracked == 2


def test_negative_cosine_of_known_vectors():
    p = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    assert negative_cosine(p, 5 * p) == pytest.approx(-1)
    assert negative_cosine(p, p.flip(1)) == pytest.approx(0)
    assert negative_cosine(p, -p) == pytest.approx(1)


@pytest.mark.parametrize(('layers', 'relus'), [(1, 0), (2, 1), (3, 2)])
def test_projector_has_bn_and_no_affine_or_relu_at_end(layers, relus):
    projector = SimSiam(get_config(**SMALL, proj_layers=layers)).projector
    kinds = [type(module).__name__ for module in projector]
    assert (kinds.count('Linear'), kinds.count('BatchNorm1d'), kinds.count('ReLU')) == (layers, layers, relus)
    assert kinds[-1] == 'BatchNorm1d'
    assert not projector[-1].affine
    assert all(module.affine for module in projector[:-1] if isinstance(module, torch.nn.BatchNorm1d))


def test_parameter_counts_equal_published_networks():
    """Parameters of torchvision's ResNets without their last layer, and of the paper's heads on ResNet-50."""
    for name, stem, features, count in (
        ('resnet18', 'imagenet', 512, 11_176_512),
        ('resnet18', 'cifar', 512, 11_168_832),  # a stem of 3 x 3 x 3 x 64 in place of 7 x 7 x 3 x 64
        ('resnet34', 'imagenet', 512, 21_284_672),
        ('resnet50', 'imagenet', 2048, 23_508_032),
        ('resnet101', 'imagenet', 2048, 42_500_160),
    ):
        backbone, d = make_backbone(name, stem, 64)
        assert (d, sum(p.numel() for p in backbone.parameters())) == (features, count)
    model = SimSiam(get_config(preset='imagenet'))
    assert sum(p.numel() for p in model.projector.parameters()) == 3 * 2048 * 2048 + 2 * 2 * 2048
    assert sum(p.numel() for p in model.predictor.parameters()) == 2 * 2048 * 512 + 2 * 512 + 2048


@pytest.mark.parametrize('name', ['small', 'resnet18', 'resnet50'])
def test_new_model_has_zero_init_residual_blocks(name):
    backbone, _ = make_backbone(name, 'cifar', 32)
    blocks = [m for m in backbone.modules() if hasattr(m, 'downsample')]
    assert blocks
    for block in blocks:
        last = block.bn3 if hasattr(block, 'bn3') else block.bn2
        assert not last.weight.any()
        assert block.bn1.weight.all()


def test_cifar_stem_keeps_resolution():
    """3 x 3, stride 1, no max-pool: the first stage sees all 32 x 32 pixels; the ImageNet stem leaves 8 x 8."""
    sides = {}
    for stem in ('cifar', 'imagenet'):
        backbone, _ = make_backbone('resnet18', stem, 32)
        seen = []
        backbone.layer1.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output.shape[-1]))
        assert backbone(torch.zeros(2, 3, 32, 32)).shape == (2, 512)
        sides[stem] = seen[0]
    assert sides == {'cifar': 32, 'imagenet': 8}


def test_simsiam_imports_from_sota_ssl_models():
    model = SimSiamOfTheReadme(get_config(**SMALL))
    p1, p2, z1, z2 = model(*views().float())
    assert {tuple(t.shape) for t in (p1, p2, z1, z2)} == {(6, 12)}


def pretrain(stop_gradient, steps=150, n=512):
    """(loss, std) of every step of one short run on the demo's drawings, with stop-gradient or without."""
    generator = torch.Generator().manual_seed(0)
    images = torch.stack([demo.draw_pattern(demo.PATTERNS[i % 10], generator) for i in range(n)])
    transform = get_augmentation(get_config(image_size=8, blur_prob=0.0), 'moco')
    images = images[:, None, ::3, ::3].expand(-1, 3, -1, -1).contiguous()
    torch.manual_seed(0)
    model = SimSiam(get_config(preset='demo', stem='imagenet', proj_dim=64, pred_dim=16))
    optimizer, history = make_sgd(model, 0.9, 5e-4), []
    for step in range(steps):
        view1, view2 = vision.random_views(images, transform, generator_for(step))
        rate = lr_schedule(step / steps, 0, 0.2)
        set_learning_rates(optimizer, rate, rate, 0.2 if stop_gradient else rate)
        p1, p2, z1, z2 = model(view1, view2)
        if stop_gradient:
            loss = simsiam_loss(p1, p2, z1, z2)
        else:
            loss = negative_cosine(p1, z2) / 2 + negative_cosine(p2, z1) / 2
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        history.append((loss.item(), feature_std(z1.detach()).item()))
    return history


def test_training_collapses_without_stop_gradient():
    """Figure 2. The BN at the end of the projector gives every channel mean 0 and variance 1 over the batch of n, so
    that std x sqrt(d) can fall to about 2 / sqrt(n) = 0.09, all images but one alike, and no further."""
    with_stop, without = pretrain(True, steps=60), pretrain(False)
    loss, std = np.array(without[-20:]).mean(0)
    assert (loss < -0.94, std < 0.32) == (True, True), (loss, std)
    loss, std = np.array(with_stop[-20:]).mean(0)
    assert (loss > -0.8, std > 0.9) == (True, True), (loss, std)
    assert min(std for _, std in with_stop) > 0.9
