"""ImageDataset: the images of a split, and how a dataloader worker reads them."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from config import Config
from dataloader import vision
from dataloader.augment.augmentations import get_augmentation
from dataloader.loading import crops
from dataloader.loading.decode import skip_hint
from dataloader.loading.loader import catch_as_value, collate
from dataloader.loading.pixel_format import PixelFormat, to_array
from dataloader.readers.memory import Memory
from runtime.errors import WorkError
from runtime.options import pixel_levels
from runtime.seeding import generator_for
from runtime.tensors import to_device


@dataclass(eq=False)
class ImageDataset(torch.utils.data.Dataset):
    """The images of one split, read as random views or as center crops."""

    args: Config
    folder: Path
    store: object  # a reader of dataloader/readers: names, open, select, digest
    labels: torch.Tensor  # N, int64; -1: no label
    classes: list  # class names, by number
    views: int = 0  # random views of each image; 0: the center crop
    pixel_format: PixelFormat = crops.RGB8
    workers_only_crop: bool = False  # the other operations run on the device

    @property
    def names(self):
        """Names of the images, for display."""
        return self.store.names

    @property
    def pixels(self):
        """N x 3 x H x W uint8 if RGB images are in memory, else None. (Other arrays in memory are read like files.)"""
        return self.store.pixels if isinstance(self.store, Memory) and self.pixel_format.is_rgb8 else None

    def digest(self):
        """Return a digest of the names, labels and order of the images."""
        return self.names.digest(self.labels.numpy().tobytes())

    def with_options(self, args):
        """Return the same images, read with other options: size, crop, interpolation, white level."""
        levels = pixel_levels(args.white_level)
        return replace(self, args=args, pixel_format=replace(self.pixel_format, levels=levels))

    def __len__(self):
        return len(self.labels)

    def __getitems__(self, keys):
        """Load a batch. keys: list of (index, seed of its views, augmentation name). Returns (images, labels) for
        utils.prepare_batch, or an exception (loader.catch_as_value)."""
        return catch_as_value(self.load_batch, keys)

    def load_batch(self, keys):
        indices = torch.tensor([index for index, *_ in keys])
        if self.is_in_memory():
            return self.pixels.index_select(0, to_device(indices, self.pixels.device)), self.labels[indices]
        try:
            images = collate([self.read(*key) for key in keys])
        except WorkError as error:
            raise WorkError(f'{error}{skip_hint(error)}') from None
        if self.views and self.args.augment_backend == 'device' and not self.workers_only_crop:
            images = self.augment_in_worker(images, *keys[0][1:])
        return images, self.labels[indices]

    def is_in_memory(self):
        """Whether batches are whole images, to be cropped and augmented on the device."""
        return self.pixels is not None and not (self.views and self.args.augment_backend == 'worker')

    def on_gpu(self):
        return self.pixels is not None and self.pixels.is_cuda

    def read(self, index, seed, augmentation):
        """Read one image: 1 x C x S x S, the center crop, or views x C x S x S, random crops or views; in the type of
        the pixel format."""
        args, pixel_format = self.args, self.pixel_format
        with self.store.open(index) as image:
            if not self.views:
                return crops.center_crop(image, args.image_size, args.crop_ratio, args.interpolation, pixel_format)
            if args.augment_backend == 'worker':
                views = vision.torchvision_views(get_augmentation(args, augmentation))
                return views(Image.fromarray(to_array(image, pixel_format).transpose(1, 2, 0)), seed, self.views)
            generator, transform = torch.Generator().manual_seed(seed), get_augmentation(args, augmentation)
            return crops.random_crops(image, self.views, transform, generator, args.jpeg_draft, pixel_format)

    def make_views(self, images, augmentation, generator, shard=None, compiled=False):
        """Make the views of a batch on the device. Returns a tuple of N x C x S x S (vision.random_views). Views that
        workers have augmented already (on a CPU, or with `augment_backend=worker`) are only normalized."""
        if images.ndim == 5 and not self.workers_only_crop:
            # Pixels of other types than uint8 are floats in [0, 1] here.
            return vision.normalize_worker_views(images, self.args)
        transform = get_augmentation(self.args, augmentation)
        return vision.random_views(images, transform, generator, self.views, shard, compiled)

    def augment_in_worker(self, images, seed, augmentation):
        """Apply the operations to crops, N x views x C x S x S, in a worker, if the device is the CPU.

        uint8 crops are changed in place and rounded, because transferring floats between processes would take as long
        as making them. Other types become floats in [0, 1].
        """
        transform, is_rgb8 = get_augmentation(self.args, augmentation), self.pixel_format.is_rgb8
        if is_rgb8 and not transform.changes_pixels:
            return images
        flat = images.flatten(0, 1)
        draws = vision.sample(len(flat), transform, generator_for(seed, 'colours'))  # independent of the crops' stream
        views = vision.augment_cpu(flat, draws, transform, vision.to_uint8 if is_rgb8 else lambda x: x)
        if not is_rgb8:
            return views.view(*images.shape)
        flat.copy_(views)
        return images
