"""Annotations and files describe the same pictures, upright: EXIF, sizes that differ, sizes that are unknown, depth."""

import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

import cli
from config import PROTOCOLS
from conftest import TINY, one_line, own_paths
from dataloader.detection.dataset import load_detection_dataset
from protocols.protocol import find_protocol, has_effect, ignored_by_protocol
from runtime.errors import WorkError
from runtime.options import get_config
from test_detection import coco, voc

RUN = 'model_name_simsiam_ckpt_0'
ORIENTATIONS = range(1, 9)
BACK = {  # what makes of an upright picture the one that is stored for each orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
COUNTS = {'train': 3, 'val': 2}


def store(path, image, orientation, suffix='.png'):
    stored = image.transpose(BACK[orientation]) if orientation in BACK else image
    exif = Image.Exif()
    exif[274] = orientation
    stored.save(path.with_suffix(suffix), exif=exif)


def turned(folder, orientation):
    """Every file of a set stored turned, marked by EXIF; the annotations as they are, of the upright picture."""
    for path in [*folder.glob('*2017/*.png'), *folder.glob('JPEGImages/*.jpg')]:
        with Image.open(path) as image:
            image.load()
        store(path, image.convert('RGB'), orientation, path.suffix)
    return folder


def share_inside(boxes):
    """Of the pixels that are bright red or blue, the share inside the boxes."""
    inside = total = 0
    for index in range(len(boxes)):
        image, target = boxes[index, False]
        spread = image.max(0).values - image.min(0).values > 0.8
        mask = np.zeros(spread.shape, bool)
        for left, top, right, bottom in target['boxes'].round().int().tolist():
            mask[max(0, top) : bottom + 1, max(0, left) : right + 1] = True
        inside, total = inside + int((spread.numpy() & mask).sum()), total + int(spread.sum())
    return inside / total


@pytest.mark.parametrize('orientation', ORIENTATIONS)
@pytest.mark.parametrize('make', [coco, voc])
def test_detection_images_are_upright(make, orientation, tmp_path):
    make(tmp_path / 'set', COUNTS if make is coco else {'train': 3, 'val': 2})
    plain = share_inside(load_detection_dataset(tmp_path / 'set', False)['train'])
    boxes = load_detection_dataset(turned(tmp_path / 'set', orientation), False)['train']
    assert share_inside(boxes) == pytest.approx(plain, abs=0.02)
    assert plain > 0.9
    assert boxes[0, False][0].shape[1:] == (80, 96)


@pytest.mark.parametrize('orientation', [6, 8])
def test_boxes_for_stored_orientation_use_stored_image(orientation, tmp_path):
    """A tool that does not know EXIF has annotated what is stored: its table has that size."""
    coco(tmp_path / 'set', COUNTS)
    for path in (tmp_path / 'set').glob('*2017/*.png'):
        with Image.open(path) as image:
            image.load()
        exif = Image.Exif()
        exif[274] = orientation
        image.save(path, exif=exif)
    boxes = load_detection_dataset(tmp_path / 'set', False)['train']
    assert boxes[0, False][0].shape[1:] == (80, 96)
    assert share_inside(boxes) > 0.9


@pytest.mark.parametrize('make', [coco, voc])
@pytest.mark.parametrize('scale', [0.5, 2])
def test_image_size_other_than_annotated_raises(make, scale, tmp_path):
    make(tmp_path / 'set', COUNTS)
    paths = [*(tmp_path / 'set').glob('train2017/*.png'), *(tmp_path / 'set').glob('JPEGImages/*.jpg')]
    for path in paths:
        with Image.open(path) as image:
            image.load()
        image.resize((round(96 * scale), round(80 * scale))).save(path)
    size = f'{round(96 * scale)} x {round(80 * scale)}'
    with pytest.raises(WorkError, match=rf'3 of the 3 images have another size .* 96 x 80 pixels there, {size}'):
        load_detection_dataset(tmp_path / 'set', False)


@pytest.mark.parametrize('unknown', ['0', '', None])
def test_unknown_image_size_is_taken_from_file(unknown, tmp_path):
    """Old labelling tools write 0: no box is dropped for it."""
    for make in (coco, voc):
        folder = tmp_path / make.__name__
        make(folder, COUNTS)
        wanted = load_detection_dataset(folder, False)['train']
        for path in folder.glob('annotations/*.json'):
            table = json.loads(path.read_text())
            for image in table['images']:
                for side in ('width', 'height'):
                    if unknown is None:
                        del image[side]
                    else:
                        image[side] = int(unknown or 0)
            path.write_text(json.dumps(table))
        for path in folder.glob('Annotations/*.xml'):
            tree = ElementTree.parse(path)
            size = tree.getroot().find('size')
            for side in ('width', 'height'):
                if unknown is None:
                    size.remove(size.find(side))
                else:
                    size.find(side).text = unknown
            tree.write(path)
        boxes = load_detection_dataset(folder, False)['train']
        assert boxes.left_out == wanted.left_out
        assert boxes.labels.tolist() == wanted.labels.tolist()
        assert [image['width'] for image in boxes.table['images']] == [96] * 3


def test_detection_images_of_16_bits_use_white_level(tmp_path):
    coco(tmp_path / 'set', COUNTS)
    for path in (tmp_path / 'set').glob('*2017/*.png'):
        with Image.open(path) as image:
            gray = np.asarray(image.convert('L')).astype(np.uint16) * 16
        Image.fromarray(gray).save(path)
    dark = load_detection_dataset(tmp_path / 'set', False)['train'][0, False][0]
    bright = load_detection_dataset(tmp_path / 'set', False, (0.0, 4095.0))['train'][0, False][0]
    assert dark.max() < 0.1
    assert bright.mean() > 0.3


def test_detection_batch_of_one_small_image_exits_2(tmp_path, capsys):
    coco(tmp_path / 'set', COUNTS)
    assert cli.main(['train', *TINY, '--max_epochs=1', '--knn_every=0', *own_paths(tmp_path)]) == 0
    capsys.readouterr()
    given = ['evaluate', f'--ckpt_name={RUN}', '--protocol=detection', f'--detection_path={tmp_path}/set']
    small = ['--detection_batch_size=1', '--detection_size=32', '--num_workers=0']
    assert cli.main([*given, *small, *own_paths(tmp_path)]) == 2
    assert 'too small for BN with one image per step' in one_line(capsys.readouterr().err)


@pytest.mark.parametrize('protocol', PROTOCOLS)
def test_options_without_effect_warn_and_are_not_in_spec(protocol):
    args, unused = get_config(preset='demo', protocol=protocol), find_protocol(protocol).unused
    for name in unused:
        assert not has_effect(args, name)
    args.explicit = {*unused, 'random_seed'}
    assert ignored_by_protocol(args) == sorted(unused)


CHANGES = {'knn_k': '3', 'knn_temperature': '5', 'knn_raw_pixels': 'True', 'val_fraction': '0.5', 'batch_size': '4'}


@pytest.mark.parametrize('protocol', ['semi', 'transfer', 'label_free'])
def test_options_declared_unused_do_not_change_results(protocol, drawn, tmp_path, capsys):
    """The result is the same file, with the same numbers."""
    given = ['train', *TINY, '--max_epochs=1', '--knn_every=0', f'--image_path={drawn}', *own_paths(tmp_path)]
    assert cli.main(given) == 0
    more = {'semi': ['--finetune_epochs=1'], 'transfer': [f'--transfer_path={drawn}']}.get(protocol, [])
    evaluate = [
        'evaluate',
        f'--ckpt_name={RUN}',
        f'--protocol={protocol}',
        '--num_workers=0',
        *more,
        *own_paths(tmp_path),
    ]
    changes = [f'--{name}={value}' for name, value in CHANGES.items() if name in find_protocol(protocol).unused]
    assert changes
    results = []
    for options in ([], changes):
        assert cli.main([*evaluate, *options]) == 0
        (path,) = (tmp_path / 'ckpt' / RUN).glob('evaluate_*.json')
        results.append(json.loads(path.read_text()))
    said = capsys.readouterr().err
    for option in changes:
        assert f'{option.partition("=")[0]} has no effect on --protocol={protocol}' in said
    ours, theirs = ({k: v for k, v in result.items() if k not in ('when', 'seconds', 'given')} for result in results)
    assert ours == theirs
