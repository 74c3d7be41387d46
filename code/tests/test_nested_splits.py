"""Splits that lie below --image_path: ImageNet as Kaggle packs it, folders called train below, names in shards."""

import csv
import io
import shutil
import tarfile

import pytest
from PIL import Image

import cli
from conftest import TINY, draw_folder, one_line, own_paths
from dataloader.load_dataset import find_split_sources, load_splits
from runtime.errors import UserError, WorkError
from runtime.options import get_config

RUN = 'model_name_simsiam_ckpt_0'


def kaggle(folder, drawn, table=True):
    """The competition's folder: classes in train, val and test flat, val's labels in a table."""
    inner = folder / 'ILSVRC/Data/CLS-LOC'
    shutil.copytree(drawn / 'train', inner / 'train')
    (inner / 'val').mkdir()
    (inner / 'test').mkdir()
    (folder / 'ILSVRC/Annotations/CLS-LOC/val').mkdir(parents=True)
    (folder / 'ILSVRC/ImageSets/CLS-LOC').mkdir(parents=True)
    rows = []
    for number, path in enumerate(sorted((drawn / 'val').rglob('*.png'))):
        name = f'ILSVRC2012_val_{number:08d}'
        shutil.copy(path, inner / f'val/{name}.png')
        shutil.copy(path, inner / f'test/ILSVRC2012_test_{number:08d}.png')
        rows.append({'ImageId': name, 'PredictionString': f'{path.parent.name} 1 2 3 4 {path.parent.name} 5 6 7 8 '})
    if table:
        with open(folder / 'LOC_val_solution.csv', 'w', newline='') as file:
            writer = csv.DictWriter(file, ['ImageId', 'PredictionString'])
            writer.writeheader()
            writer.writerows(rows[::-1])
    return folder


@pytest.mark.parametrize('below', ['', 'ILSVRC'])
def test_kaggle_imagenet_is_found_at_its_root(below, drawn, tmp_path):
    root = kaggle(tmp_path / 'kaggle', drawn) / below
    splits = load_splits(get_config(preset='demo', image_path=str(root), cache_path=str(tmp_path / 'cache')))
    plain = load_splits(get_config(preset='demo', image_path=str(drawn), cache_path=str(tmp_path / 'cache')))
    assert splits['train'].classes == plain['train'].classes
    assert splits['train'].labels.tolist() == plain['train'].labels.tolist()
    assert splits['val'].labels.tolist() == plain['val'].labels.tolist()
    assert (splits['test'].labels == -1).all()
    assert len(splits['test']) == len(splits['val']) == 24


def test_kaggle_imagenet_without_csv_has_unlabeled_val(drawn, tmp_path, capsys):
    root = kaggle(tmp_path / 'kaggle', drawn, table=False)
    parts = find_split_sources(get_config(preset='demo', image_path=str(root), cache_path=str(tmp_path / 'cache')))
    assert (parts['val'].labels == -1).all()
    assert 'LOC_val_solution.csv, which does not exist' in capsys.readouterr().out


@pytest.mark.parametrize('text', ['', 'ImageId,PredictionString\n', 'a,b\n1,2\n', 'ImageId,PredictionString\nx,\n'])
def test_kaggle_imagenet_with_damaged_csv_fails(text, drawn, tmp_path):
    root = kaggle(tmp_path / 'kaggle', drawn)
    (root / 'LOC_val_solution.csv').write_text(text)
    with pytest.raises(WorkError, match='LOC_val_solution.csv is damaged, or for other images'):
        find_split_sources(get_config(preset='demo', image_path=str(root), cache_path=str(tmp_path / 'cache')))


# Where folders called train and val lie below a folder that has no splits itself; what it is told to mean.
BELOW = {
    'a level down, with more beside': (['set/train', 'set/val', 'other'], 'set'),
    'two levels down': (['a/set/training', 'a/set/validation', 'b'], 'a/set'),
    'train and test': (['x/train', 'x/test', 'docs'], 'x'),
    'with years': (['x/train2017', 'x/val2017', 'y'], 'x'),
    'two sets': (['one/train', 'one/val', 'two/train', 'two/val'], 'one'),
}


@pytest.mark.parametrize('case', BELOW)
def test_splits_in_subfolders_exit_2(case, drawn, tmp_path, capsys):
    folders, meant = BELOW[case]
    for folder in folders:
        shutil.copytree(drawn / 'val', tmp_path / 'root' / folder)
    given = ['train', *TINY, f'--image_path={tmp_path}/root', *own_paths(tmp_path)]
    assert cli.main(given) == 2
    error = one_line(capsys.readouterr().err)
    assert f'is {tmp_path}/root/{meant} meant?' in error
    assert not list(tmp_path.rglob('run.json'))


