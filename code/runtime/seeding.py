"""Random numbers that depend on a key alone, so that a resumed run draws what an unbroken one would."""

import hashlib

import torch

from runtime.distributed import rank


def generator_for(*key):
    """A CPU generator whose stream depends on `key` alone, such as (seed, 'views', epoch, step).

    Nothing has to be saved or replayed to draw step 1000 of epoch 7 again: that is what makes a resumed run equal to
    one that never stopped.
    """
    return torch.Generator().manual_seed(derive_seed(key))


def derive_seed(key):
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), 'big') >> 1


def seed_step(*key):
    """Let what a network itself draws in a step (dropout, stochastic depth, a detector's regions), which comes from
    torch's own generators, depend on `key` alone. Each process draws its own."""
    seed = derive_seed((*key, rank()))
    torch.default_generator.manual_seed(seed)
    # torch.manual_seed would ask after every kind of device, and note who asks: a quarter of a millisecond each step.
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)
    elif torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)
