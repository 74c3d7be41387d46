"""From a folder of images to batches.

    image_path/{train,val,test}/<class>/*.jpg|png|...   test may be missing (then it is val); train and test may also
                                                        be flat, without class folders
    image_path/cifar-10-batches-py, ...                 torchvision's own CIFAR-10, CIFAR-100 or STL-10 files

Small images of one size are decoded once and held in memory, on the GPU where they fit (cache.py). Larger ones are
decoded in worker processes, which cut and resize the crops of both views from one decoding. The rest of the
augmentation happens on the device, a batch at a time; where the device is the CPU, the workers share that too.
"""

import contextlib
import io
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate
from torch.utils.data import default_collate

from config import ROOT, Config, UserError, WorkError, distortion, path_of
from dataloader import cache, demo, vision
from dataloader.files import EXTENSIONS, find_images, list_images, opened, pixels_of, rgb, shrink
from distributed import rank, world
from logger import progress, say
from utils import cpu_count, get_device, give_freed_memory_back, prepare_batch, random_from

TORCHVISION = {'cifar10': 'cifar-10-batches-py', 'cifar100': 'cifar-100-python', 'stl10': 'stl10_binary'}


@dataclass(eq=False)
class Images(torch.utils.data.Dataset):
    """The images of one split, and how they are read: as random views of each, or as the centre crop."""

    args: Config
    folder: Path
    names: list  # shown to people; the files under `folder`, unless `pixels` holds the images
    labels: torch.Tensor  # N, int64; -1: no label
    classes: list  # names, by number
    pixels: torch.Tensor | None = None  # N x 3 x H x W uint8
    resized: tuple | None = None  # (memory-mapped file, its index): cache.resized
    views: int = 0  # random ones of each image; 0: the centre crop
    crops_only: bool = False  # workers leave all but decoding and cropping to the device

    def __len__(self):
        return len(self.names)

    def __getitems__(self, keys):
        """keys: list of (index, seed of its views, augmentation). Returns (images, labels) for utils.prepare_batch, or
        a WorkError in place: raised in a worker it would arrive as a page of traceback, so prepare_batch raises it."""
        indices = torch.tensor([index for index, *_ in keys])
        if self.in_memory():
            return self.pixels[indices.to(self.pixels.device)], self.labels[indices]
        try:
            images = default_collate([self.read(*key) for key in keys])  # in a worker straight into shared memory
        except WorkError as error:
            return error
        if self.views and self.args.augment_on == 'device' and not self.crops_only:
            images = self.distorted(images, *keys[0][1:])
        return images, self.labels[indices]

    def in_memory(self):
        """Whether batches are whole images, distorted on the device."""
        return self.pixels is not None and not (self.views and self.args.augment_on == 'worker')

    def read(self, index, seed, augmentation):
        """One image: 1 x 3 x S x S uint8, the view for evaluation, or views x 3 x S x S, random crops or views."""
        if not self.views:
            return self.centre_crop(index)
        if self.args.augment_on == 'worker':
            with self.opened(index) as image:
                views = vision.torchvision_views(self.args.image_size, augmentation, self.args.blur_prob)
                return views(rgb(image), seed, self.views)
        return self.crops(index, augmentation, torch.Generator().manual_seed(seed))

    def distorted(self, images, seed, augmentation):
        """Distort crops in place, N x views x 3 x S x S uint8: where the device is the CPU, the workers' part of it.

        Whole grey levels, for floats would take as long to hand over as to make.
        """
        args, row = self.args, distortion(self.args, augmentation)
        if not vision.has_colours(row, args.blur_prob):
            return images
        generator, crops = random_from(seed, 'colours'), images.flatten(0, 1)  # not the stream that drew the crops
        crops.copy_(vision.distort(crops, False, args.image_size, row, args.blur_prob, generator, vision.to_bytes))
        return images

    def crops(self, index, augmentation, generator):
        """Random resized crops from one decoding: views x 3 x S x S uint8."""
        size = self.args.image_size
        with self.opened(index) as image:
            width, height = image.size
            boxes, flips = vision.draw_crops(self.views, height, width, distortion(self.args, augmentation), generator)
            if self.args.jpeg_shrink:
                shrink(image, boxes[:, 2:].min().item() / size)
            ratio = image.height / height  # below 1 where the decoder shrinks the image; boxes are fractional then
            if ratio < 1:
                image = rgb(image)
            else:
                pixels = pixels_of(image)[None]
        crops = torch.empty(self.views, 3, size, size, dtype=torch.uint8)
        for out, (top, left, h, w), flip in zip(crops, (boxes * ratio).tolist(), flips.tolist(), strict=True):
            if ratio < 1:
                box = (left, top, left + w, top + h)
                crop = pixels_of(image.resize((size, size), Image.Resampling.BILINEAR, box=box))
            else:  # the same to a grey level, three times as fast
                crop = pixels[:, :, int(top) : int(top + h), int(left) : int(left + w)]
                crop = crop.contiguous(memory_format=torch.channels_last)
                crop = interpolate(crop, (size, size), mode='bilinear', antialias=True)[0]
            out.copy_(crop.flip(2) if flip else crop)
        return crops

    def centre_crop(self, index):
        """The view for evaluation: 1 x 3 x S x S uint8."""
        with self.opened(index) as image:
            top, left, h, w = vision.centre_box(image.height, image.width, self.args.crop_ratio)
            image = rgb(image).resize(
                (self.args.image_size,) * 2, Image.Resampling.BILINEAR, box=(left, top, left + w, top + h)
            )
        return pixels_of(image)[None]

    @contextlib.contextmanager
    def opened(self, index):
        """Image `index` as PIL has it, its file perhaps not read yet."""
        if self.pixels is not None:
            yield Image.fromarray(self.pixels[index].permute(1, 2, 0).numpy())
        elif self.resized:
            yield Image.fromarray(cache.resized_image(self.resized, index))
        else:
            with opened(self.folder / self.names[index]) as image:
                yield image


