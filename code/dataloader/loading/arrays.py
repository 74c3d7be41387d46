"""Images with any number of channels and any type: .npy, TIFF, DICOM; and all channels of Pillow images.

Arrays are channels x height x width, in the type of the file and the machine's byte order.
"""

import contextlib
import io
import struct
import warnings
import zlib

import numpy as np
import torch

from dataloader.loading.image_decoders import decode_png

MAX_CHANNELS = 16  # the largest axis of an .npy file that can be the channels
TYPES = ('uint8', 'int8', 'uint16', 'int16', 'uint32', 'int32', 'float16', 'float32')  # supported types
PNG_16_BIT = ';16B'  # suffix of Pillow's raw mode for 16-bit PNGs


class ArrayImage:
    """An image as an array, with the part of Pillow's interface that is used here. pixels: C x H x W; rgb: whether the
    channels are red, green and blue; note: what is not read of the file, or ''; fp: the file's bytes; orientation: the
    EXIF number."""

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
    """Convert an array to the machine's byte order and one of TYPES. Raises ValueError for other types."""
    if pixels.dtype == bool:
        return pixels.astype(np.uint8) * np.uint8(255)
    if pixels.dtype == np.float64:
        with np.errstate(over='ignore'):  # larger values become inf
            pixels = pixels.astype(np.float32)
    if pixels.dtype.newbyteorder('=').name not in TYPES:
        raise ValueError(f'its type is {pixels.dtype}; supported are {", ".join(TYPES)}')
    return np.ascontiguousarray(pixels.astype(pixels.dtype.newbyteorder('='), copy=False))


def open_npy(file):
    """Open an .npy file (BytesIO) as an ArrayImage; read_channels decides which axis has the channels. Raises
    ValueError for arrays that are no images."""
    try:
        pixels = np.load(file, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        if not file.getvalue().startswith(b'\x93NUMPY'):
            raise ValueError('it is not an .npy file') from None
        if 'pickle' in str(error):
            raise ValueError('it holds Python objects, not numbers') from None
        raise
    if not isinstance(pixels, np.ndarray):
        raise ValueError('it is an .npz archive, not an .npy file')
    if not pixels.size:
        raise ValueError(f'it is an array of {describe_shape(pixels)}, without pixels')
    if pixels.ndim not in (2, 3):
        raise ValueError(f'it is an array of {describe_shape(pixels)}, and an image has 2 or 3 axes')
    if pixels.ndim == 2:
        return ArrayImage(to_native_type(pixels[None]), 'array', fp=file)
    image = ArrayImage(to_native_type(pixels), 'NPY', fp=file)
    with contextlib.suppress(ValueError):
        image.height, image.width = to_channels_first(image.pixels, 'auto').shape[1:]
        image.size = image.width, image.height
    return image


def to_channels_first(pixels, axes):
    """Reorder the axes of an .npy array to C x H x W. axes: auto, hwc or chw. Raises ValueError if auto is
    ambiguous."""
    axes = axes if axes != 'auto' else guess_axis_order(pixels.shape)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)) if axes == 'hwc' else pixels


