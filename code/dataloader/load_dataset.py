"""From a folder of images to batches.

    get_iterator
        load_splits           find the images            sources/find.py           -> names, labels, a reader
            build_dataset     cache decoded images       cache/decoded.py          -> another reader (readers/)
        make_loader           order and seeds            loading/sampler.py        -> (index, seed, augmentation)
    ImageDataset.load_batch   make a batch               loading/dataset.py        -> (images, labels)
        ImageDataset.read     decode and crop an image   loading/decode.py, crops  -> its crops, in a worker
    ImageDataset.make_views   augment on the device      vision.py                 -> views, float32

Small images of one size are decoded once and kept in memory, on the GPU if they fit. Larger ones are decoded in
dataloader workers, which cut and resize the crops of all views of an image from one decoding. The other operations run
on the device, a batch at a time; if the device is the CPU, in the workers.
"""

import unicodedata
from dataclasses import replace

import torch

from dataloader.cache import decoded
from dataloader.loading.crops import RGB8
from dataloader.loading.dataset import ImageDataset
from dataloader.loading.loader import WatchedDataLoader, resolve_num_workers
from dataloader.loading.pixel_settings import (
    find_pixel_format,
    report_pixels,
    resolve_mean_std,
    resolve_pixels,
)
from dataloader.loading.sampler import EpochBatchSampler
from dataloader.readers.memory import Memory
from dataloader.sources import dataset_warnings, demo, find
from dataloader.sources.split_source import stratified_holdout
from dataloader.sources.tar_splits import expand_braces
from dataloader.sources.torchvision_datasets import DATASET_FOLDERS, detect_dataset, download, torchvision_splits
from runtime.console import join_first, printable
from runtime.device import get_device
from runtime.distributed import local_main_first, rows_per_rank, world_size
from runtime.errors import ROOT, UserError, resolve_path, same_path
from runtime.files import clear_parts
from runtime.messages import log, progress, warn
from runtime.options import channel_numbers

EVAL_PIXELS_PER_FORWARD = 64 * 224**2  # pixels of a batch in evaluation: activations take less than a gigabyte


def get_iterator(args, sources=None):
    """Build the DataLoaders {'train', 'val', 'test'}; batches are (images, labels), for utils.prepare_batch.

    train: shuffled, with random views of each image. val and test: in order, every image once. Without val it is None;
    without test it is val. Their `.dataset` is an ImageDataset. sources: the result of find_split_sources, if known.
    Raises UserError for an unknown folder layout or too few images, WorkError for unreadable images.
    """
    splits = load_splits(args, sources)
    train = splits['train']
    if len(train) < args.batch_size:
        size = 2 ** (len(train).bit_length() - 1)
        hint = f'try `batch_size={size}`' if size > 1 else 'at least two are needed'
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
    """Return the number of views of an image per training step. Raises UserError for contradictory options."""
    if args.num_views > 2 and args.loss_symmetry != 'true':
        raise UserError(
            f'`loss_symmetry={args.loss_symmetry}` is for two views, not `num_views={args.num_views}`: leave one out'
        )
    return 4 if args.loss_symmetry == '2x' else args.num_views


def splits_of_loaders(iterators):
    """Return {split: ImageDataset or None} of get_iterator's loaders, in which val stands in for a missing test."""
    splits = {name: None if loader is None else loader.dataset for name, loader in iterators.items()}
    return {**splits, 'test': None} if iterators.get('test') is iterators.get('val') else splits


def eval_loader(args, images):
    """Build the loader of a split for evaluation: every image once, in order, as a center crop."""
    return make_loader(args, replace(images, views=0), shuffled=False)


def supervised_loader(args, images, drop_last, for_frozen_backbone=False):
    """Build a loader for training with labels: one random resized crop of each image, perhaps flipped.
    for_frozen_backbone: the backbone is not trained, so batches may be as large as in evaluation (`gpu_eval_batch`),
    if no image is dropped.
    """
    args = replace(args, augmentation='crop', blur_prob=0.0, augment_backend='device')
    if for_frozen_backbone and not drop_last and world_size() == 1:  # the GPUs of several ranks may differ
        args.batch_size = max(args.batch_size, gpu_eval_batch(images))
    return make_loader(args, replace(images, args=args, views=1), shuffled=True, drop_last=drop_last)


