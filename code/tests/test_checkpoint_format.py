"""Checkpoints that earlier commits wrote (tests/checkpoints) are read as what they were."""

import shutil
import zipfile

import pytest
import torch

import cli
from ckpt import get_model_ckpt
from conftest import CODE, own_paths
from protocols.results import load_results
from runtime.checkpoints.format import FORMAT, upgrade
from runtime.errors import WorkError
from runtime.options import get_config, preset_options

OLD = CODE / 'tests/checkpoints'


def old(name):
    return torch.load(OLD / name, weights_only=True)


def test_upgrade_fills_missing_options_from_preset(capsys):
    """An option that is younger than the file, of a demo run: the demo's default, and it is said."""
    args, _, checkpoint = get_model_ckpt(get_config(ckpt_name=str(OLD / 'da4e617')))
    unsaid = set(preset_options('demo')) - set(old('da4e617')['args'])
    assert {'probe_optimizer', 'cache_features', 'crop_scale'} <= unsaid
    for name in unsaid:
        assert getattr(args, name) == preset_options('demo')[name], name
    assert args.proj_dim == 8
    assert (checkpoint['epoch'], checkpoint['images'], checkpoint['format']) == (1, 0, FORMAT)
    said = capsys.readouterr().out
    assert 'da4e617 is older than the options --' in said
    assert 'they are those of --preset=demo' in said


def test_old_checkpoint_has_same_knn_accuracy(drawn, tmp_path):
    """kNN as that commit measured it on these images: 12 of 24."""
    run = tmp_path / 'ckpt/model_name_old_ckpt_0'
    run.mkdir(parents=True)
    shutil.copy(OLD / 'da4e617', run / 'loss_-0.0824_epoch_1')
    argv = ['evaluate', '--ckpt_name=model_name_old_ckpt_0', '--protocol=knn', f'--image_path={drawn}', '--amp=off']
    assert cli.main([*argv, *own_paths(tmp_path)]) == 0
    assert load_results(run)[-1]['top1'] == 50.0


def test_upgrade_converts_steps_to_images():
    before = old('6693c8e')
    assert (before['step'], before['args']['batch_size']) == (1, 16)
    now, _ = upgrade(before)
    assert (now['epoch'], now['images']) == (0, 16)
    assert (now['sums'] / now['images'])[0].item() == pytest.approx(before['loss'], abs=1e-6)
    assert 'step' not in now


@pytest.mark.parametrize('name', ['da4e617', '6693c8e'])
def test_old_checkpoint_resumes(name, drawn, tmp_path, capsys):
    run = tmp_path / 'ckpt/model_name_old_ckpt_0'
    run.mkdir(parents=True)
    content = old(name)
    step = f'_step_{content["step"]}' if content.get('step') else ''
    shutil.copy(OLD / name, run / f'loss_{content["loss"]:.4f}_epoch_{content["epoch"]}{step}')
    options = ('--resume=model_name_old_ckpt_0', '--max_epochs=2', f'--image_path={drawn}', '--knn_every=0')
    assert cli.main(['train', *options, *own_paths(tmp_path)]) == 0
    assert 'resuming model_name_old_ckpt_0' in capsys.readouterr().out
    assert list(run.glob('loss_*_epoch_2'))
    assert not list(run.glob('*_step_*'))


@pytest.mark.parametrize(
    ('part', 'value'),
    [
        ('last', None),
        ('last', (1.0,)),
        ('rng', 'GONE'),
        ('rng', 5),
        ('format', '2'),
        ('epoch', '2'),
        ('epoch', -3),
        ('images', 1.5),
        ('last', (1.0, 1.0)),
        ('sums', [0.0, 0.0]),
        ('sums', torch.zeros(2)),
        ('sums', torch.tensor(0.0)),
        ('loss', None),
        ('model', [1]),
        ('model', {'a': None}),
        ('optimizer', {}),
        ('optimizer', {'state': {}, 'param_groups': [{}]}),
        ('scaler', 'GONE'),
    ],
)
def test_checkpoint_with_missing_part_is_damaged(part, value):
    content, _ = upgrade(old('6693c8e'))
    content = {name: kept for name, kept in {**content, part: value}.items() if value != 'GONE' or name != part}
    with pytest.raises(WorkError, match=f'the checkpoint is damaged: its {part} is missing or invalid'):
        upgrade(content)


def test_checkpoint_of_format_3_has_no_distillation_loss():
    now, _ = upgrade(old('6693c8e'))
    before = {**now, 'format': 3, 'images': 16, 'sums': torch.tensor([-8.0, 16.0]), 'last': (-0.25, 0.5)}
    upgraded, _ = upgrade(before)
    assert upgraded['format'] == FORMAT
    assert (upgraded['sums'].tolist(), upgraded['last']) == ([-8.0, 16.0, 0.0], (-0.25, 0.5, 0.0))


def test_checkpoint_with_changed_bytes_is_damaged(tmp_path):
    """Within a weight, where torch would read them as numbers."""
    path = shutil.copy(OLD / '6693c8e', tmp_path / 'loss_0.0000_epoch_1')
    with zipfile.ZipFile(path) as parts:
        largest = max(parts.infolist(), key=lambda part: part.file_size)
    content = bytearray(path.read_bytes())
    middle = largest.header_offset + 200 + largest.file_size // 2
    content[middle : middle + 64] = bytes(64)
    path.write_bytes(content)
    torch.load(path, weights_only=True)
    with pytest.raises(WorkError, match='is damaged, in .*data/'):
        get_model_ckpt(get_config(ckpt_name=str(path)))


def test_checkpoint_of_later_format_is_named():
    with pytest.raises(WorkError, match=f'of format {FORMAT + 1}, newer than {FORMAT}: update this code'):
        upgrade({**old('6693c8e'), 'format': FORMAT + 1})
