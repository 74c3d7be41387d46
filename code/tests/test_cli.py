"""The four commands as a user types them: real processes, real files, exit codes."""

import contextlib
import csv
import fcntl
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import termios

import pytest
import torch
import torchvision
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import cli
from conftest import CODE, TINY, one_line, own_paths, run
from protocols import label_free
from protocols.collapse_verdict import SELECTION_METRIC, SUMMARY_METRICS
from protocols.results import load_results
from runtime.files import read_metrics

RUN = 'model_name_simsiam_ckpt_'


def train(folder, images, *options):
    """A tiny run; its output. Fails where the command does."""
    done = run('train', *TINY, f'--image_path={images}', *own_paths(folder), *options)
    assert done.returncode == 0, done.stderr
    assert 'Traceback' not in done.stderr
    return done


def newest(folder, number=0):
    """The last checkpoint of a run: (path, content)."""
    path = max((folder / 'ckpt' / f'{RUN}{number}').glob('loss_*'), key=lambda p: int(p.name.rsplit('_', 1)[1]))
    return path, torch.load(path, weights_only=True)


def same(one, other):
    """Whether two nested dicts and lists of tensors and values are equal to the bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def read_rows(path):
    with open(path, newline='', encoding='utf-8') as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope='module')
def trained(drawn, tmp_path_factory):
    """(folder, what the command printed): two epochs on the drawn set, every one saved. To be read only."""
    folder = tmp_path_factory.mktemp('trained')
    return folder, train(folder, drawn, '--save_every_epochs=1', '--knn_every=1').stdout


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of the trained run that a test may change."""
    return shutil.copytree(trained[0], tmp_path / 'copy')


def test_train_writes_checkpoints_scalars_and_picture(trained, drawn):
    folder, said = trained
    assert re.search(
        r'epoch 0/2  kNN [\d.]+ %  10 labels per class [\d.]+ %  '
        r'retrieval rank of the positive view [\d.]+ of 72 \(untrained\)',
        said,
    )
    loss = re.search(r'epoch 2/2  loss (-\d\.\d{4})  std [\d.]+  \d+ images/s  kNN [\d.]+ %', said)[1]
    assert f'--ckpt_name={RUN}0/loss_{loss}_epoch_2' in said
    path, content = newest(folder)
    assert path.name == f'loss_{loss}_epoch_2'
    assert (content['epoch'], round(content['loss'], 4)) == (2, float(loss))
    assert content['args']['image_path'] == str(drawn)
    assert sorted(p.name.split('_')[0] for p in path.parent.iterdir()) == [
        'checkpoints.json',
        'log.txt',
        'loss',
        'loss',
        'metrics.jsonl',
        'run.json',
    ]
    events = EventAccumulator(str(folder / 'log' / f'{RUN}0')).Reload()
    scalars = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()['scalars']}
    assert set(scalars) == {
        'pretraining/knn_top1',
        'pretraining/few_labels_top1',
        'pretraining/loss',
        'pretraining/std',
        'speed/images_per_second',
        'speed/waiting_for_data',
        'schedule/learning_rate_projector',
        'schedule/learning_rate_predictor',
        'pretraining/gradient_norm',
        *(f'pretraining/{name}' for name in ('rank', 'rank_z', 'retrieval', 'retrieval_z', 'rankme', 'area', 'alpha')),
        'pretraining/std_judged',
        *(f'pretraining/{name}' for name in ('mean_direction', 'correlation', 'rank_z_minus_p', 'norm_z', 'norm_p')),
    }
    assert re.search(r'^verdict      (healthy|partly collapsed|collapsed|nothing learned): .*std of z', said, re.M)
    for name in ('knn_top1', 'rank', 'area'):
        assert [event.step for event in events.Scalars(f'pretraining/{name}')] == [0, 1, 2]
    assert scalars['pretraining/loss'][-1] == pytest.approx(content['loss'], abs=1e-6)
    first, last = scalars['schedule/learning_rate_projector']
    assert 0 < last < first < 0.8 * 16 / 256
    assert scalars['schedule/learning_rate_predictor'] == pytest.approx([0.8 * 16 / 256] * 2)
    assert len(events.Images('pretraining/two_views')) == 1
    with Image.open(folder / 'log' / f'{RUN}0' / 'two_views.png') as picture:
        assert picture.width > 16 * 32