@pytest.mark.parametrize(
    'folders', [['a', 'b'], ['trainers/x', 'values/y'], ['a/train', 'b/train'], ['strain/a', 'val_a/b']]
)
def test_folders_with_other_names_are_classes(folders, drawn, tmp_path):
    for folder in folders:
        shutil.copytree(drawn / 'val/checks', tmp_path / 'root' / folder)
    parts = find_split_sources(
        get_config(preset='demo', image_path=str(tmp_path / 'root'), cache_path=str(tmp_path / 'cache'))
    )
    assert len(parts['train'].labels) + len(parts['val'].labels) == 8 * len(folders)


def shards(folder, counts, keys):
    """val-000000.tar, ...: images whose keys `keys` makes of (shard, number)."""
    folder.mkdir(parents=True)
    for shard in range(counts[0]):
        with tarfile.open(folder / f'val-{shard:06d}.tar', 'w') as archive:
            for number in range(counts[1]):
                buffer = io.BytesIO()
                Image.new('RGB', (16, 16), (shard * 60, number * 20, 99)).save(buffer, 'PNG')
                member = tarfile.TarInfo(keys(shard, number))
                member.size = len(buffer.getvalue())
                archive.addfile(member, io.BytesIO(buffer.getvalue()))


KEYS = {
    'that begin anew': (lambda shard, number: f'{number:06d}.png', True),
    'that begin anew, in classes': (lambda shard, number: f'{"ab"[number % 2]}/{number:06d}.png', True),
    'that go on': (lambda shard, number: f'{shard * 100 + number:06d}.png', False),
}


@pytest.mark.parametrize('kind', KEYS)
def test_shard_names_are_unique_in_outputs(kind, drawn, tmp_path, capsys):
    keys, marked = KEYS[kind]
    shards(tmp_path / 'set', (3, 8), keys)
    for path in (tmp_path / 'set').iterdir():
        shutil.copy(path, path.with_name(path.name.replace('val', 'train')))
    assert cli.main(['train', *TINY, '--max_epochs=1', f'--image_path={drawn}', *own_paths(tmp_path)]) == 0
    given = [
        f'--ckpt_name={RUN}',
        f'--image_path={tmp_path}/set',
        '--num_workers=0',
        *own_paths(tmp_path, 'ckpt', 'cache'),
    ]
    assert cli.main(['infer', *given, f'--output={tmp_path}/x.csv']) == 0
    with open(tmp_path / 'x.csv', newline='') as file:
        names = [row['file'] for row in csv.DictReader(file)]
    assert len(names) == len({*names}) == 24
    assert all(('val-0' in name) == marked for name in names)
    if 'classes' in kind:
        parts = find_split_sources(
            get_config(preset='demo', image_path=str(tmp_path / 'set'), cache_path=str(tmp_path / 'c'))
        )
        assert parts['val'].classes == ['a', 'b']
        assert {name.split('/')[0] for name in names} == {'a', 'b'}
    assert 'val-{000000..000002}.tar' in capsys.readouterr().out


def test_pack_of_image_too_wide_for_jpeg_names_it(tmp_path, capsys):
    """70,000 x 100 px with a shorter side of 256: wider than the library writes."""
    draw_folder(tmp_path / 'set', {'train': 3})
    Image.new('L', (70_000, 100)).save(tmp_path / 'set/train/checks/wide.png')
    given = ['pack', f'--image_path={tmp_path}/set', '--pack_short_side=256', f'--cache_path={tmp_path}/cache']
    assert cli.main([*given, f'--output={tmp_path}/one']) == 1
    error = one_line(capsys.readouterr().err)
    assert 'checks/wide.png would have' in error
    assert '65500 a side' in error.replace(',', '')
    assert cli.main([*given, f'--output={tmp_path}/two', '--on_unreadable=skip']) == 0
    names = []
    for path in (tmp_path / 'two').iterdir():
        with tarfile.open(path) as archive:
            names += archive.getnames()
    assert len(names) == 9
    assert 'wide.png' in capsys.readouterr().err


def test_runtime_error_of_writer_is_not_reported_as_full_disk(tmp_path):
    """A RuntimeError of what is written is not told as a full disk."""
    from runtime.files import atomic_write

    def write(aside):
        raise RuntimeError('unsupported operator')

    with pytest.raises(RuntimeError, match='unsupported operator'):
        atomic_write(tmp_path / 'x', write)

    def full(aside):
        raise RuntimeError('[enforce fail at inline_container.cc:603] . unexpected pos 64 vs 0')

    with pytest.raises(OSError, match='is the disk full'):
        atomic_write(tmp_path / 'x', full)


def test_ambiguous_splits_exit_2(tmp_path, drawn):
    shutil.copytree(drawn, tmp_path / 'root/set')
    shutil.copytree(drawn / 'val', tmp_path / 'root/more')
    with pytest.raises(UserError, match='folders called .* lie below'):
        find_split_sources(get_config(preset='demo', image_path=str(tmp_path / 'root')))
