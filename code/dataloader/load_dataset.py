"""From a folder of images to batches.

    image_path/{train,val,test}/<class>/*.jpg|png|...   test may be missing (then it is val); train and test may also
                                                        be flat, without class folders
    image_path/cifar-10-batches-py, ...                 torchvision's own CIFAR-10, CIFAR-100 or STL-10 files

Small images of one size are decoded once and held in memory, whole. Larger ones are decoded in worker processes, which
cut and resize the crops of both views from one decoding; the rest of the augmentation happens on the device.
"""

import contextlib
import io
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from config import AUGMENTATIONS, ROOT, UserError, WorkError, path_of
from dataloader import demo, vision
from utils import cpu_count, get_device, random_from

EXTENSIONS = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff', '.ppm', '.pgm', '.gif')
SMALL_SIDE, MEMORY_BYTES = 96, 4 * 2**30  # held in memory: images up to this side (pixels), sets up to this size
TORCHVISION = {'cifar10': 'cifar-10-batches-py', 'cifar100': 'cifar-100-python', 'stl10': 'stl10_binary'}


@dataclass(eq=False)
class Images(torch.utils.data.Dataset):
    """The images of one split, and how they are read: `views` random crops each, or (0) the centre crop."""

    folder: Path
    names: list  # shown to people; the files under `folder`, unless `pixels` holds the images
    labels: torch.Tensor  # N, int64; -1: no label
    classes: list  # names, by number
    pixels: torch.Tensor | None  # N x 3 x H x W uint8
    size: int  # side of a crop, pixels
    crop_ratio: float
    views: int = 0

    def __len__(self):
        return len(self.names)

    def __getitems__(self, keys):
        """keys: list of (index, seed of its crops, augmentation). Returns (images, labels), or a WorkError in place:
        raised in a worker it would arrive as a page of traceback, so utils.prepare_batch raises it."""
        indices = torch.tensor([index for index, *_ in keys])
        if self.pixels is not None:
            return self.pixels[indices], self.labels[indices]
        try:
            crops = [self.crops(decode(self.folder / self.names[index]), *how) for index, *how in keys]
        except WorkError as error:
            return error
        return torch.from_numpy(np.stack(crops)), self.labels[indices]

    def crops(self, image, seed, augmentation):
        """The crops of one decoded image, resized: V x 3 x S x S uint8 (numpy)."""
        width, height = image.size
        square, bilinear = (self.size, self.size), Image.Resampling.BILINEAR
        if self.views:
            generator = torch.Generator().manual_seed(seed)
            boxes, flips = vision.draw_crops(self.views, height, width, AUGMENTATIONS[augmentation], generator)
            cut = []
            for (top, left, h, w), flip in zip(boxes.int().tolist(), flips.tolist(), strict=True):
                crop = image.crop((left, top, left + w, top + h)).resize(square, bilinear)
                cut.append(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else crop)
        else:
            top, left, h, w = vision.centre_box(height, width, self.crop_ratio)
            cut = [image.resize(square, bilinear, box=(left, top, left + w, top + h))]
        return np.stack([np.asarray(crop).transpose(2, 0, 1) for crop in cut])


class Keys:
    """The batches of one epoch, as (index, seed of its crops, augmentation) of every image: the DataLoader's order.

    What an epoch holds depends on `seed`, the epoch's number and the augmentation alone. A shuffled epoch drops the
    last, smaller batch (its BN statistics would differ); an epoch in order has every image once.
    """

    def __init__(self, count, batch_size, seed, augmentation, shuffled):
        self.count, self.batch_size, self.seed, self.shuffled = count, batch_size, seed, shuffled
        self.start_epoch(0, augmentation)

    def start_epoch(self, epoch, augmentation):
        """Name the epoch that the next iteration gives."""
        self.epoch, self.augmentation = epoch, augmentation

    def __len__(self):
        return self.count // self.batch_size if self.shuffled else -(-self.count // self.batch_size)

    def __iter__(self):
        if self.shuffled:
            generator = random_from(self.seed, 'order', self.epoch)
            order = torch.randperm(self.count, generator=generator).tolist()
            seeds = torch.randint(2**62, (self.count,), generator=generator).tolist()
        else:
            order, seeds = range(self.count), [0] * self.count
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            batch = slice(start, start + self.batch_size)
            yield [(index, seed, self.augmentation) for index, seed in zip(order[batch], seeds[batch], strict=True)]


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
        'train': batches(args, replace(train, views=2), shuffled=True),
        'val': iterators.get('val'),
        'test': iterators.get('test', iterators.get('val')),
    }


def in_order(args, images):
    """Batches of a split as evaluation wants it: every image once, in order, the centre crop."""
    return batches(args, replace(images, views=0), shuffled=False)


def batches(args, images, shuffled):
    workers = 0 if images.pixels is not None else cpu_count() if args.num_workers < 0 else args.num_workers
    return torch.utils.data.DataLoader(
        images,
        batch_sampler=Keys(len(images), args.batch_size, args.random_seed, args.augmentation, shuffled),
        num_workers=workers,
        collate_fn=as_it_is,
        pin_memory=get_device(args).type == 'cuda',
        persistent_workers=workers > 0 and shuffled,
    )


