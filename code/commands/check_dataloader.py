"""check_dataloader: is every image readable, what lies beside the images, and what do the batches look like?"""

import hashlib
import time

import torch

from dataloader import vision
from dataloader.cache.bit_depth import warn_of_range
from dataloader.cache.decoded import each
from dataloader.load_dataset import get_iterator, parts_of
from engine.auto_preset import choose_preset
from errors import WorkError, path_of
from logger import picture
from runtime.console import complain, shown
from runtime.device import use_device
from runtime.files import try_writing
from runtime.messages import say
from runtime.seeding import random_from
from utils import prepare_batch

SECONDS = 5  # to time the batches of a split for


def check_dataloader(args):
    """Say of each split: images, classes, batch shape, type and range, images/s; save a picture of two views.

    Raises WorkError, after naming each, where files cannot be read; UserError for a folder that is not laid out.
    """
    root = path_of(args.image_path)
    use_device(args)
    path = path_of(args.log_path) / f'check_dataloader_{root.name[:50]}.png'
    try_writing(path)
    parts = parts_of(args)
    args = choose_preset(args, parts)
    unreadable, read = read_all(parts)
    if unreadable and args.bad_images == 'error':
        raise WorkError(
            f'{unreadable} of the {read} images under {shown(root)} cannot be read: replace or delete '
            'them, or --bad_images=skip leaves them out'
        )
    iterators = get_iterator(args, parts)
    say(f'{shown(root)}, ' + ('every image was read' if not unreadable else f'{unreadable} of {read} images left out'))
    for name, batches in iterators.items():
        if batches is None:
            said = 'none' if name == 'test' else 'none: no kNN monitor in train, no evaluate'
        elif name == 'test' and batches is iterators['val']:
            said = 'none of its own: it is val'
        else:
            said = describe(args, batches)
        say(f'{name:5}  {said}')
    warn_of_range(iterators['train'].dataset.store, args.pixel_max)

    images, _ = prepare_batch(args, next(iter(iterators['train'])))
    views = distorted(args, iterators['train'].dataset, images[:16])
    picture([vision.denormalise(view, args) for view in views], path)
    say(f'the two views of {len(views[0])} images: {shown(path)}')


def read_all(parts):
    """(images that cannot be read, images), after saying which, and which are there twice."""
    unreadable = read = 0
    trained_on = {}  # digest to the image's name
    for name, part in sorted(parts.items(), key=lambda item: item[0] != 'train'):
        digests = [*each(part.store, f'reading {name}', digest)]
        for error in [found for found in digests if isinstance(found, WorkError)]:
            digests[error.row] = None
            say(str(error))
            unreadable += 1
        read += len(digests)
        if name == 'train':
            trained_on = {known: row for row, known in enumerate(digests) if known}
            if twice := len([*filter(None, digests)]) - len(trained_on):
                say(f'train  {twice} images are there once more: the same pixels in another file')
        elif same := [row for row, known in enumerate(digests) if known in trained_on]:
            other = parts['train'].store.names[trained_on[digests[same[0]]]]
            complain(
                'warning',
                f'{len(same)} of the {len(digests)} images of {name} are in train too, pixel by pixel: what is judged '
                f'on them was learned. The first is {shown(part.store.names[same[0]])}, in train {shown(other)}',
            )
    return unreadable, read


def digest(image):
    """What two images have in common that have the same pixels: 8 bytes."""
    return hashlib.blake2b(image.tobytes(), key=b'%d %d' % image.size, digest_size=8).digest()


def describe(args, batches):
    """One line on a split; the images/s are those of ready views, decoding and augmentation included."""
    images, first = batches.dataset, None
    seen, started = 0, time.time()
    for batch in batches:
        batch, _ = prepare_batch(args, batch)
        views = distorted(args, images, batch) if images.views else (plain(args, batch),)
        first = first or (batch, views)
        seen += len(batch)
        if time.time() - started > SECONDS:
            break
    if batch.is_cuda:
        torch.cuda.synchronize(batch.device)  # what was begun is not yet done
    speed = seen / (time.time() - started)
    batch, views = first
    classes = f'{len(images.classes)} classes' if (images.labels >= 0).any() else 'no classes'
    unlabelled = int((images.labels < 0).sum())
    if 0 < unlabelled < len(images):
        classes += f' ({unlabelled} images without)'
    return (
        f'{len(images)} images, {classes}; a batch: {shape(batch)} uint8 in [{batch.min()}, {batch.max()}], '
        f'{len(views)} view{"s" * (len(views) - 1)} of {shape(views[0])} float32 in '
        f'[{views[0].min():.2f}, {views[0].max():.2f}]; {speed:.0f} images/s'
    )


def shape(tensor):
    return ' x '.join(str(side) for side in tensor.shape)


def distorted(args, images, batch):
    return images.random_views(batch, args.augmentation, random_from(args.random_seed, 'views', 0, 0))


def plain(args, images):
    return vision.plain_view(images, args)
