"""Images of any number of channels, any depth, in any orientation: read as they are, or refused in a line."""

import io
import re
import shutil
import struct
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
import tifffile
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.data import get_testdata_file

import cli
from ckpt import get_model_ckpt
from conftest import TINY, draw_folder, one_line, own_paths
from dataloader.augment.augmentations import get_augmentation
from dataloader.augment.channels import IntensityJitter
from dataloader.load_dataset import eval_loader, get_iterator, load_splits
from dataloader.loading import arrays, crops, pixel_format
from dataloader.loading.decode import ORIENTATION, decode, open_image
from dataloader.loading.pixel_format import PixelFormat, to_array
from dataloader.loading.pixel_settings import NUM_SAMPLES, measure_levels
from dataloader.readers.files import Files
from dataloader.vision import eval_view, to_picture
from model.weights import adapt_first_layer
from runtime.errors import UserError, WorkError
from runtime.options import get_config, replace_args
from runtime.seeding import generator_for

DTYPES = ('uint8', 'int8', 'uint16', 'int16', 'int32', 'float16', 'float32')
examples = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def values(shape, dtype, seed=0):
    """Values over the whole range of a type."""
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == 'f':
        return (rng.normal(size=shape) * 3).astype(dtype)
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max, shape, dtype, endpoint=True)


def read(content, name, npy_axes='auto'):
    """(pixels, None) of a file, or (None, the line that refuses it)."""
    try:
        with open_image(io.BytesIO(content), name) as image:
            kind = pixel_format.image_kind(image, npy_axes)
            form = PixelFormat((*range(1, kind.channels + 1),), True, kind.dtype, npy_axes=npy_axes)
            return to_array(image, form), None
    except WorkError as error:
        return None, str(error)


@examples
@given(
    st.integers(1, 16),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from(DTYPES),
    st.sampled_from('<>'),
    st.sampled_from(('hwc', 'chw', 'hw')),
    st.booleans(),
)
def test_npy_is_read_exactly_or_refused(channels, height, width, dtype, order, axes, told):
    pixels = values((channels, height, width), dtype)
    stored = {'hwc': pixels.transpose(1, 2, 0), 'chw': pixels, 'hw': pixels[0]}[axes]
    file = io.BytesIO()
    np.save(file, stored.astype(np.dtype(dtype).newbyteorder(order)))
    told = told and axes != 'hw'
    found, line = read(file.getvalue(), 'x.npy', axes if told else 'auto')
    if line:
        assert not told
        assert 'unclear which of these are the channels: `npy_axes=hwc`' in line
        assert '\n' not in line
        assert min(stored.shape[0], stored.shape[-1]) <= 16
    else:
        assert found.dtype == np.dtype(dtype)
        assert np.array_equal(found, pixels[:1] if axes == 'hw' else pixels)


@examples
@given(
    st.integers(1, 16),
    st.integers(2, 40),
    st.integers(2, 40),
    st.sampled_from(DTYPES),
    st.sampled_from('<>'),
    st.sampled_from(('planar', 'chunky', 'pages')),
    st.sampled_from((None, 'zlib', 'tiled')),
)
def test_tiff_is_read_exactly_or_refused(channels, height, width, dtype, order, how, packed):
    pixels, file = values((channels, height, width), dtype), io.BytesIO()
    more = {'tile': (16, 16)} if packed == 'tiled' else {'compression': packed}
    if how == 'chunky' and channels > 1:
        tifffile.imwrite(
            file, pixels.transpose(1, 2, 0), byteorder=order, photometric='minisblack', planarconfig='contig', **more
        )
    elif how == 'planar' and channels > 1:
        tifffile.imwrite(file, pixels, byteorder=order, photometric='minisblack', planarconfig='separate', **more)
    else:
        tifffile.imwrite(file, pixels, byteorder=order, photometric='minisblack', metadata=None, **more)
    found, line = read(file.getvalue(), 'x.tif')
    assert line is None
    assert found.dtype == np.dtype(dtype)
    assert np.array_equal(found, pixels)


BANDS = 5


def bands(folder, kind, counts, side=20):
    """folder/<split>/<class>/<number>.<kind>: five bands of 12 bits in uint16; the class is the fifth's brightness."""
    rng = np.random.default_rng(3)
    for split, count in counts.items():
        for number, name in enumerate('ab'):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 4096, (BANDS, side, side), np.uint16)
                pixels[4] = pixels[4] // 2 + 2000 * number
                path = folder / split / name / f'{i:02d}.{kind}'
                if kind == 'npy':
                    np.save(path, pixels if side > 16 else pixels.transpose(1, 2, 0))
                else:
                    tifffile.imwrite(path, pixels, photometric='minisblack', planarconfig='separate')
    return folder


@pytest.fixture(scope='module')
def five(tmp_path_factory):
    """12 training and 6 validation images of each of two classes, five bands, as TIFF. To be read only."""
    return bands(tmp_path_factory.mktemp('five') / 'set', 'tif', {'train': 12, 'val': 6})


def pack_tar(folder, tars):
    tars.mkdir()
    for split in ('train', 'val'):
        with tarfile.open(tars / f'{split}.tar', 'w') as archive:
            for path in sorted((folder / split).rglob('*.*')):
                archive.add(path, path.relative_to(folder / split))


def batches_of(image_path, cache, **more):
    """([views of two epochs], [views for evaluation]) of a set."""
    options = {'preset': 'demo', 'image_size': 16, 'batch_size': 8, 'white_level': '4095', 'num_workers': 0, **more}
    args = get_config(image_path=str(image_path), cache_path=str(cache), **options)
    args = load_splits(args)['train'].args  # as found
    iterators, views = get_iterator(args), []
    for epoch in range(2):
        iterators['train'].batch_sampler.start_epoch(epoch, 'moco', 0)
        for step, (images, _) in enumerate(iterators['train']):
            views += iterators['train'].dataset.make_views(images, 'moco', generator_for(epoch, step))
    return args, torch.cat(views), torch.cat([eval_view(images, args) for images, _ in iterators['val']])


