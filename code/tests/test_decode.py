"""What a pixel is worth, in every mode that Pillow has; damaged files."""

import io
import random
import re
import struct

import numpy as np
import pytest
from PIL import Image

from conftest import TINY, own_paths, run
from dataloader.loading.arrays import read_channels
from dataloader.loading.decode import decode, open_image
from dataloader.loading.pixel_settings import range_warning
from runtime.errors import WorkError

# Of each mode: how to make a picture of it, the value that --white_level names (0: none), the gray level of it in RGB.
DEEP = [
    (np.uint16, 65535, 0, 255),
    (np.uint16, 32768, 0, 128),
    (np.uint16, 4095, 4095, 255),
    (np.uint16, 2048, 4095, 128),
    (np.uint16, 4095, 0, 16),
    (np.uint16, 65535, 4095, 255),
    (np.int32, 65535, 0, 255),
    (np.int32, -5, 0, 0),
    (np.int32, 70000, 0, 255),
    (np.int32, 1500000, 2000000, 191),
    (np.float32, 1.0, 0, 255),
    (np.float32, 0.5, 0, 128),
    (np.float32, 7.0, 0, 255),
    (np.float32, -1.0, 0, 0),
    (np.float32, float('nan'), 0, 0),
    (np.float32, float('inf'), 0, 255),
    (np.float32, float('-inf'), 0, 0),
    (np.float32, 1e38, 2e38, 128),
    (np.float32, 127.5, 255, 128),
]


@pytest.mark.parametrize(('kind', 'value', 'white', 'gray'), DEEP)
def test_rgb_of_16_bit_image_uses_white_level(kind, value, white, gray, tmp_path):
    Image.fromarray(np.full((6, 8), value, kind)).save(tmp_path / 'deep.tiff')
    image = decode(tmp_path / 'deep.tiff', levels=(0, white) if white else None)
    assert (image.mode, image.size) == ('RGB', (8, 6))
    assert np.unique(np.asarray(image)).tolist() == [gray]


@pytest.mark.parametrize(
    ('value', 'white', 'gray'), [(0, 0, 0), (65535, 0, 255), (2**31 + 5, 0, 255), (2**31, 2**32 - 1, 128)]
)
def test_tiff_of_unsigned_32_bits_is_read(value, white, gray, tmp_path):
    """Which Pillow reads, as signed ones, and does not write."""
    tags = {256: 4, 257: 4, 258: 32, 259: 1, 262: 1, 273: 8 + 2 + 12 * 9 + 4, 277: 1, 278: 4, 279: 64}
    entries = b''.join(struct.pack('<HHII', tag, 4, 1, number) for tag, number in tags.items())
    head = struct.pack('<2sHIH', b'II', 42, 8, len(tags))
    (tmp_path / 'deep.tiff').write_bytes(head + entries + bytes(4) + 16 * struct.pack('<I', value))
    assert np.unique(np.asarray(decode(tmp_path / 'deep.tiff', levels=(0, white) if white else None))).tolist() == [
        gray
    ]
    with open_image(tmp_path / 'deep.tiff', 'deep.tiff') as image:
        pixels = read_channels(image)
    assert (pixels.dtype, *np.unique(pixels)) == (np.uint32, value)


@pytest.mark.parametrize('mode', ['I;16B', 'I;16'])
def test_tiff_of_either_byte_order_is_read(mode, tmp_path):
    data = np.full((4, 4), 32768, '>u2' if mode == 'I;16B' else '<u2')
    image = Image.frombytes(mode, (4, 4), data.tobytes())
    image.save(tmp_path / 'deep.tiff')
    assert np.asarray(decode(tmp_path / 'deep.tiff'))[0, 0].tolist() == [128] * 3


@pytest.mark.parametrize('mode', ['1', 'L', 'P', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'LA', 'LAB'])
def test_rgb_of_8_bit_image_is_unchanged(mode, tmp_path):
    if mode == 'LAB':
        image = Image.merge('LAB', [Image.new('L', (8, 8), level) for level in (255, 128, 128)])
    else:
        image = Image.new('RGB', (8, 8), 'white')
        image = image.convert('L').convert('LA') if mode == 'LA' else image.convert(mode)
    # Pillow 12.3 cannot read the YCbCr that it writes without compression
    image.save(tmp_path / 'light.tiff', compression='tiff_lzw')
    assert np.asarray(decode(tmp_path / 'light.tiff')).min() > 250


def test_dataset_with_small_range_warns(tmp_path):
    """A 12-bit scan in 16 bits; with the option that the warning names it is gone."""
    rng = np.random.default_rng(0)
    (tmp_path / 'set/train').mkdir(parents=True)
    for number in range(16):
        scan = rng.integers(0, 4096, (100, 100)).astype(np.uint16)
        Image.fromarray(scan).save(tmp_path / f'set/train/{number}.tiff')
    command = [f'--image_path={tmp_path}/set', *own_paths(tmp_path)]
    for first in (['check_dataloader', '--preset=demo', '--batch_size=8'], ['train', *TINY, '--max_epochs=1']):
        done = run(*first, *command)
        assert done.returncode == 0, done.stderr
        assert re.search(
            r'warning: images of more than 8 bits hold values from \d+ to 409\d, where 65535 is white: '
            r'they are nearly black; --white_level=4095',
            done.stderr,
        )
        done = run(*first, *command, '--white_level=4095')
        assert 'bits' not in done.stderr


