"""Open and decode one image: file endings, formats, conversion to RGB, EXIF orientation."""

import contextlib
import functools
import io
import logging
import os
import warnings
from importlib.util import find_spec

import numpy as np
import torch
from PIL import Image, ImageFile

from dataloader.loading import arrays
from dataloader.loading.image_decoders import decode_jpeg
from runtime.console import printable
from runtime.errors import WorkError

MAX_PIXELS = 10**8  # larger images are refused: a small file can decompress to any size
warnings.filterwarnings('ignore', category=Image.DecompressionBombWarning)  # MAX_PIXELS is stricter
warnings.filterwarnings('ignore', module=r'PIL\.')  # warnings about damaged metadata; errors are raised
logging.getLogger('PIL').addHandler(logging.NullHandler())  # errors are raised as well
# Formats that Pillow recognizes but cannot decode itself: videos, and EPS, which needs Ghostscript.
UNSUPPORTED_FORMATS = ('MPEG', 'EPS')
BITS = 258  # TIFF tag: bits per channel
# Formats that need a package: {ending: (module, name on PyPI)}.
PACKAGES = {
    '.dcm': ('pydicom', 'pydicom'),
    '.dicom': ('pydicom', 'pydicom'),
    '.heic': ('pillow_heif', 'pillow-heif'),
    '.heif': ('pillow_heif', 'pillow-heif'),
}
logging.getLogger('tifffile').addHandler(logging.NullHandler())
logging.getLogger('pydicom').addHandler(logging.NullHandler())


@functools.cache
def image_extensions():
    """Return the endings of files that can be opened, lower case, as bytes: {b'.jpg', b'.avif', b'.npy', b'.dcm',
    ...}."""
    Image.init()
    if find_spec('pillow_heif'):
        import pillow_heif

        pillow_heif.register_heif_opener()
    stubs = {
        name
        for name, (factory, _) in Image.OPEN.items()
        if isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile)
    }
    left_out = stubs.union(UNSUPPORTED_FORMATS)
    installed = [ending for ending, (package, _) in PACKAGES.items() if find_spec(package)]
    return frozenset((b'.npy', *map(str.encode, installed))) | frozenset(
        ending.encode()
        for ending, name in Image.registered_extensions().items()
        if (name in Image.OPEN or name == 'MPO') and name not in left_out  # MPO is opened as a JPEG
    )


def install_hint(endings):
    """Return a hint with the packages that read files with these endings; '' if there are none."""
    packages = {pip for ending, (package, pip) in PACKAGES.items() if ending in endings and not find_spec(package)}
    return f'; pip3 install {" ".join(sorted(packages))} reads more of them' if packages else ''


def is_image(name):
    """Whether a file with this name (bytes) is an image, by its ending."""
    dot = name.rfind(b'.')
    return dot > 0 and name[dot:].lower() in image_extensions()


@contextlib.contextmanager
def open_image(source, name):
    """Context manager that opens an image without decoding it; rgb and arrays.read_channels decode.

    source: a path or a BytesIO. name: for messages, and its ending gives the format. Raises WorkError with the name if
    it cannot be opened.
    """
    with wrap_pillow_errors(name):
        image = open_by_format(source, os.fsdecode(name))
    with image:
        pixels, sides = image.width * image.height, f'{image.width} x {image.height}'
        if not pixels:  # a damaged header: Pillow opens it all the same
            raise WorkError(f'cannot read the image {printable(name)}: it has {sides} pixels')
        if pixels > MAX_PIXELS:
            raise WorkError(f'cannot read the image {printable(name)}: it has {sides} pixels, more than {MAX_PIXELS:,}')
        image.named = name
        yield image


def open_by_format(source, name):
    """Open an image with Pillow, or as an arrays.ArrayImage. name: its ending gives the format."""
    image_extensions()  # registers pillow-heif
    ending = os.path.splitext(name)[1].lower() or sniff_ending(source)
    if ending == '.npy':
        return arrays.open_npy(arrays.read_bytes(source))
    if ending in ('.dcm', '.dicom'):
        return arrays.open_dicom(arrays.read_bytes(source))
    try:
        image = Image.open(source)
    except Image.UnidentifiedImageError:
        if ending not in ('.tif', '.tiff'):
            raise
        return arrays.open_tiff(arrays.read_bytes(source))
    lost = describe_tiff_loss(image)
    if image.format != 'TIFF' or not (lost or max(image.tag_v2.get(BITS, (8,))) > 8):
        return image
    if not find_spec('tifffile'):
        image.note = lost and f'{lost} without tifffile (pip3 install tifffile)'
        return image
    try:
        array_image = arrays.open_tiff(arrays.read_bytes(source))
    except Exception:  # tifffile needs further packages for some compressions
        if lost:
            raise
        return image
    image.close()
    return array_image


