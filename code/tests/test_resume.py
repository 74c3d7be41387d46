"""A run that is stopped anywhere and started again ends as the one that never stopped, to the bit."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torchvision

import cli
from conftest import CODE, TINY, Python, one_line, own_paths, run
from engine import set_up
from engine.run_dir import new_run
from engine.train_state import TrainState, restore_rng, rng_states
from loss.negative_cosine import simsiam_loss
from model.simsiam import SimSiam
from optimizer.sgd import make_sgd, set_learning_rates
from runtime import signals
from runtime.checkpoints.run_folder import checkpoints, record_checkpoint
from runtime.files import read_metrics
from runtime.options import get_config
from runtime.run_lock import LOCK_FILE, lock_content, process_start_time
from test_cli import same
from train import train_step

RUN = 'model_name_simsiam_ckpt_0'
RESUMES = rf'python3 cli.py train --resume={RUN} --ckpt_path=\S+ --log_path=\S+ resumes it'  # as own_paths has them
# 30 epochs of 9 steps, a checkpoint within an epoch after nearly every step.
LONG = (
    *TINY,
    '--batch_size=8',
    '--max_epochs=30',
    '--knn_every=0',
    '--save_every_epochs=1000',
    '--save_every_minutes=0.0001',
)


def start(folder, images, *options):
    return Python('cli.py', 'train', *LONG, f'--image_path={images}', *own_paths(folder), *options)


def last(folder):
    """(name, content) of the one checkpoint that is left at the end."""
    (path,) = (folder / 'ckpt' / RUN).glob('loss_*')
    return path.name, torch.load(path, weights_only=True)


@pytest.fixture(scope='module')
def whole(drawn, tmp_path_factory):
    """The uninterrupted run. To be read only."""
    folder = tmp_path_factory.mktemp('whole')
    process = start(folder, drawn)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    return folder


def stop_in_an_epoch(process, folder, number, seen=()):
    """Send the signal as soon as there is a checkpoint from within an epoch that was not there before."""
    end = time.time() + 60
    while time.time() < end:
        names = [path.name for path in (folder / 'ckpt' / RUN).glob('loss_*_images_*')]
        if any(name not in seen for name in names):
            process.send_signal(number)
            return names, process.communicate(timeout=60)
        assert process.poll() is None, process.said()
        time.sleep(0.005)
    raise AssertionError('no checkpoint within an epoch')


def assert_same_end(folder, whole):
    (name, content), (wanted_name, wanted) = last(folder), last(whole)
    assert name == wanted_name
    assert same(content['model'], wanted['model'])
    assert same(content['optimizer'], wanted['optimizer'])


def test_killed_and_restarted_run_equals_unbroken_run(whole, drawn, tmp_path):
    """kill -9 three times; the same command goes on each time."""
    seen = []
    for _ in range(3):
        process = start(tmp_path, drawn, '--resume=auto')
        names, _ = stop_in_an_epoch(process, tmp_path, signal.SIGKILL, seen)
        seen += names
        assert process.returncode == -signal.SIGKILL
    process = start(tmp_path, drawn, '--resume=auto')
    said, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert re.search(rf'resuming {RUN} in epoch \d+, after \d+ images \(of 30 epochs\)', said)
    assert_same_end(tmp_path, whole)


@pytest.mark.parametrize(('number', 'code', 'name'), [(signal.SIGTERM, 143, 'SIGTERM'), (signal.SIGINT, 130, 'SIGINT')])
def test_signal_saves_checkpoint_and_prints_resume_command(number, code, name, whole, drawn, tmp_path):
    process = start(tmp_path, drawn)
    _, (_, errors) = stop_in_an_epoch(process, tmp_path, number)
    assert process.returncode == code
    where = r'(after epoch \d+|in epoch \d+, after \d+ images)'
    assert re.fullmatch(rf'{name}: saved {where}; {RESUMES}\n', errors)
    assert f'stopped by {name} ' in (tmp_path / 'ckpt' / RUN / 'log.txt').read_text()
    process = start(tmp_path, drawn, f'--resume={RUN}')
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert_same_end(tmp_path, whole)


def test_signal_to_process_group_with_workers_saves(drawn_large, tmp_path):
    """Images decoded by workers, the signal sent to all processes as a terminal and SLURM do."""
    options = ('--num_workers=2', '--max_epochs=30', '--blur_prob=0.5')
    process = start(tmp_path / 'whole', drawn_large, *options)
    process.communicate(timeout=200)
    process = start(tmp_path / 'cut', drawn_large, *options)
    folder = tmp_path / 'cut/ckpt' / RUN
    end = time.time() + 60
    while not list(folder.glob('loss_*_images_*')) and time.time() < end:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert errors.startswith('SIGTERM: saved ')
    process = start(tmp_path / 'cut', drawn_large, *options, '--resume=auto')
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert_same_end(tmp_path / 'cut', tmp_path / 'whole')


def test_second_signal_kills_process():
    """After a second; what comes sooner is the same wish again: a shell and a batch system send it twice."""
    code = (
        'import os, signal, sys, time\nfrom runtime import signals\n'
        'with signals.signal_handlers(), signals.defer_signals():\n'
        '    os.kill(os.getpid(), signal.SIGTERM)\n    os.kill(os.getpid(), signal.SIGTERM)\n'
        '    print(signals.STATE["number"], flush=True)\n    time.sleep(1.1)\n'
        '    os.kill(os.getpid(), signal.SIGINT)\n    print("not reached")\n'
    )
    done = subprocess.run([sys.executable, '-c', code], cwd=CODE, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ('15\n', -signal.SIGINT)
    before = signal.getsignal(signal.SIGTERM)
    with signals.signal_handlers():
        assert signal.getsignal(signal.SIGTERM) == signals.handle_signal
    assert signal.getsignal(signal.SIGTERM) == before


def short(folder, images, *options):
    return cli.main(['train', *TINY, '--knn_every=0', f'--image_path={images}', *own_paths(folder), *options])


def test_resume_auto_finds_run_or_starts_one(drawn, tmp_path, capsys):
    """Without a run it starts one; it goes on with an unfinished one; other options are named; a finished one stays."""
    limited = ('--max_minutes=0.0001', '--max_epochs=3', '--resume=auto')
    assert short(tmp_path, drawn, *limited) == 0
    assert short(tmp_path, drawn, *limited) == 0
    assert f'resuming {RUN} in epoch 1, after 16 images (of 3 epochs)' in capsys.readouterr().out
    assert short(tmp_path, drawn, *limited, '--momentum=0.8', '--weight_decay=0') == 2
    assert one_line(capsys.readouterr().err) == (
        f'error: --resume=auto: the unfinished run {RUN} has momentum=0.9 (not 0.8), weight_decay=0.0005 (not 0.0); '
        f'--resume={RUN} resumes it, without --resume a new run starts'
    )
    assert short(tmp_path, drawn, f'--resume={RUN}', '--momentum=0.8', '--max_epochs=3') == 0
    assert short(tmp_path, drawn, '--max_epochs=1', '--resume=auto') == 0
    assert (tmp_path / 'ckpt' / RUN.replace('_0', '_1')).is_dir()
    assert short(tmp_path, drawn, '--max_epochs=1', '--resume=auto') == 0
    assert f'{RUN.replace("_0", "_1")} has all of its 1 epochs' in capsys.readouterr().out
    assert not (tmp_path / 'ckpt' / RUN.replace('_0', '_2')).is_dir()
    capsys.readouterr()
    assert short(tmp_path, drawn, '--resume=nothing') == 2
    said = one_line(capsys.readouterr().err)
    assert 'no checkpoint nothing in' in said
    assert 'the newest there is --resume=' in said


def test_resume_with_other_images_warns(drawn, tmp_path, capsys):
    """One that is gone; the same, said again nowhere; one that is called otherwise."""
    images = shutil.copytree(drawn, tmp_path / 'set')
    limited = ('--max_minutes=0.0001', '--max_epochs=3', '--resume=auto')
    one, other, *_ = sorted((images / 'train').rglob('*.png'))
    for change, number, warned in (
        (lambda: None, 72, False),
        (lambda: None, 72, False),
        (one.unlink, 71, True),
        (lambda: None, 71, False),
        (lambda: other.rename(other.with_name('new.png')), 71, True),
    ):
        change()
        assert short(tmp_path, images, *limited) == 0
        said = capsys.readouterr().err
        assert (f'the {number} training images of {images}/train differ in names or classes' in said) == warned


def test_resume_from_older_checkpoint_starts_new_run(drawn, tmp_path, capsys):
    """What its run did after it stays; the new one has the whole history, and ends as the old one did."""
    assert short(tmp_path, drawn, '--max_epochs=3', '--save_every_epochs=1', '--model_name=first', '--knn_every=1') == 0
    first, second = (tmp_path / 'ckpt' / f'model_name_first_ckpt_{number}' for number in (0, 1))
    before = {path.name: path.read_bytes() for path in first.iterdir()}
    older = next(first.glob('*_epoch_1'))
    capsys.readouterr()
    options = (*TINY, f'--ckpt_name={older}', '--max_epochs=3', '--knn_every=1', *own_paths(tmp_path))
    said = run('train', *options, f'--image_path={drawn}').stdout
    assert (
        f'{first.name} has newer checkpoints than {older.name} and stays unchanged: this continues as the new run'
        in said
    )
    assert 'verdict' in said
    assert {path.name: path.read_bytes() for path in first.iterdir()} == before
    assert sorted(path.name for path in second.glob('loss_*')) == [
        name for name in sorted(before) if name[:5] == 'loss_'
    ]
    old, new = (read_metrics(folder / 'metrics.jsonl') for folder in (first, second))
    assert [line['epoch'] for line in new] == [0, 1, 2, 3]
    assert [line['pretraining/loss'] for line in new[1:]] == [line['pretraining/loss'] for line in old[1:]]
    assert short(tmp_path, drawn, f'--resume={second.name}', '--max_epochs=4') == 0  # the newest: no third run
    assert len([*(tmp_path / 'ckpt').glob('model_name_first_*')]) == 2


def test_init_from_is_saved_and_needs_no_preset(drawn, tmp_path, capsys):
    assert short(tmp_path, drawn, '--max_epochs=1', '--model_name=first') == 0
    began = f'--init_from={tmp_path}/ckpt/model_name_first_ckpt_0'
    own = (f'--image_path={drawn}', '--knn_every=1', *own_paths(tmp_path), '--model_name=second', '--resume=auto')
    again = ('train', began, '--preset=cifar10', '--batch_size=16', '--device=cpu', *own)
    assert cli.main([*again, '--max_epochs=2', '--warmup_epochs=2', '--max_minutes=0.0001']) == 0
    captured = capsys.readouterr()
    assert '(at the start)' in captured.out
    assert '--warmup_epochs=2 of --max_epochs=2: the learning rate rises to the end and never falls' in captured.err
    for _ in range(2):
        run_json = json.loads((tmp_path / 'ckpt/model_name_second_ckpt_0/run.json').read_text())
        assert run_json['args']['init_from'] == began.partition('=')[2]
        assert run_json['args']['preset'] == 'cifar10'
        assert cli.main([*again, '--max_epochs=2', '--warmup_epochs=2']) == 0
    said = capsys.readouterr().out
    assert 'resuming model_name_second_ckpt_0' in said
    assert 'beside the start (' in said  # the verdict's words
    other = ('train', *TINY, *own, '--max_epochs=1')  # another beginning, after that one was finished
    assert cli.main(other) == 0
    assert (tmp_path / 'ckpt/model_name_second_ckpt_1').is_dir()


def test_resume_of_finished_run_without_metrics_trains_nothing(drawn, tmp_path, capsys):
    assert short(tmp_path, drawn, '--max_epochs=1') == 0
    (tmp_path / 'ckpt' / RUN / 'metrics.jsonl').unlink()
    for option in ('--resume=auto', f'--resume={RUN}'):
        capsys.readouterr()
        assert short(tmp_path, drawn, '--max_epochs=1', option) == 0
        said = capsys.readouterr()
        assert (f'{RUN} has all of its 1 epochs' in said.out, said.err) == (True, '')
    assert len([*(tmp_path / 'ckpt').iterdir()]) == 1


def test_resume_from_older_finished_checkpoint_changes_nothing(drawn, tmp_path):
    assert short(tmp_path, drawn, '--max_epochs=2', '--knn_every=1', '--save_every_epochs=1') == 0
    folder = tmp_path / 'ckpt' / RUN
    older = next(folder.glob('*_epoch_1'))
    before = (folder / 'metrics.jsonl').read_bytes()
    options = (*TINY, f'--ckpt_name={older}', '--max_epochs=1', f'--image_path={drawn}', *own_paths(tmp_path))
    assert re.search(r'loss_\S+_epoch_1 has all of --max_epochs=1: nothing is trained', run('train', *options).stdout)
    assert (folder / 'metrics.jsonl').read_bytes() == before
    assert len([*(tmp_path / 'ckpt').iterdir()]) == 1


def test_copy_of_a_finished_checkpoint_is_a_run(drawn, tmp_path, capsys):
    """Its folder has the options, and names no best epoch, which was not measured there."""
    given = ['--backbone=resnet18', '--stem=imagenet', '--heads_epochs=0', '--distill_weight=0']
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / 'w.pth')
    assert short(tmp_path, drawn, *given, f'--init_from={tmp_path}/w.pth', '--max_epochs=1') == 0
    (path,) = (tmp_path / 'ckpt' / RUN).glob('loss_*_epoch_1')
    shutil.copy(path, tmp_path / path.name)
    capsys.readouterr()
    assert cli.main(['train', f'--resume={tmp_path}/{path.name}', *own_paths(tmp_path)]) == 0
    assert '\nbest ' not in capsys.readouterr().out
    new = tmp_path / 'ckpt' / RUN.replace('_0', '_1')
    assert json.loads((new / 'run.json').read_text())['args']['max_epochs'] == 1
    assert cli.main(['runs', *own_paths(tmp_path, 'ckpt')]) == 0
    assert 'unknown' not in capsys.readouterr().out


def test_automatic_values_are_not_said_to_have_no_effect(drawn, tmp_path, capsys):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / 'w.pth')
    given = ['--backbone=resnet18', '--stem=imagenet', '--distill_size=0', '--heads_epochs=-1', '--resume=auto']
    for _ in range(2):
        capsys.readouterr()
        assert short(tmp_path, drawn, *given, f'--init_from={tmp_path}/w.pth', '--max_epochs=1', '--image_size=32') == 0
    printed = capsys.readouterr()
    assert 'has all of its 1 epochs' in printed.out
    assert 'has no effect' not in printed.err


def test_resume_of_running_run_exits_2(drawn, tmp_path, capsys):
    """It is told by its process, not by the mark alone: one that was killed leaves that."""
    assert short(tmp_path, drawn, '--max_epochs=3', '--max_minutes=0.0001') == 0
    folder, other = tmp_path / 'ckpt' / RUN, subprocess.Popen(['sleep', '60'])
    try:
        mark = {**lock_content(), 'pid': other.pid, 'started': process_start_time(other.pid)}
        (folder / LOCK_FILE).write_text(json.dumps(mark))
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        for option in (f'--resume={RUN}', f'--ckpt_name={RUN}'):
            capsys.readouterr()
            assert short(tmp_path, drawn, option, '--max_epochs=3') == 2
            said = one_line(capsys.readouterr().err)
            assert f'{RUN} is being trained, by process {other.pid}: wait for its end, or stop it' in said
        assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != 'log.txt'} == {
            name: content for name, content in before.items() if name != 'log.txt'
        }
    finally:
        other.kill()
        other.wait()
    assert short(tmp_path, drawn, f'--resume={RUN}', '--max_epochs=3') == 0


@pytest.mark.parametrize('option', ['--resume=auto', f'--resume={RUN}'])
def test_resume_of_running_run_that_saves_meanwhile_exits_2(option, drawn, tmp_path, monkeypatch, capsys):
    """Between the load and the look at its lock: it was continued as a new run, a second training of the same."""
    assert short(tmp_path, drawn, '--max_epochs=3', '--max_minutes=0.0001') == 0
    folder, other = tmp_path / 'ckpt' / RUN, subprocess.Popen(['sleep', '60'])
    go_on = set_up.continue_run

    def save_first(args, checkpoint, state):
        newer = folder / 'loss_-0.9000_epoch_2'
        shutil.copy(checkpoint['path'], newer)
        record_checkpoint(folder, newer)
        return go_on(args, checkpoint, state)

    monkeypatch.setattr(set_up, 'continue_run', save_first)
    try:
        mark = {**lock_content(), 'pid': other.pid, 'started': process_start_time(other.pid)}
        (folder / LOCK_FILE).write_text(json.dumps(mark))
        assert short(tmp_path, drawn, option, '--max_epochs=3') == 2
        assert f'{RUN} is being trained, by process {other.pid}' in one_line(capsys.readouterr().err)
        assert len([*(tmp_path / 'ckpt').iterdir()]) == 1
    finally:
        other.kill()
        other.wait()


def test_resume_with_other_model_name_exits_2(drawn, tmp_path, capsys):
    assert short(tmp_path, drawn, '--max_epochs=3', '--max_minutes=0.0001') == 0
    capsys.readouterr()
    assert short(tmp_path, drawn, f'--resume={RUN}', '--model_name=other') == 2
    assert '--model_name=other: the resumed run is called simsiam' in one_line(capsys.readouterr().err)


def test_weights_that_are_nan_are_not_saved(drawn, tmp_path, monkeypatch, capsys):
    """The last update of an epoch can break them, after a loss that was finite."""
    assert short(tmp_path, drawn, '--max_epochs=2', '--save_every_epochs=1', '--max_minutes=0.0001') == 0
    finish = TrainState.finish_epoch

    def break_and_finish(state, means):
        with torch.no_grad():
            next(state.model.parameters()).fill_(float('nan'))
        finish(state, means)

    monkeypatch.setattr(TrainState, 'finish_epoch', break_and_finish)
    capsys.readouterr()
    assert cli.main(['train', f'--resume={RUN}', *own_paths(tmp_path)]) == 1
    error = one_line(capsys.readouterr().err)
    assert 'weights are nan or infinite after epoch 1: try a lower --learning_rate' in error
    assert 'the last good checkpoint is' in error
    for path in (tmp_path / 'ckpt' / RUN).glob('loss_*'):
        assert all(value.isfinite().all() for value in torch.load(path, weights_only=True)['model'].values())


def test_unwritable_log_path_leaves_no_run(drawn, tmp_path, capsys):
    (tmp_path / 'log').write_text('a file')
    assert short(tmp_path, drawn) in (1, 2)
    assert not (tmp_path / 'ckpt' / RUN).exists()


def test_options_of_training_have_no_effect_on_a_finished_run(drawn, tmp_path, capsys):
    assert short(tmp_path, drawn, '--max_epochs=2') == 0
    capsys.readouterr()
    given = ['train', f'--resume={RUN}', *own_paths(tmp_path)]
    assert cli.main([*given, '--learning_rate=0.1', '--batch_size=32', '--weight_decay=0.0005']) == 0
    assert capsys.readouterr().err == 'warning: --learning_rate has no effect: all 2 epochs are finished\n'
    assert cli.main([*given, '--max_epochs=1']) == 2
    assert re.search(r'--max_epochs=1: loss_\S+_epoch_2 is of epoch 2; give more', one_line(capsys.readouterr().err))


def test_checkpoints_ignores_files_deleted_meanwhile(tmp_path):
    """Its run keeps the last ones alone, or it was a link to what is gone."""
    (tmp_path / 'loss_-0.5000_epoch_1').touch()
    (tmp_path / 'loss_-0.6000_epoch_2').symlink_to(tmp_path / 'gone')
    assert checkpoints(tmp_path) == [tmp_path / 'loss_-0.5000_epoch_1']


def test_keep_checkpoints_deletes_oldest(drawn, tmp_path):
    assert (
        short(
            tmp_path,
            drawn,
            '--max_epochs=5',
            '--save_every_epochs=1',
            '--keep_checkpoints=2',
            '--save_every_minutes=0.00001',
        )
        == 0
    )
    names = sorted(path.name.split('_epoch_')[1] for path in (tmp_path / 'ckpt' / RUN).glob('loss_*'))
    assert names == ['4', '5']


def test_resume_keeps_evaluation_and_first_command(drawn, tmp_path):
    """The printed command names the run only: what it was to be evaluated by, and how it is saved, comes from the
    run."""
    first = ('--max_epochs=1', '--evaluate_after=True', '--protocol=knn', '--keep_checkpoints=1')
    assert run('train', *TINY, *first, f'--image_path={drawn}', *own_paths(tmp_path)).returncode == 0
    folder = tmp_path / 'ckpt' / RUN
    command = json.loads((folder / 'run.json').read_text())['command']
    assert run('train', f'--resume={RUN}', '--max_epochs=2', *own_paths(tmp_path)).returncode == 0
    epochs = {json.loads(path.read_text())['epoch'] for path in folder.glob('evaluate_knn_*.json')}
    assert epochs == {1, 2}
    assert [path.name[-1] for path in folder.glob('loss_*')] == ['2']
    about = json.loads((folder / 'run.json').read_text())
    assert about['command'] == command != about['resume_command']


def test_from_run_repeats_run(drawn, tmp_path):
    options = (*TINY, '--knn_every=0', '--max_epochs=1', '--proj_dim=24', '--learning_rate=0.3')
    assert run('train', *options, f'--image_path={drawn}', *own_paths(tmp_path)).returncode == 0
    about = json.loads((tmp_path / 'ckpt' / RUN / 'run.json').read_text())
    assert about['args']['proj_dim'] == 24
    assert '--proj_dim=24' in about['command']
    assert about['versions']['torch'] == torch.__version__
    assert set(about['versions']) == {'python', 'torch', 'torchvision', 'commit'}
    assert cli.main(['train', f'--from_run={RUN}', *own_paths(tmp_path)]) == 0
    one, two = (
        torch.load(next((tmp_path / 'ckpt' / RUN.replace('_0', f'_{i}')).glob('loss_*')), weights_only=True)
        for i in (0, 1)
    )
    assert same(one['model'], two['model'])
    assert one['args']['proj_dim'] == two['args']['proj_dim'] == 24


def test_resume_restores_random_generators():
    states = rng_states()
    first = random.random(), np.random.rand(), torch.rand(1).item()
    torch.save(states, buffer := __import__('io').BytesIO())
    buffer.seek(0)
    restore_rng(torch.load(buffer, weights_only=True))
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == first


def test_grad_accum_steps_average_gradients():
    model = SimSiam(get_config(preset='demo', proj_dim=8, pred_dim=4)).double()
    other = SimSiam(get_config(preset='demo', proj_dim=8, pred_dim=4)).double()
    other.load_state_dict(model.state_dict())
    view1, view2 = torch.randn(2, 6, 3, 16, 16, dtype=torch.float64)
    optimizer = make_sgd(model, 0.0, 0.0)
    set_learning_rates(optimizer, 0.0, 0.0, 0.0)
    loss, *_ = train_step(model, optimizer, (view1, view2), micro_batches=3)
    losses = [simsiam_loss(*other(view1[i : i + 2], view2[i : i + 2])) for i in (0, 2, 4)]
    (sum(losses) / 3).backward()
    assert loss.item() == pytest.approx(sum(losses).item() / 3, abs=1e-12)
    for ours, wanted in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, wanted.grad, atol=1e-12, rtol=1e-9)


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs a POSIX shell')
def test_full_disk_keeps_last_checkpoint(drawn, tmp_path):
    """A limit on the size of a file, as a disk that has room for small ones only."""
    assert short(tmp_path, drawn, '--max_epochs=1') == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / 'ckpt' / RUN).glob('loss_*')}
    options = ' '.join((f'--resume={RUN}', '--max_epochs=2', *own_paths(tmp_path)))
    command = f'ulimit -f 300; exec "{sys.executable}" cli.py train {options}'
    done = subprocess.run(['bash', '-c', command], cwd=CODE, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert re.search('cannot write .*is the disk full|File too large', one_line(done.stderr))
    after = {path.name: path.read_bytes() for path in (tmp_path / 'ckpt' / RUN).glob('*loss_*')}
    assert after == before


def kill_a_worker(process):
    """As the system does it when memory runs out; returns what the run, which has to end with 1, said of it."""
    asked = ['ps', '-o', 'pid=', '--ppid', str(process.pid)]
    children = subprocess.run(asked, capture_output=True, text=True, check=True)
    os.kill(max(map(int, children.stdout.split())), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    return errors


def test_killed_worker_is_reported_in_one_line(drawn_large, tmp_path):
    """Killed as the system does it when memory runs out."""
    process = start(tmp_path, drawn_large, '--num_workers=2', '--max_epochs=400')
    end = time.time() + 60
    while not list((tmp_path / 'ckpt' / RUN).glob('loss_*')) and time.time() < end:
        time.sleep(0.01)
    errors = kill_a_worker(process)
    assert 'a dataloader worker was killed by SIGKILL' in one_line(errors)


def test_new_run_does_not_reuse_log_folder(tmp_path):
    """Of one that was deleted, or whose checkpoints lie elsewhere."""
    args = get_config(ckpt_path=str(tmp_path / 'ckpt'), log_path=str(tmp_path / 'log'))
    (tmp_path / 'log/model_name_simsiam_ckpt_0').mkdir(parents=True)
    (tmp_path / 'log/model_name_simsiam_ckpt_2').mkdir()
    assert [new_run(args).name for _ in range(3)] == [f'model_name_simsiam_ckpt_{i}' for i in (1, 3, 4)]


def test_resume_auto_takes_checkpoint_before_a_damaged_one(drawn, tmp_path, capsys):
    """A power cut has left the newest empty, or cut short."""
    given = ['train', *TINY, '--max_epochs=3', '--save_every_epochs=1', '--knn_every=0', f'--image_path={drawn}']
    given += ['--num_workers=0', *own_paths(tmp_path)]
    assert cli.main(given) == 0
    folder = tmp_path / 'ckpt' / RUN
    for number in (3, 2):
        (path,) = folder.glob(f'loss_*_epoch_{number}')
        content = path.read_bytes()
        path.write_bytes(b'' if number == 3 else content[: len(content) // 2])
    capsys.readouterr()
    assert cli.main([*given, '--resume=auto']) == 0
    printed = capsys.readouterr()
    assert printed.err.count('the one before it is resumed') == 2
    assert 'after epoch 1' in printed.out
    assert len(list((tmp_path / 'ckpt').glob('*/loss_*_epoch_3'))) == 2


def test_start_share_without_start_warns(drawn, tmp_path, capsys):
    given = ['train', *TINY, '--max_epochs=1', '--start_share=0.5', '--knn_every=0', f'--image_path={drawn}']
    assert cli.main([*given, '--num_workers=0', *own_paths(tmp_path)]) == 0
    assert '--start_share has no effect with random weights' in capsys.readouterr().err


def test_resume_of_renamed_read_only_checkpoint_starts_new_run(drawn, tmp_path, capsys):
    given = ['--max_epochs=2', '--knn_every=0', '--num_workers=0', *own_paths(tmp_path)]
    assert cli.main(['train', *TINY, f'--image_path={drawn}', *given[1:], '--max_epochs=1']) == 0
    (path,) = (tmp_path / 'ckpt' / RUN).glob('loss_*_epoch_1')
    shutil.copy(path, tmp_path / 'mine.pth')
    os.chmod(tmp_path / 'mine.pth', 0o444)
    assert cli.main(['train', f'--resume={tmp_path}/mine.pth', *given]) == 0
    (new,) = (folder for folder in (tmp_path / 'ckpt').iterdir() if folder.name != RUN)
    assert [path.name.partition('_epoch_')[2] for path in checkpoints(new)][-1] == '2'