@pytest.mark.parametrize(
    ('dtype', 'low', 'top', 'levels', 'said'),
    [
        ('uint8', 0, 250.0, None, None),
        ('uint8', 0, 63.0, None, 'gray levels up to 63 of 255'),
        ('uint16', 0, 60000, None, None),
        ('uint16', 0, 1023, None, '`white_level=1023`'),
        ('float32', 0, 255, None, '1 is white already: `white_level=255`'),
        ('float32', 0, 3e6, None, '`white_level=3e\\+06`'),
        ('int16', -1000, 3000, (0, 4095), 'below 0 become black; `white_level=-1000,3000`'),
        ('int16', -1000, 3000, (-1024, 3071), None),
        ('float32', 0, 0.01, None, '`white_level=0.01`'),
        ('uint8', 0, 250.0, (0, 4095), '`white_level` has no effect: the images have 8 bits'),
    ],
)
def test_range_warning_covers_all_cases(dtype, low, top, levels, said):
    line = range_warning(dtype, low, top, levels)
    assert line is None if said is None else re.search(said, line)


def samples():
    """An image in every format that is common, as bytes."""
    image = Image.effect_noise((60, 40), 50).convert('RGB')
    for kind in ('JPEG', 'PNG', 'TIFF', 'GIF', 'BMP', 'WEBP', 'PPM', 'JPEG2000', 'AVIF', 'TGA', 'ICO', 'PCX', 'QOI'):
        for more in ({'compression': 'tiff_lzw'}, {'compression': 'jpeg'}, {}) if kind == 'TIFF' else ({},):
            buffer = io.BytesIO()
            try:
                image.save(buffer, kind, **more)
            except (KeyError, OSError):
                continue  # not in this build of Pillow
            yield kind.lower(), buffer.getvalue()


def damage(content, rng):
    """Bytes flipped, a piece cut out, an end cut off, or a piece doubled."""
    content, start = bytearray(content), rng.randrange(len(content))
    end = min(len(content), start + rng.randrange(1, 200))
    kind = rng.randrange(4)
    if kind == 0:
        for _ in range(rng.randrange(1, 20)):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del content[start:end]
    elif kind == 2:
        del content[start:]
    else:
        content[start:start] = content[start:end]
    return bytes(content)


def test_damaged_files_decode_or_raise_work_error(tmp_path):
    """1,000 of them: RGB or a WorkError of one line, and nothing else."""
    rng, named = random.Random(0), 0
    kinds = list(samples())
    for number in range(1000):
        kind, content = kinds[number % len(kinds)]
        path = tmp_path / f'{number}.{kind}'
        path.write_bytes(damage(content, rng))
        said = f'cannot read the image {path}: '
        try:
            assert decode(path).mode == 'RGB'
        except WorkError as error:
            said = str(error)
            named += 1
        assert said.startswith(f'cannot read the image {path}: ')
        assert '\n' not in said
    assert 100 < named < 990


def test_image_without_pixels_is_refused(tmp_path):
    """A damaged header of a TIFF can say a height of 0, and Pillow opens it."""
    Image.new('RGB', (6, 4)).save(tmp_path / 'x.tiff')
    content = bytearray((tmp_path / 'x.tiff').read_bytes())
    fields = (struct.pack('<HHI', 257, kind, 1) for kind in (3, 4))  # ImageLength, a SHORT or a LONG
    entry = next(content.index(field) for field in fields if field in content)
    content[entry + 8 : entry + 12] = bytes(4)
    (tmp_path / 'x.tiff').write_bytes(content)
    np.save(tmp_path / 'x.npy', np.zeros((0, 5, 3), np.uint8))
    for name in ('x.tiff', 'x.npy'):
        with pytest.raises(WorkError, match=f'cannot read the image .*{name}: '), open_image(tmp_path / name, name):
            pass


def test_damaged_files_print_nothing_from_c_libraries(tmp_path):
    """libjpeg, libtiff and Pillow have pages to say of damaged files: one line of ours is printed for each."""
    rng, kinds = random.Random(1), [sample for sample in samples() if sample[0] in ('jpeg', 'tiff', 'png')]
    (tmp_path / 'set/train').mkdir(parents=True)
    for number in range(120):
        kind, content = kinds[number % len(kinds)]
        content = content if number % 3 == 0 else damage(content, rng)
        (tmp_path / f'set/train/{number:03d}.{kind}').write_bytes(content)
    command = [f'--image_path={tmp_path}/set', *own_paths(tmp_path)]
    checked = run('check_dataloader', '--preset=demo', '--batch_size=8', *[x for x in command if '--ckpt' not in x])
    assert checked.returncode == 1
    assert re.fullmatch(r'error: \d+ of the 120 images under .* cannot be read: .*\n', checked.stderr)
    unread = int(re.search(r'error: (\d+)', checked.stderr)[1])
    assert checked.stdout.count('cannot read the image') == unread > 20
    for workers in (0, 2):
        done = run(
            'train',
            *TINY,
            '--max_epochs=1',
            '--on_unreadable=skip',
            f'--num_workers={workers}',
            '--cache_images=off',
            *command,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ''
