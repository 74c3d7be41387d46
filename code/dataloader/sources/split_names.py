"""Names of splits."""

import os
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


# Matches a folder called like a split in the concatenated names of images.
BELOW = re.compile(
    rb'(?<![^/])((?:' + b'|'.join(name.encode() for name in SPLIT_ALIASES) + rb')(?:[-_ ]?20\d\d)?)/', re.I
)


def split_from_folder_name(name):
    """Return the split for a folder with this name, or None."""
    return SPLIT_ALIASES.get(YEAR_SUFFIX.sub('', name.lower()))


def require_train(root, names):
    """Raise UserError if a dataset has splits but no train. names: {split: its name in the folder}."""
    if 'train' not in names:
        present = ', '.join(sorted(map(printable, names.values())))
        raise UserError(f'{printable(root)} has {present} but no train: which images are for training?')


def check_no_splits_below(root, names, is_archive=False):
    """Raise UserError if images that would become one split lie in folders called train and val or test: the network
    would be trained on its evaluation images."""
    matches = {}
    for match in BELOW.finditer(names.data):
        matches.setdefault(split_from_folder_name(os.fsdecode(match[1])), match)
        if 'train' in matches and len(matches) > 1:
            break
    if 'train' in matches and len(matches) > 1:
        first = next(name for name in names if f'/{os.fsdecode(matches["train"][1])}/' in f'/{name}')
        above = first[: f'/{first}'.index(f'/{os.fsdecode(matches["train"][1])}/')].rstrip('/')
        kinds = ' and '.join(printable(match[1]) for match in matches.values())
        meant = f'is {printable(root / above)} meant? Name that as `image_path`'
        if is_archive:
            meant = 'unpack it (tar xf), and name the folder that holds train as `image_path`'
        raise UserError(
            f'{printable(root)} has no splits itself, and folders called {kinds} lie below it: {meant}; to train on '
            'all of it as one dataset, rename them'
        )
