"""Pixel settings measured on the images: channels, levels, mean and standard deviation; and warnings about conversions
and about images that use a small part of their range, such as 12-bit scans in 16-bit files."""

from collections import Counter
from dataclasses import replace
from weakref import WeakKeyDictionary

import numpy as np

from dataloader.augment.augmentations import describe_augmentation
from dataloader.loading.decode import level_range
from dataloader.loading.pixel_format import PixelFormat, find_dtype, format_from_options, image_kind, to_array
from dataloader.readers.memory import Memory
from runtime.console import join_first, silence_stderr
from runtime.distributed import rank
from runtime.errors import UserError, WorkError
from runtime.messages import log, warn
from runtime.options import UNRESOLVED, channel_numbers, check_mean_std, pixel_levels, replace_args
from runtime.tensors import evenly_spaced

NUM_SAMPLES = 64  # images to determine the type from and to measure on, evenly spaced
MIN_RANGE_SHARE = 0.25  # warn if images use less of their range
QUANTILE = 0.999  # of the values, to ignore a few hot pixels
MAX_VALUES = 10_000  # values per image
KINDS = WeakKeyDictionary()  # {reader: {npy_axes: the ImageKinds of its images}}


def find_pixel_format(args, store):
    """Determine the PixelFormat of a reader's images, from the options and some images."""
    if isinstance(store, Memory):
        if store.is_rgb8:
            return PixelFormat()
        dtype = str(store.pixels.dtype).removeprefix('torch.')
        return replace(format_from_options(args, dtype), channels=(*range(1, store.pixels.shape[1] + 1),), exact=True)
    return format_from_options(args, find_dtype(sample_kinds(store, args.npy_axes)))


def sample_kinds(store, npy_axes):
    """Return the ImageKind of up to NUM_SAMPLES evenly spaced images; unreadable ones are skipped. They are opened once
    per reader: arrays are decoded for it."""
    if npy_axes in (known := KINDS.setdefault(store, {})):
        return known[npy_axes]
    kinds = known[npy_axes] = []
    with silence_stderr():
        for row in evenly_spaced(len(store.names), NUM_SAMPLES).tolist():
            try:
                with store.open(row) as image:
                    kinds.append(image_kind(image, npy_axes))
            except WorkError:
                continue
    return kinds


def resolve_pixels(args, store):
    """Resolve `channels=auto` and `white_level=auto` on the images of train, and log conversions. store: a reader.
    Returns args."""
    kinds = [] if isinstance(store, Memory) else sample_kinds(store, args.npy_axes)
    if args.channels == 'auto':
        args = replace_args(args, channels=find_channels(kinds))
    check_channels(args.channels, kinds)
    if args.white_level == 'auto':
        args = replace_args(args, white_level=measure_levels(args, store))
    if channel_numbers(args.channels) and kinds:
        log_channels(args, kinds[0])
    for note, count in Counter(kind.note for kind in kinds if kind.note).items():
        if not channel_numbers(args.channels) or kinds[0].color == 'other':
            log(f'of {len(kinds)} images that were read {count}: {note}')
    if line := describe_augmentation(args):
        log(line)
    return args


def check_channels(channels, kinds):
    """Raise UserError if none of the images has the channels of the option."""
    numbers, counts = channel_numbers(channels), {kind.channels for kind in kinds}
    if not numbers or not counts:
        return
    text = f'the images have {join_first([*map(str, sorted(counts))])} channels, not those of `channels={channels}`'
    if max(numbers) > max(counts):
        raise UserError(text)
    if '-' in channels and len(numbers) not in counts:
        raise UserError(f'{text}; `channels={",".join(map(str, numbers))}` leaves the others out')


def log_channels(args, kind):
    """Log the channels of the images, whose first is of this ImageKind, and those that are used."""
    log(f'images of {kind.channels} channels, {kind.dtype}; used are `channels={args.channels}`')


def report_pixels(args, store):
    """Log and warn of what a checkpoint makes of the images of a reader: channels that are left out, and the range.
    8-bit RGB needs neither."""
    if isinstance(store, Memory) or (pixel_format := find_pixel_format(args, store)).is_rgb8:
        return
    kinds = sample_kinds(store, args.npy_axes)
    if kinds and kinds[0].channels > args.num_channels:
        log_channels(args, kinds[0])
    warn_pixel_range(args, store, pixel_format)


def find_channels(kinds):
    """Return `channels` for images of these kinds: rgb, or all channels of the first image."""
    return f'1-{kinds[0].channels}' if kinds and kinds[0].color == 'other' else 'rgb'


def measure_levels(args, store):
    """Measure `white_level`: the 99.9th percentile of the values of some images; black is 0, or the 0.1th percentile if
    there are negative values."""
    pixel_format = find_pixel_format(args, store)
    parts = [] if pixel_format.dtype == 'uint8' else [*sample_pixels(store, pixel_format)]
    values = np.concatenate([*(pixels.ravel() for pixels in parts), np.zeros(0)])
    if not len(values):
        log('`white_level=auto`: the images have 8 bits, 255 is white')
        return 'type'
    low, high = np.quantile(values, (1 - QUANTILE, QUANTILE))
    high = max(high, min(low, 0) + 1e-6)
    level_text = f'{high:.6g}' if low >= 0 else f'{low:.6g},{high:.6g}'
    log(f'`white_level={level_text}`: {QUANTILE:.1%} of the values of {len(parts)} images lie below')
    return level_text


