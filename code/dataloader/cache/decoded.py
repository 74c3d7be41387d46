"""What is done once with all images of a store: held in memory, made smaller on disk, tried."""

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b

import numpy as np
import torch
from PIL import Image

from dataloader.cache import cache_file
from dataloader.loading.decode import draft_downscale, rgb
from dataloader.readers.memmap import MemmapReader
from dataloader.readers.memory import Memory
from runtime.atomic_write import atomic_write
from runtime.console import printable, silence_stderr
from runtime.environment import cpu_count
from runtime.errors import UserError, WorkError
from runtime.messages import log, progress

SMALL_SIDE, MEMORY_BYTES = 96, 4 * 2**30  # held without being asked: images up to this side (px), sets up to this size


def decode_to_memory(store, where, policy, white_level, cache_path):
    """A Memory of the store's images, where `policy` (`cache_images`) says so; else None. where: the folder's path.

    auto: all are of one size, up to SMALL_SIDE pixels, and fit. on: all are of one size. Raises UserError where `on`
    cannot be, WorkError naming the first image that cannot be read, and how many there are.
    """
    if policy == 'off':
        return None
    width, height = first_image_size(store)
    small = max(width, height) <= SMALL_SIDE and len(store.names) * width * height * 3 <= MEMORY_BYTES
    if not small and policy == 'auto':
        return None
    path, mark = (
        cache_file.cache_file(cache_path, where.parent, where.name, 'pixels'),
        f'{store.digest()} {white_level:g}',
    )
    pixels = cache_file.load(path, mark)
    if pixels is not None:
        return Memory(store.names, pixels)
    images, errors = decode_all(store, f'reading {cache_title(where)}', white_level)
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
    return Memory(store.names, pixels)


def first_image_size(store):
    """Width and height of the first image that can be opened; of none 1 and 1: reading them all will tell why."""
    for row in range(len(store.names)):
        with contextlib.suppress(WorkError), store.opened(row) as image:
            return image.size
    return 1, 1


def build_resized_cache(store, where, side, white_level, cache_path):
    """A MemmapReader of the store's images, the shorter side `side` pixels; smaller images are kept as they are.

    Built once, with a progress bar. Raises WorkError for an image that cannot be read.
    """
    path, mark = (
        cache_file.cache_file(cache_path, where.parent, where.name, f'side{side}'),
        f'{store.digest()} {white_level:g}',
    )
    flat = path.with_name(f'{path.stem}_{blake2b(mark.encode(), digest_size=4).hexdigest()}.bin')
    index = cache_file.load(path, mark)
    if index is not None and flat.is_file() and flat.stat().st_size == index[-1, 0] + 3 * index[-1, 1:].prod():
        return MemmapReader(store.names, flat, index)
    sizes = []

    def write(aside):
        with open(aside, 'wb') as file, ThreadPoolExecutor(cpu_count()) as pool, silence_stderr():
            rows, title = range(len(store.names)), f'resizing {cache_title(where)}'
            images = ordered_map(pool, lambda row: resize_short_side(store, row, side, white_level), rows)
            for image in progress(images, title, 'images', len(rows)):
                sizes.append(image.shape[:2])
                file.write(image.tobytes())

    if path.parent.is_dir():
        for other in os.scandir(path.parent):
            if other.name.startswith(f'{path.stem}_') and other.name.endswith('.bin'):
                os.unlink(other.path)  # made from what the images were before
    atomic_write(flat, write)
    sizes = torch.tensor(sizes)
    ends = 3 * sizes.prod(1).cumsum(0)
    index = torch.cat(((ends - 3 * sizes.prod(1))[:, None], sizes), 1)
    atomic_write(path, lambda aside: torch.save({'mark': mark, 'content': index}, aside))
    return MemmapReader(store.names, flat, index)


def resize_short_side(store, row, side, white_level=0.0):
    """Image `row` with a shorter side of `side` pixels, or as it is where it is smaller: height x width x 3 uint8."""
    with store.opened(row) as image:
        draft_downscale(image, min(image.size) / side)
        image = rgb(image, white_level)
    scale = side / min(image.size)
    if scale < 1:
        size = [max(side, round(length * scale)) for length in image.size]
        image = image.resize(size, Image.Resampling.BILINEAR)
    return np.asarray(image)


def readable_rows(store, where, cache_path):
    """Row numbers of the images that can be read. All are decoded, once; the others are named in a file, said, and
    tried again each time: it may have been a right, or the disk. Raises WorkError where none can."""
    path, mark = cache_file.cache_file(cache_path, where.parent, where.name, 'unreadable'), store.digest()
    unreadable_rows, named = cache_file.load(path, mark), path.with_suffix('.txt')
    before = unreadable_rows
    if unreadable_rows is None or unreadable_rows:
        some = store if unreadable_rows is None else store.select(torch.tensor(unreadable_rows))
        errors = [found for found in map_images(some, f'checking {cache_title(where)}', lambda _: None) if found]
        unreadable_rows = [error.row if before is None else before[error.row] for error in errors]
    if unreadable_rows != before:
        cache_file.save(path, {'mark': mark, 'content': unreadable_rows})
    where_named = f'they are named in {named}'
    if unreadable_rows != (before or []):
        text = ''.join(f'{error}\n' for error in errors)
        try:
            atomic_write(named, lambda aside: aside.write_text(text, encoding='utf-8', errors='backslashreplace'))
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


def decode_all(store, title, white_level=0.0):
    """Read every image. Returns (N x 3 x H x W uint8 or None, list of WorkErrors); (None, []) at the first image that
    has another size than the others."""
    kept, errors = None, []
    for row, image in enumerate(
        map_images(store, title, lambda image: np.asarray(image).transpose(2, 0, 1), white_level)
    ):
        if isinstance(image, WorkError):
            errors.append(image)
            continue
        if kept is None:
            kept = np.empty((len(store.names), *image.shape), np.uint8)
        if image.shape != kept.shape[1:]:
            return None, []
        kept[row] = image
    return kept, errors


def map_images(store, title, fn, white_level=0.0):
    """Of each image in turn what `fn` makes of it in RGB, or the WorkError, with its `row`, where it cannot be read.

    fn: called in threads.
    """
    rows = range(len(store.names))

    def read(row):
        try:
            with store.opened(row) as image:
                image = rgb(image, white_level)
        except WorkError as error:
            error.row = row
            return error
        return fn(image)

    with ThreadPoolExecutor(cpu_count()) as pool, silence_stderr():
        yield from progress(ordered_map(pool, read, rows), title, 'images', len(rows))


def ordered_map(pool, function, items, ahead=256):
    """Results in the order of the items, at most `ahead` of them waiting: large images must not pile up in memory."""
    for start in range(0, len(items), ahead):
        yield from pool.map(function, items[start : start + ahead])


def cache_title(path):
    return printable(f'{path.parent.name}/{path.name}')
