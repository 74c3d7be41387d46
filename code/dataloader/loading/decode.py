"""One image: which files are images, how one is opened, and how it becomes RGB, whatever it is opened as."""

import contextlib
import functools
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

MAX_PIXELS = 10**8  # more is refused: a small file can unpack to any number
warnings.filterwarnings('ignore', category=Image.DecompressionBombWarning)  # ours is the stricter limit
warnings.filterwarnings('ignore', module=r'PIL\.')  # what Pillow thinks of damaged metadata; errors are errors
logging.getLogger('PIL').addHandler(logging.NullHandler())  # it also says those, and they are raised
# Formats that Pillow recognises and cannot read itself: films, and what it would start Ghostscript for.
UNSUPPORTED_FORMATS = ('MPEG', 'EPS')
BITS = 258  # TIFF's tag: of each channel
# Formats that are read where a package is installed: its name, and what pip calls it.
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
    """The endings of the files that can be opened, lower case, as bytes: {b'.jpg', b'.avif', b'.npy', b'.dcm', ...}."""
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
    """What pip3 installs to read files with one of these endings, in words; '' where that is nothing."""
    packages = {pip for ending, (package, pip) in PACKAGES.items() if ending in endings and not find_spec(package)}
    return f'; pip3 install {" ".join(sorted(packages))} reads more of them' if packages else ''


def is_image(name):
    """Whether a file of this name (bytes) counts as an image."""
    dot = name.rfind(b'.')
    return dot > 0 and name[dot:].lower() in image_extensions()


@contextlib.contextmanager
def open_image(source, name):
    """An image as PIL opens it, its pixels not read yet: rgb and arrays.read_channels do.

    source: a path, or a file of bytes; name: of the image. Raises WorkError with its name where it cannot be opened, as
    they do where it cannot be read.
    """
    with wrap_pillow_errors(name):
        image = open_by_format(source, os.fsdecode(name))
    with image:
        if image.width * image.height > MAX_PIXELS:
            raise WorkError(
                f'cannot read the image {printable(name)}: it has {image.width} x {image.height} pixels, more '
                f'than {MAX_PIXELS:,}'
            )
        image.named = name
        yield image


def open_by_format(source, name):
    """An image of Pillow's, its pixels not read yet, or an arrays.ArrayImage. name: whose ending tells the format."""
    image_extensions()  # registers the readers that Pillow does not bring
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
        image.note = lost and f'{lost}, for tifffile is not installed (pip3 install tifffile)'
        return image
    try:
        found = arrays.open_tiff(arrays.read_bytes(source))
    except Exception:  # tifffile reads some compressions with other packages alone
        if lost:
            raise
        return image
    image.close()
    return found


