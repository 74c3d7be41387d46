"""Runs from pretrained weights, repeated, resumed and continued: which options and which val count."""

import itertools
import json
import os
import re
import shutil
import signal

import numpy as np
import pytest
import torch

import cli
from ckpt import get_model_ckpt
from commands import check_dataloader
from commands.ablate import plan_variants
from config import NOT_RESTORED_OPTIONS, PREPROCESSING
from conftest import own_paths
from dataloader.load_dataset import find_split_sources
from engine import set_up
from engine.auto_preset import choose_preset
from engine.run_dir import args_from_run
from engine.teacher import TARGETS_FILE
from protocols import features, monitor
from protocols.collapse_verdict import judge_run, judge_run_metrics
from protocols.monitor import Monitor
from runtime.checkpoints.best_epoch import FEW_LABELS, SIMILARITY, find_best_epoch, find_best_epoch_in_metrics
from runtime.checkpoints.load_state import build_model
from runtime.checkpoints.run_folder import checkpoints, finished_epoch
from runtime.files import read_json, read_metrics
from runtime.options import channel_numbers, channel_values, get_config
from test_training_from_weights import RUN, SMALL, pretrained, state_of, train  # noqa: F401

TOLD = ('--image_size=40', '--crop_ratio=1', '--interpolation=bicubic', '--mean=0.4', '--std=0.3', '--heads_epochs=0')
TOLD += ('--backbone_lr_scale=0.7', '--distill_weight=0', '--start_share=0.2', '--augmentation=simclr')
QUICK = ('--max_epochs=1', '--knn_every=0')


def saved_args(folder, run=RUN):
    return read_json(folder / 'ckpt' / run / 'run.json')['args']


@pytest.fixture(scope='module')
def told(drawn, pretrained, tmp_path_factory):  # noqa: F811
    """A run from weights with options of its own for all that weights set."""
    folder = tmp_path_factory.mktemp('told')
    assert train(folder, drawn, pretrained, *QUICK, *TOLD) == 0
    return folder


def test_from_run_repeats_options_of_run_from_weights(told):
    """Also those that --init_from would set: the repeated run has the same weights, to the bit."""
    assert cli.main(['train', f'--from_run={RUN}', *own_paths(told)]) == 0
    second = RUN.replace('_0', '_1')
    before, after = saved_args(told), saved_args(told, second)
    assert {name for name in before if before[name] != after[name]} <= {*NOT_RESTORED_OPTIONS}
    one, two = state_of(told, 1)['model'], state_of(told, 1, second)['model']
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_explicit_options_of_a_repeated_run_are_those_that_somebody_gave(told):
    """What --from_run fixes is not said to be given; what was given to the first run stays so in a third."""
    given = {
        'image_path',
        'ckpt_path',
        'cache_path',
        'log_path',
        'init_from',
        *(one[2:].partition('=')[0] for one in TOLD),
    }
    first = {*read_json(told / 'ckpt' / RUN / 'run.json')['explicit']}
    assert first >= given
    for number in (1, 2):
        name = RUN.replace('_0', f'_{number}')
        source = RUN.replace('_0', f'_{number - 1}')
        if not (told / 'ckpt' / name).is_dir():
            assert cli.main(['train', f'--from_run={source}', *own_paths(told)]) == 0
        assert {*read_json(told / 'ckpt' / name / 'run.json')['explicit']} == first


def test_ablations_of_run_from_weights_have_its_options(told):
    args = get_config(from_run=RUN, ckpt_path=str(told / 'ckpt'), ablation='similarity')
    args.explicit = {'from_run', 'ckpt_path', 'ablation'}
    chosen = {*read_json(told / 'ckpt' / RUN / 'run.json')['explicit']}
    planned = plan_variants(args_from_run(args), chosen)
    loaded = [get_model_ckpt(variant)[0] for *_, variant in planned]
    for option in (one.strip('-').partition('=')[0] for one in TOLD):
        assert {getattr(one, option) for one in loaded} == {saved_args(told)[option]}, option


def test_weights_in_place_of_random_ones_set_their_defaults(drawn, pretrained, tmp_path, capsys):  # noqa: F811
    """--from_run of a run from random weights: its options are no choice for weights."""
    given = ('train', *SMALL, *QUICK, f'--image_path={drawn}', *own_paths(tmp_path))
    assert cli.main([*given]) == 0
    assert (
        cli.main(['train', f'--from_run={RUN}', f'--init_from={pretrained}', '--distill_size=32', *own_paths(tmp_path)])
        == 0
    )
    assert 'from pretrained weights: --freeze_bn=True' in capsys.readouterr().out
    assert saved_args(tmp_path, RUN.replace('_0', '_1'))['freeze_bn'] is True


@pytest.mark.parametrize('option', ['--distill_weight=0', '--image_size=40', '--freeze_bn=False', '--heads_epochs=0'])
def test_resume_auto_compares_what_an_earlier_command_gave(option, drawn, pretrained, tmp_path, capsys):  # noqa: F811
    """Weights set these options if they are left out: a finished run that was told otherwise is another run."""
    given = (*QUICK, '--resume=auto')
    assert train(tmp_path, drawn, pretrained, *given, option) == 0
    for command, runs in ((option, 1), ('--max_epochs=1', 2), ('--max_epochs=1', 2)):
        assert train(tmp_path, drawn, pretrained, *given, command) == 0
        assert len([*(tmp_path / 'ckpt').iterdir()]) == runs
    capsys.readouterr()
    assert train(tmp_path, drawn, pretrained, '--max_epochs=2', *given[1:], option, '--max_minutes=0.00001') == 0
    assert train(tmp_path, drawn, pretrained, '--max_epochs=2', *given[1:]) == 2
    assert f'{option.strip("-").partition("=")[0]}=' in capsys.readouterr().err


