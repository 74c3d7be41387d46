"""Cache files, with a fingerprint of what they were made from."""

import hashlib
import os

import torch

from runtime.atomic_write import atomic_write_on_main
from runtime.console import printable
from runtime.messages import log


def cache_file(cache_path, folder, name, kind):
    """Return the path of the cache file for `name` in `folder`. kind: the kind of its content."""
    path_hash = hashlib.blake2b(os.fsencode(folder) + b'/' + os.fsencode(name), digest_size=4).hexdigest()
    label = ''.join(c if c.isalnum() or c in '-_.' else '_' for c in f'{folder.name}_{name}' if c.isascii())[:80]
    return cache_path / f'{label}_{path_hash}_{kind}.pt'


def load(path, fingerprint):
    """Load a cache file, memory-mapped. Returns None if it is missing, damaged or has another fingerprint."""
    try:
        saved = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
        return saved['content'] if saved['mark'] == fingerprint else None
    except Exception:  # the unpickler raises various types; the cache is made again
        return None


def save(path, content):
    """Write a cache file. If that fails, log why and continue without it."""
    try:
        atomic_write_on_main(path, lambda aside: torch.save(content, aside))
    except (OSError, RuntimeError) as error:
        log(f'{printable(path.name)} is not cached: {error}')
