"""Operations on all images of a reader: decode them into memory, resize them into a cache on disk, find unreadable
ones."""

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from dataloader.cache import cache_file
from dataloader.loading.arrays import is_read_as_array
from dataloader.loading.crops import RGB8, cut_to_levels, from_float
from dataloader.loading.decode import draft_downscale, exif_transpose_method, rgb, skip_hint, stored_and_upright_size
from dataloader.loading.pixel_format import to_array
from dataloader.readers.memmap import MemmapReader
from dataloader.readers.memory import Memory
from runtime.atomic_write import atomic_write_on_main
from runtime.console import printable, silence_stderr
from runtime.environment import cpu_count
from runtime.errors import UserError, WorkError
from runtime.messages import log, progress

AHEAD = 256  # images that are decoded before they are asked for
SMALL_SIDE, MEMORY_BYTES = 96, 4 * 2**30  # `cache_images=auto` decodes images up to this side (px) and total size


def decode_to_memory(store, where, policy, pixel_format, cache_path):
    """Decode all images into a Memory reader if `policy` (`cache_images`) says so, else return None. where: the folder
    of the images.

    auto: if all have one size, up to SMALL_SIDE pixels, and fit. on: if all have one size. Raises UserError if `on` is
    impossible, WorkError for unreadable images.
    """
    if policy == 'off':
        return None
    width, height = first_image_size(store)
    size = len(store.names) * width * height * pixel_format.count * np.dtype(pixel_format.dtype).itemsize
    small = max(width, height) <= SMALL_SIDE and size <= MEMORY_BYTES
    if not small and policy == 'auto':
        return None
    path, mark = (
        cache_file.cache_file(cache_path, where.parent, where.name, 'pixels'),
        f'{store.digest()} {pixel_format.key()}',
    )
    pixels = cache_file.load(path, mark)
    if pixels is not None:
        return Memory(store.names, pixels, pixel_format.is_rgb8)
    images, errors = decode_all(store, f'reading {cache_title(where)}', pixel_format)
    raise_unreadable(errors)
    if images is None:
        if policy == 'on':
            raise UserError(
                f'`cache_images=on`: the images of {printable(where)} differ in size; try `cache_short_side=256`'
            )
        return None
    pixels = torch.from_numpy(images)
    cache_file.save(path, {'mark': mark, 'content': pixels})
    return Memory(store.names, pixels, pixel_format.is_rgb8)


def raise_unreadable(errors):
    """Raise WorkError with the first of some WorkErrors and the number of the others."""
    if errors:
        more = f' (and {len(errors) - 1} more; python3 cli.py check_dataloader names all)' if len(errors) > 1 else ''
        raise WorkError(f'{errors[0]}{more}{skip_hint(errors[0])}')


def first_image_size(store):
    """Return (width, height) of the first readable image, or (1, 1) if there is none; the error is reported later."""
    for row in range(len(store.names)):
        with contextlib.suppress(WorkError), store.open(row) as image:
            return stored_and_upright_size(image)[1]
    return 1, 1


def build_resized_cache(store, where, side, pixel_format, cache_path):
    """Build a cache of the images with a shorter side of `side` pixels, or use an existing one. Returns a MemmapReader.
    Smaller images are not enlarged. Raises WorkError for an unreadable image.
    """
    path, mark = (
        cache_file.cache_file(cache_path, where.parent, where.name, f'side{side}'),
        f'{store.digest()} {pixel_format.key()}',
    )
    flat = path.with_name(f'{path.stem}_{blake2b(mark.encode(), digest_size=4).hexdigest()}.bin')
    index = cache_file.load(path, mark)
    count, item = pixel_format.count, np.dtype(pixel_format.dtype).itemsize
    whole = None if index is None else item * (index[-1, 0] + count * index[-1, 1:].prod())
    if index is not None and flat.is_file() and flat.stat().st_size == whole:
        return MemmapReader(store.names, flat, index, pixel_format)
    sizes, errors = [], []

    def write(aside):
        with open(aside, 'wb') as file:
            resize = lambda row: resize_short_side(store, row, side, pixel_format)  # noqa: E731
            for image in map_rows(len(store.names), f'resizing {cache_title(where)}', resize):
                if isinstance(image, WorkError):
                    errors.append(image)
                elif not errors:  # all are read, so that all unreadable ones are counted
                    sizes.append(image.shape[:2] if pixel_format.is_rgb8 else image.shape[1:])
                    file.write(image.tobytes())
        raise_unreadable(errors)

    if path.parent.is_dir():
        for other in os.scandir(path.parent):
            if other.name.startswith(f'{path.stem}_') and other.name.endswith('.bin'):
                os.unlink(other.path)  # of an earlier state of the images
    atomic_write_on_main(flat, write)
    sizes = torch.tensor(sizes)
    ends = count * sizes.prod(1).cumsum(0)
    index = torch.cat(((ends - count * sizes.prod(1))[:, None], sizes), 1)
    atomic_write_on_main(path, lambda aside: torch.save({'mark': mark, 'content': index}, aside))
    return MemmapReader(store.names, flat, index, pixel_format)


