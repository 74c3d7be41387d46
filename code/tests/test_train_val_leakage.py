"""What is judged was not trained on, or it is said: accuracies would flatter."""

import shutil
import tarfile
from pathlib import Path

import pytest

import cli
from conftest import own_paths
from dataloader.load_dataset import load_splits
from protocols.detection import load_detection_splits
from runtime.options import get_config
from test_dataset_layouts import options, picture
from test_detection import voc


@pytest.fixture
def photos(drawn, tmp_path):
    """A copy of the drawn set without its val."""
    folder = shutil.copytree(drawn, tmp_path / 'set')
    shutil.rmtree(folder / 'val')
    return folder


def all_linked(folder):
    (folder / 'val').symlink_to(folder / 'train')


def one_class_linked(folder):
    (folder / 'val').mkdir()
    for path in sorted((folder / 'train').iterdir())[:2]:
        shutil.copytree(path, folder / 'val' / path.name)
    one = sorted((folder / 'train').iterdir())[2]
    (folder / 'val' / one.name).symlink_to(one)


def both_of_a_pool(folder):
    (folder / 'train').rename(folder.with_name('pool'))
    for split in ('train', 'val'):
        (folder / split).mkdir()
        for path in folder.with_name('pool').iterdir():
            (folder / split / path.name).symlink_to(f'../../pool/{path.name}')


def in_two_lists(folder):
    (folder / 'train').rename(folder / 'images')
    files = sorted((folder / 'images').rglob('*.png'))
    (folder / 'link').symlink_to('images')
    for split, lines in (
        ('train', files[:30]),
        ('val', [f'link/{path.parent.name}/{path.name}' for path in files[29:]]),
    ):
        (folder / f'{split}.txt').write_text('\n'.join(map(str, lines)))


def some_linked(folder, how=Path.symlink_to):
    for path in (folder / 'train').iterdir():
        (folder / 'val' / path.name).mkdir(parents=True)
        for file in sorted(path.iterdir())[:2]:
            how(folder / 'val' / path.name / f'as_{file.name}', file)


def hard_linked(folder):
    some_linked(folder, Path.hardlink_to)


def deep_in_train(folder):
    for path in sorted((folder / 'train').iterdir()):
        picture(folder / 'val' / path.name / 'a.png')
        (path / 'more').symlink_to('../../val/' + path.name)


def linked_archive(folder, how=Path.symlink_to):
    with tarfile.open(folder / 'train.tar', 'w') as archive:
        archive.add(folder / 'train', '.')
    shutil.rmtree(folder / 'train')
    how(folder / 'val.tar', folder / 'train.tar')


def hard_linked_archive(folder):
    linked_archive(folder, Path.hardlink_to)


def a_class_twice(folder):
    """And a share of it held out."""
    one, *_ = sorted((folder / 'train').iterdir())
    (folder / 'train/again').symlink_to(one.name)


def nothing_in_common(folder):
    for path in sorted((folder / 'train').iterdir()):
        picture(folder / 'val' / path.name / 'a.png')


def links_to_other_files(folder):
    both_of_a_pool(folder)
    (folder / 'val').rename(folder / 'old')
    shutil.rmtree(folder / 'old')
    for path in sorted((folder / 'train').iterdir()):
        file = picture(folder.with_name('more') / path.name / 'a.png')
        (folder / 'val' / path.name).mkdir(parents=True)
        for name in ('a.png', 'b.png'):
            (folder / 'val' / path.name / name).symlink_to(file)


@pytest.mark.parametrize(
    ('made', 'shared'),
    [
        (all_linked, True),
        (one_class_linked, True),
        (both_of_a_pool, True),
        (in_two_lists, True),
        (some_linked, True),
        (hard_linked, True),
        (deep_in_train, True),
        (linked_archive, True),
        (hard_linked_archive, True),
        (a_class_twice, True),
        (nothing_in_common, False),
        (links_to_other_files, False),
    ],
)
def test_files_shared_by_splits_warn(made, shared, photos, capsys):
    made(photos)
    load_splits(options(photos))
    said = capsys.readouterr().err
    assert ('accuracy on them is overestimated' in said) == shared


def test_image_in_both_detection_splits_warns(tmp_path, capsys):
    voc(tmp_path / 'set', {'train': 3, 'val': 3})
    asked = get_config(preset='demo', detection_path=f'{tmp_path}/set')
    load_detection_splits(asked)
    assert 'was learned' not in capsys.readouterr().err
    with open(tmp_path / 'set/ImageSets/Main/val.txt', 'a') as file:
        file.write('train_001\n')
    load_detection_splits(asked)
    assert '1 of the 4 images of ' in capsys.readouterr().err


@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('held_out', [False, True])
def test_check_dataloader_finds_copies_by_pixels(held_out, packed, drawn, tmp_path, capsys):
    """Of a file, of one in an archive, and of what is held out, whatever the copy is called; and its copy in train."""
    folder = shutil.copytree(drawn, tmp_path / 'set')
    classes = sorted((folder / 'train').iterdir())
    if held_out:
        shutil.rmtree(folder / 'val')
        for number in range(30):  # some of as many are held out, some are not
            shutil.copy(picture(tmp_path / 'one.png'), classes[0] / f'copy{number}.png')
    else:
        shutil.copy(min(classes[0].iterdir()), folder / 'val' / classes[1].name / 'other.png')
    shutil.copy(max(classes[1].iterdir()), classes[2] / 'twice.png')
    paths = own_paths(tmp_path, 'log', 'cache')
    if packed:
        assert cli.main(['pack', f'--image_path={folder}', f'--output={tmp_path}/packed', *paths[1:]]) == 0
        folder = tmp_path / 'packed'
    assert cli.main(['check_dataloader', '--preset=demo', '--batch_size=8', f'--image_path={folder}', *paths]) == 0
    out, err = capsys.readouterr()
    assert 'images of val are in train too, pixel by pixel' in err
    assert held_out or 'other.png, in train' in err
    assert 'images have the same pixels as another one of train' in out


def test_dataset_without_copies_does_not_warn(drawn, tmp_path, capsys):
    paths = own_paths(tmp_path, 'log', 'cache')
    assert cli.main(['check_dataloader', '--preset=demo', '--batch_size=8', f'--image_path={drawn}', *paths]) == 0
    out, err = capsys.readouterr()
    assert 'pixel by pixel' not in err
    assert 'once more' not in out
