"""CIFAR-10, CIFAR-100 and STL-10 in torchvision's files: download them, and read them as splits."""

import contextlib
import io

import numpy as np
import torch

from dataloader.readers.memory import Memory
from dataloader.sources.path_array import PathArray
from dataloader.sources.split_source import SplitSource
from runtime.errors import UserError, WorkError
from runtime.messages import log

DATASET_FOLDERS = {'cifar10': 'cifar-10-batches-py', 'cifar100': 'cifar-100-python', 'stl10': 'stl10_binary'}


def detect_dataset(root):
    """Return which dataset of torchvision the folder has: a key of DATASET_FOLDERS, or None, also if there is
    train/."""
    if (root / 'train').is_dir():
        return None
    return next((kind for kind, name in DATASET_FOLDERS.items() if (root / name).is_dir()), None)


def torchvision_splits(root, kind):
    """Return {'train': SplitSource, 'val': SplitSource}; val is the test set, and STL-10's unlabeled images are in
    train. Raises WorkError if files are missing or damaged."""
    from torchvision import datasets

    splits = {}
    for name, is_train in (('train', True), ('val', False)):
        try:
            if kind == 'stl10':
                data = datasets.STL10(root, split='train+unlabeled' if is_train else 'test')
                pixels, labels = data.data, data.labels
            else:
                data = (datasets.CIFAR10 if kind == 'cifar10' else datasets.CIFAR100)(root, train=is_train)
                pixels, labels = data.data.transpose(0, 3, 1, 2), data.targets
        except (RuntimeError, OSError):
            raise WorkError(
                f'{root / DATASET_FOLDERS[kind]} is incomplete or damaged: delete it and add `download=True`'
            ) from None
        names = PathArray(f'{name}/{i:05d}' for i in range(len(pixels)))
        store = Memory(names, torch.from_numpy(np.ascontiguousarray(pixels)))
        splits[name] = SplitSource(root / name, store, torch.as_tensor(labels, dtype=torch.int64), data.classes)
    return splits


def download(root):
    """Download the dataset that the folder is named after (CIFAR-10, CIFAR-100 or STL-10) with torchvision."""
    from torchvision import datasets

    if root.name not in DATASET_FOLDERS:
        raise UserError(f'`download` fetches cifar10, cifar100 or stl10: end `image_path` in one of them, not {root}')
    log(f'downloading {root.name} into {root} (verified, and not repeated if it exists)')
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            getattr(datasets, root.name.upper())(root, download=True)
    except (RuntimeError, OSError) as error:
        raise WorkError(f'could not download {root.name}: {error}; try again, or put its files into {root}') from None
