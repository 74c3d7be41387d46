"""Images that are arrays: .npy, TIFF of many bands or of more than 8 bits, DICOM; and the channels of Pillow's images.

An array is channels x height x width, in the type of the file and the machine's byte order.
"""

import contextlib
import io

import numpy as np
import torch

from dataloader.loading.image_decoders import decode_png

MAX_CHANNELS = 16  # that an axis of an .npy file may have to be taken for its channels
TYPES = ('uint8', 'int8', 'uint16', 'int16', 'uint32', 'int32', 'float16', 'float32')  # that are kept as they are
PNG_16_BIT = ';16B'  # the end of Pillow's name for such pixels


class ArrayImage:
    """An image with as much of Pillow's interface as is used here, and its pixels. pixels: C x H x W; rgb: whether its
    three channels are red, green and blue; note: what of the file is left out, or ''; fp: the bytes of the file;
    orientation: as EXIF numbers it."""

    mode, info, orientation = 'array', {}, 1

    def __init__(self, pixels, file_format, rgb=False, note='', fp=None):
        self.pixels, self.format, self.rgb, self.note, self.fp = pixels, file_format, rgb, note, fp
        self.height, self.width = pixels.shape[1:]
        self.size = self.width, self.height

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def to_native_type(pixels):
    """An array in the machine's byte order, its type one of TYPES. Raises ValueError for one that is no picture's."""
    if pixels.dtype == bool:
        return pixels.astype(np.uint8) * np.uint8(255)
    if pixels.dtype == np.float64:
        pixels = pixels.astype(np.float32)
    if pixels.dtype.newbyteorder('=').name not in TYPES:
        raise ValueError(f'its numbers are {pixels.dtype}; those that are read are {", ".join(TYPES)}')
    return np.ascontiguousarray(pixels.astype(pixels.dtype.newbyteorder('='), copy=False))


def open_npy(file):
    """An .npy file (of bytes); which of its axes are the channels is asked when they are read. Raises ValueError."""
    pixels = np.load(file, allow_pickle=False)
    if pixels.ndim not in (2, 3) or not pixels.size:
        raise ValueError(f'it is an array of {describe_shape(pixels)}, and an image has 2 or 3 axes')
    if pixels.ndim == 2:
        return ArrayImage(to_native_type(pixels[None]), 'array', fp=file)
    image = ArrayImage(to_native_type(pixels), 'NPY', fp=file)
    with contextlib.suppress(ValueError):
        image.height, image.width = to_channels_first(image.pixels, 'auto').shape[1:]
        image.size = image.width, image.height
    return image


def to_channels_first(pixels, axes):
    """C x H x W of an .npy file's three axes. axes: auto, hwc or chw. Raises ValueError where auto cannot tell."""
    axes = axes if axes != 'auto' else guess_axis_order(pixels.shape)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)) if axes == 'hwc' else pixels


def guess_axis_order(sides):
    """'chw' or 'hwc' of an array's three sides: the channels are the end that may be some and is less than both other
    sides, where the other end may not. Raises ValueError where that does not tell."""
    first, middle, last = sides
    may_be_first, may_be_last = first <= MAX_CHANNELS, last <= MAX_CHANNELS
    if may_be_first != may_be_last and min(first, last) < middle:
        return 'chw' if may_be_first else 'hwc'
    raise ValueError(
        f'it is an array of {first} x {middle} x {last}, and it is unclear which of these are the channels: '
        '`npy_axes=hwc` or `npy_axes=chw` says it'
    )


def describe_shape(array):
    return ' x '.join(map(str, array.shape)) or 'one number'


def open_tiff(file):
    """A TIFF file (of bytes) by tifffile: its first series, whose bands or pages are the channels. Raises ValueError,
    and whatever tifffile does."""
    import tifffile

    with tifffile.TiffFile(file) as tiff:
        series, page = tiff.series[0], tiff.pages[0]
        axes, pixels = series.axes, series.asarray()
        alpha = page.samplesperpixel == 4 and page.extrasamples[:1] in ((1,), (2,))
        rgb = page.photometric == tifffile.PHOTOMETRIC.RGB and (page.samplesperpixel == 3 or alpha)
        white_is_zero = page.photometric == tifffile.PHOTOMETRIC.MINISWHITE
        orientation = int(page.tags.valueof(274, default=1))
        note = f'the first of {len(tiff.series)} sets of pages' if len(tiff.series) > 1 else ''
        note = 'transparency (the last channel) left out' if rgb and alpha else note
    bands = sorted((axis for axis in axes if axis not in 'YX'), key='SC'.find, reverse=True)  # C, then S, then others
    for other in bands[1:]:
        note = f'the first of {pixels.shape[axes.index(other)]} along the axis {other}'  # slices, times, pages
        pixels, axes = pixels.take(0, axes.index(other)), axes.replace(other, '', 1)
    bands = bands[:1]
    if sorted(axes.replace(bands[0], '') if bands else axes) != ['X', 'Y']:
        raise ValueError(f'its axes are {axes}')
    pixels = pixels.transpose([axes.index(axis) for axis in [*bands, 'Y', 'X']])
    pixels = to_native_type(pixels if bands else pixels[None])
    if white_is_zero and pixels.dtype.kind == 'u':
        pixels = np.iinfo(pixels.dtype).max - pixels
    image = ArrayImage(pixels, 'TIFF', rgb, note, file)
    image.orientation = orientation
    return image


