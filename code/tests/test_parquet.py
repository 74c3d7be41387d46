"""Parquet files as the Hugging Face hub has them: read where they lie, to the bit what the files were."""

import io
import json
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import cli
from conftest import TINY, one_line, own_paths
from dataloader.load_dataset import load_splits
from dataloader.readers import parquet
from dataloader.sources import parquet_files
from dataloader.sources.parquet_files import source_from_parquet
from runtime.options import get_config

CLASSES = ['checks', 'dots', 'stripes']


def hub(folder, drawn, shards=2, metadata=True, label='label', column='image', group=7):
    """folder/data/<split>-0000x-of-0000y.parquet of the images of `drawn`, as the datasets library writes them."""
    (folder / 'data').mkdir(parents=True)
    for split, name in (('train', 'train'), ('val', 'validation')):
        paths = sorted((drawn / split).rglob('*.png'))
        rows = [({'bytes': path.read_bytes(), 'path': path.name}, CLASSES.index(path.parent.name)) for path in paths]
        features = {column: {'_type': 'Image'}, label: {'names': CLASSES, '_type': 'ClassLabel'}}
        about = {b'huggingface': json.dumps({'info': {'features': features}}).encode()} if metadata else None
        size = -(-len(rows) // shards)
        for shard in range(shards):
            images, labels = zip(*rows[shard * size : (shard + 1) * size], strict=True)
            kind = pa.struct([('bytes', pa.binary()), ('path', pa.string())])
            table = pa.table({column: pa.array(images, kind), label: pa.array(labels, pa.int64())})
            table = table.replace_schema_metadata(about)
            pq.write_table(table, folder / f'data/{name}-{shard:05d}-of-{shards:05d}.parquet', row_group_size=group)
    return folder


def options(path, tmp_path, **more):
    return get_config(preset='demo', image_path=str(path), cache_path=str(tmp_path / 'cache'), **more)


@pytest.mark.parametrize('metadata', [True, False])
def test_parquet_images_and_labels_equal_files(drawn, tmp_path, metadata):
    folder = hub(tmp_path / 'hub', drawn, metadata=metadata)
    wanted = load_splits(options(drawn, tmp_path))
    for more in ({}, {'cache_images': 'off'}):
        found = load_splits(options(folder, tmp_path, **more))
        assert [name for name, images in found.items() if images] == ['train', 'val']
        for split in ('train', 'val'):
            assert found[split].classes == (CLASSES if metadata else ['0', '1', '2'])
            assert torch.equal(found[split].labels, wanted[split].labels)
            for row in (0, 5, len(found[split]) - 1, 3):
                with found[split].store.open(row) as image:
                    assert np.array_equal(np.asarray(image.convert('RGB')), wanted[split].pixels[row].permute(1, 2, 0))
    assert len({*found['train'].names}) == 72


@pytest.mark.parametrize('workers', [0, 2])
def test_run_on_parquet_equals_run_on_files(drawn, tmp_path, workers):
    folder = hub(tmp_path / 'hub', drawn)
    given = [*TINY, '--cache_images=off', f'--num_workers={workers}']
    for path in (drawn, folder):
        assert cli.main(['train', *given, f'--image_path={path}', *own_paths(tmp_path)]) == 0
    states = [torch.load(path, weights_only=True)['model'] for path in sorted((tmp_path / 'ckpt').glob('*/loss_*'))]
    assert len(states) == 2
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_parquet_single_file_trains_and_infers(drawn, tmp_path, capsys):
    folder = hub(tmp_path / 'hub', drawn, shards=1)
    file = folder / 'data/train-00000-of-00001.parquet'
    images = load_splits(options(file, tmp_path))
    assert len(images['train']) + len(images['val']) == 72  # a part is held out
    assert cli.main(['train', *TINY, f'--image_path={folder}', *own_paths(tmp_path)]) == 0
    (run,) = (tmp_path / 'ckpt').iterdir()
    given = [f'--ckpt_name={run.name}', f'--image_path={folder}', f'--output={tmp_path}/out.csv', *own_paths(tmp_path)]
    capsys.readouterr()
    assert cli.main(['infer', *given]) == 0
    assert len((tmp_path / 'out.csv').read_text().splitlines()) == 25


def test_parquet_random_access_has_bounded_cache(tmp_path, monkeypatch):
    """A hundred row groups, of which two fit: what is kept stays below that."""
    rng, images = np.random.default_rng(0), []
    for _ in range(100):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (100, 100, 3), np.uint8)).save(file, 'PNG')
        images.append(file.getvalue())
    pq.write_table(pa.table({'image': images}), tmp_path / 'train.parquet', row_group_size=1)
    monkeypatch.setattr(parquet, 'CACHE_BYTES', 70_000)
    parquet.cache_of_process.cache_clear()
    store = source_from_parquet([tmp_path / 'train.parquet']).store
    tracemalloc.start()
    for row in rng.permutation(100).tolist():
        with store.open(row) as image:
            assert image.size == (100, 100)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    parquet.cache_of_process.cache_clear()
    assert held < 1_000_000 < sum(map(len, images))


