"""The two kinds of errors, and paths."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent  # the repository; relative paths in options are relative to it


class UserError(Exception):
    """A mistake of the user: an invalid option, path or folder layout. Printed as one line, exit code 2."""


class WorkError(Exception):
    """A failure of the work: an unreadable image or checkpoint, a loss that is not finite. One line, exit code 1."""


def same_path(one, other):
    """Whether two paths are the same place, after resolving links, '..' and trailing slashes."""
    return os.path.realpath(one) == os.path.realpath(other)


def resolve_path(text):
    """Return an option's path as an absolute path, relative to the repository. Raises UserError for an unknown
    ~user."""
    try:
        return ROOT / Path(text).expanduser()
    except RuntimeError:
        raise UserError(f'{text}: there is no such user') from None
