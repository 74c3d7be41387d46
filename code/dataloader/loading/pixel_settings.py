"""Settings of pixels that are taken from the images: channels, levels, mean and standard deviation; what is said of
them: what is converted or left out, and what part of their range a set uses. A 12-bit scan in a 16-bit file is black to
whoever does not ask."""

from collections import Counter
from dataclasses import replace

import numpy as np

from dataloader.augment.recipes import describe_augmentation
from dataloader.loading.decode import level_range
from dataloader.loading.pixel_format import PixelFormat, find_dtype, format_from_options, image_kind, to_array
from dataloader.readers.memory import Memory
from runtime.console import print_message, silence_stderr
from runtime.distributed import rank
from runtime.errors import UserError, WorkError
from runtime.messages import log
from runtime.options import UNRESOLVED, channel_numbers, channel_values, pixel_levels, replace_args
from runtime.tensors import evenly_spaced

SAMPLE = 64  # images that are looked at, evenly spaced
KINDS = 16  # of which the kind is looked at
MIN_RANGE_SHARE = 0.25  # of the range: less is warned of
QUANTILE = 0.999  # of the pixels, so that a few hot ones do not count
VALUES = 10_000  # of an image, to measure levels with


def find_pixel_format(args, store):
    """The PixelFormat of a store's images under the options."""
    if isinstance(store, Memory):
        if store.is_rgb8:
            return PixelFormat()
        dtype = str(store.pixels.dtype).removeprefix('torch.')
        return replace(format_from_options(args, dtype), channels=(*range(1, store.pixels.shape[1] + 1),), exact=True)
    return format_from_options(args, find_dtype(sample_kinds(store, args.npy_axes)))


def sample_kinds(store, npy_axes, count=KINDS):
    """ImageKind of some images; those that cannot be opened are named where they are read."""
    found = []
    with silence_stderr():
        for row in evenly_spaced(len(store.names), count).tolist():
            try:
                with store.opened(row) as image:
                    found.append(image_kind(image, npy_axes))
            except WorkError:
                continue
    return found


def resolve_pixels(args, store):
    """args with the channels and the levels that the images of `store` (of train) have, where these are `auto`; says
    what becomes of them."""
    kinds = [] if isinstance(store, Memory) else sample_kinds(store, args.npy_axes, SAMPLE)
    if args.channels == 'auto':
        args = replace_args(args, channels=find_channels(kinds))
    if args.white_level == 'auto':
        args = replace_args(args, white_level=measure_levels(args, store))
    if channel_numbers(args.channels) and kinds:
        log(f'images of {kinds[0].channels} channels, {kinds[0].dtype}; used are `channels={args.channels}`')
    for note, count in Counter(kind.note for kind in kinds if kind.note).items():
        if not channel_numbers(args.channels) or kinds[0].color == 'other':
            log(f'of {len(kinds)} images that were looked at {count}: {note}')
    if line := describe_augmentation(args):
        log(line)
    return args


def find_channels(kinds):
    """`channels` of these ImageKind: rgb, or as many as the first image has."""
    return f'1-{kinds[0].channels}' if kinds and kinds[0].color == 'other' else 'rgb'


def measure_levels(args, store):
    """`white_level` of a store's images: the 99.9th percentile of some values of some images; black is 0, or where
    there are values below it the 0.1th."""
    pixel_format = find_pixel_format(args, store)
    parts = [] if pixel_format.dtype == 'uint8' else [*sample_pixels(store, pixel_format)]
    values = np.concatenate([*(pixels.ravel() for pixels in parts), np.zeros(0)])
    if not len(values):
        log('`white_level=auto`: the images have 8 bits, 255 is white')
        return 'type'
    low, high = np.quantile(values, (1 - QUANTILE, QUANTILE))
    high = max(high, min(low, 0) + 1e-6)
    found = f'{high:.6g}' if low >= 0 else f'{low:.6g},{high:.6g}'
    log(f'`white_level={found}`: {QUANTILE:.1%} of the values of {SAMPLE} images lie below')
    return found


