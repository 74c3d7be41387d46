"""Files that are kept so that the next run need not do the work again: they know what they were made from."""

import hashlib
import os

import torch

from runtime.atomic_write import atomic_write_on_main
from runtime.console import printable
from runtime.messages import log


def cache_file(cache_path, folder, name, kind):
    """The cache file for what is called `name` in `folder`. kind: of its content."""
    where = hashlib.blake2b(os.fsencode(folder) + b'/' + os.fsencode(name), digest_size=4).hexdigest()
    label = ''.join(c if c.isalnum() or c in '-_.' else '_' for c in f'{folder.name}_{name}' if c.isascii())[:80]
    return cache_path / f'{label}_{where}_{kind}.pt'


def load(path, fingerprint):
    """The content of a cache file, memory-mapped, if it is whole and of what `fingerprint` digests; else None."""
    try:
        kept = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
        return kept['content'] if kept['mark'] == fingerprint else None
    except Exception:  # what the unpickler raises on damaged bytes has no common base; the cache is made again
        return None


def save(path, content):
    """Write a cache file, or say why not: the run goes on without it."""
    try:
        atomic_write_on_main(path, lambda aside: torch.save(content, aside))
    except (OSError, RuntimeError) as error:
        log(f'{printable(path.name)} is not kept for the next run: {error}')
