"""Processes that read images: whatever happens to one is told as what it was, and ends the run within a minute."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import cli
from conftest import CODE, TINY, Python, draw_folder, one_line, own_paths, run
from dataloader.load_dataset import get_iterator
from dataloader.loading import loader
from runtime.device import explain_oom, is_oom
from runtime.errors import WorkError
from runtime.options import get_config

# 150 px images: read by two processes; epochs enough for a process to be found.
LONG = (*TINY, '--batch_size=8', '--max_epochs=2000', '--knn_every=0', '--num_workers=2')


def start(folder, images, *options):
    return Python('cli.py', 'train', *LONG, f'--image_path={images}', *own_paths(folder), *options)


def workers_of(process):
    """The process ids of the workers, once they are there and the training is under way."""
    while '\nepoch 1/' not in process.said()[0] and process.poll() is None:
        time.sleep(0.02)
    children = subprocess.run(
        ['ps', '-o', 'pid=', '--ppid', str(process.pid)], capture_output=True, text=True, check=True
    )
    return [int(pid) for pid in children.stdout.split()]


@pytest.mark.parametrize(
    ('number', 'helps'),
    [
        (signal.SIGKILL, 'SIGKILL, as the system does when memory runs out: try a lower --num_workers'),
        (signal.SIGBUS, 'SIGBUS, as happens when /dev/shm is full: docker run --shm-size=8g'),
        (signal.SIGSEGV, 'SIGSEGV, a crash in an image library: --num_workers=0 shows which image'),
        (signal.SIGTERM, 'SIGTERM, by another process'),
    ],
)
def test_killed_worker_error_names_signal_and_remedy(number, helps, drawn_large, tmp_path):
    process = start(tmp_path, drawn_large)
    os.kill(workers_of(process)[0], number)
    began = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert time.monotonic() - began < 30
    line = one_line(errors)
    assert line.startswith(f'error: a dataloader worker was killed by {helps}')
    assert line.endswith('--resume=auto resumes training from the last checkpoint')


def test_hung_workers_end_the_run(drawn_large, monkeypatch):
    monkeypatch.setattr(loader, 'HANG_TIMEOUT_S', 4.0)
    args = get_config(preset='demo', image_path=str(drawn_large), batch_size=2, num_workers=2)
    batches = get_iterator(args)['train']
    iterator = iter(batches)
    next(iterator)
    assert len(batches.workers) == 2
    for worker in batches.workers:
        os.kill(worker.pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(WorkError, match='the dataloader workers have done nothing for 4 s'):
        for _ in iterator:
            pass
    assert 3 < time.monotonic() - began < 20
    del iterator, batches


DIED_WITH_THE_LOCK = """
import os, signal, sys
sys.path.insert(0, {code!r})
from runtime.options import get_config
from dataloader.load_dataset import get_iterator
batches = get_iterator(get_config(preset='demo', image_path={images!r}, batch_size=2, num_workers=2))['train']
iterator = iter(batches)
next(iterator)
assert batches._iterator._workers_done_event._cond.acquire(timeout=5)  # as a worker holds it for a moment
os.kill(batches.workers[0].pid, signal.SIGKILL)
try:
    list(iterator)
except Exception as error:
    print(type(error).__name__)
