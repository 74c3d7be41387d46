"""What part of their range the pixels of a set use: a 12-bit scan in a 16-bit file is black to whoever does not ask."""

import numpy as np

from dataloader.loading.decode import WHITE, levels_of, rgb
from errors import WorkError
from runtime.console import complain, hushed

SAMPLE = 64  # images that are looked at
SMALL = 0.25  # of the range: less is warned of
SHARE = 0.999  # of the pixels, so that a few hot ones do not count


def warn_of_range(store, white):
    """Say on standard error where the images of a store use a small part of their range, or go beyond it."""
    rows = np.linspace(0, len(store.names) - 1, min(SAMPLE, len(store.names))).round().astype(int)
    grey, deep = looked_at(store, rows, white)
    if line := judged(grey, deep, white):
        complain('warning', line)


def looked_at(store, rows, white):
    """([a high grey level of each image as it is used], [(kind, lowest, highest) of those of more than 8 bits])."""
    grey, deep = [], []
    with hushed():
        for row in rows:
            try:
                with store.opened(int(row)) as image:
                    kind = 'I' if image.mode.startswith('I') else image.mode
                    if kind in WHITE:
                        levels = levels_of(image).astype(np.float64)
                        levels = levels[np.isfinite(levels)] if np.isfinite(levels).any() else np.zeros(1)
                        deep.append((kind, np.quantile(levels, 1 - SHARE), np.quantile(levels, SHARE)))
                    grey.append(np.quantile(np.asarray(rgb(image, white)), SHARE))
            except WorkError:
                continue  # it is named where it is read
    return grey, deep


def judged(grey, deep, white):
    """A line on a set whose images look like this, or None."""
    if not grey:
        return None
    if deep:
        kind = deep[0][0]
        top, limit = max(high for _, _, high in deep), white or WHITE[kind]
        low = min(low for _, low, _ in deep)
        what = f'images of more than 8 bits hold values from {low:g} to {top:g}'
        if top > 1.5 * limit:
            return f'{what}, and {limit:g} is white already: `pixel_max={nice(top):g}`'
        if top < SMALL * limit:
            return f'{what}, where {limit:g} is white: they are nearly black; `pixel_max={nice(top):g}`'
        if low < -SMALL * top:
            return f'{what}: what is below 0 is black; shift them in the files'
        return None
    if white:
        return '`pixel_max` has no effect: the images have 8 bits'
    if max(grey) < SMALL * 255:
        return f'the images use grey levels up to {max(grey):.0f} of 255: they are nearly black'
    return None


def nice(top):
    """The largest value that a scanner of whole bits gives, where `top` looks like one; else top."""
    if top <= 1 or top > 65535:
        return float(f'{top:.6g}')
    return max(255.0, float(2 ** int(np.ceil(np.log2(top + 1))) - 1))