def as_it_is(batch):
    return batch


def load_splits(args):
    """{'train', 'val', 'test'} of args.image_path as Images, decoded where they are small; None where missing."""
    root = path_of(args.image_path)
    if args.preset == 'demo' and root == ROOT / 'data/demo':
        demo.make_demo(root, lambda jobs: bar(jobs, 'drawing the demo set'))
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
        pixels = hold_in_memory(root / name, files)
        splits[name] = make_images(args, root / name, files, numbers, classes, pixels)
    return splits


def labelled(images):
    """Those of `images` that have a label (a flat train has none, STL-10's has some)."""
    rows = (images.labels >= 0).nonzero()[:, 0]
    if len(rows) == len(images):
        return images
    names = [images.names[row] for row in rows]
    pixels = None if images.pixels is None else images.pixels[rows]
    return replace(images, names=names, labels=images.labels[rows], pixels=pixels)


def make_images(args, folder, names, labels, classes, pixels):
    labels = torch.as_tensor(labels, dtype=torch.int64)
    return Images(folder, names, labels, classes, pixels, args.image_size, args.crop_ratio)


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
    return make_images(args, folder, files, [-1] * len(files), [], hold_in_memory(folder, files))


def find_images(folder):
    """(files relative to folder, class numbers, class names) of a split; flat: numbers -1 and no names."""
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith('.'))
    files = list_images(folder)
    if not files:
        raise UserError(f'{folder} holds no images ({" ".join(EXTENSIONS)})')
    if not classes:
        return files, [-1] * len(files), []
    number = {name: i for i, name in enumerate(classes)}
    owners = [file.split(os.sep)[0] for file in files]
    for file, owner in zip(files, owners, strict=True):
        if owner not in number:
            raise UserError(f'{folder} has class folders, and beside them the image {file}: move it into a class')
    for name in sorted(set(classes) - set(owners)):
        raise UserError(f'the class folder {folder / name} holds no images: fill or delete it')
    return files, [number[owner] for owner in owners], classes


def list_images(folder):
    """The image files under `folder`, sorted, relative to it; what begins with a dot is left out."""
    files = []
    for where, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith('.')]
        below = os.path.relpath(where, folder)
        files += [
            os.path.normpath(os.path.join(below, name))
            for name in names
            if name.lower().endswith(EXTENSIONS) and not name.startswith('.')
        ]
    return sorted(files)


def decode(path):
    """A file as a PIL image in RGB. Raises WorkError with the file's name where it cannot be read."""
    try:
        with Image.open(path) as image:
            return image.convert('RGB')
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = 'it is not an image' if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise WorkError(f'cannot read the image {path}: {reason}') from None


def hold_in_memory(folder, files):
    """The images as N x 3 x H x W uint8, if all are small, of one size and fit; else None.

    Raises WorkError naming the first file that cannot be read, and how many there are.
    """
    try:
        width, height = decode(folder / files[0]).size
    except WorkError:
        width = height = 1  # whatever else is there will tell
    if max(width, height) > SMALL_SIDE or len(files) * width * height * 3 > MEMORY_BYTES:
        return None
    images, errors = decode_all(folder, files, f'reading {folder.parent.name}/{folder.name}', small=True)
    if errors:
        more = f' (and {len(errors) - 1} more; python3 cli.py check_dataloader names all)' if len(errors) > 1 else ''
        raise WorkError(f'{errors[0]}{more}')
    return None if images is None else torch.from_numpy(images)


def decode_all(folder, files, title, small):
    """Read every file. Returns (N x 3 x H x W uint8 or None, list of WorkErrors).

    small: keep the images, and stop with (None, []) at the first that has another size than the others.
    """
    kept, errors = None, []

    def read(name):
        try:
            image = decode(folder / name)
            return np.asarray(image).transpose(2, 0, 1) if small else None
        except WorkError as error:
            return error

    with ThreadPoolExecutor(cpu_count()) as pool:
        for i, image in enumerate(bar(pool.map(read, files), title, len(files))):
            if isinstance(image, WorkError):
                errors.append(image)
            elif small:
                if kept is None:
                    kept = np.empty((len(files), *image.shape), np.uint8)
                if image.shape != kept.shape[1:]:
                    pool.shutdown(cancel_futures=True)
                    return None, []
                kept[i] = image
    return kept, errors


def bar(jobs, title, total=None):
    """A progress bar around `jobs` on a terminal; nothing where the output is a file."""
    return tqdm(jobs, desc=title, total=total, unit='images', leave=False, disable=None)


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
    print(f'fetching {root.name} into {root} (checked, and kept if it is there)', flush=True)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            getattr(datasets, root.name.upper())(root, download=True)
    except (RuntimeError, OSError) as error:
        raise WorkError(f'could not fetch {root.name}: {error}; try again, or put its files into {root}') from None
