"""Images/s and peak memory of training with each switch off and on, and a resumed run beside one that was left alone.

    python3 bench/switches.py [--image_path=FOLDER] [other options of cli.py train, such as --backbone=small]

The cifar10 preset for two epochs each, by default on the demo's drawings; the second epoch counts. bf16, fp16,
compile and cuda_graph want a GPU; on a CPU their rows are left out. The last line is one JSON object.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import CODE

from logger import read_scalars

SWITCHES = {
    'unchanged': [],
    '--amp=off': ['--amp=off'],
    '--amp=bf16': ['--amp=bf16'],
    '--amp=fp16': ['--amp=fp16'],
    '--compile=False': ['--compile=False'],
    '--compile=True': ['--compile=True'],
    '--cuda_graph=False': ['--cuda_graph=False'],
    '--cache_images=off': ['--cache_images=off'],
    '--augment_backend=worker': ['--augment_backend=worker'],
    '--grad_accum_steps=2': ['--grad_accum_steps=2'],
}


def train(folder, *options):
    """One run; returns (images/s, peak gigabytes or None, loss) of its last epoch."""
    paths = [f'--{name}_path={folder}/{name}' for name in ('ckpt', 'log')]
    command = [sys.executable, 'cli.py', 'train', '--knn_every=0', '--save_every_epochs=1', *options, *paths]
    subprocess.run(command, cwd=CODE, check=True, stdout=subprocess.DEVNULL)
    (log,) = (folder / 'log').iterdir()
    last = {tag: values[-1][1] for tag, values in read_scalars(log).items()}
    return tuple(last.get(tag) for tag in ('speed/images_per_second', 'speed/memory_gigabytes', 'pretraining/loss'))


def main():
    root, given = Path(tempfile.mkdtemp()), sys.argv[1:]
    demo = [] if any(option.startswith('--image_path') for option in given) else ['--image_path=data/demo']
    common = ['--preset=cifar10', *demo, '--max_epochs=2', *given]
    if demo:
        subprocess.run(
            [sys.executable, 'cli.py', 'check_dataloader', '--preset=demo'],
            cwd=CODE,
            check=True,
            stdout=subprocess.DEVNULL,
        )
    cuda, results = torch.cuda.is_available(), {}
    for name, options in SWITCHES.items():
        if cuda or not name.startswith(('--amp=bf16', '--amp=fp16', '--compile=True', '--cuda_graph')):
            speed, memory, loss = train(root / name.strip('-'), *common, *options)
            results[name] = {'images_per_second': round(speed, 1), 'peak_gigabytes': memory, 'loss': loss}
            print(f'{name:24}{speed:10.0f} images/s   {memory or float("nan"):8.2f} GB   loss {loss:.4f}', flush=True)
    for name in ('unchanged', '--amp=fp16') if cuda else ('unchanged',):
        folder = root / f'resumed {name}'
        train(folder, *common, *SWITCHES[name], '--max_minutes=0.0001')
        _, _, loss = train(folder, *common, *SWITCHES[name], '--resume=auto')
        results[f'resumed, {name}'] = {'loss': loss, 'difference': loss - results[name]['loss']}
        print(f'resumed, {name}: loss {loss:.6f}, difference {loss - results[name]["loss"]:.2e}', flush=True)
    print(json.dumps(results))


if __name__ == '__main__':
    main()
