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
    """Return the split for a folder with this name, or None."""
    return SPLIT_ALIASES.get(YEAR_SUFFIX.sub('', name.lower()))


def require_train(root, names):
    """Raise UserError if a dataset has splits but no train. names: {split: its name in the folder}."""
    if 'train' not in names:
        present = ', '.join(sorted(map(printable, names.values())))
        raise UserError(f'{printable(root)} has {present} but no train: which images are for training?')
