"""Which image when, with which seed, for which process: the order of an epoch."""

import torch

from distributed import rank, world
from utils import random_from


class Keys:
    """The batches of one epoch, as (index, seed of its views, augmentation) of every image: the DataLoader's order.

    What an epoch holds depends on `seed`, the epoch's number and the augmentation alone. drop_last: without the last,
    smaller batch, whose BN statistics would differ. Of several processes each gets its part of every batch (drop_last)
    or of the whole.
    """

    def __init__(self, count, batch_size, seed, augmentation, shuffled, drop_last):
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.shuffled, self.drop_last = shuffled, drop_last
        self.start_epoch(0, augmentation)

    def start_epoch(self, epoch, augmentation, first=0):
        """Name the epoch that the next iteration gives, and how many images of it (drop_last) are done."""
        self.epoch, self.augmentation, self.first = epoch, augmentation, first

    def __len__(self):
        """Batches of the epoch that are left."""
        if self.drop_last:
            return max(0, self.count - self.first) // self.batch_size
        return -(-len(share(range(self.count))) // self.batch_size)

    def __iter__(self):
        if self.shuffled:
            generator = random_from(self.seed, 'order', self.epoch)
            order = torch.randperm(self.count, generator=generator)
            seeds = torch.randint(2**62, (self.count,), generator=generator)
        else:
            order, seeds = torch.arange(self.count), torch.zeros(self.count, dtype=torch.int64)
        if not self.drop_last:
            order, seeds = share(order), share(seeds)
        for start in range(self.first, self.first + len(self) * self.batch_size, self.batch_size):
            rows = order[start : start + self.batch_size], seeds[start : start + self.batch_size]
            if self.drop_last:
                rows = [share(part) for part in rows]
            yield [
                (index, seed, self.augmentation) for index, seed in zip(*(part.tolist() for part in rows), strict=True)
            ]


def share(rows):
    """This process's part of what all of them work through: so many of the rows in their order."""
    each = -(-len(rows) // world())
    return rows[rank() * each : (rank() + 1) * each]
