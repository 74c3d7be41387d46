"""From images, wherever they lie, to batches.

    get_iterator
        load_splits             which images are there     sources/find.py           -> names, labels, a reader of each
            of_part             kept in memory or smaller  cache/decoded.py          -> another reader (readers/)
        batches                 which image when           loading/sampler.py        -> (index, seed, augmentation)
            Images.read         how one becomes pixels     loading/decode.py, crops  -> its crops, uint8, in a worker
            Images.batch        how pixels become a batch  loading/dataset.py        -> (images, labels)
    Images.random_views         on the device              vision.py                 -> views, float32

Small images of one size are decoded once and held in memory, on the GPU where they fit. Larger ones are decoded in
worker processes, which cut and resize the crops of both views from one decoding. The rest of the augmentation happens
on the device, a batch at a time; where the device is the CPU, the workers share that too.
"""

import unicodedata
from dataclasses import replace

import torch

from dataloader.cache import decoded
from dataloader.loading.dataset import Images
from dataloader.loading.loader import Loader, workers_for
from dataloader.loading.sampler import Keys
from dataloader.readers.memory import Memory
from dataloader.sources import dataset_warnings, demo, find
from dataloader.sources.split_source import hold_out
from dataloader.sources.tar_splits import braced
from dataloader.sources.torchvision_datasets import TORCHVISION, download, torchvision_kind, torchvision_splits
from errors import ROOT, UserError, path_of, same_path
from runtime.console import complain, shown, some
from runtime.device import get_device
from runtime.distributed import in_turn, rank, world
from runtime.files import clear_parts
from runtime.messages import progress, say

LOOKED_AT = 64 * 224**2  # pixels that go through a network at once where none is trained: it holds less than a gigabyte


def get_iterator(args, parts=None):
    """The batches of {'train', 'val', 'test'}: DataLoaders of (images, labels), for utils.prepare_batch.

    train: shuffled, two crops of each image; val and test: in order, every image once; val is None where there is none,
    test is val where there is none. `.dataset` is the split's Images. Raises UserError for what find.py cannot make
    splits of, WorkError for images that cannot be read. parts: of parts_of, where that was asked already.
    """
    splits = load_splits(args, parts)
    train = splits['train']
    if len(train) < args.batch_size:
        size = 2 ** (len(train).bit_length() - 1)
        hint = f'try `batch_size={size}`' if size > 1 else 'two are the fewest that can be told apart'
        raise UserError(
            f'{shown(train.folder)} has {len(train)} images to train on, fewer than a batch of {args.batch_size}: '
            + hint
        )
    iterators = {name: in_order(args, images) for name, images in splits.items() if name != 'train' and images}
    return {
        'train': batches(args, replace(train, views=views_of(args)), shuffled=True),
        'val': iterators.get('val'),
        'test': iterators.get('test', iterators.get('val')),
    }


def views_of(args):
    """Random views of an image that a training step takes. Raises UserError for what makes no sense together."""
    if args.views > 2 and args.symmetric != 'true':
        raise UserError(f'`symmetric={args.symmetric}` is for two views, not `views={args.views}`: leave one out')
    return 4 if args.symmetric == '2x' else args.views


def in_order(args, images):
    """Loader of a split as evaluation wants it: every image once, in order, the centre crop."""
    return batches(args, replace(images, views=0), shuffled=False)


def shuffled_crops(args, images, drop_last, frozen=False):
    """Loader for training with labels: one random resized and perhaps flipped crop of each image (AUGMENTATIONS).
    frozen: they go through a network that is not trained, so many at once as `at_once` says where nothing is dropped.
    """
    args = replace(args, augmentation='crop', blur_prob=0.0, augment_on='device')
    if frozen and not drop_last and world() == 1:  # of several each may have another GPU, and all have one batch
        args.batch_size = max(args.batch_size, at_once(images))
    return batches(args, replace(images, args=args, views=1), shuffled=True, drop_last=drop_last)


def batches(args, images, shuffled, drop_last=None):
    """A DataLoader of `images`; drop_last: by default where they are shuffled (Keys)."""
    drop_last, size = shuffled if drop_last is None else drop_last, args.batch_size
    workers = 0 if images.in_memory() else workers_for(args.num_workers)
    size = size if shuffled else max(size, at_once(images))
    return Loader(
        images,
        workers,
        batch_sampler=Keys(len(images), size, args.random_seed, args.augmentation, shuffled, drop_last),
        pin_memory=get_device(args).type == 'cuda' and not images.on_gpu(),
        persistent_workers=workers > 0 and shuffled,
    )


