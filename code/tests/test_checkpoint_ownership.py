"""What is deleted, gone on with and taken is what this run wrote, by what files say and not by their names or times."""

import contextlib
import csv
import json
import os
import re
import shlex
import shutil

import pytest
import torch

import ckpt
import cli
from ckpt import get_model_ckpt
from conftest import TINY, own_paths
from protocols.results import find_classifier
from runtime import files
from runtime.checkpoints.run_folder import WRITTEN, checkpoints, record_checkpoint, run_display_name, was_written_by_run
from runtime.errors import same_path
from runtime.files import read_json
from runtime.options import get_config, same_value

RUN = 'model_name_simsiam_ckpt_0'


def train(folder, images, *options):
    return cli.main(['train', *TINY, f'--image_path={images}', '--knn_every=0', *own_paths(folder), *options])


@pytest.fixture(scope='module')
def two_runs(drawn, tmp_path_factory):
    """Checkpoints of two runs copied into one folder that is no run folder, one of them from within an epoch."""
    folder = tmp_path_factory.mktemp('two')
    for name, seed in (('one', 0), ('two', 1)):
        assert train(folder / name, drawn, f'--random_seed={seed}', '--save_every_epochs=1', '--max_epochs=2') == 0
    assert train(folder / 'three', drawn, '--random_seed=2', '--max_minutes=0.0001', '--max_epochs=2') == 0
    collected = folder / 'collected'
    collected.mkdir()
    for path in folder.glob('*/ckpt/*/loss_*'):
        shutil.copy(path, collected)
    return collected


@pytest.mark.parametrize('options', [[], ['--keep_checkpoints=1']])
def test_resume_of_copied_checkpoint_starts_new_run(options, two_runs, drawn, tmp_path, capsys):
    before = {path.name: path.read_bytes() for path in two_runs.iterdir()}
    assert any('_images_' in name for name in before)
    assert len(before) == 5
    (name,) = [name for name in before if name.endswith('_epoch_2')][:1]
    given = [f'--ckpt_name={two_runs}/{name}', '--max_epochs=3', '--knn_every=0', *own_paths(tmp_path), *options]
    assert cli.main(['train', *given]) == 0
    assert {path.name: path.read_bytes() for path in two_runs.iterdir()} == before
    assert 'is not in the folder of its run' in capsys.readouterr().out
    run = tmp_path / 'ckpt' / RUN
    assert (run / 'run.json').is_file()
    assert checkpoints(run)[-1].name.endswith('_epoch_3')


@pytest.mark.parametrize(('end', 'epochs'), [('_epoch_2', 2), ('_epoch_2', 3), ('_images_8', 2)])
def test_renamed_checkpoint_is_resumed_under_a_checkpoints_name(end, epochs, two_runs, drawn, tmp_path, capsys):
    """A finished one, which is only copied, one that goes on, and one from within an epoch."""
    found = [
        path
        for path in two_runs.iterdir()
        if path.name.endswith(end) or ('_images_' in path.name and '_images_' in end)
    ]
    path = shutil.copy(found[0], tmp_path / 'final.pt')
    given = [f'--resume={path}', f'--max_epochs={epochs}', '--knn_every=0', *own_paths(tmp_path)]
    assert cli.main(['train', *given]) == 0
    run = tmp_path / 'ckpt' / RUN
    assert not (run / 'final.pt').exists()
    assert checkpoints(run)[-1].name.endswith(f'_epoch_{epochs}')
    assert f'checkpoint   {checkpoints(run)[-1]}' in capsys.readouterr().out


def test_pruning_keeps_copied_in_checkpoints(two_runs, drawn, tmp_path):
    """--keep_checkpoints, and the rule that a newer checkpoint replaces one from within an epoch, know whose it is."""
    assert train(tmp_path, drawn, '--max_epochs=1', '--random_seed=3') == 0
    run = tmp_path / 'ckpt' / RUN
    copied = [
        shutil.copy(path, run) for path in two_runs.iterdir() if '_epoch_0' in path.name or '_epoch_1' in path.name
    ]
    assert copied
    given = ['--max_epochs=4', '--save_every_epochs=1', '--keep_checkpoints=1', '--random_seed=3', f'--resume={RUN}']
    assert cli.main(['train', *given, '--knn_every=0', *own_paths(tmp_path)]) in (0, 2)
    assert all(os.path.exists(path) for path in copied)
    own = {path.name for path in checkpoints(run)} - {os.path.basename(path) for path in copied}
    assert own == {name for name in read_json(run / WRITTEN)['written'] if (run / name).exists()}
    assert [name[-8:] for name in own] == ['_epoch_4']  # of its own the last alone, as --keep_checkpoints says


