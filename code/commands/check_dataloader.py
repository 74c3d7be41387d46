"""check_dataloader: read every image, describe the batches, and save a picture of two views."""

import hashlib
import time

import numpy as np
import torch

from ckpt import get_model_ckpt
from dataloader import vision
from dataloader.cache.decoded import map_images
from dataloader.load_dataset import find_split_sources, get_iterator
from dataloader.loading.crops import to_float
from dataloader.loading.decode import level_range
from dataloader.loading.pixel_settings import (
    find_pixel_format,
    resolve_mean_std,
    resolve_pixels,
    sample_pixels,
    warn_pixel_range,
)
from engine.auto_preset import choose_preset
from logger import save_view_grid
from model.weights import is_off_the_shelf
from runtime.checkpoints.pretrained import set_off_the_shelf_options
from runtime.checkpoints.saved_options import set_init_from_defaults
from runtime.console import join_first, printable
from runtime.device import init_device
from runtime.errors import WorkError, resolve_path
from runtime.files import try_writing
from runtime.messages import log, warn
from runtime.options import channel_numbers, replace_args
from runtime.seeding import generator_for
from utils import prepare_batch

SECONDS = 5  # time limit for reading batches of a split


def check_dataloader(args):
    """Log images, classes, batch shape, type, range and images/s of each split, and save a picture of two views.

    Raises WorkError for unreadable files, after logging each, and UserError for an unknown folder layout.
    """
    root = resolve_path(args.image_path)
    init_device(args)
    path = resolve_path(args.log_path) / f'check_dataloader_{root.name[:50]}.png'
    try_writing(path)
    sources = find_split_sources(args)
    args = choose_preset(args, sources)
    args = set_options_of_weights(resolve_pixels(args, sources['train'].store))
    args = resolve_mean_std(args, sources['train'].store)
    unreadable, read = read_and_hash_all(args, sources)
    if unreadable and args.on_unreadable == 'error':
        raise WorkError(
            f'{unreadable} of the {read} images under {printable(root)} cannot be read: replace or delete '
            'them, or --on_unreadable=skip leaves them out'
        )
    iterators = get_iterator(args, sources)
    log(
        f'{printable(root)}, '
        + ('every image was read' if not unreadable else f'{unreadable} of {read} images left out')
    )
    for name, batches in iterators.items():
        if batches is None:
            text = (
                'none'
                if name == 'test'
                else 'none: no kNN in train; evaluate only by --protocol=label_free, transfer or detection'
            )
        elif name == 'test' and batches is iterators['val']:
            text = 'none of its own: it is val'
        else:
            text = describe_loader(args, batches)
        log(f'{name:5}  {text}')
    for line in describe_channels(args, iterators['train'].dataset):
        log(line)
    warn_pixel_range(args, iterators['train'].dataset.store, iterators['train'].dataset.pixel_format)

    images, _ = prepare_batch(args, next(iter(iterators['train'])))
    views = make_views(args, iterators['train'].dataset, images[:16])
    save_view_grid([vision.to_picture(view, args) for view in views], path)
    log(f'the two views of {len(views[0])} images: {printable(path)}')


def set_options_of_weights(args):
    """Set the options that the weights of --init_from set in train. Weights off the shelf are not downloaded. Returns
    args."""
    if not is_off_the_shelf(args.init_from):
        return get_model_ckpt(replace_args(args, ckpt_name=''))[0] if args.init_from else args
    args, _ = set_off_the_shelf_options(args, args.init_from)
    return set_init_from_defaults(args)[0]