def test_same_command_gives_equal_second_run(trained, drawn, tmp_path):
    shutil.copytree(trained[0], tmp_path / 'again')
    train(tmp_path / 'again', drawn, '--save_every_epochs=1', '--knn_every=1')
    path, content = newest(tmp_path / 'again', 1)
    before, first = newest(trained[0])
    assert path.name == before.name
    assert content['loss'] == first['loss']
    assert same(content['model'], first['model'])
    assert same(content['optimizer'], first['optimizer'])
    other = train(tmp_path / 'other', drawn, '--random_seed=1')
    assert newest(tmp_path / 'other')[1]['loss'] != first['loss'], other.stdout


def test_resumed_run_equals_unbroken_run(trained, drawn, tmp_path):
    """From epoch 1's checkpoint alone; named by the run, and without repeating the first command's options."""
    run_folder = tmp_path / 'ckpt' / f'{RUN}0'
    run_folder.mkdir(parents=True)
    shutil.copy(next((trained[0] / 'ckpt' / f'{RUN}0').glob('*_epoch_1')), run_folder)
    done = run('train', f'--ckpt_name={RUN}0', *own_paths(tmp_path))
    assert done.returncode == 0, done.stderr
    assert f'resuming {RUN}0 after epoch 1 (of 2 epochs)' in done.stdout
    path, content = newest(tmp_path)
    before, wanted = newest(trained[0])
    assert path.name == before.name
    assert same(content['model'], wanted['model'])
    assert same(content['optimizer'], wanted['optimizer'])
    events = EventAccumulator(str(tmp_path / 'log' / f'{RUN}0')).Reload()
    assert [event.step for event in events.Scalars('pretraining/loss')] == [2]
    again = run('train', f'--ckpt_name={RUN}0', *own_paths(tmp_path))
    assert '_ckpt_0 --max_epochs=<more> continues it' in again.stdout


def test_train_on_large_images_uses_workers(drawn_large, tmp_path):
    options = ('--batch_size=8', '--num_workers=2', '--blur_prob=0.5', '--augmentation=simclr', '--warmup_epochs=1')
    train(tmp_path, drawn_large, *options)
    train(tmp_path, drawn_large, *options)
    assert same(newest(tmp_path, 0)[1]['model'], newest(tmp_path, 1)[1]['model'])


def test_max_minutes_stops_with_resumable_checkpoint(trained, drawn, tmp_path):
    """Interrupted after its first step and resumed, the run ends as the one that never stopped."""
    said = train(tmp_path, drawn, '--max_minutes=0.0001').stdout
    command = re.search(r'have passed: python3 cli.py (.*) resumes it in epoch 1, after 16 images', said)[1]
    assert (newest(tmp_path)[1]['epoch'], newest(tmp_path)[1]['images']) == (0, 16)
    done = run(*shlex.split(command), *own_paths(tmp_path, 'cache'))
    assert done.returncode == 0, done.stderr
    assert same(newest(tmp_path)[1]['model'], newest(trained[0])[1]['model'])
    events = EventAccumulator(str(tmp_path / 'log' / f'{RUN}0')).Reload()
    assert [event.step for event in events.Scalars('pretraining/loss')] == [1, 2]


