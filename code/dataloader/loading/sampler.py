"""Which image when, with which seed, for which process: the order of an epoch."""

import torch

from runtime.distributed import rank, world_size
from runtime.seeding import generator_for


class EpochBatchSampler:
    """The batches of one epoch, as (index, seed of its views, augmentation) of every image: the DataLoader's order.

    What an epoch holds depends on `seed`, the epoch's number and the augmentation alone. drop_last: without the last,
    smaller batch, whose BN statistics would differ. Of several processes each gets its part of every batch (shuffled;
    where there is none for it, an image that another has) or of the whole.
    """

    def __init__(self, count, batch_size, seed, augmentation, shuffled, drop_last):
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.shuffled, self.drop_last = shuffled, drop_last
        self.start_epoch(0, augmentation)

    def start_epoch(self, epoch, augmentation, first=0):
        """Name the epoch that the next iteration gives, and how many images of it (shuffled) are done."""
        self.epoch, self.augmentation, self.start_index = epoch, augmentation, first

    def __len__(self):
        """Batches of the epoch that are left."""
        left = max(0, self.count - self.start_index) if self.shuffled else len(rank_slice(range(self.count)))
        return left // self.batch_size if self.drop_last else -(-left // self.batch_size)

    def sizes(self):
        """Images of each batch (shuffled), of all processes together."""
        return [min(self.batch_size, self.count - self.start_index - i * self.batch_size) for i in range(len(self))]

    def permutation_and_seeds(self):
        """The order of the epoch's images and a seed for each, N int64 both, of all processes."""
        generator = generator_for(self.seed, 'order', self.epoch)
        order = torch.randperm(self.count, generator=generator) if self.shuffled else torch.arange(self.count)
        return order, torch.randint(2**62, (self.count,), generator=generator)

    def __iter__(self):
        order, seeds = self.permutation_and_seeds()
        if not self.shuffled:
            order, seeds = rank_slice(order), rank_slice(seeds)
        for start in range(self.start_index, self.start_index + len(self) * self.batch_size, self.batch_size):
            rows = order[start : start + self.batch_size], seeds[start : start + self.batch_size]
            if self.shuffled:
                rows = [rank_slice(part) if len(rank_slice(part)) else part[:1] for part in rows]
            yield [
                (index, seed, self.augmentation) for index, seed in zip(*(part.tolist() for part in rows), strict=True)
            ]


def rank_slice(rows):
    """This process's part of what all of them work through: so many of the rows in their order."""
    each = -(-len(rows) // world_size())
    return rows[rank() * each : (rank() + 1) * each]