def sniff_ending(source):
    """The ending that a file without one would have, by its first bytes; '' of one that Pillow knows. source: a path,
    or a file of bytes."""
    head = arrays.read_bytes(source).read(132)
    if head.startswith(b'\x93NUMPY'):
        return '.npy'
    if head[128:] == b'DICM':
        return '.dcm'
    return '.tif' if head[:4] in (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+') else ''


def describe_tiff_loss(image):
    """What Pillow leaves out of an opened TIFF, or mistakes, in a few words; '' where it is nothing."""
    if image.format != 'TIFF':
        return ''
    tags = image.tag_v2
    samples, bits, photometric = tags.get(277, 1), max(tags.get(BITS, (8,))), tags.get(262, 1)
    if bits > 8 and tags.prefix == b'MM' and tags.get(259, 1) != 1:
        return 'its order of bytes is mistaken'
    if samples > 1 and bits > 8:
        return 'channels of more than 8 bits become 8, or are not read'
    colors = {0: 1, 1: 1, 2: 3}.get(photometric, samples)
    if samples > colors and not (samples == colors + 1 and tags.get(338, (0,))[0] in (1, 2)):
        return f'some of {samples} channels are not read'  # beyond the colors and their transparency
    if samples == 1 and photometric in (0, 1) and getattr(image, 'n_frames', 1) > 1:
        return 'the first of several pages is taken'
    return ''


@contextlib.contextmanager
def wrap_pillow_errors(name):
    """What Pillow raises on the bytes of a file as a WorkError with its name. Only for calls of Pillow that read: what
    goes wrong elsewhere is no fault of the file."""
    try:
        yield
    except WorkError:
        raise
    except MemoryError:
        raise WorkError(f'cannot read the image {printable(name)}: it takes more memory than there is') from None
    except Exception as error:  # Pillow's plugins raise anything on damaged bytes: struct.error, KeyError, EOFError...
        raise WorkError(f'cannot read the image {printable(name)}: {error_text(error)}') from None


def error_text(error):
    """What an exception of Pillow means, in a few words."""
    if isinstance(error, Image.UnidentifiedImageError):
        return 'it is no image that Pillow can read'
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return printable(' '.join(str(error).split())) or type(error).__name__


def rgb(image, levels=None):
    """An opened image of one or three colours in RGB, 8 bits; an animation is its first picture.

    Where a pixel has more than 8 bits, `levels` are those that become black and white (None: 0, and 65535 for integers,
    1 for floats); what lies beyond is cut. PIL would make white of most. Raises WorkError where it cannot be read.
    """
    with wrap_pillow_errors(getattr(image, 'named', 'in memory')):
        return to_rgb(image, levels)


def level_range(levels, dtype):
    """(black, white) of a type, by its name: 0 and 255 for uint8; else `levels`, where they are given, or 0 and 65535
    for integers, 0 and 1 for floats."""
    if dtype == 'uint8':
        return 0.0, 255.0
    return levels or (0.0, 1.0 if dtype.startswith('float') else 65535.0)


def to_rgb(image, levels):
    is_array = isinstance(image, arrays.ArrayImage)
    if is_array or image.mode.startswith('I') or image.mode == 'F' or arrays.is_16_bit_png(image):
        pixels = arrays.read_channels(image)
        pixels = pixels[:1] if len(pixels) < 3 else pixels[:3]
        if is_array and len(image.pixels) > 1 and not image.rgb:
            raise ValueError(
                f'it has {len(pixels)} channels, which are not red, green and blue; `channels=1,2,3` picks some'
            )
        black, white = level_range(levels, pixels.dtype.name)
        if pixels.dtype != np.uint8:
            pixels = np.nan_to_num(pixels.astype(np.float32)).clip(black, white)
            pixels = ((pixels - black) / (white - black) * 255).round().astype(np.uint8)
        image = Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    elif image.mode == 'P' and 'transparency' in image.info:
        image = image.convert('RGBA')
    elif image.mode == 'LAB':
        from PIL import ImageCms  # not in every build of Pillow

        return ImageCms.profileToProfile(
            image, ImageCms.createProfile('LAB'), ImageCms.createProfile('sRGB'), outputMode='RGB'
        )
    return image.convert('RGB')


ORIENTATION = 274  # EXIF's tag: how a picture is to be turned to stand upright
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def turn_upright(x, turn):
    """A tensor, ... x H x W, turned as Pillow's transpose does. turn: of TURNS."""
    x = x.transpose(-1, -2) if turn in (TURNS[5], TURNS[6], TURNS[7], TURNS[8]) else x
    axes = {TURNS[2]: (-1,), TURNS[3]: (-1, -2), TURNS[4]: (-2,), TURNS[6]: (-1,), TURNS[7]: (-1, -2), TURNS[8]: (-2,)}
    return x.flip(axes[turn]) if turn in axes else x


def exif_transpose_method(image):
    """How an opened image is turned to stand upright, of TURNS; None where it does. Pillow turns a TIFF itself."""
    if isinstance(image, arrays.ArrayImage):
        return TURNS.get(image.orientation)
    if image.format == 'TIFF':
        return None
    try:
        return TURNS.get(image.getexif().get(ORIENTATION))
    except Exception:  # damaged EXIF is no orientation
        return None


def stored_and_upright_size(image):
    """((width, height) as the file has it, (width, height) upright) of an opened image."""
    stored = image.size
    if image.format == 'TIFF' and not isinstance(image, arrays.ArrayImage):  # Pillow turns it as it opens or loads it
        stored = image.tag_v2[256], image.tag_v2[257]
        return stored, stored[::-1] if image.tag_v2.get(ORIENTATION, 1) in (5, 6, 7, 8) else stored
    turned = exif_transpose_method(image) in (TURNS[5], TURNS[6], TURNS[7], TURNS[8])
    return stored, stored[::-1] if turned else stored


def draft_downscale(image, factor):
    """Let the JPEG decoder leave out detail that a resize by `factor` would: half of the factor at the most.

    Returns the pixels of the image that one of the shrunk image stands for, along each side: 1, 2, 4 or 8. The last of
    a row or column may stand for fewer: an odd side is rounded up.
    """
    spare = max((f for f in (8, 4, 2) if f <= factor / 2), default=1)
    width = image.width
    if spare > 1 and (drafted := image.draft('RGB', (image.width // spare, image.height // spare))):
        return round(width / drafted[1][2])
    return 1


def decode(source, name=None, min_side=None, levels=None, upright=False):
    """A file as a PIL image in RGB.

    min_side: the side that the image is wanted with at least; a JPEG is then decoded to 1/2, 1/4 or 1/8 of its sides,
    as long as the shorter one stays twice as long. levels: of rgb. upright: turned as its EXIF says. Raises WorkError
    where it cannot be read.
    """
    with open_image(source, name or source) as image:
        if min_side:
            draft_downscale(image, min(image.size) / min_side)
        turn = exif_transpose_method(image) if upright else None
        image = rgb(image, levels)
        return image if turn is None else image.transpose(turn)


def to_uint8_tensor(image, levels=None):
    """An opened image in RGB as 3 x H x W uint8.

    A whole JPEG goes through image_decoders: the same library and the same pixels as PIL's, without two copies.
    """
    if decode_jpeg and image.format == 'JPEG' and image.mode in ('RGB', 'L') and not image.decoderconfig:  # not shrunk
        image.fp.seek(0)
        with contextlib.suppress(RuntimeError):  # a damaged file: PIL says what is wrong with it
            return decode_jpeg(torch.frombuffer(bytearray(image.fp.read()), dtype=torch.uint8))
    return torch.from_numpy(np.array(rgb(image, levels))).permute(2, 0, 1)
