"""From files to batches: layouts, orders, worker processes, torchvision's own files, odd images."""

import functools
import hashlib
import os
import pickle
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from commands.pack import pack
from dataloader import vision
from dataloader.augment import crop
from dataloader.augment.augmentations import AUGMENTATIONS
from dataloader.cache import decoded
from dataloader.load_dataset import eval_loader, get_iterator, labeled_subset, load_splits
from dataloader.loading.dataset import ImageDataset
from dataloader.loading.decode import decode
from dataloader.sources import demo
from metric.accuracy import topk_accuracy
from metric.knn import knn_scores
from runtime.errors import UserError, WorkError
from runtime.options import get_config
from runtime.seeding import generator_for
from utils import prepare_batch


def options(folder, **more):
    given = {
        'preset': 'demo',
        'image_path': str(folder),
        'cache_path': str(folder.parent / 'cache'),
        'batch_size': 8,
        'num_workers': 0,
    }
    return get_config(**given | more)


def copy_of(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / 'copy')


def test_loader_of_images_without_labels_on_gpu_is_empty(drawn, monkeypatch):
    """Training builds one for kNN, also if no image of train has a label."""
    monkeypatch.setattr(ImageDataset, 'on_gpu', lambda self: True)
    images = load_splits(options(drawn))['train']
    images.labels[:] = -1
    assert len(eval_loader(images.args, labeled_subset(images))) == 0


def test_labels_follow_folders(drawn):
    args = options(drawn)
    iterators = get_iterator(args)
    assert set(iterators) == {'train', 'val', 'test'}
    assert iterators['test'] is iterators['val']
    seen = []
    for batch in iterators['val']:
        images, target = prepare_batch(args, batch)
        assert (images.dtype, target.dtype) == (torch.uint8, torch.int64)
        seen += list(zip(images, target.tolist(), strict=True))
    files = sorted((drawn / 'val').rglob('*.png'))
    assert len(seen) == len(files) == 24
    for file, (image, label) in zip(files, seen, strict=True):
        assert ('checks', 'dots', 'stripes')[label] == file.parent.name
        np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), np.asarray(Image.open(file).convert('RGB')))


def test_epoch_has_every_image_once_in_new_order(drawn):
    batches = get_iterator(options(drawn))['train']
    orders = []
    for epoch in (0, 1, 0):
        batches.batch_sampler.start_epoch(epoch, 'moco')
        orders.append([key[0] for keys in batches.batch_sampler for key in keys])
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(72))
    assert orders[0] == orders[2] != orders[1]
    assert orders[0] != [
        key[0] for keys in get_iterator(options(drawn, random_seed=1))['train'].batch_sampler for key in keys
    ]
    assert len(get_iterator(options(drawn, batch_size=50))['train']) == 1  # the last, smaller batch is left out
    assert sum(len(labels) for _, labels in get_iterator(options(drawn, batch_size=50))['val']) == 24  # not here


def test_batches_with_and_without_workers_are_equal(drawn_large):
    """Large images: crops cut in processes equal those cut here; they are fixed by the seed, new in every epoch."""
    epochs = {}
    for workers in (0, 2):
        batches = get_iterator(options(drawn_large, num_workers=workers))['train']
        assert batches.dataset.pixels is None
        for epoch in (0, 1):
            batches.batch_sampler.start_epoch(epoch, 'moco')
            epochs[workers, epoch] = [images for images, _ in batches]
    assert (epochs[0, 0][0].shape, epochs[0, 0][0].dtype) == ((8, 2, 3, 32, 32), torch.uint8)
    for epoch in (0, 1):
        for here, there in zip(epochs[0, epoch], epochs[2, epoch], strict=True):
            assert torch.equal(here, there)
    assert not torch.equal(epochs[0, 0][0], epochs[0, 1][0])