def test_files_memory_cache_tar_and_workers_are_equal(five, tmp_path):
    pack_tar(five, tmp_path / 'tars')
    bands(tmp_path / 'npy', 'npy', {'train': 12, 'val': 6})
    files = batches_of(five, tmp_path / 'cache', cache_images='off')
    assert files[0].num_channels == BANDS
    assert files[1].shape == (2 * 2 * 24, BANDS, 16, 16)
    for path, more in (
        (five, {}),
        (five, {'cache_images': 'off', 'num_workers': 2}),
        (five, {'cache_images': 'off', 'cache_short_side': 64}),
        (tmp_path / 'tars', {'cache_images': 'off'}),
        (tmp_path / 'npy', {'num_workers': 2}),
    ):
        args, views, plain = batches_of(path, tmp_path / 'cache', **more)
        for name in ('channels', 'white_level', 'mean', 'std'):
            assert getattr(args, name) == getattr(files[0], name)
        assert torch.equal(views, files[1])
        assert torch.equal(plain, files[2])
    other = batches_of(five, tmp_path / 'cache', cache_images='on', channels='5,1')
    assert other[1].shape[1] == 2
    torch.testing.assert_close(other[2], files[2][:, [4, 0]], atol=2e-3, rtol=0)  # one level of 4095


def test_crops_keep_type_of_file(five, tmp_path):
    args = get_config(preset='demo', image_path=str(five), cache_path=str(tmp_path), channels='1-5', num_workers=0)
    images = load_splits(args)['val']
    assert images.pixel_format.dtype == 'uint16'
    (batch, _) = next(iter(eval_loader(args, images)))
    assert batch.dtype == torch.uint16
    whole = PixelFormat((1, 2, 3, 4, 5), True, 'uint16')
    with images.store.open(0) as image:
        pixels = to_array(image, whole)
        same = crops.center_crop(image, 20, 1.0, 'bilinear', whole)
    assert np.array_equal(same[0].numpy(), pixels)


@pytest.mark.parametrize('dtype', ['uint16', 'int16', 'int32', 'uint32', 'float16', 'float32'])
def test_normalize_pixels_equals_float64_formula(dtype):
    """(x - black) / (white - black), cut to [0, 1], less the mean, by the std: in float64 by hand."""
    pixels = values((3, 2, 8, 8), dtype)
    low, high = float(pixels.min()), float(pixels.max())
    black, white = low + (high - low) / 4, high - (high - low) / 4
    args = get_config(mean='0.25', std='0.5,0.25', white_level=f'{black},{white}', channels='1-2')
    wanted = ((pixels.astype(np.float64) - black) / (white - black)).clip(0, 1)
    wanted = (wanted - 0.25) / np.array([0.5, 0.25])[:, None, None]
    found = eval_view(torch.from_numpy(pixels)[:, None], args)
    torch.testing.assert_close(found, torch.from_numpy(wanted).float(), atol=2e-3, rtol=0)


def test_to_picture_of_n_channels_is_rgb():
    for channels, shown in (('1', [0, 0, 0]), ('1-2', [0, 1, None]), ('1-5', [0, 1, 2])):
        args = get_config(channels=channels)
        x = torch.randn(2, args.num_channels, 4, 4)
        picture = to_picture(x, args)
        assert picture.shape == (2, 3, 4, 4)
        for place, channel in enumerate(shown):
            wanted = torch.zeros(2, 4, 4) if channel is None else (x[:, channel] / 5 + 0.5).clamp(0, 1)
            assert torch.equal(picture[:, place], wanted)


# An upright image and how each of EXIF's orientations has it stored.
STORED = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: x.transpose(1, 0, 2)[::-1],
    7: lambda x: x.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda x: x.transpose(1, 0, 2)[:, ::-1],
}


@pytest.fixture(scope='module', params=['png', 'webp', 'tiff', 'jpeg'])
def turned(request, tmp_path_factory):
    """A folder of eight files of one photograph, each stored in another of EXIF's orientations."""
    folder = tmp_path_factory.mktemp('turned') / request.param
    folder.mkdir()
    y, x = np.mgrid[:48, :64]
    upright = np.stack((4 * x, 255 - 5 * y, 60 + 2 * x + y), 2).astype(np.uint8)
    for number, store in STORED.items():
        image = Image.fromarray(np.ascontiguousarray(store(upright)))
        exif = Image.Exif()
        exif[ORIENTATION] = number
        more = {'lossless': True} if request.param == 'webp' else {}
        more |= {'quality': 100, 'subsampling': 0} if request.param == 'jpeg' else {}
        image.save(folder / f'{number}.{request.param}', exif=exif, **more)
    return folder


@pytest.mark.parametrize('cache', [{'cache_images': 'off'}, {}, {'cache_images': 'off', 'cache_short_side': 40}])
def test_exif_orientation_is_applied_in_all_readers(turned, cache, tmp_path):
    """In training, in evaluation (kNN too reads these views), kept or not, and in detection."""
    args = get_config(
        preset='demo',
        image_path=str(turned),
        cache_path=str(tmp_path),
        batch_size=8,
        num_workers=0,
        image_size=24,
        **cache,
    )
    images = get_iterator(args)['train'].dataset
    transform, level = get_augmentation(args, 'moco'), 9 if turned.name == 'jpeg' else 0
    plain, random = [], []
    for row in range(8):
        with images.store.open(row) as image:
            plain.append(crops.center_crop(image, 24, 0.9, 'bilinear', images.pixel_format)[0].int())
        drawn = torch.Generator().manual_seed(1)
        with images.store.open(row) as image:
            random.append(crops.random_crops(image, 2, transform, drawn, True, images.pixel_format).int())
    for found in (plain, random):
        for other in found[1:]:
            assert (other - found[0]).abs().max() <= level
    whole = [np.asarray(decode(path, upright=True)).astype(int) for path in sorted(turned.iterdir())]
    assert all(abs(other - whole[0]).max() <= level for other in whole)
    if turned.name == 'png':
        stored = replace_args(args, exif='ignore', cache_path=str(tmp_path / 'other'), cache_images='off')
        images = get_iterator(stored)['train'].dataset
        with images.store.open(2) as image:
            lying = crops.center_crop(image, 24, 0.9, 'bilinear', images.pixel_format)[0].int()
        assert (lying - plain[0].flip(1, 2)).abs().max() <= 1