def test_unfinished_run_with_defaults_is_resumed_by_same_command(drawn, pretrained, tmp_path, capsys):  # noqa: F811
    given = ('--max_epochs=2', '--knn_every=0', '--resume=auto')
    for minutes in ('0.00001', '0'):
        assert train(tmp_path, drawn, pretrained, *given, f'--max_minutes={minutes}') == 0
    assert 'resuming' in capsys.readouterr().out
    assert len([*(tmp_path / 'ckpt').iterdir()]) == 1


def change_val(folder):
    (folder / 'val').rename(folder / 'elsewhere')  # a tenth of train is val then


def change_labels(folder):
    first, second = sorted((folder / 'train').iterdir())[:2]
    for path in sorted(first.iterdir())[:8]:
        path.rename(second / f'moved_{path.name}')


def remove_images(folder):
    for part in (folder / 'train').iterdir():
        sorted(part.iterdir())[0].unlink()


UNTOUCHED = ('--heads_epochs=9', '--save_every_epochs=1', '--batch_size=16')


@pytest.mark.parametrize(
    ('change', 'option'),
    [
        (change_val, '--quiet=False'),
        (change_labels, '--quiet=False'),
        (remove_images, '--quiet=False'),
        (lambda folder: None, '--distill_size=64'),
    ],
)
def test_gain_is_measured_as_the_start_was(change, option, drawn, pretrained, tmp_path, capsys):  # noqa: F811
    """A resumed run with other images, labels or targets measures its start and its best epoch again, so that a
    backbone that is not trained gains nothing, and the best checkpoint stays."""
    shutil.copytree(drawn, tmp_path / 'set')
    folder = tmp_path / 'ckpt' / RUN
    assert train(tmp_path, tmp_path / 'set', pretrained, *UNTOUCHED, '--max_epochs=2') == 0
    lines = read_metrics(folder / 'metrics.jsonl')
    lines[1] |= {FEW_LABELS.gain: 50.0, FEW_LABELS.error: 1.0}  # as if epoch 1 were the best
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    change(tmp_path / 'set')
    capsys.readouterr()
    assert cli.main(['train', f'--resume={RUN}', '--max_epochs=3', option, *own_paths(tmp_path)]) == 0
    assert 'the start and the best epoch, 1, are measured again' in capsys.readouterr().out
    _, best, second, last = read_metrics(folder / 'metrics.jsonl')
    assert best[f'{FEW_LABELS.gain}_earlier'] == 50
    assert f'{FEW_LABELS.gain}_earlier' in second
    assert FEW_LABELS.gain not in second
    assert [line[tag] for line in (best, last) for tag in (FEW_LABELS.gain, FEW_LABELS.error)] == [0, 0, 0, 0]
    saved = read_json(folder / 'few_labels_of_start.json')
    assert last[FEW_LABELS.value] == pytest.approx(100 * torch.tensor(saved['right']).double().mean().item())
    assert cli.main(['train', f'--resume={RUN}', '--max_epochs=4', *own_paths(tmp_path)]) == 0
    assert 'measured again' not in capsys.readouterr().out


def test_resumed_run_cannot_be_measured_otherwise(drawn, pretrained, tmp_path, capsys):  # noqa: F811
    """The best epoch of a run is chosen among measures of one kind, and its file has the options of all."""
    assert train(tmp_path, drawn, pretrained, *QUICK) == 0
    before = {path: path.read_bytes() for path in (tmp_path / 'ckpt').rglob('*') if path.is_file()}
    options = ('--image_size=64', '--crop_ratio=0.5', '--interpolation=bicubic', '--exif=ignore', '--start_share=1')
    for option, epochs in itertools.product(options, (1, 2)):
        capsys.readouterr()
        given = ['train', f'--resume={RUN}', f'--max_epochs={epochs}', option, *own_paths(tmp_path)]
        assert cli.main(given) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert option in line
        assert f'--init_from={RUN} --image_path={drawn} {option}' in line
    assert {path: path.read_bytes() for path in before} == before
    assert cli.main(['train', f'--resume={RUN}', '--max_epochs=2', '--image_size=32', *own_paths(tmp_path)]) == 0


def test_run_stopped_while_it_measures_again_does_so_when_resumed(drawn, pretrained, tmp_path, monkeypatch, capsys):  # noqa: F811
    shutil.copytree(drawn, tmp_path / 'set')
    assert train(tmp_path, tmp_path / 'set', pretrained, *UNTOUCHED, '--max_epochs=2') == 0
    folder = tmp_path / 'ckpt' / RUN
    lines = read_metrics(folder / 'metrics.jsonl')
    lines[1] |= {FEW_LABELS.gain: 50.0, FEW_LABELS.error: 1.0}
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    change_val(tmp_path / 'set')
    resume = ['train', f'--resume={RUN}', '--max_epochs=3', *own_paths(tmp_path)]
    with monkeypatch.context() as patched:
        patched.setattr(monitor, 'measure_labels', lambda *given: signal.raise_signal(signal.SIGTERM))
        assert cli.main(resume) == 128 + signal.SIGTERM
    assert find_best_epoch(folder) == 1
    capsys.readouterr()
    assert cli.main(resume) == 0
    assert 'the start and the best epoch, 1, are measured again' in capsys.readouterr().out


