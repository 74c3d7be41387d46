"""A million names in the memory that they take on disk."""

import hashlib
import os

import numpy as np


class PathArray:
    """A sequence of names (str), kept as their bytes one after the other.

    A list of as many strings takes three times the memory, and every process that looks at one copies it: Python counts
    references inside the objects. A name is bytes, not text (os.fsdecode turns what is no text into surrogates).
    """

    def __init__(self, names=()):
        """names: an iterable of str or bytes."""
        encoded = [os.fsencode(name) for name in names]
        self.data = b''.join(encoded)
        self.end_offsets = np.cumsum([len(name) for name in encoded], dtype=np.int64)

    @classmethod
    def from_buffer(cls, data, ends):
        """From the bytes of all names and where each ends (int64)."""
        new = cls.__new__(cls)
        new.data, new.end_offsets = bytes(data), ends
        return new

    def __len__(self):
        return len(self.end_offsets)

    def bytes_at(self, index):
        """Name `index` as bytes."""
        index = range(len(self.end_offsets))[index]
        return self.data[self.end_offsets[index - 1] if index else 0 : self.end_offsets[index]]

    def __getitem__(self, index):
        return os.fsdecode(self.bytes_at(index))

    def __iter__(self):
        return (self[index] for index in range(len(self)))

    def digest(self, more=b''):
        """What other names, or another order, have otherwise. more: bytes that count as well."""
        found = hashlib.blake2b(self.data, digest_size=6)
        found.update(self.end_offsets.tobytes())
        found.update(more)
        return found.hexdigest()

    def index(self, name):
        """Where `name` stands. Raises ValueError."""
        return list(self).index(name)

    def select(self, rows):
        """Those of these row numbers, in this order."""
        return PathArray(self.bytes_at(int(row)) for row in rows)
