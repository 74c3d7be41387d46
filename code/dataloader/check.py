"""check_dataloader: is every image readable, and what do the batches look like?"""

import time

from config import AUGMENTATIONS, WorkError, path_of
from dataloader import vision
from dataloader.cache import decode_all
from dataloader.files import list_images
from dataloader.load_dataset import get_iterator
from logger import say
from utils import prepare_batch, random_from

SECONDS = 5  # to time the batches of a split for


def check_dataloader(args):
    """Say of each split: images, classes, batch shape, type and range, images/s; save a picture of two views.

    Raises WorkError, after naming each, where files cannot be read; UserError for a folder that is not laid out.
    """
    root, unreadable = path_of(args.image_path), 0
    for name in ('train', 'val', 'test'):
        if (root / name).is_dir():
            _, errors = decode_all(root / name, list_images(root / name), f'reading {name}', keep=False)
            for error in errors:
                say(str(error))
            unreadable += len(errors)
    if unreadable and args.bad_images == 'error':
        raise WorkError(f'{unreadable} of the files under {root} cannot be read: replace or delete them')
    iterators = get_iterator(args)
    say(f'{root}, every image was read')
    for name, batches in iterators.items():
        if batches is None:
            said = 'none' if name == 'test' else 'none: no kNN monitor in train, no evaluate'
        elif name == 'test' and batches is iterators['val']:
            said = 'none of its own: it is val'
        else:
            said = describe(args, batches)
        say(f'{name:5}  {said}')

    images, _ = prepare_batch(args, next(iter(iterators['train'])))
    views = distorted(args, iterators['train'].dataset, images[:16])
    path = path_of(args.log_path) / f'check_dataloader_{root.name}.png'
    path.parent.mkdir(parents=True, exist_ok=True)
    vision.picture([vision.denormalise(view) for view in views], path)
    say(f'the two views of {len(views[0])} images: {path}')


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
    generator, augmentation = random_from(args.random_seed, 'views', 0, 0), AUGMENTATIONS[args.augmentation]
    ready = not images.crops_only
    return vision.random_views(batch, args.image_size, augmentation, args.blur_prob, generator, distorted=ready)


def plain(args, images):
    return vision.plain_view(images, args.image_size, args.crop_ratio)