def test_best_epoch_before_a_change_of_val_keeps_its_checkpoint(drawn, pretrained, tmp_path, monkeypatch):  # noqa: F811
    shutil.copytree(drawn, tmp_path / 'set')
    assert train(tmp_path, tmp_path / 'set', pretrained, *UNTOUCHED, '--max_epochs=2') == 0
    folder, gains = tmp_path / 'ckpt' / RUN, iter([40.0, 0.0])
    lines = read_metrics(folder / 'metrics.jsonl')
    lines[1] |= {FEW_LABELS.gain: 50.0, FEW_LABELS.error: 1.0}
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    change_val(tmp_path / 'set')
    monkeypatch.setattr(monitor, 'mean_and_error', lambda difference: (next(gains), 1.0))
    resume = ['train', f'--resume={RUN}', '--max_epochs=3', '--save_every_epochs=10', *own_paths(tmp_path)]
    assert cli.main(resume) == 0
    assert find_best_epoch(folder) == 1
    assert [finished_epoch(path) for path in checkpoints(folder)] == [0, 1, 3]


def test_run_without_labels_is_judged_by_labels_once_there_are_some(drawn, pretrained, tmp_path, capsys):  # noqa: F811
    (tmp_path / 'flat/train').mkdir(parents=True)
    for number, path in enumerate(sorted((drawn / 'train').glob('*/*'))):
        shutil.copy(path, tmp_path / f'flat/train/{number}.png')
    folder, given = tmp_path / 'ckpt' / RUN, ('--max_epochs=2', '--heads_epochs=0', '--save_every_epochs=1')
    assert train(tmp_path, tmp_path / 'flat', pretrained, *given) == 0
    lines = read_metrics(folder / 'metrics.jsonl')
    lines[1] |= {SIMILARITY.gain: 0.5, SIMILARITY.error: 0.01}  # as if epoch 1 were the best
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    assert find_best_epoch(folder) == 1
    resume = ['train', f'--resume={RUN}', '--max_epochs=3', f'--image_path={drawn}', *own_paths(tmp_path)]
    assert cli.main(resume) == 0
    said, lines = capsys.readouterr().out, read_metrics(folder / 'metrics.jsonl')
    assert 'the start and the best epoch, 1, are measured again' in said
    assert [FEW_LABELS.gain in line for line in lines] == [False, True, False, True]
    assert FEW_LABELS.value in lines[0]
    assert '10 labels per class: ' in ' '.join(line for line in said.splitlines() if line.startswith('verdict'))


def test_copy_of_a_checkpoint_has_gains_over_its_start(drawn, pretrained, tmp_path):  # noqa: F811
    """A checkpoint of a distilled run keeps its initial weights."""
    assert train(tmp_path, drawn, pretrained, '--max_epochs=1', '--heads_epochs=9') == 0
    (last,) = (tmp_path / 'ckpt' / RUN).glob('loss_*_epoch_1')
    (tmp_path / 'elsewhere').mkdir()
    shutil.copy(last, tmp_path / 'elsewhere')
    shutil.rmtree(tmp_path / 'ckpt')
    resume = ['train', f'--resume={tmp_path}/elsewhere/{last.name}', '--max_epochs=2', *own_paths(tmp_path)]
    assert cli.main(resume) == 0
    new = tmp_path / 'ckpt' / RUN.replace('_0', '_1')
    lines = read_metrics(new / 'metrics.jsonl')
    assert [line['epoch'] for line in lines] == [0, 1, 2]
    assert lines[2][FEW_LABELS.gain] == 0
    assert [finished_epoch(path) for path in checkpoints(new)] == [0, 2]
    start, kept = (torch.load(path, weights_only=True) for path in checkpoints(new))
    assert all(torch.equal(start['model'][f'backbone.{name}'], value) for name, value in kept['start'].items())
    given = [f'--ckpt_name={tmp_path}/elsewhere/{last.name}', '--beside=start', '--labels=1', '--num_workers=0']
    assert cli.main(['evaluate', *given, *own_paths(tmp_path)]) == 0
    (path,) = (tmp_path / 'elsewhere').glob('evaluate_compare_*')
    assert read_json(path)['rows'][1]['columns']['1 per class']['gain'] == 0


def test_epochs_without_gain_are_not_judged():
    lines = [
        {'epoch': 0, FEW_LABELS.value: 50.0},
        {'epoch': 1, FEW_LABELS.value: 90.0},
        {'epoch': 2, FEW_LABELS.value: 60.0, FEW_LABELS.gain: 10.0, FEW_LABELS.error: 3.0},
    ]
    assert find_best_epoch_in_metrics(lines) == 2


