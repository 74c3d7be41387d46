"""Five bands of 12 bits in which the class can be seen in the fifth alone: what our network learns of them.

    python3 bench/channels.py --output=results/channels.json

Three classes of patterns (stripes, checks, rings of random phase, period and place) in the fifth band; the other four
hold noise of the same strength. Each band has a gain, an offset and noise of its own. Trained and judged with
all bands, with bands 1 to 3, and as what a conversion to 8 bits RGB leaves: kNN and linear accuracy on val.
"""

import json
import sys
import tempfile
from pathlib import Path

import fire
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli
from runtime.files import read_json

SIDE = 32  # px
GAIN, OFFSET, NOISE = (300, 600, 900, 480, 360), (1500, 1300, 1700, 1250, 2100), (40, 60, 80, 30, 50)
CLASSES = ('stripes', 'checks', 'rings')


def pattern(name, rng):
    """A pattern of a class, SIDE x SIDE in [-1, 1]."""
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    phase, turns = rng.uniform(0, 2 * np.pi, 2), 2 * np.pi * rng.uniform(2, 3.5)
    if name == 'stripes':
        return np.sin(turns * x + phase[0])
    if name == 'checks':
        return np.sin(turns * x + phase[0]) * np.sin(turns * y + phase[1])
    return np.sin(2 * turns * np.hypot(x - rng.uniform(0.3, 0.7), y - rng.uniform(0.3, 0.7)) + phase[0])


def draw(name, rng):
    """Five bands, 5 x SIDE x SIDE uint16 of 12 bits."""
    bands = np.stack([*rng.normal(size=(4, SIDE, SIDE)), pattern(name, rng)])
    scale = [np.array(numbers)[:, None, None] for numbers in (GAIN, OFFSET, NOISE)]
    bands = bands * scale[0] + scale[1] + rng.normal(size=bands.shape) * scale[2]
    return bands.round().clip(0, 4095).astype(np.uint16)


def write_set(folder, counts, seed):
    """folder/bands and folder/rgb: the bands as .npy, and as PNGs of the first three of 8 bits."""
    rng = np.random.default_rng(seed)
    for split, count in counts.items():
        for name in CLASSES:
            for kind in ('bands', 'rgb'):
                (folder / kind / split / name).mkdir(parents=True)
            for i in range(count):
                bands = draw(name, rng)
                np.save(folder / f'bands/{split}/{name}/{i:04d}.npy', bands)
                rgb = (bands[:3] // 16).astype(np.uint8).transpose(1, 2, 0)
                Image.fromarray(rgb).save(folder / f'rgb/{split}/{name}/{i:04d}.png')


def measure(folder, kind, options, epochs, seed):
    """{'knn', 'linear'} of a run on one of the sets, percent."""
    paths = [f'--{name}_path={folder}/{name}' for name in ('ckpt', 'log', 'cache')]
    name = f'--model_name={kind}_{len(options)}_{seed}'
    given = ['--preset=demo', f'--image_path={folder}/{kind}', f'--max_epochs={epochs}', '--amp=off', *options]
    train = ['train', *given, name, f'--random_seed={seed}', '--knn_every=0', '--knn_k=20', *paths]
    assert cli.main(train) == 0
    (run,) = (folder / 'ckpt').glob(f'model_name_{name.partition("=")[2]}_*')
    top1 = {}
    for protocol in ('knn', 'linear'):
        assert cli.main(['evaluate', f'--ckpt_name={run.name}', f'--protocol={protocol}', *paths]) == 0
        (path,) = run.glob(f'evaluate_{protocol}_*.json')
        top1[protocol] = read_json(path)['top1']
    return top1


def main(output='results/channels.json', epochs=40, seeds=2, train=300, val=100):
    rows = {
        'all five bands': ('bands', ['--white_level=4095']),
        'bands 1 to 3': ('bands', ['--white_level=4095', '--channels=1,2,3']),
        '8 bits, RGB': ('rgb', []),
    }
    results = {name: [] for name in rows}
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            write_set(Path(folder), {'train': train, 'val': val}, seed)
            for name, (kind, options) in rows.items():
                results[name].append(measure(Path(folder), kind, options, epochs, seed))
    about = {'epochs': epochs, 'train': 3 * train, 'val': 3 * val, 'seeds': seeds, 'rows': results}
    Path(output).write_text(json.dumps(about, indent=2) + '\n')
    print(json.dumps(results, indent=2))


if __name__ == '__main__':
    fire.Fire(main)
