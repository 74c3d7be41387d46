"""From images, wherever they lie, to batches.

    get_iterator
        load_splits           which images are there     sources/find.py           -> names, labels, a reader of each
            build_dataset     kept in memory or smaller  cache/decoded.py          -> another reader (readers/)
        make_loader           which image when           loading/sampler.py        -> (index, seed, augmentation)
    ImageDataset.load_batch   how pixels become a batch  loading/dataset.py        -> (images, labels)
        ImageDataset.read     how one becomes pixels     loading/decode.py, crops  -> its crops, uint8, in a worker
    ImageDataset.make_views   on the device              vision.py                 -> views, float32

Small images of one size are decoded once and held in memory, on the GPU where they fit. Larger ones are decoded in
worker processes, which cut and resize the crops of both views from one decoding. The rest of the augmentation happens
on the device, a batch at a time; where the device is the CPU, the workers share that too.
"""

import unicodedata
from dataclasses import replace

import torch

from dataloader.cache import decoded
from dataloader.loading.crops import RGB8
from dataloader.loading.dataset import ImageDataset
from dataloader.loading.loader import WatchedDataLoader, resolve_num_workers
from dataloader.loading.pixel_settings import find_pixel_format, resolve_mean_std, resolve_pixels
from dataloader.loading.sampler import EpochBatchSampler
from dataloader.readers.memory import Memory
from dataloader.sources import dataset_warnings, demo, find
from dataloader.sources.split_source import stratified_holdout
from dataloader.sources.tar_splits import expand_braces
from dataloader.sources.torchvision_datasets import DATASET_FOLDERS, detect_dataset, download, torchvision_splits
from runtime.console import join_first, print_message, printable
from runtime.device import get_device
from runtime.distributed import local_main_first, rank, world_size
from runtime.errors import ROOT, UserError, resolve_path, same_path
from runtime.files import clear_parts
from runtime.messages import log, progress
from runtime.options import channel_numbers

EVAL_PIXELS_PER_FORWARD = (
    64 * 224**2
)  # pixels that go through a network at once where none is trained: it holds less than a gigabyte


def get_iterator(args, parts=None):
    """The batches of {'train', 'val', 'test'}: DataLoaders of (images, labels), for utils.prepare_batch.

    train: shuffled, two crops of each image; val and test: in order, every image once; val is None where there is none,
    test is val where there is none. `.dataset` is the split's ImageDataset. Raises UserError for what find.py cannot
    make splits of, WorkError for images that cannot be read. parts: of find_split_sources, where that was asked
    already.
    """
    splits = load_splits(args, parts)
    train = splits['train']
    if len(train) < args.batch_size:
        size = 2 ** (len(train).bit_length() - 1)
        hint = f'try `batch_size={size}`' if size > 1 else 'two are the fewest that can be told apart'
        raise UserError(
            f'{printable(train.folder)} has {len(train)} images to train on, fewer than a batch of {args.batch_size}: '
            + hint
        )
    iterators = {name: eval_loader(args, images) for name, images in splits.items() if name != 'train' and images}
    return {
        'train': make_loader(args, replace(train, views=num_views(args)), shuffled=True),
        'val': iterators.get('val'),
        'test': iterators.get('test', iterators.get('val')),
    }


def num_views(args):
    """Random views of an image that a training step takes. Raises UserError for what makes no sense together."""
    if args.num_views > 2 and args.loss_symmetry != 'true':
        raise UserError(
            f'`loss_symmetry={args.loss_symmetry}` is for two views, not `num_views={args.num_views}`: leave one out'
        )
    return 4 if args.loss_symmetry == '2x' else args.num_views


def eval_loader(args, images):
    """Loader of a split as evaluation wants it: every image once, in order, the centre crop."""
    return make_loader(args, replace(images, views=0), shuffled=False)


def supervised_loader(args, images, drop_last, for_frozen_backbone=False):
    """Loader for training with labels: one random resized and perhaps flipped crop of each image (AUGMENTATIONS).
    for_frozen_backbone: they go through a network that is not trained, so many at once as `gpu_eval_batch` says where
    nothing is dropped.
    """
    args = replace(args, augmentation='crop', blur_prob=0.0, augment_backend='device')
    if (
        for_frozen_backbone and not drop_last and world_size() == 1
    ):  # of several each may have another GPU, and all have one batch
        args.batch_size = max(args.batch_size, gpu_eval_batch(images))
    return make_loader(args, replace(images, args=args, views=1), shuffled=True, drop_last=drop_last)