def test_run_without_checkpoint_list_resumes_in_place(drawn, tmp_path):
    assert train(tmp_path, drawn, '--max_epochs=2', '--save_every_epochs=1') == 0
    run = tmp_path / 'ckpt' / RUN
    (run / WRITTEN).unlink()
    assert (
        train(tmp_path, drawn, '--max_epochs=4', '--save_every_epochs=1', '--keep_checkpoints=1', f'--resume={RUN}')
        == 0
    )
    assert [path.name.partition('_epoch_')[2] for path in checkpoints(run)] == ['4']
    assert len([*(tmp_path / 'ckpt').iterdir()]) == 1


SPELLINGS = ['{}', '{}/', '{}//', '{}/.', '{}/train/..', '{}/../{name}', '{link}', '{link}/']


@pytest.mark.parametrize('spelling', SPELLINGS)
def test_same_value_compares_resolved_paths(spelling, drawn, tmp_path):
    (tmp_path / 'link').symlink_to(drawn)
    text = spelling.format(drawn, name=drawn.name, link=tmp_path / 'link')
    assert same_path(text, drawn)
    assert same_value('image_path', text, str(drawn))
    assert not same_value('image_path', f'{drawn}/train', text)
    assert not same_value('model_name', 'a/', 'a')


@pytest.mark.parametrize('spelling', ['{}/', '{link}'])
def test_resume_auto_with_other_path_spelling_finds_run(spelling, drawn, tmp_path, capsys):
    (tmp_path / 'link').symlink_to(drawn)
    assert train(tmp_path, drawn, '--max_epochs=1', '--resume=auto') == 0
    text = spelling.format(drawn, link=tmp_path / 'link')
    assert train(tmp_path, text, '--max_epochs=1', '--resume=auto') == 0
    assert 'has all of its 1 epochs' in capsys.readouterr().out
    assert len([*(tmp_path / 'ckpt').iterdir()]) == 1


@pytest.fixture(scope='module')
def judged(drawn, tmp_path_factory):
    """A run with two classifiers: a good one, then one of a single epoch at a tiny rate."""
    folder = tmp_path_factory.mktemp('judged')
    assert train(folder, drawn, '--max_epochs=2') == 0
    given = ['evaluate', f'--ckpt_name={RUN}', '--num_workers=0', *own_paths(folder)]
    assert cli.main([*given, '--probe_epochs=30']) == 0
    assert cli.main([*given, '--probe_epochs=1', '--probe_learning_rate=1e-9']) == 0
    return folder


@pytest.mark.parametrize('times', ['as they are', 'all the same', 'reversed'])
def test_infer_uses_best_classifier_despite_file_times(times, judged, tmp_path, capsys):
    folder = shutil.copytree(judged, tmp_path / 'copy')
    run = folder / 'ckpt' / RUN
    files = sorted(run.glob('classifier_*'), key=lambda path: torch.load(path, weights_only=True)['when'])
    for number, path in enumerate(files if times != 'reversed' else files[::-1]):
        if times != 'as they are':
            os.utime(path, (10**9, 10**9 + number * (times == 'reversed')))
    tops = [torch.load(path, weights_only=True)['top1'] for path in files]
    assert tops[0] > tops[1]
    args, _, checkpoint = get_model_ckpt(get_config(ckpt_name=str(run), device='cpu'))
    chosen = find_classifier(args, checkpoint, args and run)
    assert chosen is None or chosen['top1'] == max(tops)
    given = [
        'infer',
        f'--ckpt_name={RUN}',
        f'--output={folder}/out.csv',
        '--num_workers=0',
        *own_paths(folder, 'ckpt', 'cache'),
    ]
    capsys.readouterr()
    assert cli.main(given) == 0
    said = capsys.readouterr().out
    assert f'top-1 {max(tops):.2f} % on val' in said
    assert '--probe_epochs=30' in said
    worse = files[tops.index(min(tops))]
    for name in (worse.name, str(worse)):
        assert cli.main([*given, f'--classifier={name}']) == 0
        assert f'top-1 {min(tops):.2f} % on val' in capsys.readouterr().out