def test_dicom_16_bit_checks_and_trains(tmp_path, capsys):
    """Files of pydicom's own wheel: signed and unsigned, with and without a rescale intercept, three sizes."""
    for name in ('CT_small', 'MR_small', 'MR_small_bigendian', 'MR_small_RLE', 'MR_small_implicit', 'examples_overlay'):
        for copy in range(4):
            path = tmp_path / f'set/{name}_{copy}.dcm'
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(Path(get_testdata_file(f'{name}.dcm')).read_bytes())
    paths = [f'--image_path={tmp_path}/set', '--white_level=auto', *own_paths(tmp_path)]
    assert cli.main(['check_dataloader', '--preset=demo', '--batch_size=8', *paths[:2], *paths[3:]]) == 0
    said = capsys.readouterr().out
    assert re.search(r'channel 1: -8\d\d to ', said)  # of the CT: 128 to ..., less 1024; some pixels of each image
    assert cli.main(['train', *TINY, *paths, '--batch_size=8', '--knn_every=0']) == 0
    (run,) = (tmp_path / 'ckpt').iterdir()
    args, _, _ = get_model_ckpt(get_config(ckpt_name=str(run)))
    assert (args.channels, args.num_channels) == ('rgb', 3)
    black, white = map(float, args.white_level.split(','))
    assert black < 0 < white
    assert len(args.mean.split(',')) == 3


def test_dicom_monochrome1_is_inverted(tmp_path):
    import pydicom

    dataset = pydicom.dcmread(get_testdata_file('MR_small.dcm'))
    first = arrays.open_dicom(get_testdata_file('MR_small.dcm')).pixels.astype(int)
    dataset.PhotometricInterpretation = 'MONOCHROME1'
    dataset.save_as(tmp_path / 'inverse.dcm')
    assert np.array_equal(arrays.open_dicom(tmp_path / 'inverse.dcm').pixels.astype(int), -1 - first)
    dataset.RescaleSlope, dataset.RescaleIntercept = '2', '10'
    dataset.save_as(tmp_path / 'inverse.dcm')
    wanted = (2 * -32768 + 10) + (2 * 32767 + 10) - (2 * first + 10)
    assert np.array_equal(arrays.open_dicom(tmp_path / 'inverse.dcm').pixels.astype(int), wanted)


def test_fourth_png_channel_is_dropped_with_message_or_kept(tmp_path, capsys):
    """Of a PNG, whose last channel is transparency or what an instrument put there."""
    pixels = values((12, 40, 40, 4), 'uint8')
    (tmp_path / 'set').mkdir()
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f'set/{number:02d}.png')
    given = {'preset': 'demo', 'image_path': str(tmp_path / 'set'), 'cache_path': str(tmp_path), 'cache_images': 'off'}
    images = load_splits(get_config(**given))['train']
    assert images.pixel_format.is_rgb8
    assert 'of 12 images that were read 12: transparency (the last channel) left out' in capsys.readouterr().out
    images = load_splits(get_config(**given, channels='4,1'))['train']
    with images.store.open(3) as image:
        assert np.array_equal(to_array(image, images.pixel_format), pixels[3].transpose(2, 0, 1)[[3, 0]])


@pytest.mark.parametrize(('color', 'kept'), [(2, 3), (6, 3), (4, 3)])
def test_png_16_bit_color_keeps_depth(color, kept, tmp_path):
    """Which Pillow opens as 8 bits. color: PNG's own number, RGB, RGBA, gray with transparency."""
    import struct
    import zlib

    channels = {2: 3, 6: 4, 4: 2}[color]  # what Pillow makes of gray with transparency has four
    pixels = values((9, 7, channels), 'uint16').astype('>u2')
    rows = b''.join(b'\0' + row.tobytes() for row in pixels)
    parts = [(b'IHDR', struct.pack('>2I5B', 7, 9, 16, color, 0, 0, 0)), (b'IDAT', zlib.compress(rows)), (b'IEND', b'')]
    content = b'\x89PNG\r\n\x1a\n'
    for kind, data in parts:
        content += struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    (tmp_path / 'deep.png').write_bytes(content)
    with open_image(tmp_path / 'deep.png', 'deep.png') as image:
        kind = pixel_format.image_kind(image)
        found = to_array(image, PixelFormat(dtype='uint16'))
    assert (kind.dtype, kind.channels) == ('uint16', {2: 3, 6: 4, 4: 4}[color])
    wanted = pixels.transpose(2, 0, 1).astype(np.uint16)
    assert np.array_equal(found, wanted[:3] if channels > 2 else wanted[:1].repeat(3, 0))


@pytest.mark.parametrize(
    ('name', 'make', 'said'),
    [
        ('x.npy', lambda: np.zeros((4, 4, 4)), 'it is unclear which of these are the channels'),
        ('x.npy', lambda: np.zeros(4), 'it is an array of 4, and an image has 2 or 3 axes'),
        ('x.npy', lambda: np.zeros((3, 40, 40), complex), 'its type is complex128'),
        ('x.npy', lambda: np.array([['a']]), 'its type is <U1'),
        ('x.npy', lambda: np.array([[{}]], dtype=object), 'it holds Python objects, not numbers'),
        ('x.npy', lambda: np.zeros((0, 3)), 'it is an array of 0 x 3'),
    ],
)
def test_array_that_is_no_image_is_refused(name, make, said):
    file = io.BytesIO()
    np.save(file, make())
    found, line = read(file.getvalue(), name)
    assert found is None
    assert said in line


@pytest.mark.parametrize('name', ['x.npy', 'x.tif', 'x.dcm', 'x.heic', 'x.png'])
def test_damaged_array_file_is_refused(name):
    for content in (b'', b'no image', np.random.default_rng(0).bytes(3000), b'II*\0' + bytes(100)):
        found, line = read(content, name)
        assert found is None
        assert line.startswith(f'cannot read the image {name}: ')
        assert '\n' not in line


@pytest.mark.parametrize(
    ('options', 'said'),
    [
        ({'channels': '0,1'}, '--channels is auto, rgb, or up to 4096 numbers from 1 on'),
        ({'channels': '3-1'}, '--channels is auto, rgb, or up to 4096 numbers from 1 on'),
        ({'channels': 'red'}, '--channels is auto, rgb, or up to 4096 numbers from 1 on'),
        ({'white_level': '-5'}, '--white_level is type, auto, a number above 0, or two'),
        ({'white_level': '5,5'}, '--white_level is type, auto, a number above 0, or two'),
        ({'white_level': 'nan'}, '--white_level is type, auto, a number above 0, or two'),
        ({'exif': 'maybe'}, '--exif is one of apply, ignore'),
    ],
)
def test_dicom_without_pixels_is_refused(options, said):
    with pytest.raises(UserError, match=said):
        get_config(**options)


