"""Detection end to end on small drawn sets in both formats; AP against cases whose value is known."""

import functools
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

import cli
from ckpt import get_model_ckpt
from conftest import TINY, one_line, own_paths
from dataloader.detection.dataset import decode_mask, load_detection_dataset
from dataloader.detection.validate import decode_rle_counts, is_mask
from protocols import detection
from protocols.detection import average_precision, encode_rle, make_detector
from protocols.results import load_results
from runtime.checkpoints.load_state import build_model
from runtime.errors import UserError, WorkError
from runtime.options import get_config

RUN = 'model_name_simsiam_ckpt_0'
KINDS = {'disc': 'red', 'square': 'blue'}


def scenes(count, seed):
    """(image of 96 x 80 px, [(kind, left, top, right, bottom)]), one to three bright shapes on gray noise each."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        noise = torch.randint(90, 140, (80, 96, 3), generator=generator, dtype=torch.uint8)
        image, shapes = Image.fromarray(noise.numpy()), []
        pen = ImageDraw.Draw(image)
        for _ in range(int(torch.randint(1, 3, (1,), generator=generator))):
            size, x, y = (torch.rand(3, generator=generator) * torch.tensor([14, 60, 44])).int().tolist()
            kind = list(KINDS)[int(torch.randint(2, (1,), generator=generator))]
            box = (x, y, x + size + 20, y + size + 20)
            (pen.ellipse if kind == 'disc' else pen.rectangle)(box, fill=KINDS[kind])
            shapes.append((kind, *box))
        yield image, shapes


def coco(folder, counts):
    (folder / 'annotations').mkdir(parents=True)
    for split, count in counts.items():
        (folder / f'{split}2017').mkdir()
        table = {
            'images': [],
            'annotations': [],
            'categories': [{'id': 7, 'name': 'disc'}, {'id': 3, 'name': 'square'}],
        }
        for i, (image, shapes) in enumerate(scenes(count, len(split))):
            image.save(folder / f'{split}2017/{i:03d}.png')
            table['images'].append({'id': 100 + i, 'file_name': f'{i:03d}.png', 'width': 96, 'height': 80})
            for kind, x1, y1, x2, y2 in shapes:
                polygon = [x1, y1, x2, y1, x2, y2, x1, y2]
                table['annotations'].append(
                    {
                        'id': len(table['annotations']) + 1,
                        'image_id': 100 + i,
                        'category_id': 7 if kind == 'disc' else 3,
                        'bbox': [x1, y1, x2 - x1, y2 - y1],
                        'segmentation': [polygon],
                    }
                )
        (folder / f'annotations/instances_{split}2017.json').write_text(json.dumps(table))
    return folder


def voc(folder, counts):
    for name in ('Annotations', 'JPEGImages', 'ImageSets/Main'):
        (folder / name).mkdir(parents=True)
    for split, count in counts.items():
        names = []
        for i, (image, shapes) in enumerate(scenes(count, len(split))):
            names.append(f'{split}_{i:03d}')
            image.save(folder / f'JPEGImages/{names[-1]}.jpg', quality=95)
            objects = ''.join(
                f'<object><name>{kind}</name><difficult>0</difficult><bndbox><xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin>'
                f'<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>'
                for kind, x1, y1, x2, y2 in shapes
            )
            (folder / f'Annotations/{names[-1]}.xml').write_text(
                f'<annotation><size><width>96</width><height>80</height></size>{objects}</annotation>'
            )
        (folder / f'ImageSets/Main/{split}.txt').write_text('\n'.join(names) + '\n')
    return folder


def test_coco_and_voc_give_equal_datasets(tmp_path):
    counts = {'train': 5, 'val': 3}
    ours, theirs = (
        load_detection_dataset(coco(tmp_path / 'coco', counts), True),
        load_detection_dataset(voc(tmp_path / 'voc', counts), False),
    )
    for split, count in counts.items():
        assert len(ours[split]) == len(theirs[split]) == count
        for i, (_, shapes) in enumerate(scenes(count, len(split))):
            image, target = ours[split][i, False]
            _, other = theirs[split][i, False]
            assert image.shape == (3, 80, 96)
            assert target['boxes'].tolist() == other['boxes'].tolist() == [list(shape[1:]) for shape in shapes]
            names = {7: 'disc', 3: 'square'}
            number = {n: names[category] for category, n in ours[split].number.items()}
            assert [number[label] for label in target['labels'].tolist()] == [shape[0] for shape in shapes]
            for mask, (left, top, right, bottom) in zip(target['masks'], target['boxes'].int().tolist(), strict=True):
                assert mask.sum() == pytest.approx((right - left) * (bottom - top), rel=0.15)
                assert mask[top + 2 : bottom - 2, left + 2 : right - 2].all()
            mirrored, turned = ours[split][i, True]
            assert torch.equal(mirrored.flip(2), image)
            assert torch.equal(turned['masks'].flip(2), target['masks'])
            assert turned['boxes'][0, 0] == 96 - target['boxes'][0, 2]


def spoil(path, split, change):
    """Let `change(table)` alter a COCO file."""
    file = path / f'annotations/instances_{split}2017.json'
    table = json.loads(file.read_text())
    change(table)
    file.write_text(json.dumps(table))


@pytest.mark.parametrize('split', ['train', 'val'])
@pytest.mark.parametrize(
    ('entry', 'masks', 'said'),
    [
        ({'bbox': []}, False, 'annotation 2 has no box of four numbers within 1,000,000 pixels but'),
        (
            {'bbox': [float('nan'), 1, 5, 5]},
            False,
            'annotation 2 has no box of four numbers within 1,000,000 pixels but',
        ),
        ({'bbox': None}, False, 'is not in the COCO format'),
        ({'category_id': 99}, False, 'annotation 2 is of an unknown category, 99'),
        ({'image_id': 5}, False, 'annotation 2 is of an unknown image, 5'),
        ({'segmentation': None}, True, 'annotation 2 has no mask'),
        ({'segmentation': []}, True, 'annotation 2 has no mask'),
        ({'segmentation': [[1, 2, 3]]}, True, 'annotation 2 has no mask'),
        ({'segmentation': {'size': [4, 5], 'counts': [20]}}, True, 'annotation 2 has no mask'),
        ({'bbox': [10, 10, 1e300, 1e300]}, False, 'annotation 2 has no box of four numbers within 1,000,000 pixels'),
        ({'bbox': [10, 10, 10**400, 5]}, False, 'annotation 2 has no box of four numbers'),
        ({'area': '900'}, False, 'annotation 2 has no number of pixels as its area but 900'),
        ({'area': float('nan')}, False, 'annotation 2 has no number of pixels as its area but nan'),
        ({'iscrowd': '0'}, False, "annotation 2 has iscrowd '0'"),
        ({'segmentation': [[1, 2, 3, 4, 5, float('nan')]]}, True, 'annotation 2 has no mask'),
        ({'segmentation': [[1, 2, 3, 4, '5', 6]]}, True, 'annotation 2 has no mask'),
        ({'segmentation': [[1, 2, 3, 4, None, 6]], 'iscrowd': 1}, True, 'annotation 2 has no mask'),
        *(
            ({'segmentation': {'size': [80, 96], 'counts': counts}}, True, 'annotation 2 has no mask')
            for counts in ([10, 5], [10, 5, 99999], [-10, 7690], None, 'x', '\u00e9', 'PPPP', [7679.5, 0.5], '')
        ),
    ],
)
def test_invalid_annotation_is_named_before_training(entry, masks, said, split, tmp_path):
    coco(tmp_path / 'set', {'train': 3, 'val': 3})
    spoil(tmp_path / 'set', split, lambda table: table['annotations'][1].update(entry))
    with pytest.raises(WorkError, match=said):
        load_detection_dataset(tmp_path / 'set', masks)


@pytest.mark.parametrize(
    ('spoiling', 'said'),
    [
        (lambda table: table['images'][1].update(id='a'), 'the ids of the images are neither all numbers nor all text'),
        (lambda table: table['images'][1].update(id=100), 'the ids of the images are not unique: 100 occurs'),
        (lambda table: table['categories'][0].update(id=None), 'the ids of the categories are neither all numbers'),
        (lambda table: table['categories'][0].update(id=3), 'the ids of the categories are not unique: 3 occurs'),
        (lambda table: table['categories'][0].pop('name'), "is not in the COCO format: KeyError('name')"),
    ],
)
def test_invalid_table_is_named_before_training(spoiling, said, tmp_path):
    coco(tmp_path / 'set', {'train': 3, 'val': 2})
    spoil(tmp_path / 'set', 'train', spoiling)
    with pytest.raises(WorkError, match=re.escape(said)):
        load_detection_dataset(tmp_path / 'set', False)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 300))
def test_decode_rle_counts_equals_pycocotools(seed, height, width):
    mask = np.random.default_rng(seed).random((height, width)) < 0.3
    coded = encode_rle(torch.from_numpy(mask))
    assert is_mask({'size': [height, width], 'counts': coded['counts'].decode()}, height, width)
    lengths = decode_rle_counts(coded['counts'].decode())
    assert np.repeat(np.arange(len(lengths)) % 2, lengths).reshape(width, height).T.tolist() == mask.tolist()
    assert torch.equal(
        decode_mask({'size': [height, width], 'counts': lengths}, height, width), torch.from_numpy(mask) + 0
    )


@pytest.mark.parametrize('made', [coco, voc])
def test_missing_image_is_named_before_training(made, tmp_path):
    made(tmp_path / 'set', {'train': 3, 'val': 2})
    sorted(path for path in tmp_path.glob('set/*/*') if path.suffix in ('.png', '.jpg'))[-1].unlink()  # of val
    args = get_config(protocol='detection', detection_path=str(tmp_path / 'set'), cache_path=str(tmp_path))
    with pytest.raises(
        WorkError, match='1 of the 2 images of val(2017)? are not there, such as .*--on_unreadable=skip'
    ):
        detection.load_detection_splits(args)


def test_voc_difficult_object_ignores_only_itself():
    """VOC overlooks what is found of it, by its own overlap; nine boxes inside a large difficult one are wrong."""
    box = {'image_id': 0, 'category_id': 1, 'iscrowd': 0}
    table = {
        'images': [{'id': 0, 'width': 200, 'height': 200}],
        'categories': [{'id': 1, 'name': 'a'}],
        'annotations': [
            {**box, 'id': 1, 'bbox': [100, 100, 50, 50], 'area': 2500},
            {**box, 'id': 2, 'bbox': [0, 0, 90, 90], 'area': 8100, 'iscrowd': 1, 'difficult': 1},
        ],
    }
    right = {'image_id': 0, 'category_id': 1, 'bbox': [100, 100, 50, 50], 'score': 0.1}
    small = [{**right, 'bbox': [10 * i, 10, 9, 9], 'score': 0.9} for i in range(9)]
    itself = {**right, 'bbox': [0, 0, 90, 88], 'score': 0.95}
    assert average_precision(table, [right], 'bbox')[1] == pytest.approx(100)
    assert average_precision(table, [right, itself], 'bbox')[1] == pytest.approx(100)
    assert average_precision(table, [right, *small], 'bbox')[1] == pytest.approx(10)


def test_boxes_without_area_are_dropped_with_message(trained, tmp_path, capsys):
    def change(table):
        for box in table['annotations']:
            del box['id']
        for number, bbox in enumerate(([50, 50, -20, 20], [50, 50, 0, 20], [500, 500, 20, 20], [-30, 5, 20, 20])):
            table['annotations'].append({**table['annotations'][number % 2], 'bbox': bbox})
        table['categories'].reverse()

    for split in ('train', 'val'):
        coco(tmp_path / split, {'train': 3, 'val': 3})
        before = load_detection_dataset(tmp_path / split, False)[split]
        spoil(tmp_path / split, split, change)
        after = load_detection_dataset(tmp_path / split, False)[split]
        assert (after.left_out, len(after.table['annotations'])) == (4, len(before.table['annotations']))
        assert after.number == before.number
    detection.load_detection_splits(get_config(preset='demo', detection_path=f'{tmp_path}/val'))
    assert 'val2017: 4 boxes have no area or lie outside of their image, and are left out' in capsys.readouterr().out
    for split in ('train', 'val'):
        coco(tmp_path / f'crowd_{split}', {'train': 3, 'val': 3})
        spoil(tmp_path / f'crowd_{split}', split, lambda table: [x.update(iscrowd=1) for x in table['annotations']])
        with pytest.raises(UserError, match=f'has no boxes in {split}2017'):
            detection.load_detection_splits(get_config(preset='demo', detection_path=f'{tmp_path}/crowd_{split}'))


@pytest.mark.parametrize('made', [coco, voc])
def test_unreadable_images_are_dropped_with_boxes(made, tmp_path, capsys):
    """Damaged, empty and missing ones, of both splits; where none is left that is said."""
    made(tmp_path / 'set', {'train': 4, 'val': 3})
    options = {'preset': 'demo', 'detection_path': f'{tmp_path}/set', 'cache_path': f'{tmp_path}/cache'}
    splits = load_detection_dataset(tmp_path / 'set', False)
    of_train, of_val = ([boxes.folder / name for name in boxes.names] for boxes in splits.values())
    of_train[1].write_bytes(of_train[1].read_bytes()[:300])
    of_train[2].write_bytes(b'')
    of_val[0].unlink()
    whole = splits['train'], splits['val']
    kept = detection.load_detection_splits(get_config(**options, on_unreadable='skip'))
    for before, after, rows in zip(whole, kept.values(), ([0, 3], [1, 2]), strict=True):
        assert after.names == [before.names[row] for row in rows]
        assert after.labels.tolist() == before.labels[rows].tolist()
        for i, row in enumerate(rows):
            assert torch.equal(after[i, False][1]['boxes'], before[row, False][1]['boxes'])
    assert '2 of 4 images of ' in capsys.readouterr().out
    for path in (*of_train, *of_val):
        path.unlink(missing_ok=True)
    with pytest.raises(WorkError, match='no image of .* can be read'):
        detection.load_detection_splits(get_config(**options, on_unreadable='skip'))


@pytest.mark.parametrize(
    ('image', 'said'),
    [
        ('a b.jpg', None),
        ('photo.png', None),
        ('IMG_1.JPG', None),
        ('x.y.jpeg', 'elsewhere.jpeg'),
        ('one [1].webp', 'one [1].webp'),
        ('frame.png', 'image_frame.png'),
        ('Größe 1.jpg', None),
    ],
)
@pytest.mark.parametrize('mark', ['', '  1', ' -1', '\r'])
def test_voc_image_names_with_blanks_and_other_endings_are_found(image, said, mark, tmp_path):
    """Blanks in names, other endings, or a name that only the annotation says; lists with the mark of a class."""
    voc(tmp_path, {'train': 1, 'val': 1})
    name = image.rsplit('.', 1)[0]
    file = said if said and 'image_' in said else image
    (tmp_path / 'JPEGImages/train_000.jpg').rename(tmp_path / 'JPEGImages' / file)
    old = tmp_path / 'Annotations/train_000.xml'
    filename = f'<filename>{said}</filename>' if said else ''
    (tmp_path / f'Annotations/{name}.xml').write_text(old.read_text().replace('<size>', f'{filename}<size>'))
    old.unlink()
    (tmp_path / 'ImageSets/Main/train.txt').write_bytes(f'{name}{mark}\n\n'.encode())
    boxes = load_detection_dataset(tmp_path, False)['train']
    assert boxes.names == [file]
    assert boxes[0, False][0].shape == (3, 80, 96)


@pytest.mark.parametrize(
    ('old', 'new', 'said'),
    [
        ('<name>disc</name>', '', 'has an object without a name'),
        ('<name>disc</name>', '<name> </name>', 'has an object without a name'),
        ('<xmax>', '<xmax>nan</xmax><xmax>', 'is not in the VOC format'),
    ],
)
def test_invalid_voc_object_is_named(old, new, said, tmp_path):
    voc(tmp_path, {'train': 4, 'val': 2})
    for path in (tmp_path / 'Annotations').iterdir():
        path.write_text(path.read_text().replace(old, new))
    with pytest.raises(WorkError, match=said):
        load_detection_dataset(tmp_path, False)


@pytest.mark.parametrize(
    ('lists', 'pair'),
    [
        ('train val trainval test', ('trainval', 'test')),
        ('trainval test', ('trainval', 'test')),
        ('train val', ('train', 'val')),
        ('train val trainval', ('train', 'val')),
        ('train test', ('train', 'test')),
        ('trainval val', None),
        ('train', None),
    ],
)
def test_voc_lists_prefers_trainval_and_test(lists, pair, tmp_path):
    """The field's convention where both are there: trainval to test (paper, table 5)."""
    voc(tmp_path, {'train': 2, 'val': 1})
    for path in (tmp_path / 'ImageSets/Main').iterdir():
        path.unlink()
    names = sorted(path.stem for path in (tmp_path / 'JPEGImages').iterdir())
    for name in lists.split():
        (tmp_path / f'ImageSets/Main/{name}.txt').write_text('\n'.join(names[:2] if 'train' in name else names[2:]))
    if pair is None:
        with pytest.raises(UserError, match='needs trainval.txt and test.txt, or train.txt and val.txt or test.txt'):
            load_detection_dataset(tmp_path, False)
        return
    splits = load_detection_dataset(tmp_path, False)
    assert (splits['train'].split, splits['val'].split) == pair


