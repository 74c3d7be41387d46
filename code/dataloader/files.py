"""Image files: which there are in a folder, and one of them decoded."""

import contextlib
import os
import warnings

import numpy as np
import torch
from PIL import Image

from config import UserError, WorkError

try:  # torchvision 0.29 announces that its decoders will go; PIL's takes a third longer and is always there
    from torchvision.io import ImageReadMode, decode_jpeg

    warnings.filterwarnings('ignore', message='The image decoding and encoding capabilities', module='torchvision.io')
except ImportError:
    decode_jpeg = None

MOST_PIXELS = 10**8  # more is refused: a small file can unpack to any number
warnings.filterwarnings('ignore', category=Image.DecompressionBombWarning)  # ours is the stricter limit
EXTENSIONS = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff', '.ppm', '.pgm', '.gif')


def find_images(folder):
    """(files relative to folder, class numbers, class names) of a split; flat: numbers -1 and no names."""
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith('.'))
    files = list_images(folder)
    if not files:
        raise UserError(f'{folder} holds no images ({" ".join(EXTENSIONS)})')
    if not classes:
        return files, [-1] * len(files), []
    number = {name: i for i, name in enumerate(classes)}
    owners = [file.split(os.sep)[0] for file in files]
    for file, owner in zip(files, owners, strict=True):
        if owner not in number:
            raise UserError(f'{folder} has class folders, and beside them the image {file}: move it into a class')
    for name in sorted(set(classes) - set(owners)):
        raise UserError(f'the class folder {folder / name} holds no images: fill or delete it')
    return files, [number[owner] for owner in owners], classes


def list_images(folder):
    """The image files under `folder`, sorted, relative to it; what begins with a dot is left out."""
    files = []
    for where, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith('.')]
        below = os.path.relpath(where, folder)
        files += [
            os.path.normpath(os.path.join(below, name))
            for name in names
            if name.lower().endswith(EXTENSIONS) and not name.startswith('.')
        ]
    return sorted(files)


@contextlib.contextmanager
def opened(path):
    """The image file as PIL opens it, its pixels not read yet. Raises WorkError with its name where it fails."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f'it has {image.width} x {image.height} pixels, more than {MOST_PIXELS:,}')
            yield image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = 'it is not an image' if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise WorkError(f'cannot read the image {path}: {reason}') from None


def decode(path, least=None):
    """A file as a PIL image in RGB.

    least: the side that the image is wanted with at least; a JPEG is then decoded to 1/2, 1/4 or 1/8 of its sides, as
    long as the shorter one stays twice as long. Raises WorkError with the file's name where it cannot be read.
    """
    with opened(path) as image:
        if least:
            shrink(image, min(image.size) / least)
        return rgb(image)


def rgb(image):
    """An opened image in RGB. 16 bits become 8 (PIL would make white of most), an animation is its first picture."""
    if image.mode in ('I', 'F') or image.mode.startswith('I;16'):
        levels = np.asarray(image).astype(np.float32)
        image = Image.fromarray((levels / 257).clip(0, 255).round().astype(np.uint8))
    elif image.mode == 'P' and 'transparency' in image.info:
        image = image.convert('RGBA')
    return image.convert('RGB')


def shrink(image, factor):
    """Let the JPEG decoder leave out detail that a resize by `factor` would: half of the factor at the most."""
    spare = max((f for f in (8, 4, 2) if f <= factor / 2), default=1)
    if spare > 1:
        image.draft('RGB', (image.width // spare, image.height // spare))


def pixels_of(image):
    """An opened image in RGB as 3 x H x W uint8.

    A whole JPEG goes through torchvision's decoder: the same library and the same pixels as PIL's, without two copies.
    """
    if decode_jpeg and image.format == 'JPEG' and image.mode in ('RGB', 'L') and not image.decoderconfig:  # not shrunk
        image.fp.seek(0)
        with contextlib.suppress(RuntimeError):  # a damaged file: PIL says what is wrong with it
            return decode_jpeg(torch.frombuffer(bytearray(image.fp.read()), dtype=torch.uint8), ImageReadMode.RGB)
    return torch.from_numpy(np.array(rgb(image))).permute(2, 0, 1)
