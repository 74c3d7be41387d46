"""Other tools' files: which of their weights are taken, and that the features are those of the model they came from."""

import argparse
import gzip
import io
import pathlib
import zipfile

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import cli
from ckpt import get_model_ckpt
from conftest import one_line, own_paths
from runtime.checkpoints.load_state import build_model, load_state_strictly
from runtime.errors import WorkError
from runtime.options import get_config
from test_export import Official, randomised, save_official, views


def plain():
    """A ResNet-18 with every weight at random, without a classifier."""
    model = randomised(torchvision.models.resnet18(), 7)
    model.fc = nn.Identity()
    return model


def named(prefix, model=None, **more):
    """{prefix + key: weight} of `model`, and `more`, whose __ stand for points."""
    state = {f'{prefix}{name}': value for name, value in (model or plain()).state_dict().items()}
    return state | {name.replace('__', '.'): torch.zeros(4, 3) for name in more}


def arrays(state, kind=None):
    return {name: value.numpy().astype(kind or value.numpy().dtype) for name, value in state.items()}


def as_children(model):
    """lightly's backbone: a Sequential of all but the last child."""
    return nn.Sequential(*list(model.children())[:-1])


def heads(prefix, index):
    """SimSiam's projector and predictor of lightly (projection_head.layers.N) or solo-learn (projector.N): 512 wide."""
    projector = nn.Sequential(
        nn.Linear(512, 512, bias=False),
        nn.BatchNorm1d(512),
        nn.ReLU(),
        nn.Linear(512, 512, bias=False),
        nn.BatchNorm1d(512),
        nn.ReLU(),
        nn.Linear(512, 512, bias=False),
        nn.BatchNorm1d(512, affine=False),
    )
    predictor = nn.Sequential(nn.Linear(512, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 512))
    return named(prefix[0], randomised(projector, 1)) | named(prefix[1], randomised(predictor, 2))


MORE = {'fc__weight': 0, 'queue': 0}
# Of each tool: what its file holds, the layout that is found, and whether the heads are taken.
FILES = {
    'torchvision': (lambda: named('', fc__weight=0), 'torchvision', False),
    'torchvision, wrapped by DDP': (lambda: {'state_dict': named('module.', module__fc__bias=0)}, 'torchvision', False),
    'torch.compile': (lambda: {'model': named('_orig_mod.')}, 'torchvision', False),
    'torch.compile in DDP': (lambda: {'model': named('module._orig_mod.')}, 'torchvision', False),
    'timm, without counters': (
        lambda: {name: value for name, value in named('').items() if 'num_batches' not in name},
        'torchvision',
        False,
    ),
    'arrays of NumPy': (lambda: {'state_dict': arrays(named('')), 'epoch': np.int64(3)}, 'torchvision', False),
    'arrays of NumPy, in double precision, beside what is none of numbers': (
        lambda: {'model': arrays(named('', queue=0), 'f8') | {'classes': np.array(['a', None]), 'of': np.array(['b'])}},
        'torchvision',
        False,
    ),
    'MoCo v1, v2': (
        lambda: {'state_dict': named('module.encoder_q.', module__queue=0) | named('module.encoder_k.')},
        'moco',
        False,
    ),
    'MoCo v3': (
        lambda: {
            'state_dict': named('module.base_encoder.', module__predictor__0__weight=0)
            | named('module.momentum_encoder.')
        },
        'moco_v3',
        False,
    ),
    'lightly': (
        lambda: {
            'state_dict': named('backbone.', as_children(plain()))
            | heads(('projection_head.layers.', 'prediction_head.layers.'), 0)
        },
        'backbone',
        True,
    ),
    'solo-learn': (
        lambda: {
            'state_dict': named('backbone.', classifier__weight=0) | heads(('projector.', 'predictor.'), 0),
            'hyper_parameters': argparse.Namespace(lr=0.1, dir=pathlib.PurePosixPath('/x')),
        },
        'backbone',
        True,
    ),
    'SimCLR': (
        lambda: {'state_dict': named('backbone.', backbone__fc__0__weight=0, backbone__fc__2__weight=0)},
        'backbone',
        False,
    ),
    'SimCLR, with a projector': (
        lambda: named('encoder.', projector__0__weight=0, projector__2__weight=0),
        'official',
        False,
    ),
    'Barlow Twins': (
        lambda: {
            'epoch': 1,
            'model': named('module.backbone.', module__projector__0__weight=0, module__bn__running_mean=0),
        },
        'backbone',
        False,
    ),
    'DINO': (
        lambda: {
            'student': named('module.backbone.', randomised(torchvision.models.resnet18(), 9)),
            'teacher': named('backbone.', head__mlp__0__weight=0),
            'args': argparse.Namespace(arch='r18'),
        },
        'backbone',
        False,
    ),
    'a wrapper with NumPy scalars': (
        lambda: {'state_dict': named('model.'), 'best': np.float64(0.5), 'step': np.int64(3)},
        'model',
        False,
    ),
}


