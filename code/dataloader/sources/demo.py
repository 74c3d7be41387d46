"""The demo dataset: ten kinds of patterns, drawn by code, to try SimSiam without a download.

The class is the kind of pattern. Angle, phase, period, both gray levels and noise are random, so that neither color nor
position reveals the class.
"""

import math
import os
import shutil
from pathlib import Path

import torch
from PIL import Image

from runtime.errors import UserError

SIDE, OVERSAMPLE = 48, 3  # pixels of an image; points per pixel and axis, which are averaged
TRAIN_PER_CLASS, VAL_PER_CLASS = 400, 100
VERSION = '1'  # a folder of another version is drawn again


def sign(mask):
    """+1 where True, -1 elsewhere."""
    return torch.where(mask, 1.0, -1.0)


def square_wave(t):
    """+1 and -1 in turn, with period 1."""
    return sign(t % 1 < 0.5)


# A pattern maps points to a shade in [-1, 1]; it fills the image, so that every crop shows it.
# x, y: coordinates of the points, in periods, rotated and shifted at random; r: a generator.
def stripes(x, y, r):
    return square_wave(x)


def checks(x, y, r):
    return square_wave(x) * square_wave(y)


def dots(x, y, r):
    return sign(torch.hypot(x % 1 - 0.5, y % 1 - 0.5) < 0.33)


def rings(x, y, r):
    distance = torch.hypot(x % 1 - 0.5, y % 1 - 0.5)
    return sign((distance < 0.45) & (distance > 0.22))


def triangles(x, y, r):
    return sign(x % 1 + y % 1 < 1)


def bricks(x, y, r):
    shifted = x / 1.6 + 0.5 * y.floor()
    return sign((y % 1 < 0.25) | (shifted % 1 < 0.16))


def zigzags(x, y, r):
    return square_wave(x + 0.9 * (2 * (0.7 * y % 1) - 1).abs())


def plaids(x, y, r):
    return (square_wave(x) + square_wave(y)) / 2


def blocks(x, y, r):
    """A mosaic of random black and white cells."""
    cells = sign(torch.rand(64, 64, generator=r) < 0.5)
    return cells[(1.6 * x).floor().long() % 64, (1.6 * y).floor().long() % 64]


def clouds(x, y, r):
    """A smooth random field: a sum of six waves with random direction and phase."""
    angle, phase = torch.rand(2, 6, generator=r) * 2 * math.pi
    waves = torch.cos(2.4 * (x[..., None] * angle.cos() + y[..., None] * angle.sin()) + phase)
    return (waves.sum(-1) / 2.5).clamp(-1, 1)


PATTERNS = (blocks, bricks, checks, clouds, dots, plaids, rings, stripes, triangles, zigzags)


def draw_pattern(kind, generator):
    """Draw an image of the pattern `kind` (a function of PATTERNS): SIDE x SIDE uint8."""
    angle, shift_x, shift_y, size, level, contrast, polarity = torch.rand(7, generator=generator).tolist()
    turn, period = 2 * math.pi * angle, 7.5 + 4.5 * size  # pixels
    axis = (torch.arange(SIDE * OVERSAMPLE) + 0.5) / OVERSAMPLE - SIDE / 2
    row, column = torch.meshgrid(axis, axis, indexing='ij')
    x = (column * math.cos(turn) + row * math.sin(turn)) / period + shift_x
    y = (row * math.cos(turn) - column * math.sin(turn)) / period + shift_y
    shade = kind(x, y, generator).reshape(SIDE, OVERSAMPLE, SIDE, OVERSAMPLE).mean((1, 3))
    half = 0.17 + 0.15 * contrast  # of the distance between the two gray levels
    middle = 0.5 + 0.6 * (level - 0.5) * (1 - 2 * half)
    gray = middle + (half if polarity < 0.5 else -half) * shade
    gray = gray + 0.06 * torch.randn(SIDE, SIDE, generator=generator)
    return (gray.clamp(0, 1) * 255).round().to(torch.uint8)


def write_demo_dataset(folder, progress):
    """Draw the dataset into `folder`/{train,val}/<kind>/<number>.png, unless it exists. It is renamed into place when
    it is complete. progress: wraps an iterable in a progress bar. Raises UserError if the folder holds other files.
    """
    folder = Path(folder)
    marker = folder / 'made_by_demo.txt'
    if is_complete(marker):
        return
    if folder.is_dir() and not marker.is_file() and any(folder.iterdir()):
        raise UserError(f'{folder} is for the demo dataset and holds other files: move them, or name their folder')
    aside = folder.with_name(f'{folder.name}.{os.getpid()}.part')
    jobs = [
        (split, kind, number)
        for split, count in (('train', TRAIN_PER_CLASS), ('val', VAL_PER_CLASS))
        for kind in PATTERNS
        for number in range(count)
    ]
    generator = torch.Generator().manual_seed(2011_10566)
    for split, kind, number in progress(jobs):
        path = aside / split / kind.__name__ / f'{number:04d}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw_pattern(kind, generator).numpy()).save(path)
    (aside / marker.name).write_text(VERSION)
    if not is_complete(marker):  # of an earlier version, or empty
        shutil.rmtree(folder, ignore_errors=True)
    try:
        aside.rename(folder)
    except OSError:  # another process has drawn it in the meantime
        if not marker.is_file():
            raise
        shutil.rmtree(aside, ignore_errors=True)


def is_complete(marker):
    """Whether the dataset of this version is there. marker: its file with the version."""
    return marker.is_file() and marker.read_text() == VERSION