def sample_pixels(store, pixel_format):
    """Pixels of some images, C x N float64, of each image some; those that cannot be read are left out."""
    with silence_stderr():
        for row in evenly_spaced(len(store.names), SAMPLE).tolist():
            try:
                with store.opened(row) as image:
                    pixels = to_array(image, pixel_format)
            except WorkError:
                continue
            flat = pixels.reshape(len(pixels), -1)
            yield flat[:, :: max(1, flat.shape[1] // VALUES)].astype(np.float64)


def resolve_mean_std(args, store):
    """args with `mean` and `std` as numbers, or `imagenet`. store: of train. Raises UserError for `weights` where there
    are none."""
    found, words = {}, {'mean': args.mean, 'std': args.std}
    if not {*UNRESOLVED} & {*words.values()} and args.num_channels == 3:
        return args
    pixel_format = find_pixel_format(args, store)
    for name, word in words.items():
        word = ('imagenet' if pixel_format.is_rgb8 else 'dataset') if word == 'auto' else word
        if word == 'weights':
            raise UserError(f'`{name}=weights`: no pretrained weights say theirs for these channels; `{name}=dataset`?')
        found[name] = word
    if 'dataset' in found.values():
        measured = measure_mean_std(store, pixel_format)
        found = {name: measured[name] if word == 'dataset' else word for name, word in found.items()}
        log(f'`mean={found["mean"]}` `std={found["std"]}`, measured on {SAMPLE} images of train')
    for name, word in found.items():
        if len(channel_values(name, word)) not in (1, args.num_channels):
            raise UserError(
                f'`{name}={word}` is not one number for all of {args.num_channels} channels nor one for each; '
                f'`{name}=dataset` measures them'
            )
    return replace_args(args, **found)


def measure_mean_std(store, pixel_format):
    """{'mean', 'std'} of each channel over some images, in the levels' range, as options."""
    parts = [*sample_pixels(store, pixel_format)]
    if not parts:
        return {'mean': '0.5', 'std': '0.25'}  # none can be read: whoever reads all will say so
    black, white = level_range(pixel_format.levels, pixel_format.dtype)
    values = ((np.concatenate(parts, 1) - black) / (white - black)).clip(0, 1)
    numbers = {'mean': values.mean(1), 'std': values.std(1).clip(1e-6)}
    return {name: ','.join(f'{value:.6g}' for value in each) for name, each in numbers.items()}


def warn_pixel_range(args, images):
    """Say on standard error where the images of an ImageDataset use a small part of their range, or go beyond it."""
    if rank():
        return
    parts = [*sample_pixels(images.store, images.pixel_format)]
    tops, lows = ([np.quantile(part, end) for part in parts] for end in (QUANTILE, 1 - QUANTILE))
    levels = pixel_levels(args.white_level)
    if parts and (line := range_warning(images.pixel_format.dtype, min(lows), max(tops), levels)):
        print_message('warning', line)


def range_warning(dtype, low, top, levels):
    """A line on a set whose values lie between these, or None."""
    if dtype == 'uint8':
        if levels:
            return '`white_level` has no effect: the images have 8 bits'
        if top < MIN_RANGE_SHARE * 255:
            return f'the images use grey levels up to {top:.0f} of 255: they are nearly black'
        return None
    black, white = level_range(levels, dtype)
    what = f'images of more than 8 bits hold values from {low:g} to {top:g}'
    option = f'`white_level={next_bit_depth_max(top):g}`'
    if top > 1.5 * white:
        return f'{what}, and {white:g} is white already: {option}'
    if top < black + MIN_RANGE_SHARE * (white - black):
        return f'{what}, where {white:g} is white: they are nearly black; {option}'
    if low < black - MIN_RANGE_SHARE * (top - black):
        return f'{what}: what is below {black:g} is black; `white_level={low:g},{top:g}` has both ends'
    return None


def next_bit_depth_max(top):
    """The largest value that a scanner of whole bits gives, where `top` looks like one; else top."""
    if top <= 1 or top > 65535:
        return float(f'{top:.6g}')
    return max(255.0, float(2 ** int(np.ceil(np.log2(top + 1))) - 1))