def guess_axis_order(sides):
    """Guess 'chw' or 'hwc' from the three sides of an array: the channels are the first or last axis, at most
    MAX_CHANNELS long, and the other end is longer. Raises ValueError if both or neither end fits."""
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
    """Open a TIFF file (BytesIO) with tifffile as an ArrayImage: the first series, with bands or pages as channels.
    Raises ValueError, and tifffile's exceptions."""
    import tifffile

    with tifffile.TiffFile(file) as tiff:
        series, page = tiff.series[0], tiff.pages[0]
        axes, pixels = series.axes, series.asarray()
        alpha = page.samplesperpixel == 4 and page.extrasamples[:1] in ((1,), (2,))
        rgb = page.photometric == tifffile.PHOTOMETRIC.RGB and (page.samplesperpixel == 3 or alpha)
        white_is_zero = page.photometric == tifffile.PHOTOMETRIC.MINISWHITE
        orientation = int(page.tags.valueof(274, default=1))
        note = f'the first of {len(tiff.series)} sets of pages' if len(tiff.series) > 1 else ''
        notes = [note] * bool(note) + ['transparency (the last channel) left out'] * bool(rgb and alpha)
    bands = sorted((axis for axis in axes if axis not in 'YX'), key='SC'.find, reverse=True)  # C before S before others
    for other in bands[1:]:
        notes.append(f'the first of {pixels.shape[axes.index(other)]} along the axis {other}')  # slices, times, pages
        pixels, axes = pixels.take(0, axes.index(other)), axes.replace(other, '', 1)
    bands = bands[:1]
    if sorted(axes.replace(bands[0], '') if bands else axes) != ['X', 'Y']:
        raise ValueError(f'its axes are {axes}')
    pixels = pixels.transpose([axes.index(axis) for axis in [*bands, 'Y', 'X']])
    pixels = to_native_type(pixels if bands else pixels[None])
    if white_is_zero and pixels.dtype.kind == 'f':
        raise ValueError('its white is zero, which is undefined for floating-point numbers')
    if white_is_zero:
        pixels = np.invert(pixels)  # the largest value becomes the smallest
    image = ArrayImage(pixels, 'TIFF', rgb, ', '.join(notes), file)
    image.orientation = orientation
    return image


def open_dicom(file):
    """Open a DICOM file (BytesIO) with pydicom as an ArrayImage, with rescale slope and intercept applied and
    MONOCHROME1 inverted. Raises ValueError, and pydicom's exceptions."""
    import pydicom

    try:
        dataset = pydicom.dcmread(file)
    except pydicom.errors.InvalidDicomError:
        raise ValueError('it is not a DICOM file') from None
    if 'PixelData' not in dataset and 'FloatPixelData' not in dataset and 'DoubleFloatPixelData' not in dataset:
        raise ValueError('it holds no image')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # about padding and similar; errors are raised
        pixels = pydicom.pixels.pixel_array(dataset, index=0)  # the first frame; of YBR in red, green and blue
    photometric = str(dataset.get('PhotometricInterpretation', ''))
    frames = int(dataset.get('NumberOfFrames') or 1)
    note = f'the first of {frames} frames' if frames > 1 else ''
    if photometric == 'PALETTE COLOR':
        pixels = pydicom.pixels.apply_color_lut(pixels, dataset)
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    inverted = photometric == 'MONOCHROME1' or str(dataset.get('PresentationLUTShape', '')) == 'INVERSE'
    if int(dataset.get('BitsStored') or 8) == 1:
        pixels = pixels * np.uint8(255)
    elif 'ModalityLUTSequence' in dataset:
        pixels = pydicom.pixels.apply_modality_lut(pixels, dataset)
    elif pixels.dtype.kind in 'iu':
        pixels = rescale_dicom(pixels, dataset, inverted)
    elif inverted:
        raise ValueError('its smallest value is white, which is not supported for floating-point numbers')
    return ArrayImage(to_native_type(pixels), 'DICOM', len(pixels) == 3, note, file)


def rescale_dicom(pixels, dataset, inverted):
    """Apply rescale slope and intercept, and invert pixels if the smallest value is white. The type follows from the
    header alone, so that it is the same for all images of a scanner: that of the file without rescaling, int16 or int32
    if slope and intercept are whole numbers, else float32."""
    slope, intercept = find_rescale(dataset)
    bits, signed = int(dataset.BitsStored), int(dataset.get('PixelRepresentation', 0))
    ends = np.array([-(2 ** (bits - 1)), 2 ** (bits - 1) - 1] if signed else [0, 2**bits - 1])
    if (slope, intercept) == (1, 0):
        return (ends.sum() - pixels.astype(np.int64)).astype(pixels.dtype) if inverted else pixels
    values, limits = pixels * np.float64(slope) + intercept, ends * slope + intercept
    values = limits.sum() - values if inverted else values
    if not (slope.is_integer() and intercept.is_integer()):
        return values.astype(np.float32)
    fits = np.iinfo(np.int16).min <= limits.min() and limits.max() <= np.iinfo(np.int16).max
    return values.astype(np.int16 if fits else np.int32)