def load(path, **options):
    return get_model_ckpt(get_config(ckpt_name=str(path), **options))


def features(backbone):
    with torch.no_grad():
        return backbone.eval()(views())


@pytest.mark.parametrize('tool', FILES)
def test_converted_checkpoint_gives_equal_features(tool, tmp_path, capsys):
    make, layout, with_heads = FILES[tool]
    torch.save(make(), tmp_path / 'file.pth')
    args, model, checkpoint = load(tmp_path / 'file.pth')
    assert (args.backbone, args.stem, checkpoint['layout']) == ('resnet18', 'imagenet', layout)
    assert (args.preset, args.image_size) == ('imagenet', 224)  # whatever lies about here
    assert torch.equal(features(model.backbone), features(plain()))
    said = capsys.readouterr().out
    assert f'file.pth: resnet18, layout {layout}, {"with" if with_heads else "without"} projector and predictor' in said
    if with_heads:
        assert (args.proj_dim, args.pred_dim, args.proj_layers) == (512, 64, 3)
        wanted = heads(('projector.', 'predictor.'), 0)
        state = model.state_dict()
        assert all(torch.equal(state[name], value) for name, value in wanted.items())


def test_foreign_files_with_same_name_have_separate_results(drawn, tmp_path, capsys):
    """Other tools call all their files alike: each has its own results and its own classifier."""
    given = ('--image_size=32', f'--image_path={drawn}', '--stem=imagenet', '--amp=off', *own_paths(tmp_path))
    for seed in (0, 1):
        torch.manual_seed(seed)
        (tmp_path / str(seed)).mkdir()
        torch.save(torchvision.models.resnet18().state_dict(), tmp_path / f'{seed}/model.pth')
    probe = ('evaluate', '--probe_epochs=2', *given)
    assert cli.main([*probe, f'--ckpt_name={tmp_path}/0/model.pth']) == 0
    infer = ('infer', f'--output={tmp_path}/x.csv', *given[:1], *given[2:4], *own_paths(tmp_path, 'ckpt', 'cache'))
    capsys.readouterr()
    for seed, how in ((1, 'has no classifier'), (0, 'predicted by the linear classifier')):
        code = cli.main([*infer, f'--image_path={drawn}/val', f'--ckpt_name={tmp_path}/{seed}/model.pth'])
        captured = capsys.readouterr()
        assert how in captured.out + captured.err
        assert code == (0 if how.startswith('pred') else 2)
    assert cli.main([*probe, f'--ckpt_name={tmp_path}/1/model.pth']) == 0
    assert len([*(tmp_path / 'ckpt').glob('torchvision_model.pth_*/evaluate_linear_*.json')]) == 2


