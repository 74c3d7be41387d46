"""Lists of images: text files that name them."""

import os
import stat

import torch

from config import UserError
from dataloader.names import Names
from dataloader.part import PACKS, Part
from dataloader.stores.files import Files
from terminal import shown


def listed(path):
    """The Part of a list: a path a line, relative to the list's folder, after a tab perhaps its class."""
    names, owners, content = [], [], path.read_bytes()
    if path.suffix.lower() in PACKS:
        raise UserError(f'{shown(path)} is packed: unpack it, and point --image_path at the folder')
    if b'\0' in content[:1000]:
        raise UserError(f'{shown(path)} is no list of paths, for it is no text (images are known by their endings)')
    for line in content.removeprefix(b'\xef\xbb\xbf').splitlines():
        if not line.strip():
            continue
        name, _, owner = line.partition(b'\t')
        try:
            if not stat.S_ISREG(os.stat(os.path.join(os.fsencode(path.parent), name)).st_mode):
                raise UserError(f'{shown(path)} names {shown(name)}, which is no file')
        except FileNotFoundError:
            if not names:
                raise UserError(
                    f'{shown(path)}: there is no file {shown(name[:80])}, its first line, in '
                    f'{shown(path.parent)}; a list has a path a line, after a tab the class'
                ) from None
        except (OSError, ValueError):
            raise UserError(f'{shown(path)} is no list of paths: a line of it is {shown(name[:80])}') from None
        names.append(name)
        owners.append(os.fsdecode(owner.strip()))
    if not names:
        raise UserError(f'{shown(path)} names no image')
    classes = sorted(set(owners) - {''})
    number = {name: i for i, name in enumerate(classes)} | {'': -1}
    labels = torch.tensor([number[owner] for owner in owners])
    return Part(path, Files(path.parent, Names(names)), labels, classes)