def test_checkpoints_within_an_epoch_are_deleted(drawn, pretrained, tmp_path):  # noqa: F811
    """Those of the first epoch are not the start, and those after the best epoch are not the best."""
    for _ in range(3):
        given = ('--max_epochs=2', '--heads_epochs=0', '--resume=auto', '--batch_size=8')
        assert train(tmp_path, drawn, pretrained, *given, '--max_minutes=0.00001') == 0
        found = checkpoints(tmp_path / 'ckpt' / RUN)
        assert [finished_epoch(path) for path in found] == [0, None]
    assert train(tmp_path, drawn, pretrained, *given, '--max_minutes=0') == 0
    assert None not in [finished_epoch(path) for path in checkpoints(tmp_path / 'ckpt' / RUN)]


@pytest.mark.parametrize('share', [0, 0.5])
def test_start_share_without_start_is_warned_of(share, drawn, pretrained, tmp_path, capsys):  # noqa: F811
    assert train(tmp_path, drawn, pretrained, *QUICK, '--distill_weight=0', '--start_share=0') == 0
    (path,) = (tmp_path / 'ckpt' / RUN).glob('loss_*_epoch_1')
    given = ['evaluate', '--protocol=knn', f'--ckpt_name={path}', f'--start_share={share}', *own_paths(tmp_path)]
    assert cli.main(given) == 0
    said = f'--start_share={share:g} has no effect: {path.name} keeps no initial weights'
    assert (said in capsys.readouterr().err) == bool(share)


@pytest.mark.parametrize(
    ('options', 'warmup'),
    [
        ([], 'mild'),
        (['--augmentation=mild'], 'mild'),
        (['--augmentation=simclr'], 'moco'),
        (['--warmup_augmentation=simclr'], 'simclr'),
        (['--distill_weight=0'], 'moco'),
    ],
)
def test_warmup_of_a_mild_augmentation_is_mild(options, warmup, drawn, pretrained, tmp_path):  # noqa: F811
    given = ('--max_epochs=2', '--knn_every=0', '--warmup_epochs=1', '--max_minutes=0.00001', *options)
    assert train(tmp_path, drawn, pretrained, *given) == 0
    assert saved_args(tmp_path)['warmup_augmentation'] == warmup


def test_without_labels_start_is_used_also_with_few_images(drawn, pretrained, tmp_path):  # noqa: F811
    """Below 20 images no rank is measured either."""
    (tmp_path / 'set').mkdir()
    for number, path in enumerate(sorted((drawn / 'train').rglob('*.png'))[:17]):
        (tmp_path / 'set' / f'{number}.png').symlink_to(path)
    assert train(tmp_path, tmp_path / 'set', pretrained, '--max_epochs=1', '--batch_size=8', '--heads_epochs=0') == 0
    folder = tmp_path / 'ckpt' / RUN
    assert find_best_epoch(folder) == 0
    args, _, checkpoint = get_model_ckpt(get_config(ckpt_name=str(folder)))
    assert checkpoint['epoch'] == 0
    assert not judge_run(folder, 1, args)


def test_check_dataloader_shows_views_of_training(drawn, tmp_path, monkeypatch, capsys):
    """Weights set the augmentation: mild, in the picture too."""
    used, make_views = [], check_dataloader.make_views
    monkeypatch.setattr(check_dataloader, 'make_views', lambda *given: used.append(given[0]) or make_views(*given))
    given = ['check_dataloader', f'--image_path={drawn}', '--preset=photos', '--backbone=resnet18', '--num_workers=0']
    assert cli.main([*given, *own_paths(tmp_path)]) == 0
    assert {args.augmentation for args in used} == {'mild'}
    said = capsys.readouterr().err
    assert 'init_from' not in said
    assert 'backbone' not in said


PREPARED = (*PREPROCESSING, 'channels', 'augmentation')


@pytest.mark.parametrize('kind', ['run', 'renamed checkpoint', 'file of lite0', 'export'])
def test_check_dataloader_has_preprocessing_of_training(kind, drawn, pretrained, tmp_path, monkeypatch):  # noqa: F811
    """It showed ImageNet's mean and std, and bilinear crops of another size."""
    prepared = ('--mean=0.3', '--std=0.2', '--interpolation=bicubic', '--image_size=40')
    if kind != 'file of lite0':
        assert train(tmp_path / 'first', drawn, pretrained, *QUICK, *prepared) == 0
    (checkpoint,) = (tmp_path / 'first' / 'ckpt' / RUN).glob('loss_*_epoch_1') if kind != 'file of lite0' else [None]
    weights, more = tmp_path / 'weights.pth', []
    if kind == 'run':
        weights = checkpoint
    elif kind == 'renamed checkpoint':
        shutil.copy(checkpoint, weights)
    elif kind == 'export':
        weights = tmp_path / 'weights.safetensors'
        given = [f'--ckpt_name={checkpoint}', f'--output={weights}', '--format=safetensors']
        assert cli.main(['export', *given, *own_paths(tmp_path)]) == 0
    else:
        torch.save(
            build_model(get_config(preset='imagenet', backbone='timm/tf_efficientnet_lite0')).backbone.state_dict(),
            weights,
        )
        more = ['--backbone=timm/tf_efficientnet_lite0']
    given = [f'--image_path={drawn}', f'--init_from={weights}', *more, '--num_workers=0', '--device=cpu']
    given += ['--preset=photos', '--distill_size=64', *own_paths(tmp_path / 'second')]
    seen = []
    for command, module in (('check_dataloader', check_dataloader), ('train', set_up)):
        with monkeypatch.context() as patched:
            get = module.get_iterator
            patched.setattr(
                module, 'get_iterator', lambda args, sources, get=get: seen.append(args) or get(args, sources)
            )
            assert cli.main([command, *given, *(['--max_epochs=1'] if command == 'train' else [])]) == 0
    checked, trained = ({name: getattr(args, name) for name in PREPARED} for args in seen)
    assert checked == trained


