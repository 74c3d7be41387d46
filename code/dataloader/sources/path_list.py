"""Lists of images: text files that name them."""

import codecs
import os
import stat

import torch

from dataloader.readers.files import Files
from dataloader.sources.path_array import PathArray
from dataloader.sources.split_source import COMPRESSED_SUFFIXES, SplitSource
from runtime.console import print_message, printable
from runtime.distributed import rank
from runtime.errors import UserError


def read_path_list(path):
    """The SplitSource of a list: a path a line, relative to the list's folder, after a tab perhaps its class."""
    found, count, path_to_class = {}, 0, {}  # found: {path: as it is written}; owners: {path: its class}
    for line in read_lines(path):
        name, _, class_name = line.partition(b'\t')
        require_file(path, name, first=not found)
        normalized_path, class_name, count = os.path.normpath(name), os.fsdecode(class_name.strip()), count + 1
        if '\t' in class_name:
            raise UserError(
                f'{printable(path)} has a third column, behind {printable(name)}: it is a path a line, a tab, its class'
            )
        found.setdefault(normalized_path, name)
        if class_name and path_to_class.setdefault(normalized_path, class_name) != class_name:
            both = f'{printable(path_to_class[normalized_path])} and {printable(class_name)}'
            raise UserError(f'{printable(path)} has {printable(name)} in two classes, {both}: leave one line out')
    if not found:
        raise UserError(f'{printable(path)} names no image')
    if count > len(found) and not rank():
        print_message('warning', f'{count - len(found)} lines of {printable(path)} name an image again: it counts once')
    classes = sorted({*path_to_class.values()})
    number = {name: i for i, name in enumerate(classes)}
    labels = torch.tensor(
        [
            number[path_to_class[normalized_path]] if normalized_path in path_to_class else -1
            for normalized_path in found
        ]
    )
    return SplitSource(path, Files(path.parent, PathArray(found.values())), labels, classes)


def read_lines(path):
    """The lines of a list that are not blank, as bytes: names are none of text's business."""
    content = path.read_bytes()
    if path.suffix.lower() in COMPRESSED_SUFFIXES:
        raise UserError(f'{printable(path)} is packed: unpack it, and point `image_path` at the folder')
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f'{printable(path)} is in UTF-16: save it as UTF-8')
    if b'\0' in content[:1000]:
        raise UserError(f'{printable(path)} is no list of paths, for it is no text (images are known by their endings)')
    return [line for line in content.removeprefix(codecs.BOM_UTF8).splitlines() if line.strip()]


def require_file(path, name, first):
    """Raise UserError where `name`, a line of the list at `path`, is none of a file; one that is missing is found where
    it is read, but for the first."""
    try:
        if not stat.S_ISREG(os.stat(os.path.join(os.fsencode(path.parent), name)).st_mode):
            raise UserError(f'{printable(path)} names {printable(name)}, which is no file')
    except FileNotFoundError:
        if first:
            raise UserError(
                f'{printable(path)}: there is no file {printable(name[:80])}, its first line, in '
                f'{printable(path.parent)}; a list has a path a line, after a tab the class'
            ) from None
    except PermissionError as error:
        raise UserError(f'{printable(path)} names {printable(name)}, which may not be read: {error.strerror}') from None
    except (OSError, ValueError):
        raise UserError(f'{printable(path)} is no list of paths: a line of it is {printable(name[:80])}') from None
