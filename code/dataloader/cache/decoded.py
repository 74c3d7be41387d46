"""What is done once with all images of a store: held in memory, made smaller on disk, tried."""

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from dataloader.cache import cache_file
from dataloader.loading.arrays import ArrayImage
from dataloader.loading.crops import RGB8, from_float, to_float
from dataloader.loading.decode import draft_downscale, exif_transpose_method, rgb, stored_and_upright_size
from dataloader.loading.pixel_format import to_array
from dataloader.readers.memmap import MemmapReader
from dataloader.readers.memory import Memory
from runtime.atomic_write import atomic_write_on_main
from runtime.console import printable, silence_stderr
from runtime.environment import cpu_count
from runtime.errors import UserError, WorkError
from runtime.messages import log, progress

SMALL_SIDE, MEMORY_BYTES = 96, 4 * 2**30  # held without being asked: images up to this side (px), sets up to this size


def decode_to_memory(store, where, policy, pixel_format, cache_path):
    """A Memory of the store's images, where `policy` (`cache_images`) says so; else None. where: the folder's path.

    auto: all are of one size, up to SMALL_SIDE pixels, and fit. on: all are of one size. Raises UserError where `on`
    cannot be, WorkError naming the first image that cannot be read, and how many there are.
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
    if errors:
        more = f' (and {len(errors) - 1} more; python3 cli.py check_dataloader names all)' if len(errors) > 1 else ''
        raise WorkError(f'{errors[0]}{more}')
    if images is None:
        if policy == 'on':
            raise UserError(
                f'`cache_images=on`: the images of {printable(where)} differ in size; try `cache_short_side=256`'
            )
        return None
    pixels = torch.from_numpy(images)
    cache_file.save(path, {'mark': mark, 'content': pixels})
    return Memory(store.names, pixels, pixel_format.is_rgb8)


def first_image_size(store):
    """Width and height of the first image that can be opened; of none 1 and 1: reading them all will tell why."""
    for row in range(len(store.names)):
        with contextlib.suppress(WorkError), store.opened(row) as image:
            return stored_and_upright_size(image)[1]
    return 1, 1


def build_resized_cache(store, where, side, pixel_format, cache_path):
    """A MemmapReader of the store's images, the shorter side `side` pixels; smaller images are kept as they are.

    Built once, with a progress bar. Raises WorkError for an image that cannot be read.
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
    sizes = []

    def write(aside):
        with open(aside, 'wb') as file, ThreadPoolExecutor(cpu_count()) as pool, silence_stderr():
            rows, title = range(len(store.names)), f'resizing {cache_title(where)}'
            images = ordered_map(pool, lambda row: resize_short_side(store, row, side, pixel_format), rows)
            for image in progress(images, title, 'images', len(rows)):
                sizes.append(image.shape[:2] if pixel_format.is_rgb8 else image.shape[1:])
                file.write(image.tobytes())

    if path.parent.is_dir():
        for other in os.scandir(path.parent):
            if other.name.startswith(f'{path.stem}_') and other.name.endswith('.bin'):
                os.unlink(other.path)  # made from what the images were before
    atomic_write_on_main(flat, write)
    sizes = torch.tensor(sizes)
    ends = count * sizes.prod(1).cumsum(0)
    index = torch.cat(((ends - count * sizes.prod(1))[:, None], sizes), 1)
    atomic_write_on_main(path, lambda aside: torch.save({'mark': mark, 'content': index}, aside))
    return MemmapReader(store.names, flat, index, pixel_format)


def resize_short_side(store, row, side, pixel_format=RGB8):
    """Image `row` with a shorter side of `side` pixels, or as it is where it is smaller: height x width x 3 uint8, or
    channels x height x width of the format's type."""
    with store.opened(row) as image:
        if not pixel_format.is_rgb8:
            return resize_array(to_array(image, pixel_format), side)
        if isinstance(image, ArrayImage):
            return resize_array(to_array(image, pixel_format), side).transpose(1, 2, 0)
        turn = exif_transpose_method(image) if pixel_format.exif else None
        draft_downscale(image, min(image.size) / side)
        image = rgb(image, pixel_format.levels)
        image = image if turn is None else image.transpose(turn)
    scale = side / min(image.size)
    if scale < 1:
        size = [max(side, round(length * scale)) for length in image.size]
        image = image.resize(size, Image.Resampling.BILINEAR)
    return np.asarray(image)


