"""Whatever ends a run, at whatever moment: saved first, within seconds, one line, the right exit code."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import stop_table
import torch

from conftest import CODE, TINY, draw_folder, one_line, own_paths, run
from runtime import signals
from test_resume import LONG, RESUMES, RUN, kill_a_worker, start

# (epochs, images) that are saved by then; None: there is nothing to save.
SAVED = {
    'in the set-up': None,
    'in the first monitor': None,
    'before the first batch': None,
    'in a step': [0, 16],
    'waiting for the first batch of an epoch': [1, 0],
    'at the end of an epoch': [2, 0],
    'in the monitor': [2, 0],
    'in a save': [3, 0],
    'in the evaluation': [3, 0],
}


@pytest.fixture(scope='module')
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp('stops')
    images = draw_folder(folder / 'set', {'train': 8, 'val': 4})  # three steps per epoch
    done = subprocess.run(
        [sys.executable, stop_table.__file__, images, folder], capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{')]
    return {(row['moment'], row['signal']): row for row in found}


@pytest.mark.parametrize('number', signals.SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize('moment', stop_table.MOMENTS)
def test_signal_saves_checkpoint_in_every_phase(moment, number, rows):
    row = rows[moment, number.name]
    assert row['code'] == 128 + number
    assert row['seconds'] < 30
    (line,) = row['errors'].splitlines()
    assert line.startswith(f'{number.name}: ')
    assert row['saved'] == SAVED[moment]
    if SAVED[moment] and moment != 'in the evaluation':
        assert re.search(f'{RESUMES}$', line)
        assert 'saved ' in line
    assert row['again'] == 0
    assert row['same'], 'the run that went on ends otherwise'
    if SAVED[moment]:
        assert row['epochs'] == [0, 1, 2, 3]  # the metrics of each epoch, once


def test_signal_to_group_at_epoch_start_saves(drawn_large, tmp_path):
    """As SLURM does it: all processes at once, while the first batch of an epoch is awaited from workers."""
    options = ('--num_workers=2', '--max_epochs=30', '--knn_every=0')
    for time_of in (0.0, 0.02, 0.05):
        process = start(tmp_path, drawn_large, *options, '--resume=auto')
        log, end = tmp_path / 'ckpt' / RUN / 'log.txt', time.time() + 60
        before = log.read_text().count('loss') if log.exists() else 0
        while time.time() < end and not (log.exists() and log.read_text().count('loss') > before):
            time.sleep(0.002)
        time.sleep(time_of)
        os.killpg(process.pid, signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 143, errors
        assert re.fullmatch(rf'SIGTERM: saved .*; {RESUMES}\n', errors)


def test_ignored_hangup_stays_ignored(drawn, tmp_path):
    """nohup: such a run must outlast the terminal."""
    command = f'trap "" HUP; exec "{sys.executable}" cli.py train {" ".join(LONG)} --image_path={drawn}'
    process = subprocess.Popen(
        ['bash', '-c', f'{command} {" ".join(own_paths(tmp_path))}'],
        cwd=CODE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list((tmp_path / 'ckpt').glob('*/loss_*')) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGHUP)
    _, errors = process.communicate(timeout=200)
    assert (process.returncode, errors) == (0, '')


@pytest.mark.parametrize('reader', ['head -1', 'true'])
def test_closed_pipe_does_not_end_training(reader, drawn, tmp_path):
    """The log file has what the reader did not want to see."""
    options = ' '.join((*TINY, f'--image_path={drawn}', '--knn_every=0', *own_paths(tmp_path)))
    command = f'"{sys.executable}" cli.py train {options} | {reader}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(['bash', '-c', command], cwd=CODE, capture_output=True, text=True, timeout=200, check=False)
    assert (done.returncode, done.stderr) == (0, '')
    assert 'epoch 2/2' in (tmp_path / 'ckpt' / RUN / 'log.txt').read_text()
    assert list((tmp_path / 'ckpt' / RUN).glob('loss_*_epoch_2'))


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full')
def test_full_disk_for_stdout_does_not_end_training(drawn, tmp_path):
    options = ' '.join((*TINY, f'--image_path={drawn}', '--knn_every=0', *own_paths(tmp_path)))
    command = f'"{sys.executable}" cli.py train {options} > /dev/full'
    done = subprocess.run(['bash', '-c', command], cwd=CODE, capture_output=True, text=True, timeout=200, check=False)
    lost = 'the output is incomplete: No space left on device\n'
    assert (done.returncode, done.stderr) == (0, f'warning: {lost}')
    listed = ('runs', *own_paths(tmp_path, 'ckpt'))
    for command, code in ((listed, 1), (('--help',), 1), (('--help',), 0)):
        with open('/dev/full' if code else '/dev/null', 'w') as output:
            words = [sys.executable, 'cli.py', *command]
            done = subprocess.run(words, cwd=CODE, stdout=output, stderr=subprocess.PIPE, text=True, check=False)
        assert (done.returncode, done.stderr) == (code, f'error: {lost}' if code else '')


def test_dead_worker_saves_steps_done(drawn_large, tmp_path):
    """What was done since the last checkpoint is saved on the way out, and said where the run goes on."""
    process = start(tmp_path, drawn_large, '--num_workers=2', '--max_epochs=400', '--save_every_minutes=0')
    log, end = tmp_path / 'ckpt' / RUN / 'log.txt', time.time() + 60
    while time.time() < end and not (log.exists() and 'epoch 2/400' in log.read_text()):
        time.sleep(0.01)
    errors = kill_a_worker(process)
    assert 'was killed by SIGKILL' in one_line(errors)
    (path,) = (tmp_path / 'ckpt' / RUN).glob('loss_*')
    assert torch.load(path, weights_only=True)['epoch'] >= 2


@pytest.mark.parametrize('options', [('--batch_size=16',), ('--batch_size=5',), ('--grad_accum_steps=2',)])
def test_resume_with_other_batch_size_continues_at_same_image(options, drawn, tmp_path):
    """A position is counted in images: another batch goes on where the last one was, and no image is seen twice."""
    small = (*TINY, f'--image_path={drawn}', '--knn_every=0', *own_paths(tmp_path))
    assert run('train', *small, '--batch_size=8', '--max_minutes=0.00001').returncode == 0
    done = run('train', *small[len(TINY) :], f'--resume={RUN}', *options)
    assert (done.returncode, done.stderr) == (0, '')
    assert f'resuming {RUN} in epoch 1, after 8 images' in done.stdout
    assert list((tmp_path / 'ckpt' / RUN).glob('loss_*_epoch_2'))


def test_resume_with_fewer_images_ends_epoch(drawn, tmp_path):
    """More were seen in the epoch than there are now: it is over."""
    small = (*TINY, f'--image_path={drawn}', '--knn_every=0', *own_paths(tmp_path))
    assert run('train', *small, '--batch_size=40', '--max_minutes=0.00001', '--max_epochs=3').returncode == 0
    few = drawn / 'train/dots'
    done = run(
        'train', f'--resume={RUN}', '--knn_every=0', '--batch_size=16', f'--image_path={few}', *own_paths(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    assert 'differ in names or classes from the 72 of' in done.stderr
    assert list((tmp_path / 'ckpt' / RUN).glob('loss_*_epoch_3'))


def test_save_every_minutes_counts_across_epochs(drawn, tmp_path):
    """Epochs shorter than --save_every_minutes: it fires all the same."""
    process = start(tmp_path, drawn, '--save_every_minutes=0.02', '--max_epochs=4000')  # 1.2 s; an epoch takes some 0.1
    end = time.time() + 60
    while time.time() < end and not list((tmp_path / 'ckpt' / RUN).glob('loss_*_images_*')):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert list((tmp_path / 'ckpt' / RUN).glob('loss_*_images_*'))


SWALLOWED = """
import contextlib, os, signal, sys, time
from runtime import signals
class Slow:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
try:
    with signals.signal_handlers():
        with signals.defer_signals() if sys.argv[1] == 'held' else contextlib.nullcontext():
            slow = Slow()
            del slow
        if sys.argv[1] == 'caught':  # by a library that catches everything
            with contextlib.suppress(BaseException):
                time.sleep(0.1)
            signals.sync_should_save(0, False, 0.0, False, None)
        time.sleep(20)