def make_loader(args, images, shuffled, drop_last=None):
    """A DataLoader of `images`; drop_last: by default where they are shuffled (EpochBatchSampler)."""
    drop_last, size = shuffled if drop_last is None else drop_last, args.batch_size
    workers = 0 if images.is_in_memory() else resolve_num_workers(args.num_workers)
    size = size if shuffled else max(size, gpu_eval_batch(images))
    return WatchedDataLoader(
        images,
        workers,
        batch_sampler=EpochBatchSampler(len(images), size, args.random_seed, args.augmentation, shuffled, drop_last),
        pin_memory=get_device(args).type == 'cuda' and not images.on_gpu(),
        persistent_workers=workers > 0 and shuffled,
    )


def gpu_eval_batch(images):
    """How many images that a GPU holds go through a network at once where none is trained, for it is through with a few
    small ones before the next are launched; 0 of images that it does not hold."""
    return (
        min(max_eval_batch(images.args), max(1, EVAL_PIXELS_PER_FORWARD // images.pixels[0, 0].numel()))
        if images.on_gpu()
        else 0
    )


def max_eval_batch(args):
    """How many views go through a network at once where none is trained."""
    return max(1, EVAL_PIXELS_PER_FORWARD // args.image_size**2)


def load_splits(args, parts=None):
    """{'train', 'val', 'test'} of args.image_path as ImageDataset, decoded where they are small; None where missing.

    Of several processes the first of a machine draws, fetches, indexes and decodes what is kept for the others.
    """
    with local_main_first():
        clear_parts(resolve_path(args.cache_path))
        return build_datasets(args, parts or find_split_sources(args))


def build_datasets(args, parts):
    """load_splits, by each process for itself."""
    train, val = parts['train'], parts.get('val')
    if 'auto' in (args.channels, args.white_level):  # no command has done so
        args = resolve_pixels(args, train.store)
    args = resolve_mean_std(args, train.store)
    # The classes are train's; where train has none, val's: pretraining needs no label.
    classes = train.classes or (val.classes if val else [])
    class_to_idx = {normalize_unicode(name): i for i, name in enumerate(classes)}
    if len(class_to_idx) < len(classes):
        double = next(name for i, name in enumerate(classes) if class_to_idx[normalize_unicode(name)] != i)
        raise UserError(
            f'{printable(train.where)} has the class {printable(double)!r} twice, spelled in two ways of Unicode '
            '(macOS writes '
            'letters and their accents apart): move the images of one into the other'
        )
    splits = {'train': None, 'val': None, 'test': None}
    for name, part in parts.items():
        own = part.classes if (part.labels >= 0).any() else []
        extra = sorted(name for name in own if normalize_unicode(name) not in class_to_idx)
        if extra:
            said = (
                f'{printable(part.where)} has the class {printable(extra[0])!r}, which {printable(train.where)} has not'
            )
            if name != 'test':
                raise UserError(f'{said}: spelled otherwise?')
            log(f'{said}: its images count as without a class')  # test/unknown, as where labels are a secret
        table = torch.tensor(
            [*(class_to_idx.get(normalize_unicode(class_name), -1) for class_name in own), -1]
        )  # the last for -1
        splits[name] = build_dataset(args, part, table[part.labels], classes)
    if len(train.classes) == 1 and not rank():
        print_message(
            'warning', f'{printable(train.where)} has one class, {printable(classes[0])!r}: accuracies say nothing'
        )
    dataset_warnings.warn_ignored_data_options(args, parts, splits['train'])
    return splits


def normalize_unicode(name):
    """A class's name as it is compared: letters and their accents as one, for macOS writes them apart (NFD) and others
    do not (NFC), and a set may come from both."""
    return unicodedata.normalize('NFC', name)


@local_main_first()
def find_split_sources(args):
    """{'train': SplitSource, ...} as `image_path` has them; train's held-out share is val where there is none. Of
    several processes the first of a machine draws, fetches and indexes."""
    root = resolve_path(args.image_path)
    if args.preset == 'demo' and same_path(root, ROOT / 'data/demo'):
        demo.write_demo_dataset(root, lambda jobs: progress(jobs, 'drawing the demo set', 'images'))
    if args.download:
        download(root)
    if kind := detect_dataset(root):
        return torchvision_splits(root, kind)
    if not root.exists() and not expand_braces(root):
        hint = 'or try the demo: `preset=demo` alone'
        if root.name in DATASET_FOLDERS:
            hint = f'or fetch it: `download=True`; {hint}'
        raise UserError(
            f'no images for `preset={args.preset}`: {printable(root)} is not there; lay it out as train/<class>/*.jpg '
            'and '
            f'val/<class>/*.jpg in it, point `image_path` at such a folder, {hint}'
        )
    parts = find.find_splits(root, resolve_path(args.cache_path), progress)
    train = parts['train']
    if 'val' not in parts and train.classes and args.val_fraction:
        train, val = stratified_holdout(train, args.val_fraction)
        if len(val.labels):
            parts = {**parts, 'train': train, 'val': val}
            log(
                f'{printable(root)} has no val: {len(val.labels)} of its {len(train.labels) + len(val.labels)} images '
                'are '
                f'held out for it, the same share of every class (`val_fraction={args.val_fraction:g}`)'
            )
    dataset_warnings.log_dataset_notes(root, parts)
    return parts


def load_unlabeled(args, path):
    """All images of a folder, an archive, a list or one file, without labels: for infer. Raises UserError where there
    are none."""
    with local_main_first():
        part = find.load_single_source(path, resolve_path(args.cache_path), progress)
        dataset_warnings.log_split_notes(printable(path.name), part)
        return build_dataset(args, part, torch.full_like(part.labels, -1), [])


def build_dataset(args, part, labels, classes):
    """The ImageDataset of a SplitSource: held in memory, made smaller on disk, or read when they are needed."""
    store, where, kept = part.store, part.where, resolve_path(args.cache_path) / part.cache_subdir
    pixel_format, picked = find_pixel_format(args, store), channel_numbers(args.channels)
    if args.augment_backend == 'worker' and (picked or not pixel_format.is_rgb8 or args.jitter == 'channel'):
        raise UserError(
            '`augment_backend=worker` is for red, green and blue of 8 bits, jittered as torchvision does: leave it out'
        )
    if args.on_unreadable == 'skip' and not isinstance(store, Memory):
        rows = decoded.readable_rows(store, where, kept, pixel_format)
        lost = {*labels.tolist()} - {*labels[rows].tolist()} - {-1}
        if lost and not rank():
            names = join_first([printable(classes[label]) for label in sorted(lost)])
            print_message(
                'warning', f'{printable(where)}: no image of the class {names} can be read: it is there no more'
            )
        store, labels = store.select(rows) if len(rows) < len(labels) else store, labels[rows]
    if isinstance(store, Memory) and picked:  # of torchvision's files: red, green and blue
        if max(picked) > 3:
            raise UserError(f'{printable(where)} has 3 channels, and `channels={args.channels}` are wanted')
        store = Memory(store.names, store.pixels[:, [channel - 1 for channel in picked]], is_rgb8=False)
        pixel_format = find_pixel_format(args, store)
    if not isinstance(store, Memory):
        held = decoded.decode_to_memory(store, where, args.cache_images, pixel_format, kept)
        if held is None and args.cache_short_side:
            held = decoded.build_resized_cache(store, where, args.cache_short_side, pixel_format, kept)
        store, pixel_format = (held, pixel_format.decoded()) if held else (store, pixel_format)
    return place_on_device(args, where, store, labels, classes, pixel_format)


def place_on_device(args, folder, store, labels, classes, pixel_format=RGB8):
    """Images of a store; pixels in memory go to the GPU where they fit."""
    device = get_device(args)
    if isinstance(store, Memory) and store.is_rgb8 and device.type == 'cuda' and args.augment_backend == 'device':
        free, _ = torch.cuda.mem_get_info(device)
        if store.pixels.nbytes < free / 4:
            store = Memory(store.names, store.pixels.to(device))
    labels = torch.as_tensor(labels, dtype=torch.int64)
    return ImageDataset(
        args,
        folder,
        store,
        labels,
        classes,
        pixel_format=pixel_format,
        workers_only_crop=device.type != 'cpu' and args.augment_backend == 'device',
    )


def labeled_subset(images):
    """Those of `images` that have a label (a flat train has none, STL-10's has some)."""
    return select(images, (images.labels >= 0).nonzero()[:, 0])


def select(images, rows):
    """The images of these row numbers (int64), in this order."""
    if len(rows) == len(images) and torch.equal(rows, torch.arange(len(rows))):
        return images
    return replace(images, store=images.store.select(rows), labels=images.labels[rows])