def resize_short_side(store, row, side, pixel_format=RGB8):
    """Decode image `row` and resize its shorter side to `side` pixels, if it is larger. Returns H x W x 3 uint8, or
    C x H x W of the format's type."""
    with store.open(row) as image:
        if not pixel_format.is_rgb8:
            return resize_array(to_array(image, pixel_format), side, pixel_format.levels)
        if is_read_as_array(image):
            return resize_array(to_array(image, pixel_format), side, pixel_format.levels).transpose(1, 2, 0)
        turn = exif_transpose_method(image) if pixel_format.exif else None
        draft_downscale(image, min(image.size) / side)
        image = rgb(image, pixel_format.levels)
        image = image if turn is None else image.transpose(turn)
    scale = side / min(image.size)
    if scale < 1:
        size = [max(side, round(length * scale)) for length in image.size]
        image = image.resize(size, Image.Resampling.BILINEAR)
    return np.asarray(image)


def resize_array(pixels, side, levels):
    """resize_short_side for an array, C x H x W. levels: see cut_to_levels."""
    scale = side / min(pixels.shape[1:])
    if scale >= 1:
        return pixels
    size = [max(side, round(length * scale)) for length in pixels.shape[1:]]
    pixels = torch.from_numpy(pixels)[None]
    return from_float(
        interpolate(cut_to_levels(pixels, levels)[0], size, mode='bilinear', antialias=True), pixels.dtype
    )[0].numpy()


def readable_rows(store, where, cache_path, pixel_format=RGB8):
    """Return the row numbers of the readable images. The first call decodes all; later ones retry the unreadable ones,
    whose cause may be gone. They are listed in a file and logged. Raises WorkError if no image is readable."""
    path, mark = (
        cache_file.cache_file(cache_path, where.parent, where.name, 'unreadable'),
        f'{store.digest()} {pixel_format.key()}',
    )
    unreadable_rows, named = cache_file.load(path, mark), path.with_suffix('.txt')
    previous = unreadable_rows
    if unreadable_rows is None or unreadable_rows:
        some = store if unreadable_rows is None else store.select(torch.tensor(unreadable_rows))
        errors = [
            failure
            for failure in map_images(some, f'checking {cache_title(where)}', lambda _: None, pixel_format)
            if failure
        ]
        unreadable_rows = [error.row if previous is None else previous[error.row] for error in errors]
    if unreadable_rows != previous:
        cache_file.save(path, {'mark': mark, 'content': unreadable_rows})
    where_listed = f'they are named in {named}'
    if unreadable_rows != (previous or []):
        text = ''.join(f'{error}\n' for error in errors)
        try:
            atomic_write_on_main(
                named, lambda aside: aside.write_text(text, encoding='utf-8', errors='backslashreplace')
            )
        except OSError as error:
            where_listed = f'{printable(named)} cannot be written ({error.strerror}); its content would be:\n{text}'
    rows = torch.ones(len(store.names), dtype=torch.bool).index_fill_(
        0, torch.tensor(unreadable_rows, dtype=torch.int64), False
    )
    if len(unreadable_rows) == len(rows):
        raise WorkError(f'no image of {printable(where)} can be read')
    if unreadable_rows:
        log(
            f'{len(unreadable_rows)} of {len(store.names)} images of {printable(where)} cannot be read and are left '
            f'out; {where_listed}'
        )
    return rows.nonzero()[:, 0]


def decode_all(store, title, pixel_format=RGB8):
    """Decode every image. Returns (N x C x H x W of the format's type, or None; list of WorkErrors). Returns (None, [])
    if sizes differ."""
    images, errors = None, []
    for row, image in enumerate(map_images(store, title, lambda image: image, pixel_format)):
        if isinstance(image, WorkError):
            errors.append(image)
            continue
        if images is None:
            images = np.empty((len(store.names), *image.shape), image.dtype)
        if image.shape != images.shape[1:]:
            return None, []
        images[row] = image
    return images, errors


def map_images(store, title, fn, pixel_format=RGB8):
    """Yield fn(pixels) for each image in order; pixels: from pixel_format.to_array. See map_rows."""

    def read(row):
        with store.open(row) as image:
            pixels = to_array(image, pixel_format)
        return fn(pixels)

    yield from map_rows(len(store.names), title, read)


def map_rows(count, title, read):
    """Yield read(row) for the row numbers 0 to count - 1, in order. For an unreadable image it yields the WorkError,
    with its row number as `row`. read is called in threads."""

    def attempt(row):
        try:
            return read(row)
        except WorkError as error:
            error.row = row
            return error

    with ThreadPoolExecutor(cpu_count()) as pool, silence_stderr():
        yield from progress(ordered_map(pool, attempt, range(count)), title, 'images', count)


def ordered_map(pool, function, items):
    """Yield function(item) in the order of the items, with at most AHEAD results in memory."""
    for start in range(0, len(items), AHEAD):
        yield from pool.map(function, items[start : start + AHEAD])


def cache_title(path):
    return printable(f'{path.parent.name}/{path.name}')