def test_ascii_locale_with_unicode_log_path_exits_2(drawn, tmp_path):
    env = {**os.environ, 'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}
    given = [*TINY, f'--image_path={drawn}', f'--log_path={tmp_path}/\u00e9', *own_paths(tmp_path, 'ckpt', 'cache')]
    command = [sys.executable, 'cli.py', 'train', *given]
    done = subprocess.run(command, cwd=CODE, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert 'in this locale: PYTHONUTF8=1 helps' in one_line(done.stderr)
    assert [*(tmp_path / 'ckpt').iterdir()] == []


def test_infer_uses_classifier_of_evaluate(copied, drawn, tmp_path):
    name = f'--ckpt_name={RUN}0'
    done = run('evaluate', name, *own_paths(copied))
    assert done.returncode == 0, done.stderr
    folder = copied / 'ckpt' / f'{RUN}0'
    result = load_results(folder)[-1]
    assert {
        'protocol',
        'epoch',
        'top1',
        'top5',
        'knn_top1',
        'knn_top1_untrained',
        'num_train',
        'num_val',
        'seconds',
    } <= set(result)
    assert (result['protocol'], result['epoch'], result['num_train'], result['num_val']) == ('linear', 2, 72, 24)
    assert result['top5'] == 100  # there are three classes
    assert sum(result['per_class'].values()) / 3 == pytest.approx(result['top1'])
    assert re.search(rf'^top-1 +{result["top1"]:.2f} %$', done.stdout, re.M)
    assert f'{result["knn_top1"]:.2f} %' in re.search(r'epoch 2/2 .*', train(tmp_path, drawn).stdout)[0]

    output = tmp_path / 'submission.csv'
    done = run('infer', name, f'--output={output}', *own_paths(copied, 'ckpt', 'cache'))
    assert done.returncode == 0, done.stderr
    assert f'predicted by the linear classifier that evaluate trained on {drawn}' in done.stdout
    rows = read_rows(output)
    assert list(rows[0]) == ['file', 'prediction', 'confidence', 'top5']
    files = sorted(str(path.relative_to(drawn / 'val')) for path in (drawn / 'val').rglob('*.png'))
    assert [row['file'] for row in rows] == files
    right = sum(row['prediction'] == row['file'].split('/')[0] for row in rows)
    assert 100 * right / len(rows) == pytest.approx(result['top1'])
    for row in rows:
        assert row['top5'].split(';')[0] == row['prediction']
        assert sorted(row['top5'].split(';')) == ['checks', 'dots', 'stripes']
        assert 1 / 3 <= float(row['confidence']) <= 1


def test_printed_next_command_works(drawn, tmp_path, capsys):
    """As it is printed: after another tool's file, too, whose set nothing else says."""
    paths, folder = own_paths(tmp_path / 'a b'), tmp_path / 'a b'
    assert cli.main(['train', *TINY, '--max_epochs=1', '--knn_every=0', f'--image_path={drawn}', *paths]) == 0
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / 'other.pth')
    output = f'--output={tmp_path}/said.csv'
    for name in (f'{RUN}0', f'{tmp_path}/other.pth'):
        small = ['--image_size=32', '--probe_epochs=2', f'--image_path={drawn}', '--amp=off']
        assert cli.main(['evaluate', f'--ckpt_name={name}', *small, *paths]) == 0
        command = re.search(r'^next +python3 cli.py (.*)$', capsys.readouterr().out, re.M)[1]
        assert cli.main([*shlex.split(command), output, *own_paths(folder, 'cache')]) == 0
        given = ['infer', f'--ckpt_name={name}', f'--image_path={drawn}/val', '--neighbors=2', output, *paths]
        assert cli.main(given) == 0
        assert (tmp_path / 'said_neighbors.png').is_file()
        (tmp_path / 'said_neighbors.png').unlink()


def test_evaluate_without_protocol_is_linear(drawn, tmp_path, capsys):
    """Whatever the run was judged by at its end; and --from_run is of one preset."""
    paths = own_paths(tmp_path)
    given = [
        'train',
        *TINY,
        '--knn_every=0',
        f'--image_path={drawn}',
        '--evaluate_after=True',
        '--protocol=knn',
        *paths,
    ]
    assert cli.main(given) == 0
    assert cli.main(['evaluate', f'--ckpt_name={RUN}0', '--probe_epochs=2', *paths]) == 0
    said = capsys.readouterr()
    assert 'linear of' in said.out
    assert said.err == ''
    assert cli.main(['train', f'--from_run={RUN}0', '--preset=cifar10', *paths]) == 2
    assert '--preset=cifar10 contradicts --from_run=' in one_line(capsys.readouterr().err)
    about = tmp_path / 'ckpt' / f'{RUN}0/run.json'
    for content in ('{"args": [1, 2]}', '{"args": "x"}', '{"args": null}', '[]', ''):
        about.write_text(content)
        assert cli.main(['train', f'--from_run={RUN}0', *paths]) == 2
        assert 'run.json is not there or damaged' in one_line(capsys.readouterr().err)


def test_infer_without_classifier_uses_knn(trained, drawn, tmp_path):
    """On a folder of the user's own, of any depth and sizes."""
    own = tmp_path / 'own'
    shutil.copytree(drawn / 'val/dots', own / 'deep/er')
    Image.new('RGB', (300, 90), 'red').save(own / 'a.png')
    output = tmp_path / 'out/guess.csv'
    done = run(
        'infer',
        f'--ckpt_name={RUN}0',
        f'--image_path={own}',
        f'--output={output}',
        *own_paths(trained[0], 'ckpt', 'cache'),
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r'9 images of .* predicted by kNN \(k=24\) against 72 training images', done.stdout)
    rows = read_rows(output)
    assert [row['file'] for row in rows] == ['a.png', *(f'deep/er/{i:03d}.png' for i in range(8))]


def test_check_dataloader_describes_splits(drawn, tmp_path):
    done = run(
        'check_dataloader',
        '--preset=demo',
        '--batch_size=16',
        f'--image_path={drawn}',
        *own_paths(tmp_path, 'log', 'cache'),
    )
    assert done.returncode == 0, done.stderr
    assert re.search(
        r'train +72 images, 3 classes; a batch: 16 x 3 x 48 x 48 uint8 in \[\d+, \d+\], 2 views of 16 x 3 x 32 x 32 '
        r'float32 in \[-[\d.]+, [\d.]+\]; \d+ images/s',
        done.stdout,
    )
    assert re.search(r'val +24 images, 3 classes; .* 1 view of 16 x 3 x 32 x 32', done.stdout)
    assert 'test   none of its own: it is val' in done.stdout
    path = re.search(r'the two views of 16 images: (.*)', done.stdout)[1]
    with Image.open(path) as picture:
        assert picture.width > 16 * 32


def test_check_dataloader_names_unreadable_files(drawn, drawn_large, tmp_path):
    folder = shutil.copytree(drawn, tmp_path / 'set')
    (folder / 'train/dots/text.jpg').write_text('not an image')
    whole = next((drawn_large / 'train').rglob('*.jpg')).read_bytes()
    (folder / 'val/dots/half.jpg').write_bytes(whole[: len(whole) // 2])
    (folder / 'val/dots/empty.png').write_bytes(b'')
    done = run(
        'check_dataloader',
        '--preset=demo',
        '--batch_size=16',
        f'--image_path={folder}',
        *own_paths(tmp_path, 'log', 'cache'),
    )
    assert done.returncode == 1
    for name in ('train/dots/text.jpg', 'val/dots/half.jpg', 'val/dots/empty.png'):
        assert f'cannot read the image {folder / name}: ' in done.stdout
    assert '3 of the 99 images' in one_line(done.stderr)


@pytest.mark.parametrize('size', ['small', 'large'])
def test_train_with_unreadable_image_stops_and_names_it(size, drawn, drawn_large, tmp_path):
    """Read ahead into memory, and met in a worker in the middle of an epoch."""
    folder = shutil.copytree(drawn if size == 'small' else drawn_large, tmp_path / 'set')
    (folder / 'train/dots/text.jpg').write_text('not an image')
    done = run('train', *TINY, '--batch_size=8', '--num_workers=2', f'--image_path={folder}', *own_paths(tmp_path))
    assert done.returncode == 1
    why = 'it is not an image that Pillow can read; --on_unreadable=skip leaves unreadable images out'
    assert f'cannot read the image {folder}/train/dots/text.jpg: {why}' in one_line(done.stderr)


def test_train_on_invalid_folder_exits_2(drawn, tmp_path, capsys):
    """(what is wrong, options, what is said): each one line, exit code 2, no run folder left behind."""
    (tmp_path / 'set/train').mkdir(parents=True)
    empty_class = shutil.copytree(drawn, tmp_path / 'hole')
    (empty_class / 'train/zebra').mkdir()
    for options, said in (
        (['--image_path=/nowhere'], r'no images for --preset=demo: /nowhere is not there; lay it out as'),
        (['--preset=imagenet', '--image_path=/nowhere'], 'or run --preset=demo without --image_path'),
        (['--preset=cifar10', f'--image_path={tmp_path}/cifar10'], 'fetch it: --download=True'),
        ([f'--image_path={tmp_path}/set'], 'set/train holds no images'),
        ([f'--image_path={empty_class}'], 'the class folder .*zebra holds no images: fill or delete it'),
        ([f'--image_path={drawn}', '--batch_size=500'], 'try --batch_size=64'),
    ):
        assert cli.main(['train', '--preset=demo', *own_paths(tmp_path), *options]) == 2
        assert re.search(said, one_line(capsys.readouterr().err))
    assert not (tmp_path / 'ckpt').exists()


def test_evaluate_of_invalid_checkpoint_fails_in_one_line(copied, tmp_path, capsys):
    folder = copied / 'ckpt' / f'{RUN}0'
    path, content = newest(copied)
    torch.save({**content, 'args': content['args'] | {'proj_dim': 64}}, folder / 'loss_-0.1000_epoch_3')
    torch.save(content['model'], folder / 'loss_-0.1000_epoch_4')
    (folder / 'loss_-0.1000_epoch_5').write_bytes(path.read_bytes()[:5000])
    (folder / 'loss_-0.1000_epoch_6').write_text('text')
    (copied / 'ckpt/empty').mkdir()
    for name, options, code, said in (
        (f'{RUN}0/{path.name}', ['--backbone=resnet18'], 2, 'resnet18 contradicts the checkpoint .*has backbone=small'),
        (f'{RUN}0/{path.name}', ['--proj_dim=7'], 2, '--proj_dim=7 contradicts'),
        (f'{RUN}0/loss_-0.1000_epoch_3', [], 2, 'weights that do not match its options.*size mismatch'),
        (f'{RUN}0/loss_-0.1000_epoch_4', [], 1, 'epoch_4 was not written by this project, nor is it a ResNet'),
        (f'{RUN}0/loss_-0.1000_epoch_5', [], 1, 'is damaged or was not written by this project'),
        (f'{RUN}0/loss_-0.1000_epoch_6', [], 1, 'is damaged or was not written by this project'),
        ('empty', [], 2, 'holds no checkpoint yet'),
        ('nothing', [], 2, 'no checkpoint nothing in .*; the newest there is --(ckpt_name|resume)='),
    ):
        for command in ('train', 'evaluate', 'infer'):
            assert cli.main([command, f'--ckpt_name={name}', *own_paths(copied, 'ckpt', 'cache'), *options]) == code, (
                name
            )
            error = [line for line in capsys.readouterr().err.splitlines() if not line.startswith('warning')]
            assert re.search(said, one_line('\n'.join(error)))


class Harmful:
    """Unpickled, it would leave a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


def test_checkpoint_with_code_is_refused(tmp_path, capsys):
    (tmp_path / 'ckpt').mkdir()
    torch.save({'model': Harmful(tmp_path / 'harm')}, tmp_path / 'ckpt/bad')
    assert cli.main(['evaluate', '--ckpt_name=bad', f'--ckpt_path={tmp_path}/ckpt']) == 1
    assert 'is not loaded: it would run io.open' in one_line(capsys.readouterr().err)
    assert not (tmp_path / 'harm').exists()


def test_evaluate_without_ckpt_name_lists_checkpoints(trained, tmp_path, capsys):
    assert cli.main(['evaluate', f'--ckpt_path={trained[0]}/ckpt']) == 2
    said = capsys.readouterr()
    names = {path.name for path in (trained[0] / 'ckpt' / f'{RUN}0').iterdir()}
    assert {line.removeprefix(f'{RUN}0/') for line in said.out.split()} == names - {
        'checkpoints.json',
        'run.json',
        'log.txt',
        'metrics.jsonl',
    }
    assert 'needs --ckpt_name' in one_line(said.err)
    assert cli.main(['evaluate', f'--ckpt_path={tmp_path}']) == 2
    assert 'there is no checkpoint in' in one_line(capsys.readouterr().err)


def test_train_without_labels_names_disabled_metrics(drawn, tmp_path, capsys):
    (tmp_path / 'set/train').mkdir(parents=True)
    for number, file in enumerate(sorted((drawn / 'train').rglob('*.png'))):
        shutil.copy(file, tmp_path / f'set/train/{number}.png')
    done = train(tmp_path, tmp_path / 'set')
    assert f'the kNN monitor is off: {tmp_path}/set/train has no classes' in done.stdout
    (following,) = re.findall(r'next +python3 cli.py (evaluate .*)', done.stdout)
    assert following.endswith(' --protocol=label_free')
    assert cli.main(['evaluate', f'--ckpt_name={RUN}0', *own_paths(tmp_path)]) == 2
    assert 'evaluate needs labels' in one_line(capsys.readouterr().err)
    lines = read_metrics(tmp_path / 'ckpt' / f'{RUN}0' / 'metrics.jsonl')
    assert [line['epoch'] for line in lines if 'pretraining/rank' in line] == [0, 2]
    assert not any('pretraining/knn_top1' in line for line in lines)
    assert cli.main(['evaluate', f'--ckpt_name={RUN}0', *own_paths(tmp_path), '--protocol=label_free']) == 0
    assert 'RankMe' in capsys.readouterr().out


def test_label_free_of_run_evaluates_all_checkpoints(copied, capsys, monkeypatch):
    """The last agrees with what training noted; the best by the favored measure is named, and is one of them. The
    untrained network is measured once."""
    options, seen = ['evaluate', *own_paths(copied), '--protocol=label_free'], []
    measured = label_free.all_metrics
    monkeypatch.setattr(label_free, 'all_metrics', lambda *given: seen.append(given) or measured(*given))
    assert cli.main([*options, f'--ckpt_name={RUN}0']) == 0
    assert len(seen) == 3
    said = capsys.readouterr().out
    found = {result['epoch']: result for result in load_results(copied / 'ckpt' / f'{RUN}0', protocol='label_free')}
    assert sorted(found) == [1, 2]
    for line in read_metrics(copied / 'ckpt' / f'{RUN}0' / 'metrics.jsonl')[1:]:
        for name in SUMMARY_METRICS:
            assert found[line['epoch']]['measures'][name] == pytest.approx(line[f'pretraining/{name}'], nan_ok=True)
    assert found[1]['untrained'] == pytest.approx(found[2]['untrained'], nan_ok=True)
    best = min(found.values(), key=lambda result: result['measures'][SELECTION_METRIC])
    assert f'the best by {SELECTION_METRIC} is epoch {best["epoch"]}: --ckpt_name={RUN}0/{best["checkpoint"]}' in said
    assert cli.main([*options, f'--ckpt_name={RUN}0/{found[1]["checkpoint"]}']) == 0
    assert 'the best by' not in capsys.readouterr().out


def test_adamw_resumed_run_equals_unbroken_run(drawn, tmp_path, capsys):
    options = ['--optimizer=adamw', '--learning_rate=0.01']
    train(tmp_path / 'whole', drawn, *options)
    train(tmp_path / 'parts', drawn, *options, '--save_every_epochs=1', '--max_minutes=0.0000001')
    while newest(tmp_path / 'parts')[1]['epoch'] < 2:
        train(tmp_path / 'parts', drawn, *options, '--resume=auto', '--save_every_epochs=1', '--max_minutes=0')
    one, other = newest(tmp_path / 'whole')[1], newest(tmp_path / 'parts')[1]
    assert all(torch.equal(value, other['model'][name]) for name, value in one['model'].items())
    assert cli.main(['train', *TINY, f'--resume={RUN}0', '--optimizer=sgd', *own_paths(tmp_path / 'whole')]) == 2
    assert 'the resumed run uses adamw' in one_line(capsys.readouterr().err)


def test_train_with_four_views_runs(drawn, tmp_path, capsys):
    done = train(tmp_path, drawn, '--num_views=4', '--grad_accum_steps=2')
    assert re.search(r'epoch 2/2  loss -0\.\d+', done.stdout)
    assert newest(tmp_path)[1]['args']['num_views'] == 4
    assert cli.main(['train', '--preset=demo', '--num_views=3', '--loss_symmetry=2x', *own_paths(tmp_path)]) == 2
    assert '--loss_symmetry=2x is for two views' in one_line(capsys.readouterr().err)


def test_collapse_warning_is_printed_once(drawn, tmp_path):
    """A threshold that healthy runs are under too, for the warning's sake; the collapse itself is test_model.py's."""
    done = train(tmp_path, drawn, '--collapse_threshold=1', '--proj_bn=none')
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1
    assert re.search(r'warning: the model collapses: std 0\.\d+ .* Try --augmentation=moco', lines[0])


def test_train_with_infinite_loss_stops(drawn, tmp_path):
    done = run(
        'train',
        *TINY,
        f'--image_path={drawn}',
        '--learning_rate=100',
        '--weight_decay=1',
        '--max_epochs=60',
        '--momentum=0.9999',
        '--knn_every=0',
        *own_paths(tmp_path),
    )
    assert done.returncode == 1, done.stdout
    errors = [line for line in done.stderr.splitlines() if not line.startswith('warning: the model collapses')]
    assert re.search(r'the loss is nan in epoch \d+: try a lower --learning_rate', one_line('\n'.join(errors)))


def test_quiet_prints_nothing_but_logs_to_file(trained, drawn, tmp_path):
    done = train(tmp_path, drawn, '--quiet')
    assert done.stdout == ''
    assert done.stderr == ''
    log = (tmp_path / 'ckpt' / f'{RUN}0' / 'log.txt').read_text()
    assert 'epoch 2/2  loss' in log
    again = run('train', f'--ckpt_name={RUN}0', *own_paths(tmp_path))
    assert again.stdout, 'quiet belongs to the call, not to the run'


@pytest.mark.parametrize('plain', [False, True])
def test_colors_and_bars_need_a_terminal(plain, drawn, tmp_path):
    """On a pseudo-terminal; in a pipe (every other test) there is neither."""
    command = [
        sys.executable,
        'cli.py',
        'train',
        *TINY,
        '--knn_k=5',
        '--collapse_threshold=1',
        '--proj_bn=none',
        '--neighbors=3',
        f'--image_path={drawn}',
        *own_paths(tmp_path),
    ]
    main, end = os.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack('HHHH', 40, 120, 0, 0))
    environment = os.environ | ({'NO_COLOR': '1'} if plain else {})
    with subprocess.Popen(command, cwd=CODE, stdout=end, stderr=end, env=environment) as process:
        os.close(end)
        seen = b''
        with contextlib.suppress(OSError):  # the end of a pseudo-terminal
            while part := os.read(main, 65536):
                seen += part
    os.close(main)
    assert process.returncode == 0, seen
    assert b'epoch 1/2: ' in seen  # the bar
    assert b'batches/s' in seen
    assert b'kNN: features of val: ' in seen
    assert (b'\x1b[33mwarning: --neighbors has no effect on train\x1b[0m' in seen) is not plain
    assert (b'\x1b[33mwarning: the model collapses' in seen) is not plain


def test_failed_save_leaves_no_partial_checkpoint(tmp_path):
    from runtime.atomic_write import atomic_write_on_main

    path = tmp_path / 'file'
    atomic_write_on_main(path, lambda aside: aside.write_text('whole'))

    def fail(aside):
        aside.write_text('ha')
        raise OSError('No space left on device')

    with pytest.raises(OSError, match='No space'):
        atomic_write_on_main(path, fail)
    assert path.read_text() == 'whole'
    assert [p.name for p in tmp_path.iterdir()] == ['file']
