"""Lines on standard error, in colour where there is somebody to see it. Standard library only."""

import os
import sys

COLOURS = {'error': 31, 'warning': 33}


def complain(kind, line):
    """Print `<kind>: <line>`; in the colour of its kind on a terminal, unless the environment has NO_COLOR
    (no-color.org). kind: error or warning."""
    text = f'{kind}: {line}'
    if sys.stderr.isatty() and not os.environ.get('NO_COLOR'):
        text = f'\033[{COLOURS[kind]}m{text}\033[0m'
    print(text, file=sys.stderr, flush=True)
