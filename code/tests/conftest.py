"""What the tests share: small folders of real image files, and the command line as a process of its own."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
import warm
from PIL import Image

from dataloader.sources import demo
from runtime import precision
from runtime.messages import CONSOLE, LOGGER

for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:  # under nohup, or behind a job with &: the runs would ignore it too
        signal.signal(number, signal.SIG_DFL)

CODE = Path(__file__).resolve().parent.parent
KINDS = (demo.checks, demo.dots, demo.stripes)
# A model and a run small enough for a test; what a test varies it gives after these.
TINY = (
    '--preset=demo',
    '--image_size=16',
    '--batch_size=16',
    '--proj_dim=32',
    '--pred_dim=8',
    '--max_epochs=2',
    '--probe_epochs=20',
    '--cache_epochs=1',
    '--amp=off',
)


# Files whose tests take minutes: begun first, so that at the end no process is left alone with one.
LONGEST = (
    'readme',
    'signals',
    'runs_from_weights',
    'distributed',
    'training_from_weights',
    'teacher',
    'detection',
    'cli',
    'resume',
    'dataloader_workers',
    'tar_archives',
    'model',
    'dataset_layouts',
    'report',
    'channels',
    'pretrained_weights',
)


def pytest_collection_modifyitems(items):
    names = [f'test_{name}' for name in LONGEST]
    items.sort(key=lambda item: names.index(item.path.stem) if item.path.stem in names else len(names))


@pytest.fixture(autouse=True)
def untried(monkeypatch):
    """In this process --amp=auto is float32 without a trial, which would take seconds for each network."""
    monkeypatch.setattr(precision, 'bf16_benchmark_shared', lambda *_: {'ratio': 0.0, 'failed': 'not tried in a test'})


@pytest.fixture(autouse=True)
def close_log_files():
    """After each test close the log file that it set: its folder is deleted, and no line could be written there."""
    yield
    for handler in LOGGER.handlers[:]:
        if handler is not CONSOLE:
            LOGGER.removeHandler(handler)
            handler.close()


def draw_folder(folder, counts, side=48, suffix='.png'):
    """A folder of drawn images, side x side pixels: folder/<split>/<kind>/<number><suffix>. counts: split to number."""
    generator = torch.Generator().manual_seed(5)
    for split, count in counts.items():
        for kind in KINDS:
            (folder / split / kind.__name__).mkdir(parents=True)
            for number in range(count):
                image = Image.fromarray(demo.draw_pattern(kind, generator).numpy())
                image.resize((side, side)).save(folder / split / kind.__name__ / f'{number:03d}{suffix}')
    return folder


@pytest.fixture(scope='session')
def drawn(tmp_path_factory):
    """24 training and 8 validation images of each of three kinds, 48 px PNG: kept in memory. To be read only."""
    return draw_folder(tmp_path_factory.mktemp('drawn') / 'set', {'train': 24, 'val': 8})


@pytest.fixture(scope='session')
def drawn_large(tmp_path_factory):
    """8 training and 4 validation images of each kind, 150 px JPEG: decoded by workers. To be read only."""
    return draw_folder(tmp_path_factory.mktemp('large') / 'set', {'train': 8, 'val': 4}, side=150, suffix='.jpg')


class Python(warm.Process):
    """`python3 *argv`, begun, from a warm Python (warm.py)."""

    def __init__(self, *argv, cwd=CODE, env=None):
        warm.started()
        self.printed = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
        with open(os.devnull) as nothing:
            files = [file.fileno() for file in (nothing, *self.printed)]
            super().__init__(list(map(str, argv)), cwd, dict(os.environ) if env is None else env, files)

    def said(self):
        """What it has written so far, to standard output and to standard error."""
        texts = [os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0) for file in self.printed]
        return [text.decode(errors='surrogateescape').replace('\r\n', '\n') for text in texts]

    def communicate(self, timeout=None):
        """`said`, at its end."""
        self.wait(timeout)
        texts = self.said()
        for file in self.printed:
            file.close()
        return texts

    def done(self, timeout=300):
        """A subprocess.CompletedProcess, when it is."""
        texts = self.communicate(timeout)
        return subprocess.CompletedProcess([], self.returncode, *texts)


def run(*argv, cwd=CODE, env=None):
    """`python3 cli.py *argv` as a process: a CompletedProcess with its text. Warm where nothing stands against it."""
    if env and not warm.usable(env):
        command = [sys.executable, str(CODE / 'cli.py'), *map(str, argv)]
        return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False)
    return Python(CODE / 'cli.py', *argv, cwd=cwd, env=env).done()


def own_paths(folder, *names):
    """Options that keep what a test writes under `folder`; names: some of ckpt, log and cache, by default all."""
    return [f'--{name}_path={folder}/{name}' for name in names or ('ckpt', 'log', 'cache')]


def wait_for(condition, seconds=60):
    """The first true value of `condition()`. Raises AssertionError after `seconds` without one."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError('waited in vain')


def one_line(text):
    """The error line, where `text` (standard error) holds exactly one line and no traceback."""
    lines = text.strip().splitlines()
    assert len(lines) == 1, text
    assert lines[0].startswith('error: '), text
    return lines[0]
