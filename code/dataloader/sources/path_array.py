"""A compact array of file names."""

import hashlib
import os

import numpy as np


class PathArray:
    """A sequence of file names (str), stored as one bytes object.

    A list of strings takes three times the memory, and forked processes copy it, because Python counts references in
    the objects. Names are bytes; os.fsdecode converts undecodable ones to surrogates.
    """

    def __init__(self, names=()):
        """names: an iterable of str or bytes."""
        encoded = [os.fsencode(name) for name in names]
        self.data = b''.join(encoded)
        self.end_offsets = np.cumsum([len(name) for name in encoded], dtype=np.int64)

    @classmethod
    def from_buffer(cls, data, ends):
        """Build it from the concatenated names and their end offsets (int64)."""
        new = cls.__new__(cls)
        new.data, new.end_offsets = bytes(data), ends
        return new

    def __len__(self):
        return len(self.end_offsets)

    def bytes_at(self, index):
        """Return name `index` as bytes."""
        index = range(len(self.end_offsets))[index]
        return self.data[self.end_offsets[index - 1] if index else 0 : self.end_offsets[index]]

    def __getitem__(self, index):
        return os.fsdecode(self.bytes_at(index))

    def __iter__(self):
        return (self[index] for index in range(len(self)))

    def digest(self, more=b''):
        """Return a digest of the names and their order. more: bytes to include."""
        hashed = hashlib.blake2b(self.data, digest_size=6)
        hashed.update(self.end_offsets.tobytes())
        hashed.update(more)
        return hashed.hexdigest()

    def select(self, rows):
        """Return the names with these row numbers, in this order."""
        return PathArray(self.bytes_at(int(row)) for row in rows)
