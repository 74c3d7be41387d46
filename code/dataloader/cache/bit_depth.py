"""What part of their range the pixels of a set use: a 12-bit scan in a 16-bit file is black to whoever does not ask."""

import numpy as np

from dataloader.loading.decode import WHITE_LEVEL, raw_values, rgb
from runtime.console import print_message, silence_stderr
from runtime.errors import WorkError

SAMPLE = 64  # images that are looked at
MIN_RANGE_SHARE = 0.25  # of the range: less is warned of
QUANTILE = 0.999  # of the pixels, so that a few hot ones do not count


def warn_bit_depth(store, white):
    """Say on standard error where the images of a store use a small part of their range, or go beyond it."""
    rows = np.linspace(0, len(store.names) - 1, min(SAMPLE, len(store.names))).round().astype(int)
    gray, high_bit_depth = sample_levels(store, rows, white)
    if line := bit_depth_warning(gray, high_bit_depth, white):
        print_message('warning', line)


def sample_levels(store, rows, white):
    """([a high grey level of each image as it is used], [(kind, lowest, highest) of those of more than 8 bits])."""
    gray, high_bit_depth = [], []
    with silence_stderr():
        for row in rows:
            try:
                with store.opened(int(row)) as image:
                    kind = 'I' if image.mode.startswith('I') else image.mode
                    if kind in WHITE_LEVEL:
                        levels = raw_values(image).astype(np.float64)
                        levels = levels[np.isfinite(levels)] if np.isfinite(levels).any() else np.zeros(1)
                        high_bit_depth.append((kind, np.quantile(levels, 1 - QUANTILE), np.quantile(levels, QUANTILE)))
                    gray.append(np.quantile(np.asarray(rgb(image, white)), QUANTILE))
            except WorkError:
                continue  # it is named where it is read
    return gray, high_bit_depth


def bit_depth_warning(gray, high_bit_depth, white):
    """A line on a set whose images look like this, or None."""
    if not gray:
        return None
    if high_bit_depth:
        kind = high_bit_depth[0][0]
        top, limit = max(high for _, _, high in high_bit_depth), white or WHITE_LEVEL[kind]
        low = min(low for _, low, _ in high_bit_depth)
        what = f'images of more than 8 bits hold values from {low:g} to {top:g}'
        if top > 1.5 * limit:
            return f'{what}, and {limit:g} is white already: `white_level={next_bit_depth_max(top):g}`'
        if top < MIN_RANGE_SHARE * limit:
            return f'{what}, where {limit:g} is white: they are nearly black; `white_level={next_bit_depth_max(top):g}`'
        if low < -MIN_RANGE_SHARE * top:
            return f'{what}: what is below 0 is black; shift them in the files'
        return None
    if white:
        return '`white_level` has no effect: the images have 8 bits'
    if max(gray) < MIN_RANGE_SHARE * 255:
        return f'the images use grey levels up to {max(gray):.0f} of 255: they are nearly black'
    return None


def next_bit_depth_max(top):
    """The largest value that a scanner of whole bits gives, where `top` looks like one; else top."""
    if top <= 1 or top > 65535:
        return float(f'{top:.6g}')
    return max(255.0, float(2 ** int(np.ceil(np.log2(top + 1))) - 1))