class Keys:
    """The batches of one epoch, as (index, seed of its views, augmentation) of every image: the DataLoader's order.

    What an epoch holds depends on `seed`, the epoch's number and the augmentation alone. drop_last: without the last,
    smaller batch, whose BN statistics would differ. Of several processes each gets its part of every batch (drop_last)
    or of the whole.
    """

    def __init__(self, count, batch_size, seed, augmentation, shuffled, drop_last):
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.shuffled, self.drop_last = shuffled, drop_last
        self.start_epoch(0, augmentation)

    def start_epoch(self, epoch, augmentation, first=0):
        """Name the epoch that the next iteration gives, and its first batch."""
        self.epoch, self.augmentation, self.first = epoch, augmentation, first

    def __len__(self):
        if self.drop_last:
            return self.count // self.batch_size
        return -(-len(self.share(range(self.count))) // self.batch_size)

    def share(self, rows):
        """This process's part of what all of them work through: so many of the rows in their order."""
        each = -(-len(rows) // world())
        return rows[rank() * each : (rank() + 1) * each]

    def __iter__(self):
        if self.shuffled:
            generator = random_from(self.seed, 'order', self.epoch)
            order = torch.randperm(self.count, generator=generator).tolist()
            seeds = torch.randint(2**62, (self.count,), generator=generator).tolist()
        else:
            order, seeds = range(self.count), [0] * self.count
        keys = [(index, seed, self.augmentation) for index, seed in zip(order, seeds, strict=True)]
        keys = keys if self.drop_last else self.share(keys)
        for start in range(self.first * self.batch_size, len(self) * self.batch_size, self.batch_size):
            batch = keys[start : start + self.batch_size]
            yield self.share(batch) if self.drop_last else batch


def get_iterator(args):
    """The batches of {'train', 'val', 'test'}: DataLoaders of (images, labels), for utils.prepare_batch.

    train: shuffled, two crops of each image; val and test: in order, every image once; val is None where there is no
    such folder, test is val where there is none. `.dataset` is the split's Images. Raises UserError for a folder that
    is not laid out as this file's first lines say, WorkError for images that cannot be read.
    """
    splits = load_splits(args)
    train = splits['train']
    if len(train) < args.batch_size:
        raise UserError(
            f'{train.folder} has {len(train)} images, fewer than a batch of {args.batch_size}: '
            f'try --batch_size={2 ** (len(train).bit_length() - 1)}'
        )
    iterators = {name: in_order(args, images) for name, images in splits.items() if name != 'train' and images}
    return {
        'train': batches(args, replace(train, views=views_of(args)), shuffled=True),
        'val': iterators.get('val'),
        'test': iterators.get('test', iterators.get('val')),
    }


def views_of(args):
    """Random views of an image that a training step takes."""
    return 4 if args.symmetric == '2x' else 2


def in_order(args, images):
    """Batches of a split as evaluation wants it: every image once, in order, the centre crop."""
    return batches(args, replace(images, views=0), shuffled=False)


def shuffled_crops(args, images, drop_last):
    """Batches for training with labels: one random resized and perhaps flipped crop of each image (AUGMENTATIONS)."""
    args = replace(args, augmentation='crop', blur_prob=0.0, augment_on='device')
    return batches(args, replace(images, args=args, views=1), shuffled=True, drop_last=drop_last)


def batches(args, images, shuffled, drop_last=None):
    """A DataLoader of `images`; drop_last: by default where they are shuffled (Keys)."""
    drop_last = shuffled if drop_last is None else drop_last
    workers = 0 if images.in_memory() else cpu_count() if args.num_workers < 0 else args.num_workers
    on_gpu = images.pixels is not None and images.pixels.is_cuda
    return torch.utils.data.DataLoader(
        images,
        batch_sampler=Keys(len(images), args.batch_size, args.random_seed, args.augmentation, shuffled, drop_last),
        num_workers=workers,
        collate_fn=as_it_is,
        pin_memory=get_device(args).type == 'cuda' and not on_gpu,
        persistent_workers=workers > 0 and shuffled,
        worker_init_fn=give_freed_memory_back,
    )


def prepared(args, batches):
    """utils.prepare_batch over `batches`; to a GPU the next batch is copied while this one is worked on."""
    if get_device(args).type != 'cuda':
        yield from (prepare_batch(args, batch) for batch in batches)
        return
    stream, ahead = torch.cuda.Stream(), None
    for batch in batches:
        with torch.cuda.stream(stream):
            following = prepare_batch(args, batch), stream.record_event()
        if ahead:
            yield arrived(*ahead)
        ahead = following
    yield arrived(*ahead)


def arrived(tensors, copied):
    """Tensors that another stream made, safe to use on this one: after the event `copied`, and not freed before."""
    torch.cuda.current_stream().wait_event(copied)
    for tensor in tensors:
        tensor.record_stream(torch.cuda.current_stream())
    return tensors


def as_it_is(batch):
    return batch


def load_splits(args):
    """{'train', 'val', 'test'} of args.image_path as Images, decoded where they are small; None where missing."""
    root = path_of(args.image_path)
    if args.preset == 'demo' and root == ROOT / 'data/demo':
        demo.make_demo(root, lambda jobs: progress(jobs, 'drawing the demo set', 'images'))
    if args.download:
        download(root)
    if kind := torchvision_kind(root):
        return torchvision_splits(args, root, kind)
    if not (root / 'train').is_dir():
        hint = 'or try the demo: --preset=demo alone'
        if root.name in TORCHVISION:
            hint = f'or fetch it: --download=True; {hint}'
        raise UserError(
            f'no images for --preset={args.preset}: {root}/train is not there; lay it out as '
            f'{root}/train/<class>/*.jpg and {root}/val/<class>/*.jpg, point --image_path at such a folder, {hint}'
        )
    found = {name: find_images(root / name) for name in ('train', 'val', 'test') if (root / name).is_dir()}
    # The classes are train's; where train has none, val's: pretraining needs no label.
    classes = found['train'][2] or (found['val'][2] if 'val' in found else [])
    splits = {'train': None, 'val': None, 'test': None}
    for name, (files, labels, own) in found.items():
        extra = sorted(set(own) - set(classes))
        if extra:
            raise UserError(f'{root / name} has the class {extra[0]!r}, which {root}/train has not: spelled otherwise?')
        numbers = [classes.index(own[label]) if label >= 0 else -1 for label in labels]
        splits[name] = from_files(args, root / name, files, numbers, classes)
    return splits


def labelled(images):
    """Those of `images` that have a label (a flat train has none, STL-10's has some)."""
    return select(images, (images.labels >= 0).nonzero()[:, 0])


def select(images, rows):
    """The images of these row numbers (int64), in this order."""
    if len(rows) == len(images) and torch.equal(rows, torch.arange(len(rows))):
        return images
    names = [images.names[row] for row in rows]
    pixels = None if images.pixels is None else images.pixels[rows.to(images.pixels.device)]
    resized = images.resized and (images.resized[0], images.resized[1][rows])
    return replace(images, names=names, labels=images.labels[rows], pixels=pixels, resized=resized)


def from_files(args, folder, files, labels, classes):
    """Images of these files: held in memory, resized on disk, or decoded when they are needed."""
    if args.bad_images == 'skip':
        bad = set(cache.unreadable(args, folder, files))
        rows = [row for row, name in enumerate(files) if name not in bad]
        files, labels = [files[row] for row in rows], [labels[row] for row in rows]
        if not files:
            raise WorkError(f'no image of {folder} can be read')
    pixels = cache.hold_in_memory(args, folder, files)
    resized = cache.resized(args, folder, files) if pixels is None and args.resize_cache else None
    return make_images(args, folder, files, labels, classes, pixels, resized)


def make_images(args, folder, names, labels, classes, pixels=None, resized=None):
    device = get_device(args)
    if pixels is not None and device.type == 'cuda' and args.augment_on == 'device':
        free, _ = torch.cuda.mem_get_info(device)
        pixels = pixels.to(device) if pixels.nbytes < free / 4 else pixels
    labels = torch.as_tensor(labels, dtype=torch.int64)
    crops_only = device.type != 'cpu' and args.augment_on == 'device'
    return Images(args, folder, names, labels, classes, pixels, resized, crops_only=crops_only)


def torchvision_kind(root):
    """Which of torchvision's own sets the folder holds: a key of TORCHVISION, or None; train/ goes before them."""
    if (root / 'train').is_dir():
        return None
    return next((kind for kind, name in TORCHVISION.items() if (root / name).is_dir()), None)


def load_folder(args, folder):
    """The images of any folder, at any depth, without labels (for infer). Raises UserError where there are none."""
    files = list_images(folder)
    if not files:
        raise UserError(f'{folder} holds no images ({" ".join(EXTENSIONS)})')
    return from_files(args, folder, files, [-1] * len(files), [])


def torchvision_splits(args, root, kind):
    """The splits of torchvision's own files: val is its test set; STL-10's unlabelled images are train's too."""
    from torchvision import datasets

    splits = {'train': None, 'val': None, 'test': None}
    for name, first in (('train', True), ('val', False)):
        try:
            if kind == 'stl10':
                data = datasets.STL10(root, split='train+unlabeled' if first else 'test')
                pixels, labels = data.data, data.labels
            else:
                data = (datasets.CIFAR10 if kind == 'cifar10' else datasets.CIFAR100)(root, train=first)
                pixels, labels = data.data.transpose(0, 3, 1, 2), data.targets
        except (RuntimeError, OSError):
            raise WorkError(
                f'{root / TORCHVISION[kind]} is incomplete or damaged: delete it and add --download=True'
            ) from None
        names = [f'{name}/{i:05d}' for i in range(len(pixels))]
        pixels = torch.from_numpy(np.ascontiguousarray(pixels))
        splits[name] = make_images(args, root / name, names, labels, data.classes, pixels)
    return splits


def download(root):
    """Fetch CIFAR-10, CIFAR-100 or STL-10, whichever the folder is named after, through torchvision."""
    from torchvision import datasets

    if root.name not in TORCHVISION:
        raise UserError(f'--download fetches cifar10, cifar100 or stl10: end --image_path in one of them, not {root}')
    say(f'fetching {root.name} into {root} (checked, and kept if it is there)')
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            getattr(datasets, root.name.upper())(root, download=True)
    except (RuntimeError, OSError) as error:
        raise WorkError(f'could not fetch {root.name}: {error}; try again, or put its files into {root}') from None