def read_and_hash_all(args, sources):
    """Read all images, log unreadable ones, and warn of duplicates within train and of images of train in other splits.
    Returns (number of unreadable images, number of images)."""
    unreadable = read = 0
    trained_on = {}  # digest to the image's name
    for name, source in sorted(sources.items(), key=lambda item: item[0] != 'train'):
        pixel_format = find_pixel_format(args, source.store)
        digests = [*map_images(source.store, f'reading {name}', hash_pixels, pixel_format)]
        for error in [digest for digest in digests if isinstance(digest, WorkError)]:
            digests[error.row] = None
            log(str(error))
            unreadable += 1
        read += len(digests)
        if name == 'train':
            trained_on = {known: row for row, known in enumerate(digests) if known}
            if twice := len([*filter(None, digests)]) - len(trained_on):
                log(f'train  {twice} images have the same pixels as another one of train; select lists near-duplicates')
        elif same := [row for row, known in enumerate(digests) if known in trained_on]:
            other = sources['train'].store.names[trained_on[digests[same[0]]]]
            warn(
                f'{len(same)} of the {len(digests)} images of {name} are in train too, pixel by pixel: accuracy on '
                f'them is overestimated. The first is {printable(source.store.names[same[0]])}, in train '
                f'{printable(other)}'
            )
    return unreadable, read


def hash_pixels(pixels):
    """Return an 8-byte digest of pixels, C x H x W."""
    return hashlib.blake2b(pixels.tobytes(), key=b'%d %d %d' % pixels.shape, digest_size=8).digest()


def describe_loader(args, batches):
    """Describe a split in one line. images/s includes decoding and augmentation."""
    images, first = batches.dataset, None
    num_images, started = 0, time.time()
    for batch in batches:
        batch, _ = prepare_batch(args, batch)
        views = make_views(args, images, batch) if images.views else (eval_view(args, batch),)
        first = first or (batch, views)
        num_images += len(batch)
        if time.time() - started > SECONDS:
            break
    if batch.is_cuda:
        torch.cuda.synchronize(batch.device)
    speed = num_images / (time.time() - started)
    batch, views = first
    classes = describe_classes(images)
    unlabeled = int((images.labels < 0).sum())
    if 0 < unlabeled < len(images):
        classes += f' ({unlabeled} images without)'
    dtype = str(batch.dtype).removeprefix('torch.')
    low, high = (end.item() for end in to_float(batch).aminmax())
    return (
        f'{len(images)} images, {classes}; a batch: {describe_shape(batch)} {dtype} in [{low:g}, {high:g}], '
        f'{len(views)} view{"s" * (len(views) - 1)} of {describe_shape(views[0])} float32 in '
        f'[{views[0].min():.2f}, {views[0].max():.2f}]; {speed:.0f} images/s'
    )


def describe_classes(images):
    """Describe the classes of a split, and name those without images."""
    numbers = {*images.labels.tolist()} - {-1}
    if not numbers:
        return 'no classes'
    if missing := [printable(name) for number, name in enumerate(images.classes) if number not in numbers]:
        return f'{len(numbers)} of {len(images.classes)} classes (none of {join_first(missing)})'
    return f'{len(numbers)} classes'


def describe_channels(args, images):
    """Describe each channel of images that are not 8-bit RGB: range, mean, and shares of black and white. Returns
    lines."""
    if images.pixel_format.is_rgb8:
        return []
    parts = [*sample_pixels(images.store, images.pixel_format)]
    black, white = level_range(images.pixel_format.levels, images.pixel_format.dtype)
    lines = []
    for number, values in enumerate(np.concatenate(parts, 1) if parts else ()):
        channel = (channel_numbers(args.channels) or (1, 2, 3))[number]
        lines.append(
            f'channel {channel}: {values.min():g} to {values.max():g}, mean '
            f'{(values.mean() - black) / (white - black):.4f} between black ({black:g}) and white ({white:g}); '
            f'{(values <= black).mean():.2%} at black or below, {(values >= white).mean():.2%} at white or above'
        )
    return lines


def describe_shape(tensor):
    return ' x '.join(str(side) for side in tensor.shape)


def make_views(args, images, batch):
    return images.make_views(batch, args.augmentation, generator_for(args.random_seed, 'views', 0, 0))


def eval_view(args, images):
    return vision.eval_view(images, args)