def test_detector_heads_run_in_float32(trained):
    """In bfloat16 the width of a small box far from the corner would be rounded away, and its logarithm is nan."""
    args, model, _ = get_model_ckpt(
        get_config(ckpt_name=RUN, ckpt_path=f'{trained}/ckpt', amp='off', detection_size=120)
    )
    detector = make_detector(args, model.backbone, 2, False).train()
    detector.backbone.args = SimpleNamespace(amp='bf16', device='cpu')
    target = {'boxes': torch.tensor([[157.125, 117.625, 157.25, 117.75]]), 'labels': torch.tensor([1])}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('protocols.detection.autocast', lambda *_, **__: torch.autocast('cpu', torch.bfloat16))
        losses = detector([torch.rand(3, 120, 160)], [target])
    assert all(torch.isfinite(loss) for loss in losses.values()), losses
    assert all(loss.dtype == torch.float32 for loss in losses.values())


def test_average_precision_of_known_detections(tmp_path):
    """All right: 100. Half of the objects found, the rest missed: precision 1 up to recall 1/2, 51 of COCO's 101 points
    of recall. Boxes whose overlap is 0.6: right at the thresholds 0.5, 0.55, 0.6 of ten."""
    table = load_detection_dataset(coco(tmp_path / 'coco', {'train': 2, 'val': 40}), False)['val'].table
    table['annotations'] = [dict(box, category_id=7) for box in table['annotations']]
    table['categories'] = [{'id': 7, 'name': 'disc'}]
    first = {box['image_id']: box for box in table['annotations']}
    table['annotations'] = list(first.values())
    perfect = [
        {'image_id': box['image_id'], 'category_id': 7, 'bbox': box['bbox'], 'score': 0.9}
        for box in table['annotations']
    ]
    assert average_precision(table, perfect, 'bbox') == pytest.approx((100, 100, 100))
    assert average_precision(table, perfect[:20], 'bbox') == pytest.approx((100 * 51 / 101,) * 3)
    narrow = [{**box, 'bbox': [*box['bbox'][:2], 0.601 * box['bbox'][2], box['bbox'][3]]} for box in perfect]
    assert average_precision(table, narrow, 'bbox') == pytest.approx((30, 100, 0))
    assert average_precision(table, [], 'bbox') == (0, 0, 0)