@pytest.mark.parametrize(('weights', 'preset'), [('imagenet', 'photos'), ('none', 'cifar10')])
def test_small_images_from_weights_get_preset_photos(weights, preset, drawn, tmp_path):
    args = get_config(image_path=str(drawn), device='cpu', init_from=weights)
    assert choose_preset(args, find_split_sources(args)).preset == preset


@pytest.mark.parametrize('error', [float('nan'), 1e9])
def test_gain_without_standard_error_is_no_gain(error):
    """Of a val of one image."""
    lines = [
        {'epoch': 0, FEW_LABELS.value: 0.0},
        {'epoch': 1, FEW_LABELS.value: 100.0, FEW_LABELS.gain: 100.0, FEW_LABELS.error: error},
    ]
    assert find_best_epoch_in_metrics(lines) == 0
    assert judge_run_metrics([*map(with_collapse_measures, lines)], True)[0] == 'no better than the start'


def test_gains_are_judged_without_measures_of_collapse():
    """Fewer than 20 images have none."""
    lines = [
        {'epoch': 0, FEW_LABELS.value: 50.0},
        {'epoch': 1, FEW_LABELS.value: 60.0, FEW_LABELS.gain: 10.0, FEW_LABELS.error: 2.0},
    ]
    assert judge_run_metrics(lines, True)[0] == 'better than the start'
    assert judge_run_metrics(lines) is None
    assert judge_run_metrics(lines[:1], True) is None
    assert judge_run_metrics([], True) is None


def with_collapse_measures(line):
    return {**line, 'pretraining/rank': 5.0, 'pretraining/area': 0.5, 'pretraining/std': 1.0}


def test_run_averaged_with_start_begins_another_of_other_channels(drawn, pretrained, tmp_path, capsys):  # noqa: F811
    """The initial weights within the checkpoint are adapted too."""
    assert train(tmp_path / 'rgb', drawn, pretrained, *QUICK, '--heads_epochs=0', '--start_share=0.5') == 0
    (path,) = (tmp_path / 'rgb/ckpt' / RUN).glob('loss_*_epoch_1')
    given = ['train', *SMALL, *QUICK, f'--init_from={path}', f'--image_path={drawn}', '--channels=1']
    assert cli.main([*given, *own_paths(tmp_path / 'gray')]) == 0
    rgb, gray = (read_start_weight(tmp_path / name, epoch) for name, epoch in (('rgb', 1), ('gray', 0)))
    first = torch.load(path, weights_only=True)['start']['conv1.weight']
    torch.testing.assert_close(gray, ((rgb + first) / 2).sum(1, keepdim=True))


def read_start_weight(folder, epoch):
    return state_of(folder, epoch)['model']['backbone.conv1.weight']


def test_unlabeled_val_is_no_reason_to_stop(drawn, pretrained, tmp_path, capsys):  # noqa: F811
    """The preset evaluates afterwards only where val has labels."""
    shutil.copytree(drawn / 'train', tmp_path / 'set/train')
    (tmp_path / 'set/val').mkdir()
    for number, path in enumerate((drawn / 'val').rglob('*.png')):
        shutil.copy(path, tmp_path / f'set/val/{number}.png')
    given = ['train', *SMALL, '--preset=photos', '--backbone=resnet18', f'--init_from={pretrained}']
    given += [f'--image_path={tmp_path}/set', '--distill_size=32', '--max_epochs=1', '--heads_epochs=0']
    assert cli.main([*given, *own_paths(tmp_path)]) == 0
    assert 'the kNN monitor is off' in capsys.readouterr().out


def test_share_of_trained_weights_is_said(drawn, pretrained, tmp_path, capsys):  # noqa: F811
    """The layer that crosses the limit is trained as a whole."""
    assert train(tmp_path, drawn, pretrained, *QUICK, '--heads_epochs=0', '--trained_share=0.3') == 0
    said = re.search(r'--trained_share=0.3: the last layers, with ([\d.]+)% of the weights', capsys.readouterr().out)
    before, after = (state_of(tmp_path, epoch)['model'] for epoch in (0, 1))
    names = [
        name for name, _ in get_model_ckpt(get_config(ckpt_name=str(tmp_path / 'ckpt' / RUN)))[1].named_parameters()
    ]
    names = [name for name in names if name.startswith('backbone.')]
    changed = sum(before[name].numel() for name in names if not torch.equal(before[name], after[name]))
    share = 100 * changed / sum(before[name].numel() for name in names)
    assert float(said[1]) == pytest.approx(share, abs=0.1)
    assert share > 30