def make_loader(args, images, shuffled, drop_last=None):
    """Build a DataLoader of an ImageDataset. drop_last: None is True if shuffled (EpochBatchSampler)."""
    drop_last, size = shuffled if drop_last is None else drop_last, args.batch_size
    workers = 0 if images.is_in_memory() else resolve_num_workers(args.num_workers)
    size = size if shuffled else max(rows_per_rank(size), gpu_eval_batch(images))  # each rank has its own batches
    return WatchedDataLoader(
        images,
        workers,
        batch_sampler=EpochBatchSampler(len(images), size, args.random_seed, args.augmentation, shuffled, drop_last),
        pin_memory=get_device(args).type == 'cuda' and not images.on_gpu(),
        persistent_workers=workers > 0 and shuffled,
    )


def gpu_eval_batch(images):
    """Return the batch size for evaluation of images in GPU memory: large, because a GPU is idle between small batches
    of small images. 0 if the images are not in GPU memory."""
    return (
        min(max_eval_batch(images.args), max(1, EVAL_PIXELS_PER_FORWARD // images.pixels.shape[2:].numel()))
        if images.on_gpu()
        else 0
    )


def max_eval_batch(args):
    """Return the number of views per forward pass in evaluation."""
    return max(1, EVAL_PIXELS_PER_FORWARD // args.image_size**2)


def load_splits(args, sources=None):
    """Load the splits of args.image_path: {'train', 'val', 'test'} of ImageDataset, None for a missing split.

    With several ranks the first one of each machine prepares the files (demo, download, index, cache) for the others.
    """
    with local_main_first():
        for folder in ('', 'held_out'):
            clear_parts(resolve_path(args.cache_path) / folder)
        return build_datasets(args, sources or find_split_sources(args))


def build_datasets(args, sources):
    """load_splits in one process. sources: from find_split_sources."""
    train, val = sources['train'], sources.get('val')
    if 'auto' in (args.channels, args.white_level):  # not resolved by the command
        args = resolve_pixels(args, train.store)
    args = resolve_mean_std(args, train.store)
    if args.ckpt_name and not args.resume:  # train reports them itself
        report_pixels(args, train.store)
    # The classes of train, or of val if train has none: pretraining needs no labels.
    classes = train.classes or (val.classes if val else [])
    class_to_idx = {normalize_unicode(name): i for i, name in enumerate(classes)}
    if len(class_to_idx) < len(classes):
        double = next(name for i, name in enumerate(classes) if class_to_idx[normalize_unicode(name)] != i)
        raise UserError(
            f'{printable(train.location)} has the class {printable(double)!r} twice, spelled in two ways of Unicode '
            '(macOS writes letters and their accents apart): move the images of one into the other'
        )
    splits = {'train': None, 'val': None, 'test': None}
    for name, source in sources.items():
        part_classes = source.classes if (source.labels >= 0).any() else []
        extra = sorted(name for name in part_classes if normalize_unicode(name) not in class_to_idx)
        if extra:
            listed = join_first([repr(printable(name)) for name in extra])
            word = 'class' if len(extra) == 1 else 'classes'
            problem = f'{printable(source.location)} has the {word} {listed}, which {printable(train.location)} has not'
            if name != 'test':
                raise UserError(f'{problem}: is it misspelled?')
            unlabeled = sum(int((source.labels == part_classes.index(name)).sum()) for name in extra)
            log(f'{problem}: {unlabeled} of its {len(source.labels)} images count as without a class')
        # The last entry maps -1 (no label) to itself.
        table = torch.tensor(
            [*(class_to_idx.get(normalize_unicode(class_name), -1) for class_name in part_classes), -1]
        )
        splits[name] = build_dataset(args, source, table[source.labels], classes)
    if len(train.classes) == 1:
        warn(f'{printable(train.location)} has one class, {printable(classes[0])!r}: no accuracy can be measured')
    dataset_warnings.warn_ignored_data_options(args, sources, splits['train'])
    return splits


def normalize_unicode(name):
    """Normalize a class name for comparison: macOS writes accents as separate characters (NFD), other systems do not
    (NFC), and a dataset may have files of both."""
    return unicodedata.normalize('NFC', name)


@local_main_first()
def find_split_sources(args):
    """Find the splits of `image_path`: {'train': SplitSource, ...}. Without val, a share of train is held out for it.
    With several ranks the first one of each machine prepares the files. Raises UserError for an unknown layout."""
    root = resolve_path(args.image_path)
    if args.preset == 'demo' and same_path(root, ROOT / 'data/demo'):
        demo.write_demo_dataset(root, lambda jobs: progress(jobs, 'drawing the demo set', 'images'))
    if args.download:
        download(root)
    if kind := detect_dataset(root):
        return torchvision_splits(root, kind)
    if not root.exists() and not expand_braces(root):
        hint = 'or run `preset=demo` without `image_path`'
        if root.name in DATASET_FOLDERS:
            hint = f'or fetch it: `download=True`; {hint}'
        if args.ckpt_name and 'image_path' not in args.explicit:
            raise UserError(f'{printable(root)} is not there: `image_path=FOLDER` names the images of this run anew')
        raise UserError(
            f'no images for `preset={args.preset}`: {printable(root)} is not there; lay it out as train/<class>/*.jpg '
            f'and val/<class>/*.jpg in it, point `image_path` at such a folder, {hint}'
        )
    sources = find.find_splits(root, resolve_path(args.cache_path), progress)
    train = sources['train']
    if 'val' not in sources and train.classes and args.val_fraction:
        train, val = stratified_holdout(train, args.val_fraction)
        if len(val.labels):
            sources = {**sources, 'train': train, 'val': val}
            log(
                f'{printable(root)} has no val: {len(val.labels)} of its {len(train.labels) + len(val.labels)} images '
                f'are held out for it, the same share of every class (`val_fraction={args.val_fraction:g}`)'
            )
    dataset_warnings.log_dataset_notes(root, sources)
    return sources


def load_unlabeled(args, path):
    """Load all images of a folder, an archive, a list or one file, without labels, for infer. Returns an ImageDataset.
    Raises UserError if there are none."""
    with local_main_first():
        source = find.load_single_source(path, resolve_path(args.cache_path), progress)
        dataset_warnings.log_split_notes(printable(path.name), source)
        report_pixels(args, source.store)
        return build_dataset(args, source, torch.full_like(source.labels, -1), [])


def build_dataset(args, source, labels, classes):
    """Build the ImageDataset of a SplitSource: decoded in memory, resized in a cache on disk, or read when needed."""
    store, location, cache_dir = source.store, source.location, resolve_path(args.cache_path) / source.cache_subdir
    pixel_format, picked = find_pixel_format(args, store), channel_numbers(args.channels)
    if args.augment_backend == 'worker' and (picked or not pixel_format.is_rgb8 or args.jitter == 'channel'):
        raise UserError(
            '`augment_backend=worker` is for red, green and blue of 8 bits, jittered as torchvision does: leave it out'
        )
    if args.on_unreadable == 'skip' and not isinstance(store, Memory):
        rows = decoded.readable_rows(store, location, cache_dir, pixel_format)
        empty_classes = {*labels.tolist()} - {*labels[rows].tolist()} - {-1}
        if empty_classes:
            names = join_first([printable(classes[label]) for label in sorted(empty_classes)])
            warn(f'{printable(location)}: no image of the class {names} can be read: it stays empty')
        store, labels = store.select(rows) if len(rows) < len(labels) else store, labels[rows]
    if isinstance(store, Memory) and picked:  # torchvision's datasets have red, green and blue
        if max(picked) > 3:
            raise UserError(f'{printable(location)} has 3 channels, but `channels={args.channels}` is set')
        store = Memory(store.names, store.pixels[:, [channel - 1 for channel in picked]], is_rgb8=False)
        pixel_format = find_pixel_format(args, store)
    if not isinstance(store, Memory):
        cached = decoded.decode_to_memory(store, location, args.cache_images, pixel_format, cache_dir)
        if cached is None and args.cache_short_side:
            cached = decoded.build_resized_cache(store, location, args.cache_short_side, pixel_format, cache_dir)
        store, pixel_format = (cached, pixel_format.decoded()) if cached else (store, pixel_format)
    return place_on_device(args, location, store, labels, classes, pixel_format)


def place_on_device(args, folder, store, labels, classes, pixel_format=RGB8):
    """Build the ImageDataset of a reader. Pixels in memory are moved to the GPU if they take less than a quarter of its
    free memory."""
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


def num_labeled_classes(labels):
    """Return the number of classes that have a label in `labels`, where -1 is none."""
    return len(labels[labels >= 0].unique())


def labeled_subset(images):
    """Return the images that have a label."""
    return select(images, (images.labels >= 0).nonzero()[:, 0])


def select(images, rows):
    """Return the images with these row numbers (int64), in this order."""
    if len(rows) == len(images) and torch.equal(rows, torch.arange(len(rows))):
        return images
    return replace(images, store=images.store.select(rows), labels=images.labels[rows])