del iterator, batches
"""


def test_worker_killed_while_holding_lock_is_detected(drawn_large):
    """As one does, now and then, of a group that is ended by one signal: what it held it holds for ever."""
    program = DIED_WITH_THE_LOCK.format(code=str(CODE), images=str(drawn_large))
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, 'WorkerDied', '')


@pytest.mark.parametrize('method', ['spawn', 'forkserver'])
def test_spawn_uses_threads_for_evaluation(method, drawn_large, monkeypatch):
    """As on macOS. The same images in the same order, and workers for the training alone."""
    monkeypatch.setattr(loader, 'start_method', lambda: method)
    args = get_config(preset='demo', image_path=str(drawn_large), batch_size=8, num_workers=2)
    iterators = get_iterator(args)
    assert (iterators['train'].num_workers, iterators['train'].threads) == (2, 0)
    assert (iterators['val'].num_workers, iterators['val'].threads) == (0, 2)
    alone = get_iterator(get_config(preset='demo', image_path=str(drawn_large), batch_size=8, num_workers=0))['val']
    for ours, theirs in zip(iterators['val'], alone, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one, other)


def test_exception_in_reader_thread_is_raised(drawn_large, monkeypatch):
    monkeypatch.setattr(loader, 'start_method', lambda: 'spawn')
    args = get_config(preset='demo', image_path=str(drawn_large), batch_size=8, num_workers=2)
    val = get_iterator(args)['val']
    monkeypatch.setattr(type(val.dataset), 'read', lambda *_: {}['a fault'])
    with pytest.raises(loader.WorkerException, match='a fault'):
        list(val)


def test_slow_workers_do_not_end_the_run(drawn_large, monkeypatch):
    """A batch that takes longer than several looks at the processes, and than the patience with idle ones."""
    monkeypatch.setattr(loader, 'POLL_S', 0.2)
    monkeypatch.setattr(loader, 'HANG_TIMEOUT_S', 1.0)
    args = get_config(preset='demo', image_path=str(drawn_large), batch_size=8, num_workers=1)
    images = get_iterator(args)['val'].dataset
    whole = type(images).read

    def slow(self, *key):
        until = time.process_time() + 0.5
        while time.process_time() < until:
            pass
        return whole(self, *key)

    monkeypatch.setattr(type(images), 'read', slow)
    assert sum(len(labels) for _, labels in get_iterator(args)['val']) == 12


@pytest.mark.parametrize('workers', [0, 2])
def test_bug_in_worker_prints_its_traceback(workers, drawn_large, tmp_path, monkeypatch, capsys):
    """With its place, and where to report it; not as the death of a process or for lack of memory."""
    monkeypatch.setattr('dataloader.loading.crops.random_crops', lambda *_: {}['DataLoader worker (pid 7) is killed'])
    command = ['train', *TINY, f'--image_path={drawn_large}', '--batch_size=8', '--knn_every=0', *own_paths(tmp_path)]
    assert cli.main([*command, f'--num_workers={workers}']) == 1
    errors = capsys.readouterr().err
    assert 'Traceback (most recent call last)' in errors
    assert "KeyError: 'DataLoader worker (pid 7) is killed'" in errors
    assert errors.strip().splitlines()[-1].startswith('error: this is a bug of this program')
    assert 'was ended by' not in errors


def test_bug_in_main_process_prints_its_traceback(drawn, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('train.train_step', lambda *_: int('Connection to a DataLoader worker'))
    assert cli.main(['train', *TINY, f'--image_path={drawn}', '--knn_every=0', *own_paths(tmp_path)]) == 1
    errors = capsys.readouterr().err
    assert 'ValueError: invalid literal' in errors
    assert 'this is a bug of this program' in errors


def test_train_with_long_tmpdir_works(drawn_large, tmp_path):
    """A socket's name holds 108 bytes: the processes printed that, and the run hung."""
    folder = tmp_path / ('x' * 100)
    folder.mkdir()
    done = run(
        'train',
        *TINY,
        f'--image_path={drawn_large}',
        '--batch_size=8',
        '--max_epochs=1',
        '--num_workers=2',
        *own_paths(tmp_path),
        env={**os.environ, 'TMPDIR': str(folder)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ''


def small_shm(megabytes):
    """The beginning of a command that sees /dev/shm as small as Docker makes it; None where that cannot be made."""
    command = [
        'unshare',
        '--mount',
        'sh',
        '-c',
        f'mount -t tmpfs -o size={megabytes}m none /dev/shm && exec "$@"',
        'sh',
    ]
    possible = (
        shutil.which('unshare') and not subprocess.run([*command, 'true'], capture_output=True, check=False).returncode
    )
    return command if possible else None


def test_full_shared_memory_is_named(tmp_path):
    command = small_shm(1)
    if not command:
        pytest.skip('no mount of its own can be made here')
    folder = draw_folder(tmp_path / 'set', {'train': 24, 'val': 8}, side=150, suffix='.jpg')
    done = subprocess.run(
        [
            *command,
            sys.executable,
            str(CODE / 'cli.py'),
            'train',
            *TINY,
            f'--image_path={folder}',
            '--image_size=128',
            '--batch_size=32',
            '--num_workers=2',
            '--knn_every=0',
            '--max_epochs=1',
            *own_paths(tmp_path),
        ],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 1, done.stdout
    assert re.search(
        r'error: (/dev/shm has no room for a batch|a dataloader worker was killed by SIGBUS, as '
        r'where /dev/shm is full).*docker run --shm-size=8g',
        one_line(done.stderr),
    )


def test_out_of_memory_error_names_remedy():
    for error, place in (
        (torch.OutOfMemoryError('CUDA out of memory. Tried to allocate'), 'the GPU'),
        (MemoryError(), 'the machine'),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory"),
            'the machine',
        ),
    ):
        assert is_oom(error) == place
        said = f'{place} is out of memory for the kNN test: --knn_every=0'
        with pytest.raises(WorkError, match=said), explain_oom('the kNN test', '--knn_every=0 trains without it'):
            raise error
    assert is_oom(RuntimeError('out of memory of another kind')) is None
    with pytest.raises(RuntimeError, match='a fault'), explain_oom('anything', 'nothing'):
        raise RuntimeError('a fault')


def test_out_of_memory_on_cpu_is_one_line(drawn, tmp_path):
    """With a limit on the address space, and views that do not fit below it."""
    command = [
        'sh',
        '-c',
        'ulimit -v 4000000; exec "$@"',
        'sh',
        sys.executable,
        str(CODE / 'cli.py'),
        'train',
        *TINY,
        f'--image_path={drawn}',
        '--batch_size=64',
        '--image_size=1024',
        '--device=cpu',
        '--knn_every=0',
        *own_paths(tmp_path),
    ]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=environment)
    if done.returncode != 1 or 'bug of this program' in done.stderr:
        assert 'libtorch' in done.stderr or 'cannot allocate' in done.stderr.lower(), done.stderr
        pytest.skip('this build of torch does not load below the limit')
    assert 'the machine is out of memory' in one_line(done.stderr)


@pytest.mark.parametrize('quiet', [True, False])
def test_worker_outliving_main_process_prints_nothing(quiet):
    """The first process ends while a worker hands it a batch; an exception elsewhere is shown as ever."""
    code = f"""
import multiprocessing.resource_sharer as sharer, sys, time
from multiprocessing import current_process
from multiprocessing.connection import Client
from dataloader.loading.loader import worker_init_fn
from runtime.console import wrap_std_streams
wrap_std_streams()
if {quiet}:
    worker_init_fn(0)
address = sharer.DupFd(0)._id[0]
Client(address, authkey=current_process().authkey).close()
time.sleep(0.5)
print('between', file=sys.stderr, flush=True)
raise ValueError('shown')
"""
    done = subprocess.run([sys.executable, '-c', code], cwd=CODE, capture_output=True, text=True, check=False)
    handed_over, _, raised = done.stderr.partition('between')
    assert ('Traceback' in handed_over) != quiet
    assert 'ValueError: shown' in raised