def sample_pixels(store, pixel_format):
    """Yield pixels of up to NUM_SAMPLES images, C x n float64, at most about MAX_VALUES per channel; unreadable images
    are skipped."""
    with silence_stderr():
        for row in evenly_spaced(len(store.names), NUM_SAMPLES).tolist():
            try:
                with store.open(row) as image:
                    pixels = to_array(image, pixel_format)
            except WorkError:
                continue
            flat = pixels.reshape(len(pixels), -1)
            if flat.shape[1] > MAX_VALUES:  # random ones: images may have a pattern of rows or columns
                flat = flat[:, np.random.default_rng(0).integers(flat.shape[1], size=MAX_VALUES)]
            yield flat.astype(np.float64)


def resolve_mean_std(args, store):
    """Resolve `mean` and `std` to numbers or `imagenet`. store: the reader of train. Returns args. Raises UserError for
    `weights` if no weights state theirs."""
    resolved, words = {}, {'mean': args.mean, 'std': args.std}
    check_mean_std(args)
    if not {*UNRESOLVED} & {*words.values()} and args.num_channels == 3:
        return args
    pixel_format = find_pixel_format(args, store)
    for name, word in words.items():
        word = ('imagenet' if pixel_format.is_rgb8 else 'dataset') if word == 'auto' else word
        if word == 'weights':
            raise UserError(f'`{name}=weights`: no pretrained weights have it for these channels: `{name}=dataset`')
        resolved[name] = word
    if 'dataset' in resolved.values():
        measured = measure_mean_std(store, pixel_format)
        texts = [f'`{name}={measured[name]}`' for name, word in resolved.items() if word == 'dataset']
        resolved = {name: measured[name] if word == 'dataset' else word for name, word in resolved.items()}
        if measured['images']:
            log(f'{" ".join(texts)}, measured on {measured["images"]} images of train')
    args = replace_args(args, **resolved)
    check_mean_std(args)
    return args


def measure_mean_std(store, pixel_format):
    """Measure mean and standard deviation of each channel on some images, relative to the levels. Returns {'mean',
    'std'} as option texts, and the number of 'images'. The std of a constant channel is 1."""
    parts = [*sample_pixels(store, pixel_format)]
    if not parts:
        return {'mean': '0.5', 'std': '0.25', 'images': 0}  # no image can be read: reported later
    black, white = level_range(pixel_format.levels, pixel_format.dtype)
    values = ((np.concatenate(parts, 1) - black) / (white - black)).clip(0, 1)
    mean, std = values.mean(1), values.std(1)
    constant = [number + 1 for number, value in enumerate(std) if value < 1e-4]
    if constant:
        warn(f'constant in the images of train: channel {join_first([*map(str, constant)])}; its std is 1')
    numbers = {'mean': mean, 'std': np.where(std < 1e-4, 1.0, std)}
    texts = {name: ','.join(f'{value:.6g}' for value in each) for name, each in numbers.items()}
    return {**texts, 'images': len(parts)}


def warn_pixel_range(args, store, pixel_format):
    """Warn if the images of a reader use a small part of their range, or exceed it."""
    if rank():
        return
    parts = [*sample_pixels(store, pixel_format)]
    tops, lows = ([np.quantile(part, end) for part in parts] for end in (QUANTILE, 1 - QUANTILE))
    levels = pixel_levels(args.white_level)
    if parts and (line := range_warning(pixel_format.dtype, min(lows), max(tops), levels)):
        warn(line)


def range_warning(dtype, low, top, levels):
    """Return a warning for a dataset with values from `low` to `top`, or None."""
    if dtype == 'uint8':
        if levels:
            return '`white_level` has no effect: the images have 8 bits'
        if top < MIN_RANGE_SHARE * 255:
            return f'the images use gray levels up to {top:.0f} of 255: they are nearly black'
        return None
    black, white = level_range(levels, dtype)
    what = f'images of more than 8 bits hold values from {low:g} to {top:g}'
    option = f'`white_level={next_bit_depth_max(top):g}`' if top > max(0, low) else '`white_level=auto`'
    if top > 1.5 * white:
        return f'{what}, and {white:g} is white already: {option}'
    if top < black + MIN_RANGE_SHARE * (white - black):
        return f'{what}, where {white:g} is white: they are nearly black; {option}'
    if low < black - MIN_RANGE_SHARE * (top - black):
        return f'{what}: values below {black:g} become black; `white_level={low:g},{top:g}`'
    return None


def next_bit_depth_max(top):
    """Return the largest value of the bit depth that `top` suggests (4095 for 3000), or `top` for floats."""
    if top <= 1 or top > 65535:
        return float(f'{top:.6g}')
    return max(255.0, float(2 ** int(np.ceil(np.log2(top + 1))) - 1))
