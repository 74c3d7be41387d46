"""What cannot work is said before the work: places that may not be written, trackers, and systems that lack names."""

import errno
import subprocess
import sys
import tempfile
from dataclasses import replace

import pytest
import torch

import cli
from conftest import CODE, TINY, one_line, own_paths
from protocols import knn, run_protocol
from runtime.errors import UserError

RUN = 'model_name_simsiam_ckpt_0'


@pytest.fixture(scope='module')
def trained(drawn, tmp_path_factory):
    folder = tmp_path_factory.mktemp('trained')
    given = ['train', *TINY, '--max_epochs=1', '--knn_every=0', f'--image_path={drawn}', *own_paths(folder)]
    assert cli.main(given) == 0
    return folder


COMMANDS = {
    'evaluate': ['--protocol=knn'],
    'infer': ['--output={out}/x.csv'],
    'embed': ['--output={out}/x.npz', '--projector_images=0'],
    'select': ['--output={out}/x.csv', '--num_select=2'],
    'export': ['--output={out}/x.safetensors', '--format=safetensors'],
    'report': ['--output={out}/x.html', '--report_max_images=10'],
    'pack': ['--output={out}'],
    'check_dataloader': [],
}


@pytest.mark.parametrize('command', COMMANDS)
def test_unwritable_output_fails_before_work(command, trained, drawn, tmp_path, monkeypatch, capsys):
    """No image is read before. As on a disk that may only be read, which the right to everything does not help with."""
    given = [option.format(out=tmp_path / 'out') for option in COMMANDS[command]]
    if command in ('pack', 'check_dataloader'):
        given += [f'--image_path={drawn}', *own_paths(trained, 'cache', *['log'] * (command != 'pack'))]
    else:
        given += [f'--ckpt_name={RUN}', *own_paths(trained, 'ckpt', *['cache'] * (command != 'export'))]
        given += own_paths(trained, 'log') if command in ('evaluate', 'embed', 'report') else []

    def refused(*_, dir=None, **__):
        raise OSError(errno.EROFS, 'Read-only file system', str(dir))

    def worked(*_, **__):
        raise AssertionError('the work has begun')

    monkeypatch.setattr(tempfile, 'TemporaryFile', refused)
    monkeypatch.setattr('dataloader.loading.loader.WatchedDataLoader.__iter__', worked)
    monkeypatch.setattr('commands.pack.write_split', worked)
    assert cli.main([command, *given]) == 1
    assert 'Read-only file system' in one_line(capsys.readouterr().err)


def test_result_is_printed_before_it_is_written(trained, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, 'No space left on device', 'x.json')

    monkeypatch.setattr(run_protocol.results, 'write_result', full)
    given = ['evaluate', f'--ckpt_name={RUN}', '--protocol=knn', '--num_workers=0', *own_paths(trained)]
    assert cli.main(given) == 1
    said = capsys.readouterr()
    assert 'top-1' in said.out
    assert 'No space left' in said.err


def test_failing_tracker_exits_before_evaluation(trained, monkeypatch, capsys):
    def refused(*_):
        raise UserError('--tracker=wandb does not start')

    monkeypatch.setattr(run_protocol, 'make_tracker', refused)
    begun = replace(knn.PROTOCOL, run=lambda *_: pytest.fail('the work has begun'))
    monkeypatch.setattr(knn, 'PROTOCOL', begun)
    given = ['evaluate', f'--ckpt_name={RUN}', '--protocol=knn', *own_paths(trained)]
    assert cli.main(given) == 2
    assert 'does not start' in capsys.readouterr().err


# As Windows has it: without these modules and names.
LACKING = """
import os, signal, sys
for module in ('resource', 'fcntl', 'termios', 'pwd', 'grp'):
    sys.modules[module] = None
for name in ('SIGHUP', 'SIGUSR1', 'SIGUSR2', 'SIGALRM', 'SIGKILL', 'SIGBUS', 'SIGCHLD', 'setitimer', 'alarm'):
    delattr(signal, name)
for name in ('pread', 'sched_getaffinity'):
    delattr(os, name)
sys.argv = ['cli.py', *sys.argv[1:]]
sys.path.insert(0, '.')
import runpy
runpy.run_path('cli.py', run_name='__main__')
"""


@pytest.mark.parametrize('command', ['help', 'train', 'tar'])
def test_commands_run_without_posix_modules(command, drawn, tmp_path):
    paths = own_paths(tmp_path)
    argv = {
        'help': ['--help'],
        'train': ['train', *TINY, '--max_epochs=1', f'--image_path={drawn}', '--num_workers=0', *paths],
        'tar': ['check_dataloader', f'--image_path={tmp_path}/packed', '--num_workers=0', '--batch_size=8', *paths[1:]],
    }[command]
    if command == 'tar':
        assert (
            cli.main(['pack', f'--image_path={drawn}', f'--output={tmp_path}/packed', f'--cache_path={tmp_path}/c'])
            == 0
        )
    done = subprocess.run(
        [sys.executable, '-c', LACKING, *argv], cwd=CODE, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert 'Traceback' not in done.stderr


@pytest.mark.parametrize(
    'error', [MemoryError(), MemoryError(''), torch.OutOfMemoryError(''), MemoryError('of\nlines')]
)
def test_exception_without_message_is_printed(error, monkeypatch, capsys):
    def out_of_memory(*_):
        raise error

    monkeypatch.setattr('engine.auto_preset.choose_preset', out_of_memory)
    monkeypatch.setattr('train.train', out_of_memory)
    assert cli.main(['train', '--preset=demo']) == 1
    assert 'is out of memory' in one_line(capsys.readouterr().err)


def test_evaluate_after_is_skipped_after_max_minutes(drawn, tmp_path, capsys):
    given = ['train', *TINY, '--max_epochs=1', f'--image_path={drawn}', '--evaluate_after=True', '--max_minutes=0.0001']
    assert cli.main([*given, *own_paths(tmp_path)]) == 0
    assert '--evaluate_after is skipped' in capsys.readouterr().out
    assert not list(tmp_path.rglob('evaluate_*.json'))