@pytest.fixture(scope='module')
def trained(drawn, tmp_path_factory):
    folder = tmp_path_factory.mktemp('detection')
    options = ('--backbone=resnet18', '--stem=imagenet', '--max_epochs=1', '--knn_every=0', *own_paths(folder))
    assert cli.main(['train', *TINY, f'--image_path={drawn}', *options]) == 0
    return folder


def run(folder, *options):
    code = cli.main(
        [
            'evaluate',
            '--protocol=detection',
            f'--ckpt_name={RUN}',
            '--num_workers=0',
            '--detection_size=80',
            *own_paths(folder),
            *options,
        ]
    )
    assert code == 0


def test_faster_rcnn_learns_voc_folder(trained, tmp_path, capsys, monkeypatch):
    """With 64 regions of an image in the loss and not 512, which take most of the time."""
    fewer = functools.partial(detection.FasterRCNN, box_batch_size_per_image=64)
    monkeypatch.setattr(detection, 'FasterRCNN', fewer)
    folder = voc(tmp_path / 'voc', {'train': 24, 'val': 8})
    run(
        trained,
        f'--detection_path={folder}',
        '--detection_epochs=4',
        '--detection_batch_size=4',
        '--detection_learning_rate=0.05',
    )
    said = capsys.readouterr().out
    result = load_results(trained / 'ckpt' / RUN, init='checkpoint')[-1]
    assert f'AP50                  {result["AP50"]:6.2f} %' in said
    assert result['AP50'] > 10
    assert result['AP'] <= result['AP50']
    assert (result['num_train'], result['num_val'], result['init']) == (24, 8, 'checkpoint')


