"""The order of the images in an epoch, their seeds, and their distribution over ranks."""

import torch

from runtime.distributed import rank, rows_per_rank
from runtime.seeding import generator_for


class EpochBatchSampler:
    """A batch sampler. A batch is a list of (index, seed of its views, augmentation name), one per image.

    order, seeds: N int64, for all ranks: the row numbers of the epoch's images, and a seed for each. They depend only
    on `seed` and the number of the epoch. drop_last: skip the last, smaller batch, whose BN statistics would differ.
    With several ranks each gets its part of every batch if shuffled (at least one image, which another rank may have
    too), else its part of the whole.
    """

    def __init__(self, count, batch_size, seed, augmentation, shuffled, drop_last):
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.shuffled, self.drop_last = shuffled, drop_last
        self.start_epoch(0, augmentation)

    def start_epoch(self, epoch, augmentation, first=0):
        """Set the epoch of the next iteration, and how many of its images (if shuffled) are done already."""
        self.augmentation, self.start_index = augmentation, first
        generator = generator_for(self.seed, 'order', epoch)
        self.order = torch.randperm(self.count, generator=generator) if self.shuffled else torch.arange(self.count)
        self.seeds = torch.randint(2**62, (self.count,), generator=generator)

    def __len__(self):
        """Number of remaining batches of the epoch."""
        remaining = max(0, self.count - self.start_index) if self.shuffled else len(rank_slice(range(self.count)))
        return remaining // self.batch_size if self.drop_last else -(-remaining // self.batch_size)

    def sizes(self):
        """Return the size of each batch over all ranks, if shuffled."""
        return [min(self.batch_size, self.count - self.start_index - i * self.batch_size) for i in range(len(self))]

    def rank_part(self, values, first):
        """Return this rank's part of the shuffled batch that begins at image `first` of the epoch. values: order, or
        seeds."""
        batch = values[first : first + self.batch_size]
        return rank_slice(batch) if len(rank_slice(batch)) else batch[:1]

    def __iter__(self):
        order, seeds = self.order, self.seeds
        if not self.shuffled:
            order, seeds = rank_slice(order), rank_slice(seeds)
        for start in range(self.start_index, self.start_index + len(self) * self.batch_size, self.batch_size):
            if self.shuffled:
                rows = self.rank_part(order, start), self.rank_part(seeds, start)
            else:
                rows = order[start : start + self.batch_size], seeds[start : start + self.batch_size]
            yield [
                (index, seed, self.augmentation) for index, seed in zip(*(part.tolist() for part in rows), strict=True)
            ]


def rank_slice(rows):
    """Return this rank's part of the rows: a contiguous slice."""
    each = rows_per_rank(len(rows))
    return rows[rank() * each : (rank() + 1) * each]