except signals.Interrupted as end:
    sys.exit(f'heard {end.number}')
"""


@pytest.mark.parametrize('place', ['alone', 'held', 'caught'])
def test_signal_in_del_is_raised_again(place):
    """In a __del__ an exception is printed and gone: it is raised again, and nothing is printed."""
    done = subprocess.run(
        [sys.executable, '-c', SWALLOWED, place], cwd=CODE, capture_output=True, text=True, timeout=15, check=False
    )
    assert (done.returncode, done.stderr) == (1, f'heard {signal.SIGTERM}\n')


@pytest.mark.parametrize('closed', ['2>&-', '<&- >&- 2>&-'])
def test_closed_streams_do_not_end_training(closed, drawn, tmp_path):
    options = ' '.join((*TINY, f'--image_path={drawn}', '--max_epochs=1', '--knn_every=0', *own_paths(tmp_path)))
    done = subprocess.run(['bash', '-c', f'"{sys.executable}" cli.py train {options} {closed}'], cwd=CODE, check=False)
    assert done.returncode == 0
    assert list((tmp_path / 'ckpt' / RUN).glob('loss_*_epoch_1'))
    assert 'pretraining done' in (tmp_path / 'ckpt' / RUN / 'log.txt').read_text()


def test_deleted_log_folder_does_not_end_training(drawn, tmp_path):
    process = start(tmp_path, drawn, '--max_epochs=16')
    log, end = tmp_path / 'ckpt' / RUN / 'log.txt', time.time() + 60
    while time.time() < end and not (log.exists() and 'epoch 2/' in log.read_text()):
        time.sleep(0.01)
    shutil.rmtree(tmp_path / 'log')
    said, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert len(errors.splitlines()) == 1
    assert errors.startswith('warning: TensorBoard is turned off for this run')
    lines = (tmp_path / 'ckpt' / RUN / 'metrics.jsonl').read_text().splitlines()
    assert [json.loads(line)['epoch'] for line in lines] == [*range(17)]