def test_image_with_other_channels_is_named(five, tmp_path, capsys):
    odd = bands(tmp_path / 'set', 'tif', {'train': 8, 'val': 4})
    tifffile.imwrite(odd / 'train/b/07.tif', values((7, 20, 20), 'uint16'), photometric='minisblack')
    given = [f'--image_path={odd}', *own_paths(tmp_path)]
    assert cli.main(['train', *TINY, *given, '--batch_size=8']) == 1
    line = one_line(capsys.readouterr().err)
    assert '07.tif: it has 7 channels, and --channels=1-5 is for images of 5; --channels=1,2,3,4,5 leaves' in line
    assert cli.main(['train', *TINY, *given, '--batch_size=8', '--channels=1,8', '--cache_images=off']) == 2
    assert 'the images have 5, 7 channels, not those of --channels=1,8' in one_line(capsys.readouterr().err)
    assert cli.main(['train', *TINY, *given, '--batch_size=8', '--mean=0.1,0.2']) == 2
    assert '--mean=0.1,0.2 is not one number for all of 5 channels nor one for each' in capsys.readouterr().err


@pytest.mark.parametrize('channels', [1, 2, 3, 4, 5, 7, 13])
def test_adapt_first_layer_equals_timm(channels):
    from timm.models import adapt_input_conv

    weight = torch.randn(8, 3, 5, 5)
    torch.testing.assert_close(adapt_first_layer(weight, channels), adapt_input_conv(channels, weight.clone()))


@pytest.mark.parametrize('backbone', ['resnet18', 'timm/resnet10t', 'vit_b_32', 'mobilenet_v3_small'])
def test_init_from_rgb_weights_trains_five_channels(backbone, five, tmp_path, capsys):
    torch.manual_seed(0)
    if backbone.startswith('timm/'):
        made = timm.create_model(backbone.removeprefix('timm/'))
    else:
        import torchvision

        made = torchvision.models.get_model(backbone, **({'image_size': 32} if 'vit' in backbone else {}))
    torch.save(made.state_dict(), tmp_path / 'w.pth')
    args = get_config(
        preset='imagenet', init_from=str(tmp_path / 'w.pth'), backbone=backbone, channels='1-5', image_size=32
    )
    args, model, _ = get_model_ckpt(args)
    assert args.mean == 'auto'  # the weights say three
    name, first = next((name, value) for name, value in made.state_dict().items() if value.ndim == 4)
    torch.testing.assert_close(model.backbone.state_dict()[name], adapt_first_layer(first, 5))
    assert f'backbone.{name} of 3 channels is adapted to 5' in capsys.readouterr().out
    assert model.backbone.eval()(torch.zeros(2, 5, 32, 32)).ndim == 2


@pytest.mark.parametrize('each', [True, False])
def test_intensity_jitter_is_relative_to_channel_std(each):
    """Contrast around the mean, and a shift: as drawn, of all channels alike or of each its own."""
    mean, std = (0.1, 0.2, 0.3, 0.4, 0.5), (0.01, 0.02, 0.03, 0.04, 0.05)
    jitter = IntensityJitter(0.4, 0.3, mean, std, 5 if each else 1, 0.8)
    draws = jitter.sample(4000, generator_for('jitter'))
    assert draws.shape == (4000, jitter.columns)
    y = torch.randn(4000, 5, 2, 2)
    mean, std = (torch.tensor(values).view(1, 5, 1, 1) for values in (mean, std))
    changed = (jitter.on_cpu(mean + std * y, draws) - mean) / std
    torch.testing.assert_close(changed, (jitter.on_gpu(mean + std * y, draws) - mean) / std)
    factors, shifts = draws.chunk(2, 1)
    torch.testing.assert_close(changed, y * factors[..., None, None] + shifts[..., None, None], atol=1e-4, rtol=0)
    touched = (factors != 1).any(1)
    assert touched.float().mean() == pytest.approx(0.8, abs=0.02)
    assert factors.min() == pytest.approx(0.7, abs=0.01)
    assert shifts.max() == pytest.approx(1.9 * 0.4, abs=0.01)
    assert (factors.shape[1], shifts.shape[1]) == ((5, 5) if each else (1, 1))


def test_augmentation_of_n_channels_has_no_color_operations(five):
    for options, names in (
        ({'channels': '1-5'}, ['IntensityJitter 1', 'GaussianBlur']),
        ({'channels': '1-5', 'jitter': 'channel'}, ['IntensityJitter 5', 'GaussianBlur']),
        ({'channels': 'rgb', 'jitter': 'channel'}, ['IntensityJitter 3', 'GaussianBlur']),
        ({'channels': 'rgb'}, ['ColorJitter', 'RandomGrayscale', 'GaussianBlur']),
    ):
        transform = get_augmentation(get_config(**options), 'moco')
        shown = [f'{type(each).__name__} {getattr(each, "groups", "")}'.strip() for each in transform.operations]
        assert shown == names


def test_five_channels_work_in_every_command(five, tmp_path, capsys):
    paths = own_paths(tmp_path)
    given = [*TINY, f'--image_path={five}', '--batch_size=8', '--white_level=auto', '--jitter=channel', *paths]
    assert cli.main(['train', *given, '--evaluate_after=True', '--backbone=timm/resnet10t', '--stem=imagenet']) == 0
    said = capsys.readouterr().out
    assert 'images of 5 channels, uint16; used are --channels=1-5' in said
    assert 'augmentation: a gain and an offset for each channel (--jitter=channel)' in said
    (run,) = (tmp_path / 'ckpt').iterdir()
    args, _, _ = get_model_ckpt(get_config(ckpt_name=str(run)))
    assert len(args.std.split(',')) == 5
    assert 4000 < float(args.white_level) < 4096
    of_run, here = [f'--ckpt_name={run.name}', *paths], f'--output={tmp_path}/out'
    for protocol in ('knn', 'compare', 'semi', 'label_free', 'transfer'):
        more = (
            [f'--transfer_path={five}'] if protocol == 'transfer' else ['--beside=untrained'][: protocol == 'compare']
        )
        more += ['--finetune_epochs=1', '--label_fraction=0.5'] if protocol == 'semi' else []
        assert cli.main(['evaluate', *of_run, f'--protocol={protocol}', *more]) == 0, protocol
    assert cli.main(['infer', *of_run, f'--image_path={five}/val', f'{here}.csv', '--neighbors=2']) == 0
    assert cli.main(['embed', *of_run, f'--image_path={five}/val', f'{here}.npz', '--projector_images=6']) == 0
    assert cli.main(['select', *of_run, f'{here}s.csv', '--num_select=3']) == 0
    assert cli.main(['report', *of_run, f'{here}.html']) == 0
    assert cli.main(['export', *of_run, f'{here}_timm', '--format=timm']) == 0
    backbone = timm.create_model(f'local-dir:{tmp_path}/out_timm', pretrained=True).eval()
    assert backbone(torch.zeros(1, 5, 32, 32)).shape == (1, 512)
    assert cli.main(['export', *of_run, f'{here}.onnx', '--format=onnx']) == 0
    capsys.readouterr()
    assert cli.main(['evaluate', *of_run, '--protocol=detection', '--detection_path=x']) == 2
    assert 'is for red, green and blue, and this backbone takes --channels=1-5' in capsys.readouterr().err
    assert cli.main(['evaluate', *of_run, '--protocol=knn', '--channels=1,2']) == 2
    assert '--channels=1,2 contradicts the checkpoint' in capsys.readouterr().err


