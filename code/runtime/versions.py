"""The versions of the libraries and of this code."""

import functools
import os
import platform
import shutil
import subprocess

import torch
import torchvision

from runtime.errors import ROOT


@functools.cache
def library_versions():
    """Return the versions of Python, torch, torchvision and this code (git commit, or SIMSIAM_COMMIT from
    setup-docker.sh)."""
    git = (
        subprocess.run(
            ['git', f'--git-dir={ROOT}/.git', 'describe', '--always', '--dirty', '--abbrev=40', '--exclude=*'],
            cwd=ROOT,  # not of an outer repository
            capture_output=True,
            text=True,
            check=False,
        )
        if shutil.which('git')
        else None
    )
    return {
        'python': platform.python_version(),
        'torch': str(torch.__version__),
        'torchvision': str(torchvision.__version__),
        'commit': os.environ.get('SIMSIAM_COMMIT') or (git.stdout.strip() if git and not git.returncode else ''),
    }