def test_random_weights_in_place_of_pretrained_ones_lose_their_defaults(drawn, pretrained, tmp_path, capsys):  # noqa: F811
    assert train(tmp_path, drawn, pretrained, *QUICK, '--backbone_lr_scale=0.7') == 0
    assert cli.main(['train', f'--from_run={RUN}', '--init_from=none', *own_paths(tmp_path)]) == 0
    assert 'random weights: --freeze_bn=False --heads_epochs=0' in capsys.readouterr().out
    args = saved_args(tmp_path, RUN.replace('_0', '_1'))
    assert (args['freeze_bn'], args['heads_epochs'], args['augmentation']) == (False, 0, 'moco')
    assert args['backbone_lr_scale'] == 0.7


def test_few_labels_of_small_classes_are_said(drawn, pretrained, tmp_path, capsys):  # noqa: F811
    listed = [f'{path}\t{path.parent.name}' for path in sorted((drawn / 'train').rglob('*.png'))]
    (tmp_path / 'set.txt').write_text('\n'.join(listed[::4]))
    assert (
        train(tmp_path, tmp_path / 'set.txt', pretrained, '--max_epochs=1', '--heads_epochs=1', '--batch_size=4') == 0
    )
    assert 'few labels: 3 of 3 classes have fewer than 10 labeled images: all are used' in capsys.readouterr().out


def test_printed_next_command_has_no_option_without_effect(drawn, pretrained, tmp_path, capsys):  # noqa: F811
    given = ('--max_epochs=1', '--heads_epochs=0', '--evaluate_after=True', '--labels=1')
    assert train(tmp_path, drawn, pretrained, *given) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith('next ')]
    assert f'infer --ckpt_name={RUN}/' in line
    assert '--ckpt_path=' in line
    assert '--log_path=' not in line


def test_exported_weights_can_be_read_by_others(drawn, pretrained, tmp_path):  # noqa: F811
    pytest.importorskip('safetensors')
    assert train(tmp_path, drawn, pretrained, *QUICK) == 0
    mask = os.umask(0o022)
    try:
        given = [f'--ckpt_name={RUN}', '--format=safetensors', f'--output={tmp_path}/x.safetensors']
        assert cli.main(['export', *given, *own_paths(tmp_path, 'ckpt')]) == 0
    finally:
        os.umask(mask)
    assert (tmp_path / 'x.safetensors').stat().st_mode & 0o777 == 0o644


@pytest.fixture(scope='module')
def bands(tmp_path_factory):
    """24 training and 8 validation images of two classes, five bands of 16 bits."""
    folder, random = tmp_path_factory.mktemp('bands'), np.random.default_rng(0)
    for split, count in (('train', 24), ('val', 8)):
        for label in range(2):
            (folder / split / str(label)).mkdir(parents=True)
            for number in range(count):
                image = random.integers(0, 2000, (40, 40, 5), dtype=np.uint16) * np.arange(1, 6, dtype=np.uint16)
                np.save(folder / split / str(label) / f'{number}.npy', image + 9000 * label)
    return folder


@pytest.mark.parametrize(
    'more', [(), ('--mean=dataset', '--std=dataset'), ('--mean=0.1', '--std=0.2'), ('--channels=1-5',)]
)
def test_weights_are_evaluated_on_images_of_other_channels(more, bands, pretrained, tmp_path, capsys):  # noqa: F811
    """Their first layer is adapted, as in training."""
    given = [f'--ckpt_name={pretrained}', '--backbone=resnet18', '--image_size=32', '--protocol=knn', '--amp=off']
    given += [f'--image_path={bands}', '--num_workers=0', *own_paths(tmp_path), *more]
    assert cli.main(['evaluate', *given]) == 0
    (path,) = (tmp_path / 'ckpt').rglob('evaluate_knn*.json')
    settings = read_json(path)['settings']
    assert len(channel_numbers(settings['channels'])) == 5
    assert len(channel_values('mean', settings['mean'])) == (1 if '--mean=0.1' in more else 5)


def test_file_beside_a_run_of_other_channels_has_its_mean(bands, pretrained, tmp_path):  # noqa: F811
    """The same weights give the same row, by the name start and by the file's."""
    assert train(tmp_path, bands, pretrained, *QUICK, '--batch_size=16', '--distill_weight=0', '--start_share=0') == 0
    given = [
        f'--ckpt_name={RUN}',
        f'--beside=start,{pretrained}',
        '--labels=2',
        '--num_workers=0',
        *own_paths(tmp_path),
    ]
    assert cli.main(['evaluate', *given]) == 0
    (path,) = (tmp_path / 'ckpt' / RUN).glob('evaluate_compare*.json')
    _, start, file = read_json(path)['rows']
    assert start['columns'] == file['columns']


LEVELS = ('--white_level=4095', '--mean=0.4', '--std=0.3')