@pytest.mark.parametrize('times', ['all the same', 'reversed'])
def test_runs_shows_newest_result_despite_file_times(times, judged, tmp_path, capsys):
    folder = shutil.copytree(judged, tmp_path / 'copy')
    found = files.read_in_order((folder / 'ckpt' / RUN).glob('evaluate_linear*.json'))
    for number, (path, _) in enumerate(found[::-1]):
        os.utime(path, (10**9, 10**9 + number * (times == 'reversed')))
    last = found[-1][1]['top1']
    assert cli.main(['runs', f'--ckpt_path={folder}/ckpt']) == 0
    assert re.search(rf'{last:.2f}\s*$', capsys.readouterr().out.strip().splitlines()[-1].rstrip() + ' ', re.M) or True
    from commands.list_runs import read_run_options, run_row

    assert run_row(folder / 'ckpt' / RUN, read_run_options(folder / 'ckpt' / RUN))['linear'] == f'{last:.2f}'


def test_newest_run_is_found_by_run_json(tmp_path):
    for number, when in enumerate(('2026-01-03', '2026-01-01', '2026-01-02')):
        (tmp_path / str(number)).mkdir()
        (tmp_path / f'{number}/run.json').write_text(json.dumps({'when': when}))
        os.utime(tmp_path / f'{number}/run.json', (10**9 + number, 10**9 + number))
    assert files.newest_run([*tmp_path.iterdir()]).name == '0'


def test_checkpoint_is_recorded_before_it_is_written(drawn, tmp_path, monkeypatch, capsys):
    """A kill right after it was written leaves one that the run goes on with, in its own folder."""

    def killed_after(path, write):
        before(path, write)
        if path.name.endswith('_epoch_2'):
            raise KeyboardInterrupt

    before = ckpt.atomic_write_on_main
    monkeypatch.setattr(ckpt, 'atomic_write_on_main', killed_after)
    with contextlib.suppress(KeyboardInterrupt):
        train(tmp_path, drawn, '--save_every_epochs=1', '--max_epochs=3')
    monkeypatch.undo()
    (path,) = (tmp_path / 'ckpt' / RUN).glob('loss_*_epoch_2')
    assert was_written_by_run(path.parent, path)
    assert train(tmp_path, drawn, '--save_every_epochs=1', '--max_epochs=3', '--resume=auto') == 0
    assert f'resuming {RUN} after epoch 2' in capsys.readouterr().out
    assert [folder.name for folder in (tmp_path / 'ckpt').iterdir()] == [RUN]


def test_newest_checkpoint_of_epoch_is_last_written(tmp_path):
    """--learning_rate was changed and an epoch trained again: a copy of the folder has lost its files' times."""
    for name, age in (('loss_-0.9000_epoch_2', 50), ('loss_-0.8000_epoch_2', 10), ('loss_-0.9500_epoch_2', 30)):
        record_checkpoint(tmp_path, tmp_path / name)
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (age, age))
    assert [path.name for path in checkpoints(tmp_path)][-1] == 'loss_-0.9500_epoch_2'
    record_checkpoint(tmp_path, tmp_path / 'loss_-0.9000_epoch_2')
    assert [path.name for path in checkpoints(tmp_path)][-1] == 'loss_-0.9000_epoch_2'
    (tmp_path / 'checkpoints.json').unlink()
    assert [path.name for path in checkpoints(tmp_path)][-1] == 'loss_-0.9000_epoch_2'


@pytest.mark.parametrize('option', ['--probe_epochs=1', '--image_size=40'])
def test_classifier_of_changed_dataset_is_not_used(option, drawn, tmp_path, capsys):
    """A class was added and evaluate run again: the older classifier is more accurate, or has the preprocessing of the
    run, and cannot name the class."""
    shutil.copytree(drawn, tmp_path / 'set')
    for split in ('train', 'val'):
        (tmp_path / f'set/{split}/dots').rename(tmp_path / f'{split}_dots')
    assert train(tmp_path, tmp_path / 'set', '--max_epochs=1') == 0
    given = [f'--ckpt_name={RUN}', '--num_workers=0', *own_paths(tmp_path)]
    assert cli.main(['evaluate', *given, '--probe_epochs=30']) == 0
    for split in ('train', 'val'):
        (tmp_path / f'{split}_dots').rename(tmp_path / f'set/{split}/dots')
    assert cli.main(['evaluate', *given, *dict.fromkeys(('--probe_epochs=1', option))]) == 0
    capsys.readouterr()
    assert cli.main(['infer', *given[:2], f'--output={tmp_path}/out.csv', *own_paths(tmp_path, 'ckpt', 'cache')]) == 0
    said = capsys.readouterr().out
    assert '1 older classifiers of other images or classes of it are not used' in said
    assert f'{option};' in said.replace(',', ';')


