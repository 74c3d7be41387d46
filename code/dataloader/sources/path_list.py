"""Lists of images: text files with one path per line."""

import codecs
import os
import stat

import torch

from dataloader.readers.files import Files
from dataloader.sources.path_array import PathArray
from dataloader.sources.split_source import COMPRESSED_SUFFIXES, SplitSource
from runtime.console import printable
from runtime.errors import UserError
from runtime.messages import warn


def read_path_list(path):
    """Return the SplitSource of a list: one path per line, relative to the list's folder, optionally a tab and a class.
    Raises UserError for an invalid list."""
    paths, count, path_to_class = {}, 0, {}  # paths: {normalized path: path as written}
    for line in read_lines(path):
        name, _, class_name = line.partition(b'\t')
        require_file(path, name, first=not paths)
        normalized_path, class_name, count = os.path.normpath(name), os.fsdecode(class_name.strip()), count + 1
        if '\t' in class_name:
            raise UserError(
                f'{printable(path)} has a third column, behind {printable(name)}: each line is a path, a tab, its class'
            )
        paths.setdefault(normalized_path, name)
        if class_name and path_to_class.setdefault(normalized_path, class_name) != class_name:
            two_classes = f'{printable(path_to_class[normalized_path])} and {printable(class_name)}'
            raise UserError(
                f'{printable(path)} has {printable(name)} in two classes, {two_classes}: leave one line out'
            )
    if not paths:
        raise UserError(f'{printable(path)} names no image')
    if count > len(paths):
        warn(f'{count - len(paths)} lines of {printable(path)} repeat an image, which counts once')
    classes = sorted({*path_to_class.values()})
    number = {name: i for i, name in enumerate(classes)}
    labels = torch.tensor(
        [
            number[path_to_class[normalized_path]] if normalized_path in path_to_class else -1
            for normalized_path in paths
        ]
    )
    return SplitSource(path, Files(path.parent, PathArray(paths.values())), labels, classes)


def read_lines(path):
    """Return the non-blank lines of a list as bytes."""
    content = path.read_bytes()
    if path.suffix.lower() in COMPRESSED_SUFFIXES:
        raise UserError(f'{printable(path)} is compressed: unpack it, and point `image_path` at the folder')
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f'{printable(path)} is in UTF-16: save it as UTF-8')
    if b'\0' in content[:1000]:
        raise UserError(
            f'{printable(path)} is not a list of paths, because it is not text (images are recognized by their endings)'
        )
    return [line for line in content.removeprefix(codecs.BOM_UTF8).splitlines() if line.strip()]


def require_file(path, name, first):
    """Raise UserError if `name`, a line of the list at `path`, is not a file. A missing file is only reported here for
    the first line, else when it is read."""
    try:
        if not stat.S_ISREG(os.stat(os.path.join(os.fsencode(path.parent), name)).st_mode):
            raise UserError(f'{printable(path)} names {printable(name)}, which is no file')
    except FileNotFoundError:
        if first:
            raise UserError(
                f'{printable(path)}: there is no file {printable(name[:80])}, its first line, in '
                f'{printable(path.parent)}; a list has one path per line, optionally a tab and the class'
            ) from None
    except PermissionError as error:
        raise UserError(f'{printable(path)} names {printable(name)}, which cannot be read: {error.strerror}') from None
    except (OSError, ValueError):
        raise UserError(
            f'{printable(path)} is not a list of paths: one of its lines is {printable(name[:80])}'
        ) from None