def test_parquet_missing_label_is_minus_one(drawn, tmp_path):
    table = pa.table({'image': [b'x'] * 4, 'label': pa.array([1, -1, None, 0], pa.int64())})
    about = {'info': {'features': {'image': {'_type': 'Image'}, 'label': {'_type': 'ClassLabel', 'names': ['a', 'b']}}}}
    table = table.replace_schema_metadata({b'huggingface': json.dumps(about).encode()})
    pq.write_table(table, tmp_path / 'test.parquet')
    source = source_from_parquet([tmp_path / 'test.parquet'])
    assert (source.labels.tolist(), source.classes) == ([1, -1, -1, 0], ['a', 'b'])
    pq.write_table(pa.table({'image': [b'x'] * 3, 'label': ['cat', 'ant', None]}), tmp_path / 'test.parquet')
    source = source_from_parquet([tmp_path / 'test.parquet'])
    assert (source.labels.tolist(), source.classes) == ([1, 0, -1], ['ant', 'cat'])


@pytest.mark.parametrize(
    ('make', 'code', 'said'),
    [
        (lambda path: path.write_bytes(b'no parquet'), 1, 'cannot read the file'),
        (lambda path: pq.write_table(pa.table({'text': ['a']}), path), 2, 'has no column of images, but text'),
        (lambda path: pq.write_table(pa.table({'image': pa.array([], pa.binary())}), path), 2, 'holds no images'),
        (lambda path: pq.write_table(pa.table({'image': [b'x'] * 9}), path), 1, 'cannot read the image'),
    ],
)
def test_damaged_parquet_fails_in_one_line(make, code, said, tmp_path, capsys):
    (tmp_path / 'set').mkdir()
    make(tmp_path / 'set/train.parquet')
    assert cli.main(['train', *TINY, '--batch_size=2', f'--image_path={tmp_path}/set', *own_paths(tmp_path)]) == code
    assert said in one_line(capsys.readouterr().err)


def test_parquet_without_train_exits_2(drawn, tmp_path, capsys):
    hub(tmp_path / 'hub', drawn)
    for path in (tmp_path / 'hub/data').glob('train*'):
        path.unlink()
    assert cli.main(['train', *TINY, f'--image_path={tmp_path}/hub', *own_paths(tmp_path)]) == 2
    assert 'no train: which images are for training?' in one_line(capsys.readouterr().err)


STRUCT = pa.struct([('bytes', pa.binary()), ('path', pa.string())])


def write_odd(folder, drawn, change):
    """folder/data/train-00000-of-00001.parquet and one for val, of {column: array} as `change` makes it from images and
    labels; it may return (columns, metadata)."""
    (folder / 'data').mkdir(parents=True)
    for split, name in (('train', 'train'), ('val', 'validation')):
        paths = sorted((drawn / split).rglob('*.png'))
        images = [{'bytes': path.read_bytes(), 'path': path.name} for path in paths]
        columns = change(images, [CLASSES.index(path.parent.name) for path in paths])
        columns, metadata = columns if isinstance(columns, tuple) else (columns, None)
        table = pa.table(columns).replace_schema_metadata(metadata and {b'huggingface': metadata})
        pq.write_table(table, folder / f'data/{name}-00000-of-00001.parquet')
    return folder


def hub_metadata(**features):
    return json.dumps({'info': {'features': features}}).encode()


# What columns and metadata may be: the number of labeled training images, or None if one image is unreadable.
ODD = {
    'bytes without paths': (
        lambda x, y: {'image': pa.array([{'bytes': each['bytes']} for each in x], pa.struct([('bytes', pa.binary())]))},
        0,
    ),
    'a null image': (lambda x, y: {'image': pa.array([*x[:5], None, *x[6:]], STRUCT), 'label': y}, None),
    'lists of labels': (lambda x, y: {'image': pa.array(x, STRUCT), 'label': [[each] for each in y]}, 0),
    'dicts as labels': (lambda x, y: {'image': pa.array(x, STRUCT), 'label': [{'a': each} for each in y]}, 0),
    'names for numbers': (
        lambda x, y: (
            {'image': pa.array(x, STRUCT), 'label': [CLASSES[each] for each in y]},
            hub_metadata(image={'_type': 'Image'}, label={'_type': 'ClassLabel', 'names': CLASSES}),
        ),
        72,
    ),
    'a column that is not there': (
        lambda x, y: (
            {'image': pa.array(x, STRUCT), 'target': y},
            hub_metadata(image={'_type': 'Image'}, label={'_type': 'ClassLabel', 'names': CLASSES}),
        ),
        72,
    ),
    'nan among the labels': (
        lambda x, y: {'image': pa.array(x, STRUCT), 'label': [float('nan'), *map(float, y[1:])]},
        71,
    ),
    'metadata that is no JSON': (lambda x, y: ({'image': pa.array(x, STRUCT), 'label': y}, b'{nope'), 72),
    'metadata that is a list': (lambda x, y: ({'image': pa.array(x, STRUCT), 'label': y}, b'[1]'), 72),
    'metadata without features': (lambda x, y: ({'image': pa.array(x, STRUCT), 'label': y}, b'{"info": null}'), 72),
}


