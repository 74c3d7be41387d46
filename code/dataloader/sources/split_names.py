"""Names of splits."""

import re

from runtime.console import printable
from runtime.errors import UserError

SPLIT_ALIASES = {
    'train': 'train',
    'training': 'train',
    'val': 'val',
    'valid': 'val',
    'validation': 'val',
    'test': 'test',
    'testing': 'test',
}
YEAR_SUFFIX = re.compile(r'[-_ ]?20\d\d$')  # COCO's train2017


def split_from_folder_name(name):
    """The split that a folder of this name is, or None."""
    return SPLIT_ALIASES.get(YEAR_SUFFIX.sub('', name.lower()))


def require_train(root, names):
    """Raise UserError where a set has splits, {split: its name there}, and none to train on."""
    if 'train' not in names:
        said = ', '.join(sorted(map(printable, names.values())))
        raise UserError(f'{printable(root)} has {said} and no train: what is there to be trained on?')
