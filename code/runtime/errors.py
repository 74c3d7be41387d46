"""What every module stands on: the two kinds of errors, and paths."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent  # the repository: relative paths in options start here


class UserError(Exception):
    """Bad use: an option, a path or a folder layout that cannot work. One line, exit code 2."""


class WorkError(Exception):
    """The work itself failed: an unreadable image or checkpoint, a loss that is not finite. One line, exit code 1."""


def same_path(one, other):
    """Whether two paths lead to one place: with or without / at the end, by way of .., of links."""
    return os.path.realpath(one) == os.path.realpath(other)


def resolve_path(text):
    """An option's path as an absolute one: relative paths start at the repository's root."""
    try:
        return ROOT / Path(text).expanduser()
    except RuntimeError:
        raise UserError(f'{text}: there is no such user whose home it could be in') from None