def test_label_free_of_backbone_has_no_verdict(drawn, tmp_path, capsys):
    path = tmp_path / 'model.pth'
    torch.save(torchvision.models.resnet18().state_dict(), path)
    given = (f'--ckpt_name={path}', '--protocol=label_free', '--image_size=32', f'--image_path={drawn}', '--amp=off')
    assert cli.main(['evaluate', *given, *own_paths(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert 'there is no z, and no verdict' in said
    assert 'RankMe' in said
    assert 'std of z' not in said
    assert 'verdict  ' not in said


def test_checkpoint_with_nan_weights_is_refused(tmp_path, capsys):
    state = torchvision.models.resnet18().state_dict()
    state['layer1.0.conv1.weight'][0, 0, 0, 0] = float('nan')
    torch.save(state, tmp_path / 'model.pth')
    assert cli.main(['export', f'--ckpt_name={tmp_path}/model.pth', f'--output={tmp_path}/x.pth']) == 1
    said = one_line(capsys.readouterr().err)
    assert 'holds weights that are nan or infinite, such as backbone.layer1.0.conv1.weight' in said
    assert not (tmp_path / 'x.pth').exists()


def test_infinite_bounds_of_network_are_no_invalid_weights():
    """timm's gemma4_vit has clipping bounds of -inf and inf until they are calibrated."""
    model = build_model(get_config(preset='demo', device='cpu'))
    model.backbone.register_buffer('bound', torch.tensor(float('inf')))
    load_state_strictly(model, model.state_dict(), pathlib.Path('file.pth'))
    state = {**model.state_dict(), 'backbone.0.weight': torch.full_like(model.backbone[0].weight, float('inf'))}
    with pytest.raises(WorkError, match=r'infinite, such as backbone\.0\.weight'):
        load_state_strictly(model, state, pathlib.Path('file.pth'))


def test_safetensors_file_loads(tmp_path):
    from safetensors.torch import save_file

    save_file(named(''), tmp_path / 'file.safetensors')
    _, model, checkpoint = load(tmp_path / 'file.safetensors')
    assert checkpoint['layout'] == 'torchvision'
    assert torch.equal(features(model.backbone), features(plain()))
    (tmp_path / 'bad.safetensors').write_bytes(b'no such thing')
    assert cli.main(['export', f'--ckpt_name={tmp_path / "bad.safetensors"}', f'--output={tmp_path}/o']) == 1


def test_checkpoint_with_other_head_shape_loads_backbone(tmp_path, capsys):
    """The official code's ResNet-18: its projector is 512, 512, 2048 wide, ours as wide throughout."""
    official = randomised(Official(width=2048, hidden=512))
    _, model, _ = load(save_official(tmp_path / 'official.pth.tar', official))
    official.encoder.fc = nn.Identity()
    assert torch.equal(features(model.backbone), features(official.encoder))
    assert 'without projector and predictor; not used: predictor, projector' in capsys.readouterr().out


@pytest.mark.parametrize('name', ['resnet18', 'resnet34', 'resnet50', 'resnet101', 'resnet152'])
def test_every_resnet_depth_is_inferred(name, tmp_path):
    theirs = getattr(torchvision.models, name)()
    torch.save({'state_dict': named('module.encoder.', theirs)}, tmp_path / 'file')
    args, model, _ = load(tmp_path / 'file')
    assert args.backbone == name
    state = theirs.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.backbone.state_dict().items())


@pytest.mark.parametrize(
    ('content', 'code', 'said'),
    [
        (
            {'state_dict': {'blocks.0.attn.qkv.weight': torch.zeros(3), 'head.bias': torch.zeros(2)}},
            1,
            'its first keys: blocks.0.attn.qkv.weight, head.bias',
        ),
        ({}, 1, 'its first keys: none'),
        ([1, 2], 1, 'its first keys: none'),
        (named('', torchvision.models.resnext50_32x4d()), 2, 'size mismatch: backbone.layer1.0.conv1.weight'),
        ({name: value for name, value in named('').items() if 'layer4' not in name}, 2, 'a ResNet without layer4'),
    ],
)
def test_unusable_foreign_file_fails_in_one_line(content, code, said, tmp_path, capsys):
    torch.save(content, tmp_path / 'file')
    argv = ['export', f'--ckpt_name={tmp_path / "file"}', f'--output={tmp_path}/o', *own_paths(tmp_path, 'ckpt')]
    assert cli.main(argv) == code
    assert said in one_line(capsys.readouterr().err)


def test_checkpoint_with_cifar_stem_uses_cifar_preset(tmp_path):
    theirs = plain()
    theirs.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    torch.save(named('', theirs), tmp_path / 'file')
    args, _, _ = load(tmp_path / 'file')
    assert (args.preset, args.image_size, args.stem) == ('cifar10', 32, 'cifar')
    args, _, _ = load(tmp_path / 'file', preset='imagenet', image_size='64')
    assert (args.preset, args.image_size, args.stem) == ('imagenet', 64, 'cifar')


def test_init_from_imagenet_loads_torchvision_weights(tmp_path, monkeypatch, capsys):
    """From where torchvision would have put them; there is no network in a test."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    folder = tmp_path / 'hub/checkpoints'
    folder.mkdir(parents=True)
    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    theirs = randomised(torchvision.models.resnet18(), 4)
    torch.save(theirs.state_dict(), folder / weights.url.rsplit('/', 1)[1])
    _, model, checkpoint = get_model_ckpt(get_config(preset='imagenet', backbone='resnet18', init_from='imagenet'))
    theirs.fc = nn.Identity()
    assert checkpoint is None
    assert torch.equal(features(model.backbone), features(theirs))
    assert 'torchvision ResNet18_Weights.IMAGENET1K_V1' in capsys.readouterr().out
    for options in (('--preset=demo',), ('--preset=cifar10',)):
        assert cli.main(['train', *options, '--init_from=imagenet', *own_paths(tmp_path)]) == 2
        assert "imagenet has the weights of torchvision's networks, not of --backbone=" in capsys.readouterr().err


KINDS = {
    'float8_e4m3fn': lambda weight: weight.to(torch.float8_e4m3fn),
    'int32': lambda weight: weight.int(),
    'complex': lambda weight: weight.to(torch.complex64),
    'sparse': lambda weight: weight.to_sparse(),
    'quantized': lambda weight: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8),
    'without content': lambda weight: weight.to('meta'),
}


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.filterwarnings('ignore')
def test_quantized_complex_and_sparse_weights_are_refused(kind, tmp_path, capsys):
    """Casting them would throw away a part, or fails somewhere in torch."""
    state = torchvision.models.resnet18().state_dict()
    state['layer1.0.conv1.weight'] = KINDS[kind](state['layer1.0.conv1.weight'])
    torch.save(state, tmp_path / 'model.pth')
    assert cli.main(['export', f'--ckpt_name={tmp_path}/model.pth', f'--output={tmp_path}/x.pth']) == 1
    assert f'backbone.layer1.0.conv1.weight is {kind}, and a weight is plain' in one_line(capsys.readouterr().err)


def test_resnet_with_deep_stem_is_refused(tmp_path, capsys):
    """timm's resnet18d: three convolutions in place of the first."""
    state = torchvision.models.resnet18().state_dict()
    state['conv1.0.weight'] = state.pop('conv1.weight')
    torch.save(state, tmp_path / 'model.pth')
    assert cli.main(['export', f'--ckpt_name={tmp_path}/model.pth', f'--output={tmp_path}/x.pth']) == 2
    assert 'with an unknown stem' in one_line(capsys.readouterr().err)


@pytest.mark.parametrize('protocol', ['knn', 'linear', 'label_free', 'transfer'])
def test_evaluate_with_nan_features_fails(protocol, drawn, tmp_path, capsys):
    """Every weight is finite, and what comes out is not."""
    state = torchvision.models.resnet18().state_dict()
    state = {name: value * 1e20 if name == 'conv1.weight' or 'bn' in name else value for name, value in state.items()}
    torch.save(state, tmp_path / 'model.pth')
    given = [f'--ckpt_name={tmp_path}/model.pth', f'--protocol={protocol}', '--image_size=32']
    given += [f'--image_path={drawn}'] if protocol != 'transfer' else []
    given += ['--amp=off', '--num_workers=0', *own_paths(tmp_path)]
    if protocol == 'linear':
        given += ['--probe_epochs=2', '--probe_optimizer=sgd']
    if protocol == 'transfer':
        given += [f'--transfer_path={drawn}']
    assert cli.main(['evaluate', *given]) == 1
    assert 'nan or infinite' in one_line(capsys.readouterr().err)
    assert not list(tmp_path.rglob('evaluate_*.json'))


def write_zip(path, names):
    with zipfile.ZipFile(path, 'w') as archive:
        for name in names:
            archive.writestr(name, b'x')


def zip_without_table():
    """A file of torch.save whose list of parts is overwritten, and its end record is not."""
    buffer = io.BytesIO()
    torch.save({'a': torch.zeros(9)}, buffer)
    content = bytearray(buffer.getvalue())
    start = content.index(b'PK\1\2')
    content[start : start + 40] = bytes(40)
    return bytes(content)


# Files that hold no weights: how they are written, and what the message says of them.
OTHER_FILES = {
    'git lfs': (lambda path: path.write_text('version https://git-lfs.github.com/spec/v1\noid sha256:0\n'), 'Git LFS'),
    'web page': (lambda path: path.write_text('\n<!DOCTYPE html>\n<html>'), 'a web page'),
    'keras': (lambda path: path.write_bytes(b'\x89HDF\r\n\x1a\n' + bytes(99)), 'an HDF5 file'),
    'gguf': (lambda path: path.write_bytes(b'GGUF' + bytes(99)), 'a GGUF file'),
    'gzip': (lambda path: path.write_bytes(gzip.compress(b'weights')), 'compressed by gzip: unpack it'),
    'json': (lambda path: path.write_text('{"weight_map": {}}'), 'JSON text'),
    'zip': (lambda path: write_zip(path, ['weights.pth']), 'a ZIP archive: unpack it'),
    'numpy': (lambda path: write_zip(path, ['a.npy', 'b.npy']), 'a NumPy archive'),
    'torchscript': (lambda path: torch.jit.trace(torch.nn.ReLU(), torch.ones(1)).save(str(path)), 'TorchScript'),
    'whole network': (lambda path: torch.save(torch.nn.Linear(2, 2), path), 'save the state_dict()'),
    'empty': (lambda path: path.write_bytes(b''), 'it is empty'),
    'zip without a table': (lambda path: path.write_bytes(zip_without_table()), 'is damaged'),
    'noise': (lambda path: path.write_bytes(bytes(range(256))), 'is damaged'),
}


@pytest.mark.filterwarnings('ignore')  # torch.jit is deprecated
@pytest.mark.parametrize('case', OTHER_FILES)
def test_file_without_weights_is_named_for_what_it_is(case, tmp_path, capsys):
    write, text = OTHER_FILES[case]
    write(tmp_path / 'weights.pth')
    given = ['--backbone=resnet18', '--image_size=32', *own_paths(tmp_path)]
    assert cli.main(['evaluate', f'--ckpt_name={tmp_path}/weights.pth', *given]) == 1
    error = one_line(capsys.readouterr().err)
    assert text in error
    assert 'weights.pth' in error