def test_mean_std_dataset_is_measured_and_saved(drawn, tmp_path, capsys):
    given = [*TINY, f'--image_path={drawn}', '--mean=dataset', '--std=dataset', '--knn_every=0', *own_paths(tmp_path)]
    assert cli.main(['train', *given]) == 0
    (run,) = (tmp_path / 'ckpt').iterdir()
    args, _, _ = get_model_ckpt(get_config(ckpt_name=str(run)))
    pixels = load_splits(get_config(preset='demo', image_path=str(drawn), cache_path=str(tmp_path)))['train'].pixels
    for name, number in (('mean', pixels.float().mean() / 255), ('std', pixels.float().std() / 255)):
        assert float(getattr(args, name).split(',')[0]) == pytest.approx(number.item(), abs=0.02)
    capsys.readouterr()
    assert cli.main(['train', *given[:-5], '--mean=weights', *given[-4:]]) == 2
    assert '--mean=weights: no pretrained weights have it' in capsys.readouterr().err


def test_white_level_auto_is_measured(five, tmp_path):
    args = get_config(preset='demo', image_path=str(five), cache_path=str(tmp_path), channels='1-5')
    assert 4085 < float(measure_levels(args, load_splits(args)['train'].store)) <= 4095


def test_torchcodec_decoders_equal_torchvision(monkeypatch, drawn_large):
    """And where both are, Pillow's do."""
    import importlib
    import sys

    from dataloader.loading import image_decoders

    paths = sorted(drawn_large.rglob('*.jpg'))[:3]
    data = [torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8) for path in paths]
    wanted = [image_decoders.decode_jpeg(each) for each in data]
    monkeypatch.setitem(sys.modules, 'torchvision.io', None)
    monkeypatch.delattr('torchvision.io', raising=False)
    try:
        pytest.importorskip('torchcodec')
        gone = importlib.reload(image_decoders)
        assert 'torchcodec' in gone.decode_jpeg.__globals__['decoders'].__name__
        assert all(torch.equal(gone.decode_jpeg(each), one) for each, one in zip(data, wanted, strict=True))
        monkeypatch.setitem(sys.modules, 'torchcodec', None)
        assert importlib.reload(image_decoders).decode_jpeg is None
    finally:
        monkeypatch.undo()
        importlib.reload(image_decoders)
    assert all(
        torch.equal(torch.from_numpy(np.array(decode(path))).permute(2, 0, 1), one)
        for path, one in zip(paths, wanted, strict=True)
    )


def view_of(path, pixel_format):
    with open_image(path, path) as image:
        return crops.center_crop(image, 16, 1.0, 'bilinear', pixel_format)[0]


@pytest.mark.parametrize('low', [-1e9, -3.4028235e38, -np.inf, np.nan])
def test_resize_clamps_no_data_pixels_first(low, tmp_path):
    pixels = np.random.default_rng(0).random((32, 32)).astype(np.float32)
    form = PixelFormat((1,), True, 'float32')
    np.save(tmp_path / 'whole.npy', pixels)
    pixels[0, :3] = low
    np.save(tmp_path / 'holes.npy', pixels)
    whole, holes = (view_of(tmp_path / f'{name}.npy', form) for name in ('whole', 'holes'))
    assert holes.isfinite().all()
    assert torch.equal(whole[:, 4:], holes[:, 4:])


@pytest.mark.parametrize('channels', ['1', 'rgb', 'auto'])
def test_mixed_8_and_16_bit_images_have_equal_brightness(channels, tmp_path):
    """Half of the range of each, as gray PNG, as PNG of 16 bits a color, as TIFF and as floats."""
    (tmp_path / 'set').mkdir()
    for number in range(3):
        Image.new('L', (20, 20), 128).save(tmp_path / f'set/a{number}.png')
        Image.fromarray(np.full((20, 20), 32896, np.uint16)).save(tmp_path / f'set/b{number}.png')
        tifffile.imwrite(tmp_path / f'set/c{number}.tif', np.full((20, 20), 128 / 255, np.float32))
        tifffile.imwrite(tmp_path / f'set/d{number}.tif', np.full((20, 20, 3), 32896, np.uint16), photometric='rgb')
    args = get_config(
        preset='demo', image_path=str(tmp_path / 'set'), cache_path=str(tmp_path), channels=channels, image_size=16
    )
    images = load_splits(args)['train']
    args = replace_args(images.args, mean='0', std='1')
    (batch, _) = next(iter(eval_loader(args, images)))
    view = eval_view(batch, args)
    assert (view - 128 / 255).abs().max() < 0.002


def test_tiff_8_bit_extra_bands_are_kept(tmp_path):
    """Aerial photographs: red, green, blue and near-infrared."""
    for count in (4, 5):
        pixels = values((count, 12, 12), 'uint8')
        for how in ({'planarconfig': 'contig'}, {'planarconfig': 'separate', 'compression': 'zlib'}):
            stored = pixels.transpose(1, 2, 0) if how['planarconfig'] == 'contig' else pixels
            path = tmp_path / 'x.tif'
            tifffile.imwrite(path, stored, photometric='rgb', extrasamples=['unspecified'] * (count - 3), **how)
            with open_image(path, path) as image:
                assert pixel_format.image_kind(image).channels == count
                assert np.array_equal(to_array(image, PixelFormat((*range(1, count + 1),), True)), pixels)


def test_tiff_16_bit_alpha_is_dropped_with_message(tmp_path):
    pixels = values((12, 12, 4), 'uint16')
    tifffile.imwrite(tmp_path / 'x.tif', pixels, photometric='rgb', extrasamples=['unassalpha'])
    with open_image(tmp_path / 'x.tif', 'x.tif') as image:
        kind = pixel_format.image_kind(image)
        assert (kind.color, kind.note) == ('rgb', 'transparency (the last channel) left out')
        assert np.array_equal(to_array(image, PixelFormat(dtype='uint16')), pixels.transpose(2, 0, 1)[:3])