def test_white_level_comes_with_mean_and_std_of_a_run(bands, pretrained, tmp_path):  # noqa: F811
    """They are relative to it: without it the images were nearly constant."""
    given = (*QUICK, *LEVELS, '--batch_size=16', '--distill_weight=0', '--start_share=0')
    assert train(tmp_path, bands, pretrained, *given) == 0
    new = ['train', f'--init_from={RUN}', f'--image_path={bands}', '--preset=imagenet', '--batch_size=16', '--amp=off']
    new += ['--image_size=32', '--max_epochs=1', '--num_workers=0', *own_paths(tmp_path), '--resume=auto']
    for options, level in ((['--knn_every=1'], '4095'), (['--white_level=65535', '--model_name=other'], '65535')):
        assert cli.main([*new, *options]) == 0
        names = [path.name for path in (tmp_path / 'ckpt').iterdir()]
        args = saved_args(tmp_path, next(name for name in names if name != RUN and 'other' in name or level == '4095'))
        assert (args['white_level'], args['mean'], args['std']) == (level, '0.4', '0.3')
    assert cli.main([*new, '--knn_every=1']) == 0  # the same command resumes the same run


@pytest.mark.parametrize('word', ['dataset', 'weights'])
def test_mean_of_a_run_that_starts_from_another_can_be_measured(word, drawn, pretrained, tmp_path, capsys):  # noqa: F811
    assert train(tmp_path, drawn, pretrained, *QUICK, '--mean=0.4', '--std=0.3') == 0
    new = ['train', f'--init_from={RUN}', f'--image_path={drawn}', '--preset=imagenet', '--batch_size=16', '--amp=off']
    new += ['--image_size=32', '--max_epochs=1', '--num_workers=0', f'--mean={word}', *own_paths(tmp_path)]
    capsys.readouterr()
    assert cli.main(new) == 0
    assert 'applies to new runs' not in capsys.readouterr().out
    saved = saved_args(tmp_path, RUN.replace('_0', '_1'))
    assert (saved['mean'] == '0.4') == (word != 'dataset')
    assert len(channel_values('mean', saved['mean'])) == (3 if word == 'dataset' else 1)
    assert saved['std'] == '0.3'


def test_runs_of_other_white_levels_are_measured_with_their_own(bands, pretrained, tmp_path, monkeypatch):  # noqa: F811
    given = (*QUICK, '--batch_size=16', '--distill_weight=0', '--start_share=0')
    assert train(tmp_path, bands, pretrained, *given, *LEVELS) == 0
    assert train(tmp_path, bands, pretrained, *given, '--model_name=two', '--white_level=30000') == 0
    two = RUN.replace('simsiam', 'two')
    seen, extract = [], features.extract_features

    def extract_and_note(args, backbone, loader, *more):
        assert loader.dataset.pixel_format.levels == (0, float(args.white_level))
        seen.append(args.white_level)
        return extract(args, backbone, loader, *more)

    monkeypatch.setattr('protocols.compare.extract_features', extract_and_note)
    monkeypatch.setattr('commands.report.extract_features', extract_and_note)
    compared = ['evaluate', f'--ckpt_name={RUN}', f'--beside={two},{pretrained}', '--labels=2', '--num_workers=0']
    assert cli.main([*compared, *own_paths(tmp_path)]) == 0
    assert seen == ['4095'] * 2 + ['30000'] * 2 + ['4095'] * 2
    seen.clear()
    assert cli.main(['report', f'--ckpt_name={RUN},{two}', '--num_workers=0', *own_paths(tmp_path)]) == 0
    assert seen == ['4095'] * 2 + ['30000'] * 2


@pytest.mark.parametrize('channels', ['1-5', '1-3', '4,2,3'])
def test_exported_weights_keep_channels_and_white_level(channels, bands, pretrained, tmp_path):  # noqa: F811
    given = (*QUICK, *LEVELS, f'--channels={channels}', '--batch_size=16', '--distill_weight=0', '--start_share=0')
    folder = tmp_path / 'set'
    shutil.copytree(bands, folder)
    if channels == '1-3':
        for path in folder.rglob('*.npy'):
            np.save(path, np.load(path)[..., :3])
    assert train(tmp_path, folder, pretrained, *given) == 0
    weights = tmp_path / 'weights.safetensors'
    out = [f'--output={weights}', '--format=safetensors']
    assert cli.main(['export', f'--ckpt_name={RUN}', *out, *own_paths(tmp_path)]) == 0
    args, model, _ = get_model_ckpt(get_config(ckpt_name=str(weights)))
    assert (args.channels, args.white_level, args.mean) == (channels, '4095', ','.join(['0.4'] * args.num_channels))
    x = torch.rand(2, args.num_channels, 32, 32)
    _, own, _ = get_model_ckpt(get_config(ckpt_name=str(tmp_path / 'ckpt' / RUN)))
    assert torch.equal(model.eval().backbone(x), own.eval().backbone(x))
    export = [f'--output={tmp_path}/folder', '--format=timm']
    assert cli.main(['export', f'--ckpt_name={RUN}', *export, *own_paths(tmp_path)]) == 0
    assert 'PIL, RGB' not in (tmp_path / 'folder/README.md').read_text()


def test_automatic_channels_resume_and_evaluate_a_run(bands, pretrained, tmp_path):  # noqa: F811
    given = (*QUICK, '--channels=auto', '--batch_size=16', '--resume=auto')
    for minutes in ('0.00001', '0'):
        assert train(tmp_path, bands, pretrained, *given, f'--max_minutes={minutes}') == 0
    (run,) = (tmp_path / 'ckpt').iterdir()
    assert checkpoints(run)[-1].name.endswith('_epoch_1')
    evaluated = [f'--ckpt_name={RUN}', '--channels=auto', '--protocol=knn', '--num_workers=0', *own_paths(tmp_path)]
    assert cli.main(['evaluate', *evaluated]) == 0