@pytest.mark.parametrize(('side', 'atol', 'mean'), [(150, 1.6 / 255, 0.4 / 255), (1100, 15 / 255, 1 / 255)])
def test_worker_crops_use_sampled_boxes(side, atol, mean, drawn, tmp_path):
    """The device path's, within the rounding to whole gray levels; of a photo that the JPEG decoder halved, within
    one gray level on average."""
    small = torch.nn.functional.interpolate(
        torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(0)), (side, side), mode='bicubic'
    )
    (tmp_path / 'set/train').mkdir(parents=True)
    image = Image.fromarray((small[0].clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy())
    for number in range(8):
        image.save(tmp_path / f'set/train/{number}.jpg', quality=95)
    images = get_iterator(options(tmp_path / 'set', image_size=128))['train'].dataset
    whole = torch.from_numpy(np.array(decode(images.folder / images.names[0]))).permute(2, 0, 1).expand(2, -1, -1, -1)
    for seed in range(8):
        crops = images.read(0, seed, 'moco') / 255
        draws = AUGMENTATIONS['moco'][0].sample(2, side, side, torch.Generator().manual_seed(seed))
        wanted = crop.crop_resize(whole / 255, draws[:, :4], draws[:, 4], 128)
        torch.testing.assert_close(crops, wanted, atol=atol, rtol=0)
        assert (crops - wanted).abs().mean() < mean


def test_eval_view_from_memory_and_workers_is_equal(drawn_large, tmp_path):
    """A folder of images that are too large for memory, and the same pixels kept in memory."""
    args = options(drawn_large)
    from_workers = eval_loader(args, load_splits(args)['val'])
    images = from_workers.dataset
    pixels = torch.stack(
        [torch.from_numpy(np.array(decode(images.folder / name))).permute(2, 0, 1) for name in images.names]
    )
    for start, batch in zip(range(0, 12, 8), from_workers, strict=True):
        ours = vision.eval_view(prepare_batch(args, batch)[0], args)
        wanted = vision.eval_view(pixels[start : start + 8], args)
        torch.testing.assert_close(ours, wanted, atol=0.04, rtol=0)  # 1.6 gray levels over the channel's std


def test_images_of_different_sizes_are_not_cached_in_memory(drawn, tmp_path):
    folder = copy_of(drawn, tmp_path)
    Image.new('RGB', (60, 20), 'red').save(folder / 'train/dots/odd.png')
    splits = load_splits(options(folder))
    assert splits['train'].pixels is None
    assert splits['val'].pixels is not None
    images, _ = next(iter(get_iterator(options(folder))['train']))
    assert images.shape == (8, 2, 3, 32, 32)


def unreadable(*_, **__):
    raise AssertionError('a file was decoded')


def test_decoded_cache_is_used_until_file_changes(drawn, tmp_path, monkeypatch):
    folder = copy_of(drawn, tmp_path)
    first = load_splits(options(folder))
    with monkeypatch.context() as patch:
        patch.setattr(decoded, 'decode_all', unreadable)
        again = load_splits(options(folder))
        for name in ('train', 'val'):
            assert torch.equal(again[name].pixels, first[name].pixels)
    Image.new('RGB', (48, 48), 'red').save(folder / 'train/dots/000.png')
    changed = load_splits(options(folder))['train']
    row = [*changed.names].index('dots/000.png')
    assert changed.pixels[row, :, 0, 0].tolist() == [255, 0, 0]
    for file in (tmp_path / 'cache').iterdir():
        file.write_bytes(file.read_bytes()[:1000])
    assert torch.equal(load_splits(options(folder))['train'].pixels, changed.pixels)


def test_cache_images_off_and_on_are_obeyed(drawn, drawn_large, tmp_path):
    assert load_splits(options(drawn, cache_images='off'))['train'].pixels is None
    assert load_splits(options(drawn_large, cache_images='on'))['train'].pixels.shape == (24, 3, 150, 150)
    folder = copy_of(drawn, tmp_path)
    Image.new('RGB', (60, 20)).save(folder / 'train/dots/odd.png')
    with pytest.raises(UserError, match='differ in size; try `cache_short_side=256`'):
        load_splits(options(folder, cache_images='on'))


def test_cache_short_side_resizes_once(drawn_large, tmp_path, monkeypatch):
    """The shorter side as asked, smaller images as they are, no file decoded the second time."""
    folder = copy_of(drawn_large, tmp_path)
    tall = Image.effect_noise((200, 301), 60).convert('RGB')
    tall.save(folder / 'train/dots/tall.png')
    small = Image.effect_noise((70, 90), 60).convert('RGB')
    small.save(folder / 'train/dots/tiny.png')
    args = options(folder, cache_short_side=100)
    train = load_splits(args)['train']
    monkeypatch.setattr(decoded, 'resize_short_side', unreadable)
    train = load_splits(args)['train']
    resized = {}
    for row, name in enumerate(train.names):
        with train.store.open(row) as image:
            resized[name] = np.asarray(image)
    np.testing.assert_array_equal(resized['dots/tiny.png'], np.asarray(small))
    wanted = tall.resize((100, 150), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(resized['dots/tall.png'], np.asarray(wanted))
    assert resized['checks/000.jpg'].shape == (100, 100, 3)
    images, target = next(iter(get_iterator(args)['train']))
    assert (images.shape, len(target)) == ((8, 2, 3, 32, 32), 8)
    monkeypatch.undo()
    flat, size = train.store.memmap_path, train.store.memmap_path.stat().st_size
    flat.unlink()
    flat.write_bytes(b'damaged')
    again = load_splits(args)['train']
    assert (again.store.memmap_path, flat.stat().st_size) == (flat, size)
    os.utime(folder / 'train/dots/tall.png', (1, 1))
    changed = load_splits(args)['train']
    assert changed.store.memmap_path != flat
    assert not flat.exists()
    other = load_splits(options(folder, cache_short_side=100, white_level=4095))['train']
    assert other.store.memmap_path != changed.store.memmap_path  # another white makes other pixels of 16 bits


def views_of(args, epochs):
    """Every view of some epochs, in the order of drawing, normalized."""
    batches = get_iterator(args)['train']
    views = []
    for epoch in range(epochs):
        batches.batch_sampler.start_epoch(epoch, args.augmentation)
        for step, (images, _) in enumerate(batches):
            views += batches.dataset.make_views(images, args.augmentation, generator_for(epoch, step))
    return torch.cat(views)


@pytest.mark.parametrize('size', ['small', 'large'])
def test_device_and_worker_views_have_equal_statistics(size, drawn, drawn_large):
    """Torchvision's transforms against ours on the same images: mean, contrast, colorfulness and detail of a view."""
    folder, epochs = (drawn, 14) if size == 'small' else (drawn_large, 42)
    ours = views_of(options(folder, blur_prob=0.5), epochs)
    theirs = views_of(options(folder, blur_prob=0.5, augment_backend='worker'), epochs)
    again = views_of(options(folder, blur_prob=0.5, augment_backend='worker', num_workers=2), 1)
    assert torch.equal(again, theirs[: len(again)])
    assert ours.shape == theirs.shape
    for measure in (
        lambda x: x.mean((1, 2, 3)),
        lambda x: x.std((1, 2, 3)),
        lambda x: x.diff(dim=3).abs().mean((1, 2, 3)),
        lambda x: x.diff(dim=2).abs().mean((1, 2, 3)),
    ):
        a, b = measure(ours).sort().values, measure(theirs).sort().values
        both = torch.cat((a, b))
        gap = (torch.searchsorted(a, both, right=True) - torch.searchsorted(b, both, right=True)).abs().max()
        assert gap / len(a) < 0.065  # of 2,000 views each: once in two thousand times with equal distributions


def test_flat_train_folder_has_no_labels(drawn, tmp_path):
    (tmp_path / 'train').mkdir()
    for number, file in enumerate(sorted((drawn / 'train').rglob('*.png'))):
        shutil.copy(file, tmp_path / f'train/{number}.png')
    iterators = get_iterator(options(tmp_path))
    images, target = next(iter(iterators['train']))
    assert (len(images), target.tolist()) == (8, [-1] * 8)
    assert (iterators['val'], iterators['test']) == (None, None)
    assert len(labeled_subset(iterators['train'].dataset)) == 0


def test_flat_test_folder_is_separate_from_val(drawn, tmp_path):
    folder = copy_of(drawn, tmp_path)
    (folder / 'test').mkdir()
    Image.new('RGB', (48, 48)).save(folder / 'test/1.png')
    iterators = get_iterator(options(folder))
    assert len(iterators['test'].dataset) == 1
    assert len(iterators['val'].dataset) == 24


def test_hidden_files_are_skipped(drawn, tmp_path):
    folder = copy_of(drawn, tmp_path)
    (folder / 'train/.cache').mkdir()
    (folder / 'train/dots/.thumb.png').write_text('no image')
    (folder / 'train/dots/notes.txt').write_text('no image')
    train = load_splits(options(folder))['train']
    assert (len(train), train.classes) == (72, ['checks', 'dots', 'stripes'])


def test_invalid_layout_raises_user_error(drawn, tmp_path):
    folder = copy_of(drawn, tmp_path)
    Image.new('RGB', (48, 48)).save(folder / 'train/stray.png')
    with pytest.raises(UserError, match='beside them the image stray.png'):
        get_iterator(options(folder))
    (folder / 'train/stray.png').unlink()
    (folder / 'val/dots').rename(folder / 'val/dot')
    with pytest.raises(UserError, match="has the class 'dot', which .*train has not"):
        get_iterator(options(folder))
    (folder / 'val/dot').rename(folder / 'val/dots')
    (folder / 'train/empty').mkdir()
    with pytest.raises(UserError, match='class folder .*empty holds no images'):
        get_iterator(options(folder))
    (folder / 'train/empty').rmdir()
    with pytest.raises(UserError, match='72 images to train on, fewer than a batch of 100: try `batch_size=64`'):
        get_iterator(options(folder, batch_size=100))


@pytest.mark.parametrize('mode', ['CMYK', 'P', 'L', 'LA', 'RGBA', '1', 'I;16'])
def test_image_modes_are_converted_to_rgb(mode, tmp_path):
    image = Image.new('I;16', (10, 12), 300) if mode == 'I;16' else Image.new('RGB', (10, 12), 'teal').convert(mode)
    path = tmp_path / ('image.jpg' if mode == 'CMYK' else 'image.png')
    image.save(path)
    assert (decode(path).mode, decode(path).size) == ('RGB', (10, 12))


def test_file_that_is_no_image_is_named(tmp_path, drawn_large):
    (tmp_path / 'text.jpg').write_text('not an image')
    with pytest.raises(WorkError, match='text.jpg: it is not an image that Pillow can read'):
        decode(tmp_path / 'text.jpg')
    whole = next((drawn_large / 'train').rglob('*.jpg')).read_bytes()
    (tmp_path / 'half.jpg').write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WorkError, match='half.jpg: .*truncated'):
        decode(tmp_path / 'half.jpg')


def digest(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.mark.parametrize('kind', ['cifar10', 'cifar100'])
def test_cifar_files_of_torchvision_load(kind, tmp_path, monkeypatch):
    """Small files in the sets' own format, with the checksums that torchvision asks for replaced by theirs."""
    cls = {'cifar10': datasets.CIFAR10, 'cifar100': datasets.CIFAR100}[kind]
    folder = tmp_path / kind / cls.base_folder
    folder.mkdir(parents=True)
    rng, key = np.random.default_rng(0), 'fine_labels' if kind == 'cifar100' else 'labels'
    lists, pixels = {}, {}
    for split, files in (('train_list', cls.train_list), ('test_list', cls.test_list)):
        pixels[split], lists[split] = [], []
        for name, _ in files:
            data = rng.integers(0, 256, (6, 3072), dtype=np.uint8)
            (folder / name).write_bytes(pickle.dumps({'data': data, key: [0, 1, 2, 0, 1, 2]}))
            pixels[split].append(data)
            lists[split].append([name, digest(folder / name)])
        monkeypatch.setattr(cls, split, lists[split])
    meta = folder / cls.meta['filename']
    meta.write_bytes(pickle.dumps({cls.meta['key']: ['a', 'b', 'c']}))
    monkeypatch.setattr(cls, 'meta', {**cls.meta, 'md5': digest(meta)})

    splits = load_splits(options(tmp_path / kind))
    for split, name in (('train', 'train_list'), ('val', 'test_list')):
        wanted = np.concatenate(pixels[name]).reshape(-1, 3, 32, 32)
        np.testing.assert_array_equal(splits[split].pixels.numpy(), wanted)
        assert splits[split].labels.tolist() == [0, 1, 2] * (len(wanted) // 3)
    assert splits['train'].classes == ['a', 'b', 'c']
    packed = pack(options(tmp_path / kind, on_unreadable='skip', output=str(tmp_path / 'packed')))
    again = load_splits(options(packed))
    assert [len(again[name]) for name in ('train', 'val')] == [len(splits['train']), 6]
    archive = Path(shutil.make_archive(tmp_path / 'served', 'gztar', folder.parent, folder.name))
    (folder / cls.test_list[0][0]).write_bytes(b'damaged')
    with pytest.raises(WorkError, match='incomplete or damaged: delete it and add `download=True`'):
        load_splits(options(tmp_path / kind))
    shutil.rmtree(folder)
    handler = functools.partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f'http://127.0.0.1:{server.server_port}/{archive.name}'
        for name, value in (('url', address), ('filename', archive.name), ('tgz_md5', digest(archive))):
            monkeypatch.setattr(cls, name, value)
        fetched = load_splits(options(tmp_path / kind, download=True))
        server.shutdown()
    for name, images in splits.items():
        if images is not None:
            np.testing.assert_array_equal(fetched[name].pixels.numpy(), images.pixels.numpy())


def test_stl10_files_load_with_unlabeled_images(tmp_path, monkeypatch):
    """Its unlabeled images are pretrained on, and take no part in kNN and the probe."""
    folder = tmp_path / 'stl10' / datasets.STL10.base_folder
    folder.mkdir(parents=True)
    rng, data = np.random.default_rng(0), {}
    for name, count in (('train_X.bin', 3), ('unlabeled_X.bin', 5), ('test_X.bin', 4)):
        data[name] = rng.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8)
        data[name].transpose(0, 1, 3, 2).tofile(folder / name)  # the files are column by column
    np.array([1, 2, 1], np.uint8).tofile(folder / 'train_y.bin')
    np.array([2, 2, 1, 1], np.uint8).tofile(folder / 'test_y.bin')
    (folder / 'class_names.txt').write_text('bird\ncar\n')
    for name in ('train_list', 'test_list'):
        files = [[file, digest(folder / file)] for file, _ in getattr(datasets.STL10, name) if (folder / file).exists()]
        monkeypatch.setattr(datasets.STL10, name, files)
    monkeypatch.setattr(datasets.STL10, '_check_integrity', lambda self: True)
    splits = load_splits(options(tmp_path / 'stl10'))
    assert splits['train'].labels.tolist() == [0, 1, 0] + [-1] * 5
    assert splits['val'].labels.tolist() == [1, 1, 0, 0]
    np.testing.assert_array_equal(splits['val'].pixels.numpy(), data['test_X.bin'])
    bank = labeled_subset(splits['train'])
    np.testing.assert_array_equal(bank.pixels.numpy(), data['train_X.bin'])
    assert (bank.labels.tolist(), len(bank.names)) == ([0, 1, 0], 3)


def test_download_of_unknown_dataset_exits_2(tmp_path):
    with pytest.raises(UserError, match='`download` fetches cifar10, cifar100 or stl10'):
        load_splits(options(tmp_path / 'mine', download=True))


def test_demo_dataset_is_drawn_once(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, 'TRAIN_PER_CLASS', 2)
    monkeypatch.setattr(demo, 'VAL_PER_CLASS', 1)
    folder = tmp_path / 'demo'

    def interrupted(jobs):
        yield from jobs[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo.write_demo_dataset(folder, interrupted)
    assert not folder.exists()
    demo.write_demo_dataset(folder, iter)
    files = sorted(folder.rglob('*.png'))
    assert len(files) == 30
    before = [(file.stat().st_mtime_ns, file.read_bytes()) for file in files]
    demo.write_demo_dataset(folder, iter)
    assert [file.stat().st_mtime_ns for file in files] == [time for time, _ in before]
    shutil.rmtree(folder)
    demo.write_demo_dataset(folder, iter)
    assert [file.read_bytes() for file in files] == [content for _, content in before]


def test_demo_classes_are_not_separable_by_gray_levels():
    """kNN on an image's mean, spread and a 4 x 4 thumbnail: near chance (10 %), where SimSiam gets past 85 %."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(1500) % 10
    images = torch.stack([demo.draw_pattern(demo.PATTERNS[label], generator) for label in labels]).float() / 255
    thumbnails = torch.nn.functional.adaptive_avg_pool2d(images[:, None], 4).flatten(1)
    levels = torch.stack((images.mean((1, 2)) - 0.5, images.std((1, 2))), 1)
    for features in (levels, thumbnails - thumbnails.mean(0)):
        scores = knn_scores(features[1000:], features[:1000], labels[:1000], 10, 20, 0.1)
        assert topk_accuracy(scores, labels[1000:], 1) < 25