class Scale(torch.nn.Module):
    def forward(self, x):
        return 0.1 * x


def test_pyramid_does_not_depend_on_feature_scale():
    """The first stage's features a tenth as large: what the detector sees is not."""
    args, images = get_config(preset='demo', device='cpu'), torch.randn(4, 3, 48, 48)
    levels = []
    for scale in (torch.nn.Identity(), Scale()):
        backbone = build_model(args).backbone
        backbone[3] = torch.nn.Sequential(backbone[3], scale)
        levels.append(make_detector(args, backbone, 2, False).backbone.train()(images))
    for name, features in levels[0].items():
        torch.testing.assert_close(levels[1][name], features, atol=0.2, rtol=0.05)
        assert features.std() > 0.3


def test_mask_rcnn_and_random_init_run_on_coco_folder(trained, tmp_path):
    folder = coco(tmp_path / 'coco', {'train': 4, 'val': 3})
    run(
        trained,
        f'--detection_path={folder}',
        '--detection_epochs=1',
        '--detection_batch_size=2',
        '--detector_init=random',
        '--detector=mask_rcnn',
    )
    result = load_results(trained / 'ckpt' / RUN, init='random')[-1]
    assert {'AP', 'AP50', 'AP75', 'mask_AP', 'mask_AP50', 'mask_AP75'} <= set(result)


