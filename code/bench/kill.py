"""Kill demo runs at random moments, start each again, and compare its last weights with those of a run left alone.

    python3 bench/kill.py [--kills=20] [--terms=10] [--groups=10] [--seed=0] [options of train]

kill -9 so many times, SIGTERM so many times, and so many times SIGTERM to the whole process group at the start of an
epoch, as SLURM may send it, with images read by two processes; in a random order. A run that ends is compared, and the
next one starts.
Says at the end how many interruptions there were, how many runs they fell on, and how many of these ended the same.
"""

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import CODE

OPTIONS = [
    '--preset=demo',
    '--max_epochs=2',
    '--knn_every=0',
    '--save_every_minutes=0.01',
    '--resume=auto',
    '--cache_images=off',
    '--num_workers=2',
]


def start(folder):
    paths = [f'--{name}_path={folder}/{name}' for name in ('ckpt', 'log')]
    return subprocess.Popen(
        [sys.executable, 'cli.py', 'train', *OPTIONS, *paths],
        cwd=CODE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def digest(folder):
    """Of the weights and the optimizer's state in the last checkpoint."""
    (path,) = (folder / 'ckpt').glob('*/loss_*_epoch_2')
    content = torch.load(path, weights_only=True)
    states = [*content['model'].values()]
    states += [value for state in content['optimizer']['state'].values() for value in state.values()]
    parts = (value.numpy().tobytes() for value in states if torch.is_tensor(value))
    return hashlib.sha256(b''.join(parts)).hexdigest()[:16]


def wait_for_an_epoch(process, folder, limit):
    """Until the run has said that an epoch is over, or at most so many seconds, or its end."""
    logs = list((folder / 'ckpt').glob('*/log.txt'))
    before, end = sum(log.read_text().count('  loss ') for log in logs), time.time() + limit
    while time.time() < end and process.poll() is None:
        if sum(log.read_text().count('  loss ') for log in (folder / 'ckpt').glob('*/log.txt')) > before:
            return
        time.sleep(0.005)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=20)
    parser.add_argument('--terms', type=int, default=10)
    parser.add_argument('--groups', type=int, default=10)
    parser.add_argument('--seed', type=int, default=0)
    mine, more = parser.parse_known_args()
    OPTIONS.extend(more)
    chance, root = random.Random(mine.seed), Path(tempfile.mkdtemp())
    started = time.time()
    if start(root / 'alone').wait():
        sys.exit('the run without interruptions failed')
    whole, expected = time.time() - started, digest(root / 'alone')
    print(f'left alone: {expected}, {whole:.1f} s', flush=True)

    plan = ['kill'] * mine.kills + ['term'] * mine.terms + ['group'] * mine.groups
    chance.shuffle(plan)
    runs = same = hits = 0
    process = folder = None
    while plan or process:
        if process is None:
            runs += 1
            folder = root / f'run_{runs}'
            process = start(folder)
        kind = plan.pop() if plan else None
        if kind == 'group':
            wait_for_an_epoch(process, folder, whole)
        try:
            short = 0.01 if kind == 'group' else chance.uniform(0.2, 1.0) * whole
            _, errors = process.communicate(timeout=short if kind else None)
            plan += [kind] if kind else []  # it was through before
        except subprocess.TimeoutExpired:
            number = signal.SIGKILL if kind == 'kill' else signal.SIGTERM
            os.killpg(process.pid, number) if kind == 'group' else process.send_signal(number)
            _, errors = process.communicate()
            hits += 1
            print(f'{hits}: {kind}, exit code {process.returncode}: {errors.strip()}', flush=True)
            process = start(folder)
            continue
        if process.returncode:
            sys.exit(f'run {runs} failed with {process.returncode}: {errors}')
        weights = digest(folder)
        same += weights == expected
        print(f'run {runs} ends with {weights}', flush=True)
        process = None
    print(
        f'{hits} interruptions of {runs} runs; {same} of {runs} ended with the weights of the run that was left alone'
    )
    sys.exit(same != runs)


if __name__ == '__main__':
    main()