def find_rescale(dataset):
    """Return (slope, intercept) of a DICOM dataset, also of an enhanced one, whose frames share them."""
    shared = (dataset.get('SharedFunctionalGroupsSequence') or [{}])[0]
    source = (shared.get('PixelValueTransformationSequence') or [dataset])[0]
    return float(source.get('RescaleSlope') or 1), float(source.get('RescaleIntercept') or 0)


def read_channels(image, npy_axes='auto'):
    """Read all channels of an opened image, C x H x W, in the type of its file. EXIF orientation is not applied. Raises
    ValueError if the axes of an .npy file are ambiguous."""
    if isinstance(image, ArrayImage):
        return to_channels_first(image.pixels, npy_axes) if image.format == 'NPY' else image.pixels
    if is_16_bit_png(image):
        return read_16_bit_png(image)
    if image.mode in ('P', 'PA'):
        image = image.convert('RGBA' if 'transparency' in image.info or image.mode == 'PA' else 'RGB')
    pixels = np.asarray(image)
    tags = getattr(image, 'tag_v2', None)
    if pixels.dtype == np.int32 and tags is not None and tags.get(339, (1,)) == (1,):
        pixels = pixels.view(np.uint32)  # Pillow reads unsigned 32-bit TIFFs as signed
    return to_native_type(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def is_read_as_array(image):
    """Whether an opened image is read by read_channels: an ArrayImage, or one of more than 8 bits."""
    return isinstance(image, ArrayImage) or image.mode.startswith('I') or image.mode == 'F' or is_16_bit_png(image)


def read_colors(image, npy_axes='auto'):
    """Read an image of which is_read_as_array holds as red, green and blue or gray: 3 or 1 x H x W, in the type of its
    file. Raises ValueError if its channels are no colors."""
    pixels = read_channels(image, npy_axes)
    if isinstance(image, ArrayImage) and len(pixels) > 1 and not image.rgb:
        raise ValueError(
            f'it has {len(pixels)} channels, and the network takes red, green and blue; a new one with '
            '`channels=1,2,3` takes some'
        )
    return pixels[:1] if len(pixels) < 3 else pixels[:3]


def is_16_bit_png(image):
    """Whether an image is a 16-bit color PNG, which Pillow would convert to 8 bits."""
    tile = getattr(image, 'tile', None)
    return image.format == 'PNG' and bool(tile) and str(tile[0][3]).endswith(PNG_16_BIT) and len(image.getbands()) > 1


def read_16_bit_png(image):
    """Read a 16-bit color PNG. Raises ValueError if no decoder is installed."""
    if decode_png is None:
        raise ValueError('colors of 16 bits in a PNG: pip3 install torchcodec reads them')
    image.fp.seek(0)
    content = image.fp.read()
    check_png(content)
    return decode_png(torch.frombuffer(bytearray(content), dtype=torch.uint8)).numpy()


def check_png(content):
    """Raise ValueError if a PNG is cut short or a checksum is wrong: decoders crash on such pixels."""
    width, height, _, color, _, _, interlaced = struct.unpack('>IIBBBBB', content[16:29])
    row = 1 + width * 2 * {2: 3, 4: 2, 6: 4}.get(color, 1)  # bytes: the filter, then channels of 16 bits
    try:
        pixels = zlib.decompress(read_png_data(content))  # raises if its end or its checksum is wrong
    except zlib.error:
        pixels = b''
    if len(pixels) < (width * height if interlaced else height * row):
        raise ValueError('image file is truncated or damaged')


def read_png_data(content):
    """Return the compressed pixels of a PNG; b'' if it has no end or the checksum of a chunk is wrong."""
    position, data = 8, b''
    while position + 12 <= len(content):
        end = position + 8 + int.from_bytes(content[position : position + 4])
        chunk, checksum = content[position + 4 : end], content[end : end + 4]
        if zlib.crc32(chunk) != int.from_bytes(checksum):
            return b''
        if chunk.startswith(b'IEND'):
            return data
        data += chunk[4:] if chunk.startswith(b'IDAT') else b''
        position = end + 4
    return b''


def read_bytes(source):
    """Return a BytesIO with the content of `source`, a path or a BytesIO."""
    if isinstance(source, io.BytesIO):
        source.seek(0)
        return source
    with open(source, 'rb') as file:
        return io.BytesIO(file.read())
