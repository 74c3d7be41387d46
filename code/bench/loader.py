"""Images per second from files (or memory) to two views: ours beside the plain PIL two-crop pipeline.

    python3 bench/loader.py

Cases: jpeg224_worker, 500 x 375 JPEGs, what stays on the CPU when a GPU distorts (decode, two crops of 224 px);
jpeg224_tar, the same out of a tar archive beside out of files;
jpeg224_cpu, the same files to two ready MoCo v2 views, all on the CPU; memory32, 32 px images kept in memory to two
ready views without blur (the cifar10 preset), where the reference decodes the files. The reference is what the official
release and its followers do: one image at a time in PIL, by torchvision's transforms, in a worker
process per core.
"""

import random
import tarfile
import tempfile
from pathlib import Path

import torch
from common import bandwidth, run_in_turns, show, speed
from PIL import Image, ImageFilter
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader
from torchvision import transforms

from dataloader.load_dataset import get_iterator
from dataloader.loading.decode import decode
from runtime.environment import cpu_count
from runtime.options import IMAGENET_PIXELS, get_config
from runtime.seeding import generator_for
from utils import prefetch_to_device

PHOTOS, TINY = 768, 6144  # images of each kind; whole batches of 64 and of 512


def photo(generator, height, width):
    """A picture with detail at every scale, 3 x height x width uint8: its JPEG is as large as a photograph's."""
    x = torch.full((1, 3, height, width), 128.0)
    for side, strength in ((4, 80), (12, 50), (40, 40), (120, 30), (375, 10)):
        if side <= height:
            noise = torch.randn(1, 3, side, side * width // height, generator=generator)
            x += strength * interpolate(noise, (height, width), mode='bicubic')
    return x[0].clamp(0, 255).byte()


class PilViews(torch.utils.data.Dataset):
    """The reference: two views of an image, one after the other, in PIL."""

    def __init__(self, sources, size, blur):
        self.sources = sources
        steps = [
            transforms.RandomResizedCrop(size, scale=(0.2, 1.0)),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
            transforms.RandomGrayscale(0.2),
            transforms.RandomApply([PilBlur()], 0.5),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(*IMAGENET_PIXELS.values()),
        ]
        self.transform = transforms.Compose([step for step in steps if blur or 'Pil' not in str(step)])

    def __len__(self):
        return len(self.sources)

    def __getitem__(self, index):
        with Image.open(self.sources[index]) as file:
            image = file.convert('RGB')
        return self.transform(image), self.transform(image)


class PilBlur:
    def __call__(self, image):
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2)))

    def __repr__(self):
        return 'PilBlur'


class Decode(torch.utils.data.Dataset):
    """Nothing but decoding: no pipeline that starts from these files is faster."""

    def __init__(self, sources):
        self.sources = sources

    def __len__(self):
        return len(self.sources)

    def __getitem__(self, index):
        return decode(self.sources[index]).size[0]


def loader(dataset, size):
    return DataLoader(dataset, size, shuffle=True, num_workers=cpu_count(), persistent_workers=True)


def drain(batches, size):
    """Go through `batches`, all of `size` images; returns the number of images."""
    return sum(1 for _ in batches) * size


def views(args, batches):
    """Go through our batches to both views, as train does; returns the number of images."""
    count = 0
    for step, (images, _) in enumerate(prefetch_to_device(args, batches)):
        view1, _ = batches.dataset.make_views(images, args.augmentation, generator_for(step))
        count += len(view1)
    return count


def draw(root, count, height, width, generator, below='train'):
    """`count` JPEG files, of 48 pictures again and again: it is the decoding that counts."""
    (root / below).mkdir(parents=True)
    files = [root / f'{below}/{i:05d}.jpg' for i in range(count)]
    for i, file in enumerate(files):
        if i < 48:
            Image.fromarray(photo(generator, height, width).permute(1, 2, 0).numpy()).save(file, quality=90)
        else:
            file.write_bytes(files[i % 48].read_bytes())
    kilobytes = sum(file.stat().st_size for file in files) / count / 1024
    print(f'{count} JPEGs of {width} x {height} pixels, {kilobytes:.1f} KB each')
    return files


def pack(files, folder):
    """The files as one archive."""
    folder.mkdir()
    with tarfile.open(folder / 'train.tar', 'w') as archive:
        for file in files:
            archive.add(file, file.name)
    return folder


def main():
    generator, root = torch.Generator().manual_seed(0), Path(tempfile.mkdtemp())
    print(f'{cpu_count()} CPU cores, as many workers')
    options = {'device': 'cpu', 'cache_path': str(root / 'cache')}

    photos = draw(root / 'photos', PHOTOS, 375, 500, generator)
    options['image_path'] = str(root / 'photos')
    pil = loader(PilViews(photos, 224, blur=True), 64)
    cropped = get_iterator(get_config(preset='imagenet', batch_size=64, **options))['train']
    cropped.dataset.workers_only_crop = True
    worker = run_in_turns(lambda: drain(cropped, 64), lambda: drain(pil, 64))
    packed = options | {'image_path': str(pack(photos, root / 'packed'))}
    from_tar = get_iterator(get_config(preset='imagenet', batch_size=64, **packed))['train']
    from_tar.dataset.workers_only_crop = True
    tar = run_in_turns(lambda: drain(from_tar, 64), lambda: drain(cropped, 64))
    args = get_config(preset='imagenet', batch_size=16, **options)
    ready = get_iterator(args)['train']
    whole = run_in_turns(lambda: views(args, ready), lambda: drain(pil, 64))
    decoder = loader(Decode(photos), 64)
    decoding = max(speed(lambda: drain(decoder, 64)) for _ in range(4))

    tiny = draw(root / 'tiny', TINY, 32, 32, generator)
    options['image_path'] = str(root / 'tiny')
    args32 = get_config(preset='cifar10', **options)
    held, pil32 = get_iterator(args32)['train'], loader(PilViews(tiny, 32, blur=False), 512)
    small = run_in_turns(lambda: sum(views(args32, held) for _ in range(4)), lambda: drain(pil32, 512))
    bytes32 = 3 * 32 * 32 * (1 + 2 * 4)  # read once as uint8, written twice as float
    show(
        {
            'jpeg224_worker': (*worker, decoding),
            'jpeg224_tar': (*tar, decoding),
            'jpeg224_cpu': (*whole, decoding),
            'memory32': (*small, bandwidth() / bytes32),
        },
        {
            'jpeg224_worker': 'decoding alone',
            'jpeg224_tar': 'decoding alone; the reference is jpeg224_worker, from files',
            'jpeg224_cpu': 'decoding alone',
            'memory32': 'bytes read and written / the bandwidth of a copy',
        },
    )


if __name__ == '__main__':
    main()