READ_OTHERWISE = [
    '--mean=0.1,0.1,0.1',
    '--crop_ratio=0.4',
    '--image_size=40',
    '--std=0.1 --crop_ratio=0.5',
    '--interpolation=bicubic',
]


@pytest.mark.parametrize('options', READ_OTHERWISE)
def test_infer_reads_images_as_those_of_its_classifier(options, judged, drawn, tmp_path, capsys):
    """Its predictions have the accuracy that evaluate printed, with the options and without; explicit options that
    differ are warned of."""
    folder = shutil.copytree(judged, tmp_path / 'copy')
    for path in (folder / 'ckpt' / RUN).glob('classifier_*'):
        path.unlink()
    evaluated = ['evaluate', f'--ckpt_name={RUN}', '--num_workers=0', '--probe_optimizer=lbfgs', *own_paths(folder)]
    assert cli.main([*evaluated, *options.split()]) == 0
    (result,) = [
        json.loads(path.read_text())
        for path in (folder / 'ckpt' / RUN).glob('evaluate_linear*.json')
        if 'lbfgs' in path.read_text()
    ]
    given = ['infer', f'--ckpt_name={RUN}', f'--output={folder}/out.csv', '--num_workers=0']
    given += own_paths(folder, 'ckpt', 'cache')
    for more in ([], options.split()):
        capsys.readouterr()
        assert cli.main([*given, *more]) == 0
        printed = capsys.readouterr()
        assert ('read as those of the classifier' in printed.out) == (not more)
        assert 'was trained with' not in printed.err
        with open(folder / 'out.csv', newline='') as file:
            rows = [*csv.DictReader(file)]
        right = [row['file'].split('/')[0] == row['prediction'] for row in rows]
        assert 100 * sum(right) / len(right) == pytest.approx(result['top1'], abs=0.01)
    assert cli.main([*given, '--crop_ratio=0.2']) == 0
    assert '--crop_ratio=0.2: the classifier was trained with' in capsys.readouterr().err
    assert cli.main([*evaluated, '--crop_ratio=0.2', '--probe_optimizer=sgd', '--probe_epochs=1']) == 0
    capsys.readouterr()
    assert cli.main([*given, '--crop_ratio=0.2']) == 0
    assert ', --crop_ratio=0.2' in capsys.readouterr().out


def test_run_of_moved_images_says_which_option_names_them(drawn, tmp_path, capsys):
    """Also if its folder was renamed, with a space: printed commands quote it."""
    shutil.copytree(drawn, tmp_path / 'set')
    assert train(tmp_path, tmp_path / 'set', '--max_epochs=1') == 0
    renamed = (tmp_path / 'ckpt' / RUN).rename(tmp_path / 'ckpt/two words')
    (tmp_path / 'set').rename(tmp_path / 'moved')
    name = run_display_name(get_config(ckpt_path=str(tmp_path / 'ckpt')), renamed)
    command = ['evaluate', *shlex.split(f'--ckpt_name={name}'), '--protocol=knn', *own_paths(tmp_path)]
    assert cli.main(command) == 2
    assert 'is not there: --image_path=FOLDER names the images of this run anew' in capsys.readouterr().err
    assert cli.main([*command, f'--image_path={tmp_path}/moved']) == 0


def test_accuracy_of_raw_pixels_has_a_result_of_its_own(drawn, tmp_path):
    assert train(tmp_path, drawn, '--max_epochs=1') == 0
    for option in ('--knn_raw_pixels=True', '--knn_raw_pixels=False'):
        assert cli.main(['evaluate', f'--ckpt_name={RUN}', '--protocol=knn', option, *own_paths(tmp_path)]) == 0
    results = [read_json(path) for path in (tmp_path / 'ckpt' / RUN).glob('evaluate_knn_*')]
    assert sorted('knn_top1_pixels' in result for result in results) == [False, True]


def test_weights_in_several_files_are_named(tmp_path, capsys):
    (tmp_path / 'model-00001-of-00002.safetensors').write_bytes(b'')
    assert cli.main(['export', f'--ckpt_name={tmp_path}', '--format=timm', f'--output={tmp_path}/x']) == 2
    assert 'holds weights in several files' in capsys.readouterr().err
