"""Any network of torchvision and timm as the backbone: its width, what is taken off, what it is refused for."""

import re
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torchvision

import cli
from conftest import CODE, TINY, one_line, own_paths
from engine import set_up
from model import simsiam
from model.backbone import make_backbone
from runtime import distributed
from runtime.checkpoints.load_state import build_model
from runtime.errors import UserError
from runtime.files import read_metrics
from runtime.options import get_config


class Dropping(torch.nn.Module):
    """A network that draws at random itself, 512 wide."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Conv2d(3, 64, 3, 2), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
        )
        self.drop, self.last_epoch_means = torch.nn.Dropout(0.5), torch.nn.Linear(64, 512)

    def forward(self, x):
        return self.last_epoch_means(self.drop(self.body(x)))


def test_dropout_in_resumed_run_equals_unbroken_run(drawn, tmp_path, monkeypatch):
    """Dropout, stochastic depth: the same command gives the same losses, also where it was stopped on the way, and
    another seed gives others."""
    monkeypatch.setattr(simsiam, 'make_backbone', lambda *_: (Dropping(), 512))
    losses = {}
    for name, options in {
        'one': [['--max_epochs=2']],
        'again': [['--max_epochs=2']],
        'stopped': [['--max_epochs=2', '--max_minutes=0.0001'], ['--max_epochs=2', '--resume=auto']],
        'other': [['--max_epochs=2', '--random_seed=1']],
    }.items():
        for given in options:
            torch.rand(len(name))  # something else has drawn before
            argv = ['train', *TINY, '--knn_every=0', f'--image_path={drawn}', *own_paths(tmp_path / name), *given]
            assert cli.main(argv) == 0
        lines = read_metrics(next((tmp_path / name / 'ckpt').iterdir()) / 'metrics.jsonl')
        losses[name] = [line['pretraining/loss'] for line in lines if 'pretraining/loss' in line]
    assert losses['one'] == losses['again'] == losses['stopped'] != losses['other']


# One of each family, and its features.
WIDTHS = {
    'convnext_tiny': 768,
    'vit_b_16': 768,
    'swin_t': 768,
    'swin_v2_t': 768,
    'efficientnet_b0': 1280,
    'densenet121': 1024,
    'vgg11': 4096,
    'alexnet': 4096,
    'mobilenet_v2': 1280,
    'mobilenet_v3_small': 1024,
    'squeezenet1_1': 512,
    'regnet_y_400mf': 440,
    'googlenet': 1024,
    'inception_v3': 2048,
    'maxvit_t': 512,
    'resnext50_32x4d': 2048,
    'shufflenet_v2_x0_5': 1024,
    'mnasnet0_5': 1280,
}


def test_tested_networks_cover_every_torchvision_family():
    names = torchvision.models.list_models(module=torchvision.models)
    families = {re.match('[a-z]+', name)[0] for name in names}
    assert families - {'wide', 'resnet'} == {re.match('[a-z]+', name)[0] for name in WIDTHS}


@pytest.mark.parametrize('name', WIDTHS)
def test_torchvision_backbone_has_no_class_layer(name):
    """Where it can be, built and run without memory or arithmetic; no layer with a thousand outputs is left, nor a
    dropout at the end."""
    with torch.device('cpu' if name.startswith('regnet') else 'meta'):
        backbone, width = make_backbone(name, 'imagenet', 224)
    assert backbone.training
    assert width == WIDTHS[name]
    assert not any(value.shape[0] == 1000 for value in backbone.parameters())
    last = [*backbone.children()][-1]
    assert not any(isinstance(layer, torch.nn.Dropout) for layer in [*last.modules()][-1:])


@pytest.mark.parametrize(
    ('name', 'width'),
    [('convnext_atto', 320), ('vit_tiny_patch16_224', 192), ('resnet18', 512), ('mobilenetv3_small_050', 1024)],
)
def test_timm_backbone_returns_features(name, width):
    pytest.importorskip('timm')
    with torch.device('meta'):
        backbone, found = make_backbone(f'timm/{name}', 'imagenet', 224)
    assert found == width
    assert backbone.training


STRIDED_1X1_GRADIENTS = """
import torch
from model.backbone import subsample_before_strided_1x1
from runtime.tensors import channels_last
for channels in (1, 3, 8, 15):
    reference = torch.nn.Conv2d(channels, 64, 1, stride=2).double()
    ours = torch.nn.Conv2d(channels, 64, 1, stride=2)
    ours.load_state_dict(reference.state_dict())
    network = torch.nn.Sequential(ours).to(memory_format=torch.channels_last)
    subsample_before_strided_1x1(network)
    for size in (224, 65, 224, 96, 224):
        x = channels_last(torch.randn(2, channels, size, size))
        y, expected = network(x), reference(x.double())
        torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
        weights = torch.randn_like(y)
        (y * weights).sum().backward()
        (expected * weights.double()).sum().backward()
    torch.testing.assert_close(ours.weight.grad.double(), reference.weight.grad, rtol=1e-3, atol=1e-2)
