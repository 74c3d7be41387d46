"""ImageNet (ILSVRC 2012) as it is downloaded: a tar of class tars, a tar of images, and their labels in the devkit."""

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
    """{split: archive} of those that `root` holds, {} without the training images."""
    found = {name: root / file for name, file in ARCHIVES.items() if (root / file).is_file()}
    return found if 'train' in found else {}


KAGGLE, SOLUTION = ('ILSVRC/Data/CLS-LOC', 'Data/CLS-LOC'), 'LOC_val_solution.csv'


def find_kaggle_layout(root):
    """(the folder of train/, val/ and test/ of ImageNet as Kaggle packs it, the file with val's labels or None) where
    `root` is the competition's folder, or ILSVRC in it; else None."""
    for inner in KAGGLE:
        folder = root / inner
        if (folder / 'train').is_dir():
            tables = [place / SOLUTION for place in (root, root.parent, root / 'ILSVRC')]
            return folder, next((table for table in tables if table.is_file()), None)
    return None


def val_labels_from_csv(table, names, classes):
    """Labels of the validation images, N int64, by Kaggle's table: ImageId, then the class and a box, and so on.
    classes: those of train. Raises WorkError where it is damaged or lacks an image."""
    try:
        with open(table, newline='', encoding='utf-8') as file:
            rows = csv.DictReader(file)
            owner = {row['ImageId']: row['PredictionString'].split()[0] for row in rows}
        number = {name: i for i, name in enumerate(classes)}
        return torch.tensor([number[owner[name.rsplit('/', 1)[-1].rsplit('.', 1)[0]]] for name in names])
    except (OSError, KeyError, ValueError, IndexError, AttributeError, TypeError) as error:
        raise WorkError(f'{printable(table)} is damaged, or not of these images: {error!r}') from None


def val_labels(root, names):
    """(labels of the validation images, N int64, the classes' names: WordNet ids, sorted as train's folders are).

    names: of the images, in any order: each ends in its number. Raises UserError where the devkit is missing,
    WorkError where it is damaged.
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
        of_image = [number[wnid[identity]] for identity in truth]
        labels = [of_image[int(re.search(r'(\d+)\.\w+$', name)[1]) - 1] for name in names]
    except (tarfile.TarError, OSError, EOFError, KeyError, ValueError, IndexError, TypeError) as error:
        raise WorkError(f'{printable(devkit)} is damaged, or not of these images: {error!r}') from None
    return torch.tensor(labels), classes
