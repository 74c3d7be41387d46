"""ImageNet (ILSVRC 2012) as downloaded: a tar of class tars, a tar of validation images, and their labels in the
devkit."""

import csv
import io
import re
import tarfile

import torch

from runtime.console import printable
from runtime.environment import require_package
from runtime.errors import UserError, WorkError

ARCHIVES = {'train': 'ILSVRC2012_img_train.tar', 'val': 'ILSVRC2012_img_val.tar'}
DEVKIT = 'ILSVRC2012_devkit_t12.tar.gz'
VAL_GROUND_TRUTH, META = 'data/ILSVRC2012_validation_ground_truth.txt', 'data/meta.mat'


def find_archives(root):
    """Return {split: archive} of the archives in `root`; {} without the training images."""
    archives = {name: root / file for name, file in ARCHIVES.items() if (root / file).is_file()}
    return archives if 'train' in archives else {}


KAGGLE, SOLUTION = ('ILSVRC/Data/CLS-LOC', 'Data/CLS-LOC'), 'LOC_val_solution.csv'


def find_kaggle_layout(root):
    """Return (folder with train/, val/ and test/, CSV file with the labels of val or None) if `root` is Kaggle's folder
    of ImageNet, or ILSVRC in it; else None."""
    for inner in KAGGLE:
        folder = root / inner
        if (folder / 'train').is_dir():
            tables = [place / SOLUTION for place in (root, root.parent, root / 'ILSVRC')]
            return folder, next((table for table in tables if table.is_file()), None)
    return None


def val_labels_from_csv(table, names, classes):
    """Read the labels of the validation images, N int64, from Kaggle's CSV file (ImageId; class and box, ...). classes:
    those of train. Raises WorkError if it is damaged or lacks an image."""
    try:
        with open(table, newline='', encoding='utf-8') as file:
            rows = csv.DictReader(file)
            owner = {row['ImageId']: row['PredictionString'].split()[0] for row in rows}
        number = {name: i for i, name in enumerate(classes)}
        return torch.tensor([number[owner[name.rsplit('/', 1)[-1].rsplit('.', 1)[0]]] for name in names])
    except (OSError, KeyError, ValueError, IndexError, AttributeError, TypeError) as error:
        raise WorkError(f'{printable(table)} is damaged, or for other images: {error!r}') from None


def val_labels(root, names):
    """Read the labels of the validation images from the devkit. Returns (N int64, sorted class names: WordNet ids).

    names: of the images, in any order; each ends in its number. Raises UserError if the devkit is missing, WorkError if
    it is damaged.
    """
    devkit = root / DEVKIT
    if not devkit.is_file():
        raise UserError(f'the labels of {ARCHIVES["val"]} are in {DEVKIT}, which is not in {printable(root)}')
    try:
        with tarfile.open(devkit, 'r:gz') as archive:
            files = {member.name.split('/', 1)[-1]: member for member in archive if member.isreg()}
            truth = [int(line) for line in archive.extractfile(files[VAL_GROUND_TRUTH]).read().split()]
            meta = archive.extractfile(files[META]).read()
        synsets = require_package('scipy.io', "the labels in ImageNet's devkit").loadmat(
            io.BytesIO(meta), squeeze_me=True
        )
        # ILSVRC2012_ID, WNID, words, gloss, num_children, ...: leaves are the classes
        wnid = {int(row[0]): str(row[1]) for row in synsets['synsets'].tolist() if int(row[4]) == 0}
        classes = sorted(wnid.values())
        number = {name: i for i, name in enumerate(classes)}
        image_labels = [number[wnid[identity]] for identity in truth]
        labels = [image_labels[int(re.search(r'(\d+)\.\w+$', name)[1]) - 1] for name in names]
    except (tarfile.TarError, OSError, EOFError, KeyError, ValueError, IndexError, TypeError) as error:
        raise WorkError(f'{printable(devkit)} is damaged, or for other images: {error!r}') from None
    return torch.tensor(labels), classes
