"""Kill demo runs at random moments, start each again, and compare its last weights with those of a run left alone.

    python3 bench/kill.py [--kills=20] [--terms=10] [--seed=0]

kill -9 so many times, SIGTERM so many times, in a random order; a run that ends is compared, and the next one starts.
Says at the end how many interruptions there were, how many runs they fell on, and how many of these ended the same.
"""

import argparse
import hashlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import CODE

OPTIONS = ['--preset=demo', '--max_epochs=2', '--knn_every=0', '--save_minutes=0.01', '--resume=auto']


def start(folder):
    paths = [f'--{name}_path={folder}/{name}' for name in ('ckpt', 'log')]
    return subprocess.Popen([sys.executable, 'cli.py', 'train', *OPTIONS, *paths], cwd=CODE, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True)  # fmt: skip


def digest(folder):
    """Of the weights and the optimizer's state in the last checkpoint."""
    (path,) = (folder / 'ckpt').glob('*/loss_*_epoch_2')
    content = torch.load(path, weights_only=True)
    states = [*content['model'].values()]
    states += [value for state in content['optimizer']['state'].values() for value in state.values()]
    parts = (value.numpy().tobytes() for value in states if torch.is_tensor(value))
    return hashlib.sha256(b''.join(parts)).hexdigest()[:16]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=20)
    parser.add_argument('--terms', type=int, default=10)
    parser.add_argument('--seed', type=int, default=0)
    mine = parser.parse_args()
    chance, root = random.Random(mine.seed), Path(tempfile.mkdtemp())
    started = time.time()
    if start(root / 'alone').wait():
        sys.exit('the run without interruptions failed')
    whole, wanted = time.time() - started, digest(root / 'alone')
    print(f'left alone: {wanted}, {whole:.1f} s', flush=True)

    plan = [signal.SIGKILL] * mine.kills + [signal.SIGTERM] * mine.terms
    chance.shuffle(plan)
    runs = same = hits = 0
    process = folder = None
    while plan or process:
        if process is None:
            runs += 1
            folder = root / f'run_{runs}'
            process = start(folder)
        try:
            _, errors = process.communicate(timeout=chance.uniform(0.2, 1.0) * whole if plan else None)
        except subprocess.TimeoutExpired:
            number = plan.pop()
            process.send_signal(number)
            _, errors = process.communicate()
            hits += 1
            print(f'{hits}: {number.name}, exit code {process.returncode}: {errors.strip()}', flush=True)
            process = start(folder)
            continue
        if process.returncode:
            sys.exit(f'run {runs} failed with {process.returncode}: {errors}')
        found = digest(folder)
        same += found == wanted
        print(f'run {runs} ends with {found}', flush=True)
        process = None
    print(
        f'{hits} interruptions of {runs} runs; {same} of {runs} ended with the weights of the run that was left alone'
    )
    sys.exit(same != runs)


if __name__ == '__main__':
    main()