print('equal')
"""


def test_strided_1x1_convolution_of_few_channels_has_exact_gradient():
    """oneDNN writes outside its memory there on CPUs: a crash, so in a process of its own."""
    run = subprocess.run(
        [sys.executable, '-c', STRIDED_1X1_GRADIENTS], cwd=CODE, capture_output=True, text=True, check=False
    )
    assert run.stdout.split() == ['equal'], run.stderr


def test_strided_1x1_convolution_of_mobileone_is_subsampled():
    timm = pytest.importorskip('timm')
    network, _ = make_backbone('timm/mobileone_s0', 'imagenet', 64)
    few = [conv for conv in network.modules() if isinstance(conv, torch.nn.Conv2d) and conv.in_channels < 16]
    assert {conv.stride for conv in few if conv.kernel_size == (1, 1)} == {(1, 1)}
    reference = timm.create_model('mobileone_s0', num_classes=0).eval()
    reference.load_state_dict(network.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(network.eval()(x), reference(x))


def test_vit_backbone_is_built_for_view_size():
    for name in ('vit_b_16', 'timm/vit_tiny_patch16_224'):
        with torch.device('meta'):
            assert make_backbone(name, 'imagenet', 64)[1] in (768, 192)


def zeros(backbone):
    return sum(not value.any() for key, value in backbone.named_parameters() if value.ndim == 1 and 'weight' in key)


@pytest.mark.parametrize(
    ('name', 'blocks'), [('small', 3), ('resnet18', 8), ('regnet_y_400mf', 16), ('resnext50_32x4d', 16)]
)
def test_zero_init_sets_last_bn_weights_only(name, blocks):
    """Or not, and all else is as it was."""
    torch.manual_seed(0)
    backbone, _ = make_backbone(name, 'imagenet', 64)
    torch.manual_seed(0)
    other, _ = make_backbone(name, 'imagenet', 64, zero_init=False)
    assert (zeros(backbone), zeros(other)) == (blocks, 0)
    different = [not a.equal(b) for a, b in zip(backbone.parameters(), other.parameters(), strict=True)]
    assert sum(different) == blocks


def test_zero_init_without_residual_bn_warns(capsys):
    for name, said in (('small', False), ('mobilenet_v3_small', True)):
        args = get_config(preset='demo', backbone=name, stem='imagenet', image_size=64, zero_init=False)
        set_up.warn_ignored_options(args, build_model(args))
        assert (f'--zero_init has no effect with --backbone={name}' in capsys.readouterr().err) is said


def test_zero_init_sets_last_bn_weights_of_timm():
    pytest.importorskip('timm')
    for name, blocks in (('resnet10t', 4), ('regnety_002', 13)):
        found = [zeros(make_backbone(f'timm/{name}', 'imagenet', 64, zero_init=wanted)[0]) for wanted in (True, False)]
        assert found == [blocks, 0]


@pytest.mark.parametrize(
    ('options', 'said'),
    [
        ({'backbone': 'resnet49'}, r"none of torchvision's .* \(the nearest is resnet34\)"),
        ({'backbone': 'timm/resnet1'}, 'the nearest is timm/resnet'),
        ({'backbone': 'convnext_tiny', 'stem': 'cifar'}, "--stem=cifar is for torchvision's ResNets"),
        ({'backbone': 'inception_v3', 'image_size': 32}, 'does not accept images of 32 px'),
        ({'backbone': 'vit_b_16', 'image_size': 100}, 'does not accept images of 100 px'),
        ({'backbone': 'fcn_resnet50'}, "none of torchvision's"),
        ({'backbone': ' '}, 'is empty'),
    ],
)
def test_invalid_backbone_exits_2_with_reason(options, said):
    with pytest.raises(UserError, match=said):
        build_model(get_config(preset='imagenet', proj_dim=8, pred_dim=4, **options))


def test_timm_backbone_without_timm_names_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, 'timm', None)
    with pytest.raises(UserError, match=r'requirements-extra\.txt'):
        build_model(get_config(backbone='timm/resnet18', proj_dim=8, pred_dim=4))


@pytest.mark.parametrize('name', ['timm/convnext_atto', 'mobilenet_v3_small'])
def test_other_backbones_train_evaluate_and_export(name, drawn, tmp_path, capsys):
    """Through the commands; what its export can and cannot do, and the weights in another process."""
    pytest.importorskip('timm')
    paths = own_paths(tmp_path)
    given = [
        *TINY,
        '--image_size=32',
        f'--image_path={drawn}',
        '--stem=imagenet',
        '--max_epochs=1',
        f'--backbone={name}',
        *paths,
    ]
    assert cli.main(['train', *given]) == 0
    run = 'model_name_simsiam_ckpt_0'
    assert cli.main(['evaluate', f'--ckpt_name={run}', '--protocol=knn', *paths]) == 0
    tool = 'timm' if name.startswith('timm/') else 'torchvision'
    output = tmp_path / ('backbone' if tool == 'timm' else 'backbone.pth')
    assert cli.main(['export', f'--ckpt_name={run}', f'--format={tool}', f'--output={output}', paths[0]]) == 0
    capsys.readouterr()
    for other in {'torchvision', 'timm', 'detectron2'} - {tool}:
        assert cli.main(['export', f'--ckpt_name={run}', f'--format={other}', paths[0]]) == 2
        assert f'does not support --backbone={name}' in one_line(capsys.readouterr().err)
    assert cli.main(['evaluate', f'--ckpt_name={run}', '--protocol=detection', '--detection_path=x', *paths]) == 2
    assert 'needs a ResNet or small as backbone' in one_line(capsys.readouterr().err)
    loads = {
        'timm': f"timm.create_model('local-dir:{output}', pretrained=True)",
        'torchvision': f"state = torch.load('{output}'); "
        'print(torchvision.models.mobilenet_v3_small().load_state_dict(state, strict=False))',
    }[tool]
    code = f'import timm, torch, torchvision; {loads}'
    done = subprocess.run([sys.executable, '-c', code], cwd=CODE, capture_output=True, text=True, check=True)
    assert 'unexpected_keys=[]' in done.stdout or tool == 'timm'
    assert 'classifier.3' in done.stdout or tool == 'timm'


@pytest.mark.parametrize(
    ('name', 'how'),
    [('vit_b_32', 'vit_b_32(image_size=32)'), ('timm/vit_tiny_patch16_224', 'pretrained=True')],
)
def test_exported_vit_load_line_has_image_size(name, how, drawn, tmp_path, capsys, monkeypatch):
    """And another size than the network was made for is refused as that, not as a damaged file."""
    pytest.importorskip('timm')

    def thin(weights=None, image_size=224, **more):  # the real one's 88 million weights take a while
        sizes = {'patch_size': 32, 'num_layers': 1, 'num_heads': 2, 'hidden_dim': 16, 'mlp_dim': 16}
        return torchvision.models.VisionTransformer(image_size, **sizes, **more)

    thin.__module__ = 'torchvision.models.vision_transformer'
    monkeypatch.setitem(torchvision.models._api.BUILTIN_MODELS, 'vit_b_32', thin)
    paths, size = own_paths(tmp_path), '--image_size=32'
    given = [*TINY, size, f'--image_path={drawn}', '--stem=imagenet', '--max_epochs=1', f'--backbone={name}', *paths]
    assert cli.main(['train', *given]) == 0
    (checkpoint,) = (tmp_path / 'ckpt').glob('*/loss_*')
    tool, named = 'timm' if name.startswith('timm/') else 'torchvision', f'--ckpt_name={checkpoint}'
    capsys.readouterr()
    output = tmp_path / ('x' if tool == 'timm' else 'x.pth')
    assert cli.main(['export', named, f'--format={tool}', f'--output={output}']) == 0
    assert how in capsys.readouterr().out
    if tool == 'timm':
        import timm

        assert timm.create_model(f'local-dir:{output}', pretrained=True)(torch.zeros(1, 3, 32, 32)).shape == (1, 192)
    assert cli.main(['evaluate', named, '--protocol=knn', '--image_size=64', *paths]) == 2
    assert f'--image_size=64: {name} was made for 32 px: leave the option out' in one_line(capsys.readouterr().err)


def test_exception_of_network_for_size_becomes_user_error(monkeypatch):
    def divides(name, **_):
        return 1 // 0

    monkeypatch.setattr(torchvision.models, 'get_model', divides)
    with pytest.raises(ValueError, match='it does not accept images of 20 px'):
        make_backbone('vgg11', 'imagenet', 20)


@pytest.mark.parametrize(
    'name',
    [
        'mobilenet_v3_small',
        'timm/resnet10t',
        'timm/mobilenetv3_small_050',
        'timm/regnety_002',
        'timm/densenet121',
        'timm/ghostnet_100',
    ],
)
@pytest.mark.parametrize('training', [False, True])
def test_convert_sync_batchnorm_keeps_outputs_of_timm(name, training):
    """timm has the activation in its BN."""
    pytest.importorskip('timm')
    x, found = torch.randn(6, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), []
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    try:
        for shared in (False, True):
            torch.manual_seed(0)
            network = make_backbone(name, 'imagenet', 32)[0].double().train(training)
            found.append((distributed.convert_sync_batchnorm(network) if shared else network)(x))
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(found[1], found[0], atol=1e-8, rtol=1e-6)


def test_convert_sync_batchnorm_of_unknown_bn_raises():
    class Own(torch.nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).abs()

    with pytest.raises(UserError, match='its Own cannot be synchronized over processes'):
        distributed.convert_sync_batchnorm(torch.nn.Sequential(Own(3)))
