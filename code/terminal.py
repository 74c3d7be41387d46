"""Colours, where there is somebody to see them. Standard library only."""

import os

CODES = {'red': 31, 'green': 32, 'yellow': 33}


def coloured(text, colour, stream):
    """`text`, in a colour where `stream` is a terminal and the environment has no NO_COLOR (no-color.org)."""
    if os.environ.get('NO_COLOR') or not stream.isatty():
        return text
    return f'\033[{CODES[colour]}m{text}\033[0m'
