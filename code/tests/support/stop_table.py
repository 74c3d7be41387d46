"""Every end of signals.SIGNALS at every moment of a run, each in a process of its own: a table of what came of it.

    python3 stop_table.py IMAGES FOLDER        a line of JSON for each pair; tests/test_signals.py reads them

This process imports everything once and forks; a child sends itself the signal at the moment, as a batch system would.
Then another one goes on with the run.
"""

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.utils.tensorboard  # noqa: F401
from PIL import Image

import ckpt
import cli
import plots  # noqa: F401
import train
from conftest import TINY, own_paths
from engine import set_up, train_state
from protocols import linear, monitor
from runtime import signals
from runtime.checkpoints.run_folder import checkpoints

OPTIONS = (
    *TINY,
    '--batch_size=8',
    '--max_epochs=3',
    '--knn_every=1',
    '--save_every_epochs=1000',
    '--probe_epochs=2',
    '--num_workers=0',
    '--image_size=16',
)
# Where the signal is sent: a function, and before which call of it (from 0).
MOMENTS = {
    'in the set-up': (set_up, 'get_iterator', 0),
    'in the first monitor': (monitor, 'measure_labels', 0),
    'before the first batch': (train, 'draw_views', 0),
    'in a step': (train, 'train_step', 1),
    'waiting for the first batch of an epoch': (train, 'prefetch_to_device', 1),
    'at the end of an epoch': (train_state.TrainState, 'finish_epoch', 1),
    'in the monitor': (monitor, 'measure_labels', 2),
    'in a save': (ckpt, 'atomic_write_on_main', 0),
    'in the evaluation': (linear, 'train_probe', 0),
}


def send_at(owner, name, call, number):
    """Have the `call`-th call of owner.name begin with the signal."""
    function, calls = getattr(owner, name), []

    def sending(*given, **more):
        calls.append(None)
        if len(calls) == call + 1:
            os.kill(os.getpid(), number)
        return function(*given, **more)

    setattr(owner, name, sending)


def child(folder, argv, prepare=lambda: None):
    """(exit code, seconds, standard error) of a command line in a forked process."""
    folder.mkdir(parents=True, exist_ok=True)
    began, pid = time.time(), os.fork()
    if not pid:
        for stream, name in ((sys.stdout, 'out'), (sys.stderr, 'err')):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())
        prepare()
        code = cli.main(argv)
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), time.time() - began, (folder / 'err').read_text()


def last(folder):
    """(run folder, content) of the newest checkpoint, or None."""
    for run in sorted((folder / 'ckpt').glob('*'), reverse=True):
        if found := checkpoints(run):
            return run, torch.load(found[-1], weights_only=True)
    return None


def same(one, two):
    return all(torch.equal(value, two['model'][name]) for name, value in one['model'].items())


def main(images, folder):
    torch.set_num_threads(1)
    Image.init()
    command = ['train', *OPTIONS, f'--image_path={images}', f'--cache_path={folder}/cache']
    code, _, errors = child(folder / 'whole', [*command, *own_paths(folder / 'whole', 'ckpt', 'log')])
    assert code == 0, errors
    _, whole = last(folder / 'whole')
    for moment, place in MOMENTS.items():
        evaluated = ['--evaluate_after=True'] if place[0] is linear else []
        for number in signals.SIGNALS:
            own = folder / f'{moment.replace(" ", "_")}_{number.name}'
            argv = [*command, *evaluated, *own_paths(own, 'ckpt', 'log')]
            code, seconds, errors = child(own, argv, lambda place=place, number=number: send_at(*place, number))
            saved = last(own)
            again, _, _ = child(own, [*argv, '--resume=auto'])
            run, content = last(own)
            metrics = (run / 'metrics.jsonl').read_text().splitlines()
            row = {
                'moment': moment,
                'signal': number.name,
                'code': code,
                'errors': errors,
                'seconds': seconds,
                'saved': saved and [saved[1]['epoch'], saved[1]['images']],
                'again': again,
                'epochs': [json.loads(line)['epoch'] for line in metrics],
                'same': same(content, whole),
            }
            print(json.dumps(row), flush=True)


if __name__ == '__main__':
    main(Path(sys.argv[1]), Path(sys.argv[2]))
