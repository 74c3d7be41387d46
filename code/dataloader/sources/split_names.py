"""Names of splits."""

import re

from errors import UserError
from runtime.console import shown

SPLITS = {
    'train': 'train',
    'training': 'train',
    'val': 'val',
    'valid': 'val',
    'validation': 'val',
    'test': 'test',
    'testing': 'test',
}
YEAR = re.compile(r'[-_ ]?20\d\d$')  # COCO's train2017


def split_of(name):
    """The split that a folder of this name is, or None."""
    return SPLITS.get(YEAR.sub('', name.lower()))


def wants_train(root, names):
    """Raise UserError where a set has splits, {split: its name there}, and none to train on."""
    if 'train' not in names:
        said = ', '.join(sorted(map(shown, names.values())))
        raise UserError(f'{shown(root)} has {said} and no train: what is there to be trained on?')