def one_class(drawn, folder):  # noqa: F811
    """A common layout of images without labels: train/images."""
    for split in ('train', 'val'):
        (folder / split / 'images').mkdir(parents=True)
        for number, path in enumerate(sorted(drawn.glob(f'{split}/*/*.png'))):
            shutil.copy(path, folder / split / 'images' / f'{number}.png')
    return folder


def test_one_class_is_no_label(drawn, pretrained, tmp_path, capsys):  # noqa: F811
    """Accuracy was 100 % at each epoch, so the start was the best, whatever had been gained."""
    folder = one_class(drawn, tmp_path / 'set')
    given = ('--max_epochs=3', '--heads_epochs=0', '--distill_weight=4', '--distill_size=48', '--learning_rate=0.1')
    assert train(tmp_path, folder, pretrained, *given) == 0
    assert f'all labels of {folder}/train are one class' in capsys.readouterr().out
    lines = read_metrics(tmp_path / 'ckpt' / RUN / 'metrics.jsonl')
    assert not any(FEW_LABELS.value in line for line in lines)
    assert find_best_epoch(tmp_path / 'ckpt' / RUN) == max(lines, key=lambda line: line[SIMILARITY.gain])['epoch'] > 0
    for protocol in ('knn', 'linear', 'semi', 'compare'):
        evaluated = [f'--ckpt_name={RUN}', f'--protocol={protocol}', '--num_workers=0', *own_paths(tmp_path)]
        assert cli.main(['evaluate', *evaluated]) == 2, protocol
        assert 'are one class' in capsys.readouterr().err
    transfer = [f'--ckpt_name={RUN}', '--protocol=transfer', f'--transfer_path={folder}', *own_paths(tmp_path)]
    assert cli.main(['evaluate', *transfer]) == 2
    assert 'two classes' in capsys.readouterr().err
    args = get_config(image_path=str(folder), device='cpu', init_from=str(pretrained), preset='photos')
    assert not choose_preset(args, find_split_sources(args)).evaluate_after


def test_resumed_run_keeps_its_protocol(drawn, pretrained, tmp_path):  # noqa: F811
    given = ('--protocol=knn', '--evaluate_after=True', '--heads_epochs=0', '--knn_every=0')
    assert train(tmp_path, drawn, pretrained, '--max_epochs=1', *given) == 0
    resumed = ['train', f'--resume={RUN}', '--max_epochs=2', '--num_workers=0', *own_paths(tmp_path)]
    assert cli.main(resumed) == 0
    assert saved_args(tmp_path)['protocol'] == 'knn'
    results = [read_json(path) for path in (tmp_path / 'ckpt' / RUN).glob('evaluate_*.json')]
    assert {result['protocol'] for result in results} == {'knn'}


def test_stop_in_the_last_metrics_keeps_similarity(drawn, pretrained, tmp_path, monkeypatch):  # noqa: F811
    """The resumed run had no targets any more: without labels its last epoch could not be the best."""
    folder = one_class(drawn, tmp_path / 'set')
    given = ('--max_epochs=2', '--heads_epochs=0', '--distill_weight=8', '--learning_rate=0.1', '--start_share=0')
    after_epoch = Monitor.after_epoch

    def stop(self, state, teacher):
        if state.epoch == 2:
            raise KeyboardInterrupt
        after_epoch(self, state, teacher)

    with monkeypatch.context() as patched:
        patched.setattr(Monitor, 'after_epoch', stop)
        assert train(tmp_path, folder, pretrained, *given) != 0
    assert train(tmp_path, folder, pretrained, *given, '--resume=auto') == 0
    lines = read_metrics(tmp_path / 'ckpt' / RUN / 'metrics.jsonl')
    assert [line['epoch'] for line in lines if SIMILARITY.gain in line] == [0, 1, 2]
    assert not (tmp_path / 'ckpt' / RUN / TARGETS_FILE).exists()


def test_from_run_resolves_automatic_values_anew(drawn, pretrained, tmp_path):  # noqa: F811
    """80 steps are 27 epochs of the first set, and 80 of half of it."""
    assert train(tmp_path, drawn, pretrained, '--max_epochs=1', '--knn_every=0') == 0
    assert saved_args(tmp_path)['heads_epochs'] == 27
    few = tmp_path / 'few'
    shutil.copytree(drawn, few)
    for path in sorted(few.glob('train/*/*.png'))[::2]:
        path.unlink()
    given = ['train', f'--from_run={RUN}', f'--image_path={few}', '--image_size=48', *own_paths(tmp_path)]
    assert cli.main(given) == 0
    after = saved_args(tmp_path, RUN.replace('_0', '_1'))
    assert after['heads_epochs'] == 80


def test_best_checkpoint_is_named_once(drawn, pretrained, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr('runtime.checkpoints.run_folder.find_best_epoch', lambda folder: 1)
    given = ('--max_epochs=2', '--heads_epochs=0', '--save_every_epochs=1', '--evaluate_after=True', '--labels=1')
    assert train(tmp_path, drawn, pretrained, *given) == 0
    assert capsys.readouterr().out.count('epoch 1 is its best ') == 1
