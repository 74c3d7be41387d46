"""Lists of images: text files that name them."""

import codecs
import os
import stat

import torch

from dataloader.readers.files import Files
from dataloader.sources.path_array import Names
from dataloader.sources.split_source import PACKS, Part
from errors import UserError
from runtime.console import complain, shown
from runtime.distributed import rank


def listed(path):
    """The Part of a list: a path a line, relative to the list's folder, after a tab perhaps its class."""
    found, count, owners = {}, 0, {}  # found: {path: as it is written}; owners: {path: its class}
    for line in lines_of(path):
        name, _, owner = line.partition(b'\t')
        check_is_file(path, name, first=not found)
        place, owner, count = os.path.normpath(name), os.fsdecode(owner.strip()), count + 1
        if '\t' in owner:
            raise UserError(
                f'{shown(path)} has a third column, behind {shown(name)}: it is a path a line, a tab, its class'
            )
        found.setdefault(place, name)
        if owner and owners.setdefault(place, owner) != owner:
            both = f'{shown(owners[place])} and {shown(owner)}'
            raise UserError(f'{shown(path)} has {shown(name)} in two classes, {both}: leave one line out')
    if not found:
        raise UserError(f'{shown(path)} names no image')
    if count > len(found) and not rank():
        complain('warning', f'{count - len(found)} lines of {shown(path)} name an image again: it counts once')
    classes = sorted({*owners.values()})
    number = {name: i for i, name in enumerate(classes)}
    labels = torch.tensor([number[owners[place]] if place in owners else -1 for place in found])
    return Part(path, Files(path.parent, Names(found.values())), labels, classes)


def lines_of(path):
    """The lines of a list that are not blank, as bytes: names are none of text's business."""
    content = path.read_bytes()
    if path.suffix.lower() in PACKS:
        raise UserError(f'{shown(path)} is packed: unpack it, and point `image_path` at the folder')
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f'{shown(path)} is in UTF-16: save it as UTF-8')
    if b'\0' in content[:1000]:
        raise UserError(f'{shown(path)} is no list of paths, for it is no text (images are known by their endings)')
    return [line for line in content.removeprefix(codecs.BOM_UTF8).splitlines() if line.strip()]


def check_is_file(path, name, first):
    """Raise UserError where `name`, a line of the list at `path`, is none of a file; one that is missing is found where
    it is read, but for the first."""
    try:
        if not stat.S_ISREG(os.stat(os.path.join(os.fsencode(path.parent), name)).st_mode):
            raise UserError(f'{shown(path)} names {shown(name)}, which is no file')
    except FileNotFoundError:
        if first:
            raise UserError(
                f'{shown(path)}: there is no file {shown(name[:80])}, its first line, in '
                f'{shown(path.parent)}; a list has a path a line, after a tab the class'
            ) from None
    except PermissionError as error:
        raise UserError(f'{shown(path)} names {shown(name)}, which may not be read: {error.strerror}') from None
    except (OSError, ValueError):
        raise UserError(f'{shown(path)} is no list of paths: a line of it is {shown(name[:80])}') from None
