"""Random generators that depend on a key only, so that a resumed run gets the same random numbers."""

import hashlib

import torch

from runtime.distributed import rank


def generator_for(*key):
    """Return a CPU generator seeded by `key`, such as (seed, 'views', epoch, step).

    No generator state has to be saved: step 1000 of epoch 7 gets the same numbers in a resumed run.
    """
    return torch.Generator().manual_seed(derive_seed(key))


def derive_seed(key):
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), 'big') >> 1


def seed_step(*key):
    """Seed torch's global generators, which networks use for dropout and stochastic depth and detectors for sampling,
    by `key` and the rank."""
    seed = derive_seed((*key, rank()))
    torch.default_generator.manual_seed(seed)
    # torch.manual_seed checks every kind of device, which takes a quarter of a millisecond per step.
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)
    elif torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)