def test_detection_on_invalid_folder_exits_2(trained, tmp_path, capsys):
    with pytest.raises(UserError, match='neither annotations/ .COCO. nor ImageSets/Main/ .VOC.'):
        load_detection_dataset(tmp_path, False)
    folder = coco(tmp_path / 'coco', {'train': 2, 'val': 2})
    path = folder / 'annotations/instances_val2017.json'
    table = json.loads(path.read_text())
    table['images'][0]['file_name'] = '../../secret.png'
    path.write_text(json.dumps(table))
    with pytest.raises(WorkError, match="name '../../secret.png', which is not inside"):
        load_detection_dataset(folder, False)
    path.write_text('{"images": []}')
    with pytest.raises(WorkError, match='is not in the COCO format'):
        load_detection_dataset(folder, False)
    path.unlink()
    with pytest.raises(UserError, match=r'there is no .*instances_val\*.json'):
        load_detection_dataset(folder, False)
    folder = voc(tmp_path / 'voc', {'train': 2, 'val': 2})
    with pytest.raises(UserError, match='masks, which the VOC format does not have'):
        load_detection_dataset(folder, True)
    (folder / 'Annotations/val_000.xml').write_text('<annotation>')
    name = f'--ckpt_name={RUN}'
    assert cli.main(['evaluate', '--protocol=detection', name, f'--detection_path={folder}', *own_paths(trained)]) == 1
    assert 'val_000.xml cannot be read' in one_line(capsys.readouterr().err)
