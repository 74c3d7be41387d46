"""ImageNet (ILSVRC 2012) as it is downloaded: a tar of class tars, a tar of images, and their labels in the devkit."""

import io
import re
import tarfile

import torch

from config import UserError, WorkError
from terminal import shown
from utils import extra

ARCHIVES = {'train': 'ILSVRC2012_img_train.tar', 'val': 'ILSVRC2012_img_val.tar'}
DEVKIT = 'ILSVRC2012_devkit_t12.tar.gz'
TRUTH, META = 'data/ILSVRC2012_validation_ground_truth.txt', 'data/meta.mat'


def archives_of(root):
    """{split: archive} of those that `root` holds, {} without the training images."""
    found = {name: root / file for name, file in ARCHIVES.items() if (root / file).is_file()}
    return found if 'train' in found else {}


def labels_of(root, names):
    """(labels of the validation images, N int64, the classes' names: WordNet ids, sorted as train's folders are).

    names: of the images, in any order: each ends in its number. Raises UserError where the devkit is missing,
    WorkError where it is damaged.
    """
    devkit = root / DEVKIT
    if not devkit.is_file():
        raise UserError(f'the labels of {ARCHIVES["val"]} are in {DEVKIT}, which is not in {shown(root)}')
    try:
        with tarfile.open(devkit, 'r:gz') as archive:
            files = {member.name.split('/', 1)[-1]: member for member in archive if member.isreg()}
            truth = [int(line) for line in archive.extractfile(files[TRUTH]).read().split()]
            meta = archive.extractfile(files[META]).read()
        synsets = extra('scipy.io', "the labels in ImageNet's devkit").loadmat(io.BytesIO(meta), squeeze_me=True)
        # ILSVRC2012_ID, WNID, words, gloss, num_children, ...: leaves are the classes
        wnid = {int(row[0]): str(row[1]) for row in synsets['synsets'].tolist() if int(row[4]) == 0}
        classes = sorted(wnid.values())
        number = {name: i for i, name in enumerate(classes)}
        of_image = [number[wnid[identity]] for identity in truth]
        labels = [of_image[int(re.search(r'(\d+)\.\w+$', name)[1]) - 1] for name in names]
    except (tarfile.TarError, OSError, EOFError, KeyError, ValueError, IndexError, TypeError) as error:
        raise WorkError(f'{shown(devkit)} is damaged, or not of these images: {error!r}') from None
    return torch.tensor(labels), classes
