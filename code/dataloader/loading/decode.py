"""One image: which files are images, and how one becomes RGB, whatever Pillow opens it as."""

import contextlib
import functools
import logging
import warnings

import numpy as np
import torch
from PIL import Image, ImageFile

from runtime.console import printable
from runtime.errors import WorkError

try:  # torchvision 0.29 announces that its decoders will go; PIL's takes a third longer and is always there
    from torchvision.io import ImageReadMode, decode_jpeg

    warnings.filterwarnings('ignore', message='The image decoding and encoding capabilities', module='torchvision.io')
except ImportError:
    decode_jpeg = None

MAX_PIXELS = 10**8  # more is refused: a small file can unpack to any number
warnings.filterwarnings('ignore', category=Image.DecompressionBombWarning)  # ours is the stricter limit
warnings.filterwarnings('ignore', module=r'PIL\.')  # what Pillow thinks of damaged metadata; errors are errors
logging.getLogger('PIL').addHandler(logging.NullHandler())  # it also says those, and they are raised
# Formats that Pillow recognises and cannot read itself: films, and what it would start Ghostscript for.
UNSUPPORTED_FORMATS = ('MPEG', 'EPS')
SAMPLE_FORMAT = 339  # TIFF's tag: 1 or none for unsigned numbers
WHITE_LEVEL = {'I': 65535.0, 'F': 1.0}  # the largest value of a kind of pixel, unless `white_level` says another


@functools.cache
def extensions():
    """The endings of the files that Pillow can open, lower case, as bytes: {b'.jpg', b'.jfif', b'.avif', ...}."""
    Image.init()
    stubs = {
        name
        for name, (factory, _) in Image.OPEN.items()
        if isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile)
    }
    left_out = stubs.union(UNSUPPORTED_FORMATS)
    return frozenset(
        ending.encode()
        for ending, name in Image.registered_extensions().items()
        if (name in Image.OPEN or name == 'MPO') and name not in left_out  # MPO is opened as a JPEG
    )


def is_image(name):
    """Whether a file of this name (bytes) counts as an image."""
    dot = name.rfind(b'.')
    return dot > 0 and name[dot:].lower() in extensions()


@contextlib.contextmanager
def open_image(source, name):
    """An image as PIL opens it, its pixels not read yet: rgb and mean_std_text do.

    source: a path, or a file of bytes; name: of the image. Raises WorkError with its name where it cannot be opened, as
    rgb and mean_std_text do where it cannot be read.
    """
    with wrap_pillow_errors(name):
        image = Image.open(source)
    with image:
        if image.width * image.height > MAX_PIXELS:
            raise WorkError(
                f'cannot read the image {printable(name)}: it has {image.width} x {image.height} pixels, more '
                f'than {MAX_PIXELS:,}'
            )
        image.named = name
        yield image


@contextlib.contextmanager
def wrap_pillow_errors(name):
    """What Pillow raises on the bytes of a file as a WorkError with its name. Only for calls of Pillow that read: what
    goes wrong elsewhere is no fault of the file."""
    try:
        yield
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


def rgb(image, white=0.0):
    """An opened image in RGB; an animation is its first picture.

    Where a pixel has more than 8 bits, 0 becomes black and `white` (0: of WHITE_LEVEL, 65535 for 16 and 32 bit
    integers, 1 for floats) becomes white; what lies beyond is cut. PIL would make white of most. Raises WorkError where
    it cannot be read.
    """
    with wrap_pillow_errors(getattr(image, 'named', 'in memory')):
        return to_rgb(image, white)


def to_rgb(image, white):
    kind = 'I' if image.mode.startswith('I') else image.mode
    if kind in WHITE_LEVEL:
        white = white or WHITE_LEVEL[kind]
        levels = np.nan_to_num(raw_values(image).astype(np.float32)).clip(0, white)
        levels = (levels / white * 255).round()
        image = Image.fromarray(levels.astype(np.uint8))
    elif image.mode == 'P' and 'transparency' in image.info:
        image = image.convert('RGBA')
    elif image.mode == 'LAB':
        from PIL import ImageCms  # not in every build of Pillow

        return ImageCms.profileToProfile(
            image, ImageCms.createProfile('LAB'), ImageCms.createProfile('sRGB'), outputMode='RGB'
        )
    return image.convert('RGB')


def raw_values(image):
    """The pixels of an image of more than 8 bits; Pillow takes a TIFF's unsigned 32 bits for signed ones."""
    levels, tags = np.asarray(image), getattr(image, 'tag_v2', None)
    unsigned = tags is not None and tags.get(SAMPLE_FORMAT, (1,)) == (1,)
    return levels.view(np.uint32) if unsigned and levels.dtype == np.int32 else levels


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


def exif_transpose_method(image):
    """How an opened image is turned to stand upright, of TURNS; None where it does. Pillow turns a TIFF itself."""
    if image.format == 'TIFF':
        return None
    try:
        return TURNS.get(image.getexif().get(ORIENTATION))
    except Exception:  # damaged EXIF is no orientation
        return None


def stored_and_upright_size(image):
    """((width, height) as the file has it, (width, height) upright) of an opened image."""
    stored = image.size
    if image.format == 'TIFF' and image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8):  # turned as it is loaded
        return stored, stored[::-1]
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


def decode(source, name=None, min_side=None, white=0.0, upright=False):
    """A file as a PIL image in RGB.

    min_side: the side that the image is wanted with at least; a JPEG is then decoded to 1/2, 1/4 or 1/8 of its sides,
    as long as the shorter one stays twice as long. white: of rgb. upright: turned as its EXIF says. Raises WorkError
    where it cannot be read.
    """
    with open_image(source, name or source) as image:
        if min_side:
            draft_downscale(image, min(image.size) / min_side)
        turn = exif_transpose_method(image) if upright else None
        image = rgb(image, white)
        return image if turn is None else image.transpose(turn)


def to_uint8_tensor(image, white=0.0):
    """An opened image in RGB as 3 x H x W uint8.

    A whole JPEG goes through torchvision's decoder: the same library and the same pixels as PIL's, without two copies.
    """
    if decode_jpeg and image.format == 'JPEG' and image.mode in ('RGB', 'L') and not image.decoderconfig:  # not shrunk
        image.fp.seek(0)
        with contextlib.suppress(RuntimeError):  # a damaged file: PIL says what is wrong with it
            return decode_jpeg(torch.frombuffer(bytearray(image.fp.read()), dtype=torch.uint8), ImageReadMode.RGB)
    return torch.from_numpy(np.array(rgb(image, white))).permute(2, 0, 1)
