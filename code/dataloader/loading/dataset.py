"""The images of a split, and how one becomes what a worker hands on."""

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from config import Config
from dataloader import vision
from dataloader.augment.recipes import get_augmentation
from dataloader.loading import crops
from dataloader.loading.loader import catch_as_value, collate
from dataloader.loading.pixel_format import PixelFormat, to_array
from dataloader.readers.memory import Memory
from runtime.seeding import generator_for
from runtime.tensors import to_device


@dataclass(eq=False)
class ImageDataset(torch.utils.data.Dataset):
    """The images of one split, and how they are read: as random views of each, or as the centre crop."""

    args: Config
    folder: Path
    store: object  # of dataloader/readers: names, opened, select, digest
    labels: torch.Tensor  # N, int64; -1: no label
    classes: list  # names, by number
    views: int = 0  # random ones of each image; 0: the centre crop
    pixel_format: PixelFormat = crops.RGB8
    workers_only_crop: bool = False  # workers leave all but decoding and cropping to the device

    @property
    def names(self):
        """Shown to people."""
        return self.store.names

    @property
    def pixels(self):
        """N x 3 x H x W uint8 of images that are held in memory, else None. (Arrays are held there to be read as from a
        file.)"""
        return self.store.pixels if isinstance(self.store, Memory) and self.pixel_format.is_rgb8 else None

    def __len__(self):
        return len(self.labels)

    def __getitems__(self, keys):
        """keys: list of (index, seed of its views, augmentation). Returns (images, labels) for utils.prepare_batch, or
        an exception (loader.catch_as_value)."""
        return catch_as_value(self.load_batch, keys)

    def load_batch(self, keys):
        indices = torch.tensor([index for index, *_ in keys])
        if self.is_in_memory():
            return self.pixels.index_select(0, to_device(indices, self.pixels.device)), self.labels[indices]
        images = collate([self.read(*key) for key in keys])
        if self.views and self.args.augment_backend == 'device' and not self.workers_only_crop:
            images = self.augment_in_worker(images, *keys[0][1:])
        return images, self.labels[indices]

    def is_in_memory(self):
        """Whether batches are whole images, distorted on the device."""
        return self.pixels is not None and not (self.views and self.args.augment_backend == 'worker')

    def on_gpu(self):
        return self.pixels is not None and self.pixels.is_cuda

    def read(self, index, seed, augmentation):
        """One image: 1 x C x S x S, the view for evaluation, or views x C x S x S, random crops or views; in the type
        of the pixel format."""
        args, pixel_format = self.args, self.pixel_format
        with self.store.opened(index) as image:
            if not self.views:
                return crops.center_crop(image, args.image_size, args.crop_ratio, args.interpolation, pixel_format)
            if args.augment_backend == 'worker':
                views = vision.torchvision_views(get_augmentation(args, augmentation))
                return views(Image.fromarray(to_array(image, pixel_format).transpose(1, 2, 0)), seed, self.views)
            generator, recipe = torch.Generator().manual_seed(seed), get_augmentation(args, augmentation)
            return crops.random_crops(image, self.views, recipe, generator, args.jpeg_draft, pixel_format)

    def make_views(self, images, augmentation, generator, place=None, compiled=False):
        """The views of a batch, as `batch` gave it, on the device: a tuple of N x 3 x S x S (vision.random_views). What
        workers have distorted already (the device is a CPU, or `augment_backend=worker`) is only normalised here."""
        if images.ndim == 5 and not self.workers_only_crop:
            # Arrays come as floats in [0, 1].
            return vision.normalize_worker_views(images, self.args)
        recipe = get_augmentation(self.args, augmentation)
        return vision.random_views(images, recipe, generator, self.views, place, compiled)

    def augment_in_worker(self, images, seed, augmentation):
        """Distort crops, N x views x C x S x S: where the device is the CPU, the workers' part of it.

        uint8 in place, as whole grey levels, for floats would take as long to hand over as to make; of other types
        floats in [0, 1].
        """
        recipe, is_rgb8 = get_augmentation(self.args, augmentation), self.pixel_format.is_rgb8
        if is_rgb8 and not recipe.changes_pixels:
            return images
        flat = images.flatten(0, 1)
        draws = vision.sample(len(flat), recipe, generator_for(seed, 'colours'))  # not the stream that drew the crops
        views = vision.augment_cpu(flat, draws, recipe, vision.to_uint8 if is_rgb8 else lambda x: x)
        if not is_rgb8:
            return views.view(*images.shape)
        flat.copy_(views)
        return images
