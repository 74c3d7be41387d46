"""Decoded images that are kept: small ones whole in memory, large ones resized in a memory-mapped file.

A cache file knows the names, sizes and times of the files it was made from; it is made again when one has changed.
"""

import functools
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image

from config import UserError, WorkError, path_of
from dataloader.files import decode
from logger import progress, say
from utils import cpu_count, write_aside

SMALL_SIDE, MEMORY_BYTES = 96, 4 * 2**30  # held without being asked: images up to this side (px), sets up to this size


def hold_in_memory(args, folder, files):
    """The images of `files` as N x 3 x H x W uint8, where --cache_images says so; else None.

    auto: all are of one size, up to SMALL_SIDE pixels, and fit. on: all are of one size. Raises UserError where `on`
    cannot be, WorkError naming the first file that cannot be read, and how many there are.
    """
    if args.cache_images == 'off':
        return None
    try:
        width, height = decode(folder / files[0]).size
    except WorkError:
        width = height = 1  # whatever else is there will tell
    small = max(width, height) <= SMALL_SIDE and len(files) * width * height * 3 <= MEMORY_BYTES
    if not small and args.cache_images == 'auto':
        return None
    path, mark = cache_file(args, folder, files, 'pixels')
    pixels = load(path, mark)
    if pixels is not None:
        return pixels
    images, errors = decode_all(folder, files, f'reading {folder.parent.name}/{folder.name}', keep=True)
    if errors:
        more = f' (and {len(errors) - 1} more; python3 cli.py check_dataloader names all)' if len(errors) > 1 else ''
        raise WorkError(f'{errors[0]}{more}')
    if images is None:
        if args.cache_images == 'on':
            raise UserError(f'--cache_images=on: the images of {folder} differ in size; try --resize_cache=256')
        return None
    pixels = torch.from_numpy(images)
    keep(path, {'mark': mark, 'content': pixels})
    return pixels


def resized(args, folder, files):
    """(a file of pixels, its index N x (offset, height, width)): the images with a shorter side of --resize_cache.

    For resized_image. Built once, with a progress bar; smaller images are kept as they are. Raises WorkError for a file
    that cannot be read.
    """
    path, mark = cache_file(args, folder, files, f'side{args.resize_cache}')
    flat = path.with_name(f'{path.stem}_{mark[:8]}.bin')
    index = load(path, mark)
    if index is None or not flat.is_file() or flat.stat().st_size != index[-1, 0] + 3 * index[-1, 1:].prod():
        sizes = []

        def shrunk(name):
            image = decode(folder / name, least=args.resize_cache)
            scale = args.resize_cache / min(image.size)
            if scale < 1:
                image = image.resize([max(args.resize_cache, round(side * scale)) for side in image.size],
                                     Image.Resampling.BILINEAR)  # fmt: skip
            return np.asarray(image)

        def write(aside):
            with open(aside, 'wb') as file, ThreadPoolExecutor(cpu_count()) as pool:
                title = f'resizing {folder.parent.name}/{folder.name}'
                for image in progress(in_order_of(pool, shrunk, files), title, 'images', len(files)):
                    sizes.append(image.shape[:2])
                    file.write(image.tobytes())

        for outdated in path.parent.glob(f'{path.stem}_*.bin'):
            outdated.unlink()
        write_aside(flat, write)
        sizes = torch.tensor(sizes)
        ends = 3 * sizes.prod(1).cumsum(0)
        index = torch.cat(((ends - 3 * sizes.prod(1))[:, None], sizes), 1)
        write_aside(path, lambda aside: torch.save({'mark': mark, 'content': index}, aside))
    return flat, index


def resized_image(store, row):
    """Image `row` of what `resized` returned: height x width x 3 uint8, read from the disk where it is looked at."""
    flat, index = store
    offset, height, width = index[row].tolist()
    return mapped(flat)[offset : offset + 3 * height * width].reshape(height, width, 3)


@functools.cache
def mapped(path):
    return np.memmap(path, np.uint8, mode='r')


def unreadable(args, folder, files):
    """Those of `files` that cannot be read. All are decoded, once; the names are kept beside the cache, and said."""
    path, mark = cache_file(args, folder, files, 'unreadable')
    bad, named = load(path, mark), path.with_suffix('.txt')
    if bad is None:
        _, errors = decode_all(folder, files, f'checking {folder.parent.name}/{folder.name}', keep=False)
        bad = [error.name for error in errors]
        keep(path, {'mark': mark, 'content': bad})
        write_aside(named, lambda aside: aside.write_text(''.join(f'{error}\n' for error in errors)))
    if bad:
        say(f'{len(bad)} of {len(files)} images of {folder} cannot be read and are left out; they are named in {named}')
    return bad


def cache_file(args, folder, files, kind):
    """(path of the cache of these files, a digest of their names, sizes and times)."""
    digest = hashlib.blake2b(digest_size=16)
    for name in files:
        status = os.stat(folder / name)
        digest.update(f'{name}\0{status.st_size}\0{status.st_mtime_ns}\n'.encode())
    where = hashlib.blake2b(str(folder).encode(), digest_size=4).hexdigest()
    name = f'{folder.parent.name}_{folder.name}_{where}_{kind}.pt'
    return path_of(args.cache_path) / name, digest.hexdigest()


def load(path, mark):
    """The content of a cache file, memory-mapped, if it is whole and of the files that `mark` digests; else None."""
    try:
        kept = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
        return kept['content'] if kept['mark'] == mark else None
    except Exception:  # what the unpickler raises on damaged bytes has no common base; the cache is made again
        return None


def keep(path, content):
    """Write a cache file, or say why not: the run goes on without it."""
    try:
        write_aside(path, lambda aside: torch.save(content, aside))
    except (OSError, RuntimeError) as error:
        say(f'the decoded images are not kept for the next run: {error}')


def decode_all(folder, files, title, keep):
    """Read every file. Returns (N x 3 x H x W uint8 or None, list of WorkErrors).

    keep: keep the images, and stop with (None, []) at the first that has another size than the others.
    """
    kept, errors = None, []

    def read(name):
        try:
            image = decode(folder / name)
            return np.asarray(image).transpose(2, 0, 1) if keep else None
        except WorkError as error:
            error.name = name
            return error

    with ThreadPoolExecutor(cpu_count()) as pool:
        for i, image in enumerate(progress(in_order_of(pool, read, files), title, 'images', len(files))):
            if isinstance(image, WorkError):
                errors.append(image)
            elif keep:
                if kept is None:
                    kept = np.empty((len(files), *image.shape), np.uint8)
                if image.shape != kept.shape[1:]:
                    return None, []
                kept[i] = image
    return kept, errors


def in_order_of(pool, function, items, ahead=256):
    """Results in the order of the items, at most `ahead` of them waiting: large images must not pile up in memory."""
    for start in range(0, len(items), ahead):
        yield from pool.map(function, items[start : start + ahead])
