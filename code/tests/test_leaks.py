"""What is judged was not trained on, or it is said: accuracies would flatter."""

import shutil

import pytest

import cli
from conftest import own_paths
from dataloader.load_dataset import load_splits
from test_layout import options, picture


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


def nothing_in_common(folder):
    (folder / 'val').mkdir()
    for path in sorted((folder / 'train').iterdir()):
        picture(folder / 'val' / path.name / 'a.png')


@pytest.mark.parametrize('made', [all_linked, one_class_linked, both_of_a_pool, in_two_lists, nothing_in_common])
def test_files_of_two_splits_are_said(made, photos, capsys):
    made(photos)
    load_splits(options(photos))
    said = capsys.readouterr().err
    assert ('what is judged on them was learned' in said) == (made is not nothing_in_common)


@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('held_out', [False, True])
def test_a_copy_is_found_by_its_pixels(held_out, packed, drawn, tmp_path, capsys):
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
    assert 'images are there once more: the same pixels in another file' in out


def test_a_set_without_copies_says_nothing(drawn, tmp_path, capsys):
    paths = own_paths(tmp_path, 'log', 'cache')
    assert cli.main(['check_dataloader', '--preset=demo', '--batch_size=8', f'--image_path={drawn}', *paths]) == 0
    out, err = capsys.readouterr()
    assert 'pixel by pixel' not in err
    assert 'once more' not in out