def open_dicom(file):
    """A DICOM file (of bytes) by pydicom: rescaled (slope and intercept), black at its smallest value. Raises
    ValueError, and whatever pydicom does."""
    import pydicom
    from pydicom.pixels import convert_color_space

    dataset = pydicom.dcmread(file)
    if 'PixelData' not in dataset and 'FloatPixelData' not in dataset and 'DoubleFloatPixelData' not in dataset:
        raise ValueError('it holds no image')
    pixels, photometric = dataset.pixel_array, str(dataset.get('PhotometricInterpretation', ''))
    frames = int(dataset.get('NumberOfFrames') or 1)
    if frames > 1:
        pixels = pixels[0]
    note = f'the first of {frames} frames' if frames > 1 else ''
    if photometric.startswith('YBR_FULL'):
        pixels = convert_color_space(pixels, photometric, 'RGB')
    if photometric == 'PALETTE COLOR':
        pixels = pydicom.pixels.apply_color_lut(pixels, dataset)
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    slope, intercept = float(dataset.get('RescaleSlope', 1) or 1), float(dataset.get('RescaleIntercept', 0) or 0)
    pixels = apply_rescale(pixels, slope, intercept)
    if int(dataset.get('BitsStored', 8)) == 1:
        pixels = pixels * np.uint8(255)
    elif photometric == 'MONOCHROME1' and pixels.dtype == np.uint8:
        pixels = np.uint8(2 ** int(dataset.BitsStored) - 1) - pixels
    elif photometric == 'MONOCHROME1':  # its smallest value is white
        bits, signed = int(dataset.BitsStored), int(dataset.get('PixelRepresentation', 0))
        ends = np.array([-(2 ** (bits - 1)), 2 ** (bits - 1) - 1] if signed else [0, 2**bits - 1])
        pixels = smallest_type((ends * slope + intercept).sum() - pixels.astype(np.float64))
    return ArrayImage(to_native_type(pixels), 'DICOM', len(pixels) == 3, note, file)


def apply_rescale(pixels, slope, intercept):
    """slope x pixels + intercept, in whole numbers where it gives some."""
    return pixels if (slope, intercept) == (1, 0) else smallest_type(pixels.astype(np.float64) * slope + intercept)


def smallest_type(values):
    """float64 values as the smallest signed type that holds them as they are, else float32."""
    if (values == np.rint(values)).all():
        for kind in (np.int16, np.int32):
            if np.iinfo(kind).min <= values.min() and values.max() <= np.iinfo(kind).max:
                return values.astype(kind)
    return values.astype(np.float32)


def read_channels(image, npy_axes='auto'):
    """All channels of an opened image, C x H x W, in the type of its file; of Pillow's not upright yet. Raises
    ValueError where the channels of an .npy file are not to be told."""
    if isinstance(image, ArrayImage):
        return to_channels_first(image.pixels, npy_axes) if image.format == 'NPY' else image.pixels
    if is_16_bit_png(image):
        return read_16_bit_png(image)
    if image.mode in ('P', 'PA'):
        image = image.convert('RGBA' if 'transparency' in image.info or image.mode == 'PA' else 'RGB')
    pixels = np.asarray(image)
    tags = getattr(image, 'tag_v2', None)
    if pixels.dtype == np.int32 and tags is not None and tags.get(339, (1,)) == (1,):
        pixels = pixels.view(np.uint32)  # Pillow takes a TIFF's unsigned 32 bits for signed ones
    return to_native_type(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def is_16_bit_png(image):
    """Whether Pillow would make 8 bits of 16: of a PNG that is not gray."""
    tile = getattr(image, 'tile', None)
    return image.format == 'PNG' and bool(tile) and str(tile[0][3]).endswith(PNG_16_BIT) and len(image.getbands()) > 1


def read_16_bit_png(image):
    """A PNG of 16 bits a channel. Raises ValueError where there is no decoder for it."""
    if decode_png is None:
        raise ValueError('colors of 16 bits in a PNG: pip3 install torchcodec reads them')
    image.fp.seek(0)
    return decode_png(torch.frombuffer(bytearray(image.fp.read()), dtype=torch.uint8)).numpy()


def read_bytes(source):
    """A file of the bytes of `source`, a path or a file of bytes."""
    if isinstance(source, io.BytesIO):
        source.seek(0)
        return source
    with open(source, 'rb') as file:
        return io.BytesIO(file.read())