def resize_array(pixels, side):
    """resize_short_side of C x H x W."""
    scale = side / min(pixels.shape[1:])
    if scale >= 1:
        return pixels
    size = [max(side, round(length * scale)) for length in pixels.shape[1:]]
    pixels = torch.from_numpy(pixels)[None]
    return from_float(interpolate(to_float(pixels), size, mode='bilinear', antialias=True), pixels.dtype)[0].numpy()


def readable_rows(store, where, cache_path, pixel_format=RGB8):
    """Row numbers of the images that can be read. All are decoded, once; the others are named in a file, said, and
    tried again each time: it may have been a right, or the disk. Raises WorkError where none can."""
    path, mark = (
        cache_file.cache_file(cache_path, where.parent, where.name, 'unreadable'),
        f'{store.digest()} {pixel_format.key()}',
    )
    unreadable_rows, named = cache_file.load(path, mark), path.with_suffix('.txt')
    before = unreadable_rows
    if unreadable_rows is None or unreadable_rows:
        some = store if unreadable_rows is None else store.select(torch.tensor(unreadable_rows))
        errors = [
            found for found in map_images(some, f'checking {cache_title(where)}', lambda _: None, pixel_format) if found
        ]
        unreadable_rows = [error.row if before is None else before[error.row] for error in errors]
    if unreadable_rows != before:
        cache_file.save(path, {'mark': mark, 'content': unreadable_rows})
    where_named = f'they are named in {named}'
    if unreadable_rows != (before or []):
        text = ''.join(f'{error}\n' for error in errors)
        try:
            atomic_write_on_main(
                named, lambda aside: aside.write_text(text, encoding='utf-8', errors='backslashreplace')
            )
        except OSError as error:
            where_named = f'{printable(named)} cannot be written ({error.strerror}); what would stand there:\n{text}'
    rows = torch.ones(len(store.names), dtype=torch.bool).index_fill_(
        0, torch.tensor(unreadable_rows, dtype=torch.int64), False
    )
    if len(unreadable_rows) == len(rows):
        raise WorkError(f'no image of {printable(where)} can be read')
    if unreadable_rows:
        log(
            f'{len(unreadable_rows)} of {len(store.names)} images of {printable(where)} cannot be read and are left '
            f'out; {where_named}'
        )
    return rows.nonzero()[:, 0]


def decode_all(store, title, pixel_format=RGB8):
    """Read every image. Returns (N x C x H x W of the format's type or None, list of WorkErrors); (None, []) at the
    first image that has another size than the others."""
    kept, errors = None, []
    for row, image in enumerate(map_images(store, title, lambda image: image, pixel_format)):
        if isinstance(image, WorkError):
            errors.append(image)
            continue
        if kept is None:
            kept = np.empty((len(store.names), *image.shape), image.dtype)
        if image.shape != kept.shape[1:]:
            return None, []
        kept[row] = image
    return kept, errors


def map_images(store, title, fn, pixel_format=RGB8):
    """Of each image in turn what `fn` makes of its pixels (pixel_format.to_array), or the WorkError, with its `row`,
    where it cannot be read.

    fn: called in threads.
    """
    rows = range(len(store.names))

    def read(row):
        try:
            with store.opened(row) as image:
                pixels = to_array(image, pixel_format)
        except WorkError as error:
            error.row = row
            return error
        return fn(pixels)

    with ThreadPoolExecutor(cpu_count()) as pool, silence_stderr():
        yield from progress(ordered_map(pool, read, rows), title, 'images', len(rows))


def ordered_map(pool, function, items, ahead=256):
    """Results in the order of the items, at most `ahead` of them waiting: large images must not pile up in memory."""
    for start in range(0, len(items), ahead):
        yield from pool.map(function, items[start : start + ahead])


def cache_title(path):
    return printable(f'{path.parent.name}/{path.name}')