@pytest.mark.parametrize('axes', ['CZYX', 'ZCYX', 'CTYX', 'TZCYX'])
def test_tiff_with_slices_and_times_uses_first(axes, tmp_path):
    sides = {'C': 3, 'Z': 5, 'T': 4, 'Y': 20, 'X': 24}
    pixels = values([sides[axis] for axis in axes], 'uint16')
    tifffile.imwrite(tmp_path / 'x.ome.tif', pixels, metadata={'axes': axes}, photometric='minisblack')
    with open_image(tmp_path / 'x.ome.tif', 'x.ome.tif') as image:
        found, note = arrays.read_channels(image), image.note
    wanted = pixels[tuple(slice(None) if axis in 'CYX' else 0 for axis in axes)]
    assert np.array_equal(found, wanted)
    assert note.startswith('the first of ')


def test_cmyk_image_in_16_bit_dataset_is_converted(tmp_path):
    Image.new('CMYK', (24, 24), (0, 255, 255, 0)).save(tmp_path / 'red.tif')
    with open_image(tmp_path / 'red.tif', 'red.tif') as image:
        pixels = to_array(image, PixelFormat(dtype='uint16'))
    assert pixels[:, 0, 0].tolist() == [65535, 0, 0]


def test_dicom_8_bit_monochrome1_stays_8_bit(tmp_path):
    import pydicom

    dataset = pydicom.dcmread(get_testdata_file('image_dfl.dcm'))
    first = arrays.open_dicom(get_testdata_file('image_dfl.dcm')).pixels
    dataset.PhotometricInterpretation = 'MONOCHROME1'
    dataset.save_as(tmp_path / 'inverse.dcm')
    inverse = arrays.open_dicom(tmp_path / 'inverse.dcm').pixels
    assert inverse.dtype == first.dtype == np.uint8
    assert np.array_equal(inverse, 255 - first)


def test_npy_axes_applies_to_one_channel(tmp_path):
    (tmp_path / 'set').mkdir()
    pixels = values((8, 12, 12, 1), 'uint8')
    for number, image in enumerate(pixels):
        np.save(tmp_path / f'set/{number}.npy', image)
    args = get_config(preset='demo', image_path=str(tmp_path / 'set'), cache_path=str(tmp_path), npy_axes='hwc')
    images = load_splits(args)['train']
    with images.store.open(5) as image:
        assert np.array_equal(to_array(image, images.pixel_format), pixels[5].transpose(2, 0, 1).repeat(3, 0))


@pytest.mark.parametrize(
    ('options', 'said'),
    [
        (['--mean=imagenet'], '--mean=imagenet is not one number for all of 5 channels nor one for each'),
        (['--augment_backend=worker'], '--augment_backend=worker is for red, green and blue of 8 bits'),
        (['--mean=weights'], '--mean=weights: no pretrained weights have it'),
    ],
)
def test_options_incompatible_with_five_channels_exit_2(options, said, five, tmp_path, capsys):
    given = [*TINY, f'--image_path={five}', '--batch_size=8', *options, *own_paths(tmp_path)]
    assert cli.main(['train', *given]) == 2
    assert said in capsys.readouterr().err


def test_run_with_other_channels_is_refused_as_start_and_row(five, drawn, tmp_path, capsys):
    assert cli.main(['train', *TINY, f'--image_path={five}', '--batch_size=8', *own_paths(tmp_path)]) == 0
    (run,) = (tmp_path / 'ckpt').iterdir()
    capsys.readouterr()
    assert cli.main(['train', *TINY, f'--image_path={drawn}', f'--init_from={run.name}', *own_paths(tmp_path)]) == 2
    assert (
        f'{run.name} was trained on --channels=1-5, and the images here are --channels=rgb' in capsys.readouterr().err
    )
    assert cli.main(['train', *TINY, f'--image_path={drawn}', *own_paths(tmp_path)]) == 0
    (own,) = set((tmp_path / 'ckpt').iterdir()) - {run}
    given = [f'--ckpt_name={own.name}', f'--beside={run.name}', *own_paths(tmp_path)]
    assert cli.main(['evaluate', *given]) == 2
    assert f'--beside={run.name} has --channels=1-5, and the checkpoint rgb: leave it out' in capsys.readouterr().err


def test_pack_keeps_channels_or_refuses(five, tmp_path, capsys):
    given = [f'--image_path={five}', f'--cache_path={tmp_path}/cache', f'--output={tmp_path}/packed']
    assert cli.main(['pack', *given, '--pack_short_side=16']) == 2
    assert '--pack_short_side writes JPEGs, of red, green and blue of 8 bits' in one_line(capsys.readouterr().err)
    assert cli.main(['pack', *given, '--on_unreadable=skip']) == 0
    assert len(load_splits(get_config(image_path=f'{tmp_path}/packed', cache_path=str(tmp_path)))['train']) == 24


def test_pack_short_side_uses_white_level(tmp_path):
    (tmp_path / 'set').mkdir()
    for number in range(4):
        Image.fromarray(np.full((40, 40), 2048, np.uint16)).save(tmp_path / f'set/{number}.png')
    given = [f'--image_path={tmp_path}/set', f'--cache_path={tmp_path}/cache', f'--output={tmp_path}/packed']
    assert cli.main(['pack', *given, '--pack_short_side=16', '--white_level=4095']) == 0
    images = load_splits(get_config(image_path=f'{tmp_path}/packed', cache_path=str(tmp_path)))['train']
    with images.store.open(0) as image:
        assert abs(int(np.asarray(image)[8, 8, 0]) - 128) <= 1


def test_exif_ignore_crops_16_bit_tiff_as_stored(tmp_path):
    """--exif=ignore, beside images of 8 bits."""
    tifffile.imwrite(tmp_path / 'x.tif', values((40, 120), 'uint16'), extratags=[(274, 'H', 1, 6, True)])
    for exif, sides in ((True, (120, 40)), (False, (40, 120))):
        form = PixelFormat(dtype='uint8', exif=exif)
        with open_image(tmp_path / 'x.tif', 'x.tif') as image:
            assert to_array(image, PixelFormat((1,), True, 'uint16', exif=exif)).shape[1:] == sides
            transform = get_augmentation(get_config(image_size=16), 'moco')
            crop = crops.random_crops(
                image, 2, transform, torch.Generator().manual_seed(0), True, replace(form, dtype='uint16')
            )
        assert crop.shape == (2, 3, 16, 16)