def sniff_ending(source):
    """Return the ending for a file without one, from its first bytes; '' for formats that Pillow recognizes. source: a
    path or a BytesIO."""
    head = read_head(source, 132)
    if head.startswith(b'\x93NUMPY'):
        return '.npy'
    if head[128:] == b'DICM':
        return '.dcm'
    return '.tif' if head[:4] in (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+') else ''


def read_head(source, count):
    """Return the first bytes of a path or a BytesIO."""
    if isinstance(source, io.BytesIO):
        return source.getbuffer()[:count].tobytes()
    with open(source, 'rb') as file:
        return file.read(count)


def describe_tiff_loss(image):
    """Describe what Pillow would not read, or read wrongly, of an opened TIFF; '' if it reads all."""
    if image.format != 'TIFF':
        return ''
    tags = image.tag_v2
    samples, bits, photometric = tags.get(277, 1), max(tags.get(BITS, (8,))), tags.get(262, 1)
    if bits > 8 and tags.prefix == b'MM' and tags.get(259, 1) != 1:
        return 'its byte order is read wrongly'
    if samples > 1 and bits > 8:
        return 'channels of more than 8 bits become 8, or are not read'
    if bits <= 8 and 2 in tags.get(339, ()):
        return 'signed values are read as unsigned'
    colors = {0: 1, 1: 1, 2: 3}.get(photometric, samples)
    if samples > colors and not (samples == colors + 1 and tags.get(338, (0,))[0] in (1, 2)):
        return f'some of {samples} channels are not read'  # more than colors and alpha
    if samples == 1 and photometric in (0, 1) and getattr(image, 'n_frames', 1) > 1:
        return 'the first of several pages is taken'
    return ''


@contextlib.contextmanager
def wrap_pillow_errors(name):
    """Context manager that converts exceptions of Pillow to WorkError with the image's name. Use it only around
    decoding: other exceptions are not the file's fault."""
    try:
        yield
    except WorkError:
        raise
    except MemoryError:
        raise WorkError(f'cannot read the image {printable(name)}: it needs more memory than there is') from None
    except Exception as error:  # Pillow's plugins raise anything on damaged bytes: struct.error, KeyError, EOFError...
        raise WorkError(f'cannot read the image {printable(name)}: {error_text(error)}') from None


def skip_hint(error):
    """Return what helps after a WorkError of an image: '' if the images have other channels, for then all would be left
    out."""
    unreadable = 'cannot read the image' in str(error) and ' channels, but ' not in str(error)
    return '; `on_unreadable=skip` leaves unreadable images out' if unreadable else ''


def error_text(error):
    """Return a short text for an exception of Pillow."""
    if isinstance(error, Image.UnidentifiedImageError):
        return 'it is not an image that Pillow can read'
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return printable(' '.join(str(error).split())) or type(error).__name__


def rgb(image, levels=None):
    """Decode an opened image as an 8-bit RGB PIL image; of an animation the first frame.

    levels: (black, white) for pixels of more than 8 bits (None: 0, and 65535 for integers, 1 for floats); values beyond
    are clamped. (PIL would clamp all above 255.) Raises WorkError if it cannot be decoded.
    """
    with wrap_pillow_errors(getattr(image, 'named', 'in memory')):
        return to_rgb(image, levels)


def level_range(levels, dtype):
    """Return (black, white) of a type: (0, 255) for uint8, else `levels` if given, else (0, 65535) for integers and
    (0, 1) for floats. dtype: its name."""
    if dtype == 'uint8':
        return 0.0, 255.0
    return levels or (0.0, 1.0 if dtype.startswith('float') else 65535.0)


def to_8_bits(pixels, levels):
    """Convert an array of any type to uint8, from black to white; values beyond are clamped, nan becomes black. levels:
    see level_range."""
    if pixels.dtype == np.uint8:
        return pixels
    black, white = level_range(levels, pixels.dtype.name)
    pixels = np.nan_to_num(pixels.astype(np.float32)).clip(black, white)
    return ((pixels - black) / (white - black) * 255).round().astype(np.uint8)


def to_rgb(image, levels):
    """rgb without the conversion of exceptions."""
    if arrays.is_read_as_array(image):
        pixels = arrays.read_colors(image)
        pixels = to_8_bits(pixels, levels)
        image = Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    elif image.mode == 'P' and 'transparency' in image.info:
        image = image.convert('RGBA')
    elif image.mode == 'LAB':
        from PIL import ImageCms  # not in every build of Pillow

        return ImageCms.profileToProfile(
            image, ImageCms.createProfile('LAB'), ImageCms.createProfile('sRGB'), outputMode='RGB'
        )
    return image.convert('RGB')


ORIENTATION = 274  # EXIF tag
TURNS = {  # the transposition that makes an image of each EXIF orientation upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def turn_upright(x, turn):
    """Transpose a tensor, ... x H x W, as Pillow's Image.transpose does. turn: a value of TURNS."""
    x = x.transpose(-1, -2) if turn in (TURNS[5], TURNS[6], TURNS[7], TURNS[8]) else x
    axes = {TURNS[2]: (-1,), TURNS[3]: (-1, -2), TURNS[4]: (-2,), TURNS[6]: (-1,), TURNS[7]: (-1, -2), TURNS[8]: (-2,)}
    return x.flip(axes[turn]) if turn in axes else x


def exif_transpose_method(image):
    """Return the transposition (of TURNS) that makes an opened image upright, or None. Pillow applies it to TIFFs."""
    if isinstance(image, arrays.ArrayImage):
        return TURNS.get(image.orientation)
    if image.format == 'TIFF':
        return None
    try:
        return TURNS.get(image.getexif().get(ORIENTATION))
    except Exception:  # damaged EXIF
        return None


def stored_and_upright_size(image):
    """Return the (width, height) of an opened image as stored, and the (width, height) upright."""
    stored = image.size
    if image.format == 'TIFF' and not isinstance(image, arrays.ArrayImage):  # Pillow applies the orientation
        stored = image.tag_v2[256], image.tag_v2[257]
        return stored, stored[::-1] if image.tag_v2.get(ORIENTATION, 1) in (5, 6, 7, 8) else stored
    turned = exif_transpose_method(image) in (TURNS[5], TURNS[6], TURNS[7], TURNS[8])
    return stored, stored[::-1] if turned else stored


def draft_downscale(image, factor):
    """Let the JPEG decoder downscale an image that will be resized by `factor`, at most to twice the final size.

    Returns the downscaling per side: 1, 2, 4 or 8. Sides are rounded up, so the last row or column may stand for fewer
    pixels.
    """
    spare = max((f for f in (8, 4, 2) if f <= factor / 2), default=1)
    width = image.width
    if spare > 1 and (drafted := image.draft('RGB', (image.width // spare, image.height // spare))):
        return round(width / drafted[1][2])
    return 1


def decode(source, levels=None, upright=False):
    """Decode a file as an RGB PIL image. levels: see rgb. upright: apply EXIF orientation. Raises WorkError if it
    cannot be decoded."""
    with open_image(source, source) as image:
        turn = exif_transpose_method(image) if upright else None
        image = rgb(image, levels)
        return image if turn is None else image.transpose(turn)


def to_uint8_tensor(image, levels=None):
    """Decode an opened image as a 3 x H x W uint8 RGB tensor.

    JPEGs at full size are decoded by image_decoders: the same library and pixels as PIL, with two copies less.
    """
    if decode_jpeg and image.format == 'JPEG' and image.mode in ('RGB', 'L') and not image.decoderconfig:  # full size
        image.fp.seek(0)
        with contextlib.suppress(RuntimeError):  # damaged: PIL gives the better message
            return decode_jpeg(torch.frombuffer(bytearray(image.fp.read()), dtype=torch.uint8))
    return torch.from_numpy(np.array(rgb(image, levels))).permute(2, 0, 1)
