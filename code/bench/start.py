"""How long a large set takes to be found, and in how much memory: CPU seconds and gigabytes before the first batch.

    python3 bench/start.py [--counts=10000,100000,1281000] [--classes=1000,20000]

The sets are hard links to one small JPEG, in a temporary folder on the disk of data/. Of each: CPU seconds of
get_iterator (ResNet-50's preset) and of the keys of the first batch, the process's largest memory, and by how much the
private memory of the two processes that read images grew from their first batch to their fortieth.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CODE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CODE))


def draw(root, count, classes):
    """`count` links in `classes` folders."""
    from PIL import Image

    (root / 'train').mkdir(parents=True)
    Image.effect_noise((120, 90), 60).convert('RGB').save(root / 'one.jpg')
    for owner in range(classes):
        folder = root / f'train/n{owner:08d}'
        folder.mkdir()
        for number in range(owner, count, classes):
            link(root, folder, owner, number)


def link(root, folder, owner, number):
    """A file system has a limit to the links of one file: every 30,000 names there is a new one."""
    source = root / f'one{number // 30000}.jpg'
    if not source.exists():
        shutil.copy(root / 'one.jpg', source)
    os.link(source, folder / f'n{owner:08d}_{number}.JPEG')


def private(pid):
    """Private memory of a process, in megabytes."""
    lines = Path(f'/proc/{pid}/smaps_rollup').read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith('Private_')) / 1024


def measure(root):
    """Printed by a process of its own: a line of JSON."""
    import resource

    import torch  # noqa: F401

    from dataloader.load_dataset import get_iterator
    from runtime.options import get_config

    before = time.process_time()
    args = get_config(
        preset='imagenet',
        image_path=root,
        image_size=32,
        batch_size=32,
        num_workers=2,
        val_fraction=0.0,
        cache_path=f'{root}/cache',
    )
    train = get_iterator(args)['train']
    next(iter(train.batch_sampler))
    seconds, memory = time.process_time() - before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    grown = []
    for step, _ in enumerate(train):
        if step in (1, 40):
            grown.append([private(worker.pid) for worker in train._iterator._workers])
        if step == 40:
            break
    growth = max(after - first for first, after in zip(*grown, strict=True))
    print(
        json.dumps({'cpu_seconds': round(seconds, 2), 'gigabytes': round(memory, 2), 'worker_growth_mb': round(growth)})
    )


def main():
    given = dict(word.removeprefix('--').split('=') for word in sys.argv[1:])
    counts = [int(n) for n in given.get('counts', '10000,100000,1281000').split(',')]
    classes = [int(n) for n in given.get('classes', '1000,20000').split(',')]
    results = {}
    print(f'{"images":>10}{"classes":>10}{"CPU s":>10}{"GB":>8}   growth of a worker, MB')
    for count in counts:
        for number in classes:
            if number > count:
                continue
            root = Path(tempfile.mkdtemp(dir=CODE.parent / 'data'))
            try:
                draw(root, count, number)
                finished = subprocess.run(
                    [sys.executable, __file__, str(root)], capture_output=True, text=True, check=True
                )
            finally:
                shutil.rmtree(root)
            row = json.loads(finished.stdout.splitlines()[-1])
            results[f'{count}_{number}'] = row
            print(
                f'{count:10}{number:10}{row["cpu_seconds"]:10.2f}{row["gigabytes"]:8.2f}   {row["worker_growth_mb"]}',
                flush=True,
            )
    print(json.dumps(results))


if __name__ == '__main__':
    if len(sys.argv) == 2 and Path(sys.argv[1]).is_dir():
        measure(sys.argv[1])
    else:
        main()