@pytest.mark.parametrize('case', ODD)
def test_odd_parquet_columns_are_read_or_named(case, drawn, tmp_path, capsys):
    change, labeled = ODD[case]
    folder = write_odd(tmp_path / 'hub', drawn, change)
    given = ['check_dataloader', *TINY[:3], f'--image_path={folder}', *own_paths(tmp_path, 'log', 'cache')]
    assert cli.main(given) == (1 if labeled is None else 0)
    said = capsys.readouterr()
    if labeled is None:
        assert '2 of the 96 images' in one_line(said.err)
        assert '0000005_image' in said.out
    else:
        splits = load_splits(options(folder, tmp_path))
        assert int((splits['train'].labels >= 0).sum()) == labeled


@pytest.mark.parametrize('column', ['label', 'image'])
def test_parquet_shards_with_other_columns_exit_2(column, drawn, tmp_path, capsys):
    folder = hub(tmp_path / 'hub', drawn)
    path = folder / 'data/train-00001-of-00002.parquet'
    table = pq.read_table(path)
    pq.write_table(
        table.rename_columns([f'other_{name}' if name == column else name for name in table.column_names]), path
    )
    given = ['check_dataloader', *TINY[:3], f'--image_path={folder}', *own_paths(tmp_path, 'log', 'cache')]
    assert cli.main(given) == 2
    assert f'has no column {column!r}' in one_line(capsys.readouterr().err)


def test_missing_parquet_shards_warn(drawn, tmp_path, capsys):
    folder = hub(tmp_path / 'hub', drawn, shards=3)
    (folder / 'data/train-00001-of-00003.parquet').unlink()
    load_splits(options(folder, tmp_path))
    assert 'has 2 of 3 files of this split' in capsys.readouterr().err


@pytest.mark.parametrize('layout', ['default/{split}/0000.parquet', 'plain_text/{split}-00000-of-00001.parquet'])
def test_other_parquet_names_of_the_hub_are_read(layout, drawn, tmp_path):
    folder = hub(tmp_path / 'hub', drawn, shards=1)
    for split in ('train', 'validation'):
        target = tmp_path / 'other' / layout.format(split=split)
        target.parent.mkdir(parents=True, exist_ok=True)
        (folder / f'data/{split}-00000-of-00001.parquet').rename(target)
    splits = load_splits(options(tmp_path / 'other', tmp_path))
    assert (len(splits['train']), len(splits['val'])) == (72, 24)


def test_parquet_of_arrays_is_packed_as_npy(tmp_path):
    (tmp_path / 'hub/data').mkdir(parents=True)
    contents = []
    for seed in range(6):
        file = io.BytesIO()
        np.save(file, np.random.default_rng(seed).integers(0, 4096, (20, 20, 5), np.uint16))
        contents.append(file.getvalue())
    pq.write_table(pa.table({'image': contents}), tmp_path / 'hub/data/train-00000-of-00001.parquet')
    given = ['pack', f'--image_path={tmp_path}/hub', f'--output={tmp_path}/packed', *own_paths(tmp_path, 'cache')]
    assert cli.main(given) == 0
    before, after = (
        load_splits(options(tmp_path / name, tmp_path, cache_images='off'))['train'] for name in ('hub', 'packed')
    )
    assert len(after) == 6
    for row in range(6):
        with before.store.open(row) as first, after.store.open(row) as second:
            assert np.array_equal(first.pixels, second.pixels)


def test_labels_beyond_the_names_are_counted(capsys):
    labels, classes = parquet_files.number_labels([0, 2, 7, -1, None, 7], ['a', 'b', 'c'])
    assert (labels.tolist(), classes) == ([0, 2, -1, -1, -1, -1], ['a', 'b', 'c'])
    assert '2 images have a class that the 3 names' in capsys.readouterr().err
