"""The pixel format of a dataset: channels, type, black and white levels, EXIF orientation.

Images of 8-bit red, green and blue, or gray, are read by Pillow as uint8 (decode.py). All others are arrays that keep
the type of their files until they are on the device (arrays.py).
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from dataloader.loading import arrays
from dataloader.loading.decode import exif_transpose_method, level_range, rgb, turn_upright, wrap_pillow_errors
from runtime.options import channel_numbers, pixel_levels


@dataclass(frozen=True)
class PixelFormat:
    """channels: channel numbers from 1 on; () for red, green and blue. exact: whether images may have no others. dtype:
    name of a NumPy type. levels: (black, white), None for those of the type (level_range). exif: whether to apply EXIF
    orientation. npy_axes: see arrays.read_channels."""

    channels: tuple = ()
    exact: bool = False
    dtype: str = 'uint8'
    levels: tuple | None = None
    exif: bool = True
    npy_axes: str = 'auto'

    @property
    def is_rgb8(self):
        """Whether images are 8-bit red, green and blue."""
        return not self.channels and self.dtype == 'uint8'

    @property
    def count(self):
        return len(self.channels) or 3

    def decoded(self):
        """Return the format of images that were decoded with this format and cached."""
        return self if self.is_rgb8 else replace(self, channels=(*range(1, self.count + 1),), exact=True)

    def key(self):
        """Return a text that differs between formats, for the fingerprint of caches."""
        return f'{self.channels} {self.exact} {self.dtype} {self.levels} {self.exif} {self.npy_axes}'


@dataclass(frozen=True)
class ImageKind:
    """The content of an opened image. color: rgb, gray or other. note: what is converted or left out when it is read as
    RGB, or ''."""

    channels: int
    dtype: str
    color: str
    note: str


def format_from_options(args, dtype='uint8'):
    """Build a PixelFormat from the options."""
    channels, levels = channel_numbers(args.channels), pixel_levels(args.white_level)
    return PixelFormat(channels, '-' in args.channels, dtype, levels, args.exif == 'apply', args.npy_axes)


def to_array(image, pixel_format):
    """Decode an opened image to C x H x W with the channels and type of the format. Raises WorkError if it lacks the
    channels, cannot be decoded, or its type does not fit."""
    with wrap_pillow_errors(getattr(image, 'named', 'in memory')):
        if pixel_format.channels:
            pixels = pick_channels(arrays.read_channels(image, pixel_format.npy_axes), pixel_format)
        else:
            pixels = read_rgb(image, pixel_format)
        pixels = cast_to_format(pixels, pixel_format)
        turn = exif_transpose_method(image) if pixel_format.exif else None
        if turn is None:
            return pixels
        upright = turn_upright(torch.from_numpy(pixels.copy()), turn)  # Pillow's arrays may be read-only
        return np.ascontiguousarray(upright.numpy())


def pick_channels(pixels, pixel_format):
    """Select the channels of the format from C x H x W. Raises ValueError if some are missing."""
    channels = pixel_format.channels
    channels_text = ','.join(map(str, channels))
    if max(channels) > len(pixels):
        raise ValueError(f'it has {len(pixels)} channels, but `channels={channels_text}` is set')
    if pixel_format.exact and len(pixels) > len(channels):
        raise ValueError(
            f'it has {len(pixels)} channels, and `channels=1-{len(channels)}` is for images of {len(channels)}; '
            f'`channels={channels_text}` leaves the others out'
        )
    return pixels if channels == (*range(1, len(pixels) + 1),) else pixels[[channel - 1 for channel in channels]]


def cast_to_format(pixels, pixel_format):
    """Cast pixels to the format's type; nan becomes 0, inf the image's largest finite value. If black and white of the
    two types differ (8 and 16 bits), the values are rescaled. Raises ValueError if the type cannot hold them."""
    dtype = pixel_format.dtype
    if pixels.dtype.kind == 'f' and not (valid := np.isfinite(pixels)).all():
        low, high = (pixels[valid].min(), pixels[valid].max()) if valid.any() else (0, 0)
        pixels = np.nan_to_num(pixels, nan=0, neginf=low, posinf=high)
    if pixels.dtype == dtype:
        return pixels
    (black, white), (new_black, new_white) = (
        level_range(pixel_format.levels, name) for name in (pixels.dtype.name, dtype)
    )
    if not np.can_cast(pixels.dtype, dtype) and not (pixels.dtype.kind in 'iu' and np.dtype(dtype).kind == 'f'):
        raise ValueError(f'its type is {pixels.dtype}, and that of the others {dtype}: convert all to one type')
    if (black, white) != (new_black, new_white):
        pixels = (pixels.astype(np.float64) - black) / (white - black) * (new_white - new_black) + new_black
        pixels = np.rint(pixels) if np.dtype(dtype).kind in 'iu' else pixels
    return pixels.astype(dtype, copy=False)


def read_rgb(image, pixel_format):
    """Read red, green and blue, 3 x H x W, in the type of the file; gray is repeated. Raises ValueError if
    the channels are no colors."""
    if not arrays.is_read_as_array(image):
        return np.asarray(rgb(image)).transpose(2, 0, 1)
    pixels = arrays.read_colors(image, pixel_format.npy_axes)
    return pixels.repeat(3, 0) if len(pixels) == 1 else pixels


def image_kind(image, npy_axes='auto'):
    """Return the ImageKind of an opened image. Raises WorkError if it cannot be read."""
    if isinstance(image, arrays.ArrayImage):
        with wrap_pillow_errors(image.named):
            pixels = arrays.read_channels(image, npy_axes)
        color = 'gray' if len(pixels) == 1 else 'rgb' if image.rgb else 'other'
        return ImageKind(
            len(pixels), pixels.dtype.name, color, ', '.join(filter(None, (image.note, invalid_note(pixels))))
        )
    bands, mode = image.getbands(), image.mode
    color = 'gray' if len(bands) < 3 and mode not in ('P', 'PA') else 'rgb'
    if arrays.is_16_bit_png(image):
        return ImageKind(len(bands), 'uint16', color, 'the fourth channel left out' if 'A' in bands else '')
    if mode.startswith('I;16'):
        return ImageKind(1, 'uint16', color, '')
    if mode in ('I', 'F'):
        with wrap_pillow_errors(getattr(image, 'named', 'in memory')):
            pixels = arrays.read_channels(image)
        return ImageKind(1, pixels.dtype.name, color, invalid_note(pixels))
    notes = []
    if mode != 'LAB' and ('A' in bands or 'a' in bands):
        notes.append('transparency (the last channel) left out')
    elif 'transparency' in image.info:
        notes.append('transparency left out')
    if mode in ('CMYK', 'YCbCr', 'LAB', 'HSV'):
        notes.append(f'{mode} converted to RGB')
    if mode == 'RGBX':
        notes.append('the fourth channel left out')
    with wrap_pillow_errors(getattr(image, 'named', 'in memory')):
        num_frames = getattr(image, 'n_frames', 1)
    if num_frames > 1 and image.format != 'MPO':
        notes.append(f'the first of several pictures of a {image.format} file')
    if getattr(image, 'note', ''):
        notes.append(image.note)
    return ImageKind(len(bands), 'uint8', color, ', '.join(notes))


def invalid_note(pixels):
    """Return a note if pixels are nan or infinite, else ''."""
    if pixels.dtype.kind != 'f' or np.isfinite(pixels).all():
        return ''
    return 'nan taken as 0, infinite values as the largest or smallest of the image'


def find_dtype(kinds):
    """Return the name of the smallest type that holds the pixels of all `kinds`."""
    names = {kind.dtype for kind in kinds} or {'uint8'}
    dtype = np.result_type(*names)
    return 'float32' if dtype == np.float64 else dtype.name