def at_once(images):
    """How many images that a GPU holds go through a network at once where none is trained, for it is through with a few
    small ones before the next are launched; 0 of images that it does not hold."""
    return min(at_most(images.args), max(1, LOOKED_AT // images.pixels[0, 0].numel())) if images.on_gpu() else 0


def at_most(args):
    """How many views go through a network at once where none is trained."""
    return max(1, LOOKED_AT // args.image_size**2)


def load_splits(args, parts=None):
    """{'train', 'val', 'test'} of args.image_path as Images, decoded where they are small; None where missing.

    Of several processes the first of a machine draws, fetches, indexes and decodes what is kept for the others.
    """
    with in_turn():
        clear_parts(path_of(args.cache_path))
        return splits_of(args, parts or parts_of(args))


def splits_of(args, parts):
    """load_splits, by each process for itself."""
    train, val = parts['train'], parts.get('val')
    # The classes are train's; where train has none, val's: pretraining needs no label.
    classes = train.classes or (val.classes if val else [])
    number = {composed(name): i for i, name in enumerate(classes)}
    if len(number) < len(classes):
        double = next(name for i, name in enumerate(classes) if number[composed(name)] != i)
        raise UserError(
            f'{shown(train.where)} has the class {shown(double)!r} twice, spelled in two ways of Unicode (macOS writes '
            'letters and their accents apart): move the images of one into the other'
        )
    splits = {'train': None, 'val': None, 'test': None}
    for name, part in parts.items():
        own = part.classes if (part.labels >= 0).any() else []
        extra = sorted(name for name in own if composed(name) not in number)
        if extra:
            said = f'{shown(part.where)} has the class {shown(extra[0])!r}, which {shown(train.where)} has not'
            if name != 'test':
                raise UserError(f'{said}: spelled otherwise?')
            say(f'{said}: its images count as without a class')  # test/unknown, as where labels are a secret
        table = torch.tensor([*(number.get(composed(owner), -1) for owner in own), -1])  # the last for -1
        splits[name] = of_part(args, part, table[part.labels], classes)
    if len(train.classes) == 1 and not rank():
        complain('warning', f'{shown(train.where)} has one class, {shown(classes[0])!r}: accuracies say nothing')
    dataset_warnings.warn_of_idle(args, parts, splits['train'])
    return splits


def composed(name):
    """A class's name as it is compared: letters and their accents as one, for macOS writes them apart (NFD) and others
    do not (NFC), and a set may come from both."""
    return unicodedata.normalize('NFC', name)


def parts_of(args):
    """{'train': Part, ...} as `image_path` has them; train's held-out share is val where there is none."""
    root = path_of(args.image_path)
    if args.preset == 'demo' and same_path(root, ROOT / 'data/demo'):
        demo.make_demo(root, lambda jobs: progress(jobs, 'drawing the demo set', 'images'))
    if args.download:
        download(root)
    if kind := torchvision_kind(root):
        return torchvision_splits(root, kind)
    if not root.exists() and not braced(root):
        hint = 'or try the demo: `preset=demo` alone'
        if root.name in TORCHVISION:
            hint = f'or fetch it: `download=True`; {hint}'
        raise UserError(
            f'no images for `preset={args.preset}`: {shown(root)} is not there; lay it out as train/<class>/*.jpg and '
            f'val/<class>/*.jpg in it, point `image_path` at such a folder, {hint}'
        )
    parts = find.find(root, path_of(args.cache_path), progress)
    train = parts['train']
    if 'val' not in parts and train.classes and args.val_fraction:
        train, val = hold_out(train, args.val_fraction)
        if len(val.labels):
            parts = {**parts, 'train': train, 'val': val}
            say(
                f'{shown(root)} has no val: {len(val.labels)} of its {len(train.labels) + len(val.labels)} images are '
                f'held out for it, the same share of every class (`val_fraction={args.val_fraction:g}`)'
            )
    dataset_warnings.say_of(root, parts)
    return parts


def load_whole(args, path):
    """All images of a folder, an archive, a list or one file, without labels: for infer. Raises UserError where there
    are none."""
    with in_turn():
        part = find.whole(path, path_of(args.cache_path), progress)
        dataset_warnings.say_of_part(shown(path.name), part)
        return of_part(args, part, torch.full_like(part.labels, -1), [])


def of_part(args, part, labels, classes):
    """The Images of a Part: held in memory, made smaller on disk, or read when they are needed."""
    store, where, kept = part.store, part.where, path_of(args.cache_path) / part.share
    if args.bad_images == 'skip' and not isinstance(store, Memory):
        rows = decoded.readable(store, where, kept)
        lost = {*labels.tolist()} - {*labels[rows].tolist()} - {-1}
        if lost and not rank():
            names = some([shown(classes[label]) for label in sorted(lost)])
            complain('warning', f'{shown(where)}: no image of the class {names} can be read: it is there no more')
        store, labels = store.select(rows) if len(rows) < len(labels) else store, labels[rows]
    if not isinstance(store, Memory):
        held = decoded.hold_in_memory(store, where, args.cache_images, args.pixel_max, kept)
        if held is None and args.resize_cache:
            held = decoded.resized(store, where, args.resize_cache, args.pixel_max, kept)
        store = held or store
    return make_images(args, where, store, labels, classes)


def make_images(args, folder, store, labels, classes):
    """Images of a store; pixels in memory go to the GPU where they fit."""
    device = get_device(args)
    if isinstance(store, Memory) and device.type == 'cuda' and args.augment_on == 'device':
        free, _ = torch.cuda.mem_get_info(device)
        if store.pixels.nbytes < free / 4:
            store = Memory(store.names, store.pixels.to(device))
    labels = torch.as_tensor(labels, dtype=torch.int64)
    return Images(args, folder, store, labels, classes, crops_only=device.type != 'cpu' and args.augment_on == 'device')


def labelled(images):
    """Those of `images` that have a label (a flat train has none, STL-10's has some)."""
    return select(images, (images.labels >= 0).nonzero()[:, 0])


def select(images, rows):
    """The images of these row numbers (int64), in this order."""
    if len(rows) == len(images) and torch.equal(rows, torch.arange(len(rows))):
        return images
    return replace(images, store=images.store.select(rows), labels=images.labels[rows])