def test_run_older_than_channels_resumes_unchanged(drawn, tmp_path, capsys):
    """As it was: lying as it is stored, red, green and blue."""
    given = [*TINY, f'--image_path={drawn}', '--resume=auto', '--knn_every=0', *own_paths(tmp_path)]
    assert cli.main(['train', *given, '--max_minutes=0.0001']) == 0
    (path,) = (tmp_path / 'ckpt').glob('*/loss_*')
    content = torch.load(path, weights_only=True)
    for name in ('channels', 'exif', 'npy_axes', 'jitter'):
        del content['args'][name]
    torch.save(content, path)
    assert cli.main(['train', *given]) == 0
    assert 'resuming model_name_simsiam_ckpt_0' in capsys.readouterr().out
    (run,) = (tmp_path / 'ckpt').iterdir()
    args, _, _ = get_model_ckpt(get_config(ckpt_name=str(run)))
    assert (args.channels, args.exif) == ('rgb', 'ignore')
    assert cli.main(['train', *given[:-3], '--exif=apply', '--max_epochs=3', *given[-3:]]) == 0


def make_png_16(width=40, height=40):
    """The bytes of a 16-bit color PNG of noise."""
    chunk = lambda kind, data: struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))  # noqa: E731
    rows = values((height, width * 3), 'uint16').astype('>u2')
    data = zlib.compress(b''.join(b'\0' + row.tobytes() for row in rows))
    header = struct.pack('>IIBBBBB', width, height, 16, 2, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', data) + chunk(b'IEND', b''), len(data)


# Where a 16-bit PNG is damaged: the bytes that are changed or cut, from the length of its compressed data.
PNG_DAMAGE = {
    'compressed data': lambda content, size: content[:241] + bytes([content[241] ^ 255]) + content[242:],
    'its checksum': lambda content, size: content[: 41 + size] + b'\0\1\2\3' + content[45 + size :],
    'cut in the data': lambda content, size: content[: 41 + size // 2],
    'without an end': lambda content, size: content[: 45 + size],
    'data that ends early': lambda content, size: replace_data(content, size, lambda data: data[: len(data) // 2]),
    'too few rows': lambda content, size: replace_data(
        content, size, lambda data: zlib.compress(zlib.decompress(data)[:-100])
    ),
    'wrong Adler sum': lambda content, size: replace_data(
        content, size, lambda data: data[:-1] + bytes([data[-1] ^ 1])
    ),
}


def replace_data(content, size, change):
    """Replace the IDAT chunk, with a correct checksum."""
    data = change(content[41 : 41 + size])
    body = b'IDAT' + data
    return (
        content[:33] + struct.pack('>I', len(data)) + body + struct.pack('>I', zlib.crc32(body)) + content[45 + size :]
    )


@pytest.mark.parametrize('case', PNG_DAMAGE)
def test_damaged_16_bit_png_is_refused(case):
    content, size = make_png_16()
    assert read(content, 'x.png')[0].shape == (3, 40, 40)
    _, line = read(PNG_DAMAGE[case](content, size), 'x.png')
    assert 'truncated' in line
    assert '\n' not in line


@pytest.mark.parametrize('kind', ['tif', 'gif', 'webp', 'png'])
def test_animation_cut_anywhere_is_read_or_refused(kind):
    frames = [Image.fromarray(values((30, 40, 3), 'uint8', seed)) for seed in range(3)]
    file = io.BytesIO()
    frames[0].save(file, {'tif': 'TIFF'}.get(kind, kind.upper()), save_all=True, append_images=frames[1:])
    content, refused = file.getvalue(), 0
    for cut in range(50, len(content), 97):
        pixels, line = read(content[:cut], f'x.{kind}')
        assert (line is None) == (pixels is not None)
        refused += line is not None
    assert refused


def test_tiff_cut_after_its_first_page_is_skipped(tmp_path, capsys):
    folder = draw_folder(tmp_path / 'set', {'train': 8, 'val': 4})
    path = folder / 'train/dots/cut.tif'
    tifffile.imwrite(path, values((2, 30, 40, 3), 'uint8'), photometric='rgb')
    path.write_bytes(path.read_bytes()[:2000])
    given = [f'--image_path={folder}', '--preset=demo', '--batch_size=4', *own_paths(tmp_path, 'log', 'cache')]
    assert cli.main(['check_dataloader', *given]) == 1
    assert 'error: 1 of the 37 images' in capsys.readouterr().err
    assert cli.main(['check_dataloader', *given, '--on_unreadable=skip']) == 0


def make_dicom(**elements):
    """An ArrayImage of a 12-bit DICOM file whose elements are changed."""
    import pydicom

    dataset = pydicom.dcmread(get_testdata_file('CT_small.dcm'))
    for name, value in elements.items():
        setattr(dataset, name, value)
    file = io.BytesIO()
    dataset.save_as(file)
    file.seek(0)
    return arrays.open_dicom(file)


@pytest.mark.parametrize(
    ('slope', 'intercept', 'dtype'),
    [
        ('1', '0', 'int16'),
        ('1', '-1024', 'int32'),
        ('0.5', '0', 'float32'),
        ('2', '0.5', 'float32'),
        ('3', '7', 'int32'),
    ],
)
@pytest.mark.parametrize('factor', [2, 3])
def test_dicom_type_follows_from_header(slope, intercept, dtype, factor):
    """Not from the pixels of one image: even ones times 0.5 are whole numbers too."""
    stored = (values((128, 128), 'uint8').astype(np.int16) * factor).tobytes()
    image = make_dicom(RescaleSlope=slope, RescaleIntercept=intercept, PixelData=stored)
    assert image.pixels.dtype == dtype
    expected = np.frombuffer(stored, np.int16).reshape(1, 128, 128) * float(slope) + float(intercept)
    assert np.array_equal(image.pixels, expected)


def test_dicom_rescale_of_enhanced_files_and_inverse_lut_are_applied():
    from pydicom.dataset import Dataset

    plain = make_dicom(RescaleSlope='1', RescaleIntercept='0').pixels.astype(int)
    transformation = Dataset()
    transformation.RescaleSlope, transformation.RescaleIntercept = '2', '-1000'
    shared = Dataset()
    shared.PixelValueTransformationSequence = [transformation]
    assert np.array_equal(make_dicom(SharedFunctionalGroupsSequence=[shared]).pixels, 2 * plain - 1000)
    inverse = make_dicom(RescaleSlope='1', RescaleIntercept='0', PresentationLUTShape='INVERSE')
    assert np.array_equal(inverse.pixels, -1 - plain)


def test_constant_channel_has_std_1_and_is_named(tmp_path, capsys):
    for split, count in (('train', 8), ('val', 4)):
        for name in 'ab':
            (tmp_path / 'set' / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = values((40, 40, 4), 'uint8', i)
                pixels[..., 2] = 77 if split == 'train' else pixels[..., 2]
                np.save(tmp_path / 'set' / split / name / f'{i}.npy', pixels)
    images = load_splits(
        get_config(preset='demo', image_path=str(tmp_path / 'set'), cache_path=str(tmp_path / 'cache'))
    )
    assert float(images['train'].args.std.split(',')[2]) == 1
    assert 'constant in the images of train: channel 3' in capsys.readouterr().err


@pytest.mark.parametrize('invalid', [np.nan, np.inf, -np.inf, 1e300])
def test_invalid_values_are_noted_and_do_not_change_measurements(invalid, tmp_path, capsys):
    for name in 'ab':
        (tmp_path / 'set/train' / name).mkdir(parents=True)
        for i in range(8):
            pixels = values((40, 40, 4), 'uint8', i) / 255
            pixels[:2] = invalid
            np.save(tmp_path / f'set/train/{name}/{i}.npy', pixels)
    given = [f'--image_path={tmp_path}/set', '--preset=demo', '--batch_size=4', '--white_level=auto']
    assert cli.main(['check_dataloader', *given, *own_paths(tmp_path, 'log', 'cache')]) == 0
    said = capsys.readouterr()
    assert 'nan taken as 0, infinite values as the largest or smallest of the image' in said.out
    assert 'RuntimeWarning' not in said.err
    level = re.search(r'--white_level=([\d.e+]+)', said.out)[1]
    assert 0.9 < float(level) <= 1


@pytest.mark.parametrize('channels', ['1-4097', '1-9999999999', '5-5004'])
def test_too_many_channels_exit_2(channels):
    with pytest.raises(UserError, match='up to 4096 numbers'):
        get_config(channels=channels)


@pytest.mark.parametrize(('channels', 'said'), [('9', '3 channels'), ('1-5', '3 channels'), ('2-4', '3 channels')])
def test_channels_that_no_image_has_exit_2(channels, said, tmp_path, capsys):
    folder = draw_folder(tmp_path / 'set', {'train': 8, 'val': 4})
    for path in folder.rglob('*.png'):
        Image.open(path).convert('RGB').save(path)
    given = [f'--image_path={folder}', '--preset=demo', '--batch_size=4', f'--channels={channels}']
    assert cli.main(['check_dataloader', *given, *own_paths(tmp_path, 'log', 'cache')]) == 2
    assert f'the images have {said}, not those of --channels={channels}' in one_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    ('odd', 'how'), [('png', 'files'), ('tif', 'memory'), ('float', 'resized'), ('png of colors', 'tar')]
)
def test_deep_image_among_8_bit_images_is_named(odd, how, tmp_path, capsys):
    """One that is not among those that the type is found from: it was read as 8 bits without a word."""
    folder = tmp_path / 'set/train/a'
    for split, count in (('train', 2 * NUM_SAMPLES), ('val', 2)):
        (tmp_path / f'set/{split}/a').mkdir(parents=True)
        for number in range(count):
            Image.fromarray(values((20, 20, 3), 'uint8')).save(tmp_path / f'set/{split}/a/{number:03}.png')
    path = folder / f'001.{"tif" if odd == "float" else odd[:3]}'
    (folder / '001.png').unlink()
    if odd == 'png of colors':
        path.write_bytes(make_png_16(20, 20)[0])
    else:
        Image.fromarray(values((20, 20), 'float32' if odd == 'float' else 'uint16')).save(path)
    place = tmp_path / 'set/train'
    if how == 'tar':
        with tarfile.open(tmp_path / 'set/train.tar', 'w') as tar:
            tar.add(place, '.')
        shutil.rmtree(place)
    cache = {'memory': ['--cache_images=on'], 'resized': ['--cache_images=off', '--cache_short_side=16']}
    given = ['train', *TINY, f'--image_path={tmp_path / "set"}', *own_paths(tmp_path), '--max_epochs=1']
    assert cli.main([*given, *cache.get(how, ['--cache_images=off'])]) == 1
    error = capsys.readouterr().err
    assert path.name in error
    assert 'convert all to one type' in error
    assert cli.main([*given, *cache.get(how, ['--cache_images=off']), '--on_unreadable=skip']) == 0
    assert f'1 of {2 * NUM_SAMPLES} images' in capsys.readouterr().out


@pytest.mark.parametrize('kind', ['YBR_FULL', 'RGB'])
def test_dicom_of_colors_is_converted_once(kind, tmp_path):
    """pydicom converts YBR to RGB itself; it was converted again."""
    from pydicom.pixels import convert_color_space

    dataset = pydicom.dcmread(get_testdata_file('SC_rgb_small_odd.dcm'))
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    rgb = np.broadcast_to(np.array((200, 30, 60), np.uint8), (4, 6, 3))
    pixels = rgb if kind == 'RGB' else convert_color_space(rgb, 'RGB', 'YBR_FULL')
    dataset.Rows, dataset.Columns, dataset.PlanarConfiguration = 4, 6, 0
    dataset.PhotometricInterpretation, dataset.PixelData = kind, np.ascontiguousarray(pixels).tobytes()
    dataset.save_as(tmp_path / 'x.dcm')
    with open(tmp_path / 'x.dcm', 'rb') as file:
        found = arrays.open_dicom(io.BytesIO(file.read()))
    assert found.rgb
    assert np.abs(found.pixels.astype(int) - rgb.transpose(2, 0, 1)).max() <= 2


def test_intensity_jitter_stays_between_black_and_white():
    """Rounded to 8 bits, values above white became black."""
    jitter = IntensityJitter(0.4, 0.4, (0.5,) * 3, (0.25,) * 3, prob=1.0)
    x = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = jitter.on_cpu(x.clone(), jitter.sample(64, torch.Generator().manual_seed(1)))
    assert found.min() == 0
    assert found.max() == 1


def test_images_are_opened_few_times_at_the_start(five, tmp_path, monkeypatch):
    """Arrays are decoded for it: kinds are found once per split, levels, mean and range are measured."""
    opened = []
    before = Files.open
    monkeypatch.setattr(Files, 'open', lambda self, row: opened.append(self.names[row]) or before(self, row))
    args = get_config(preset='demo', image_path=str(five), cache_path=str(tmp_path), white_level='auto', image_size=16)
    load_splits(replace_args(args, cache_images='off'))
    assert max(opened.count(name) for name in opened) <= 4
