"""Folders as people have them: which images are found, of which class, and what is said of the rest."""

import os
import random
import re
import shutil
import subprocess
import sys
import tarfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import ImageFolder

import cli
from conftest import CODE, TINY, draw_folder, one_line, own_paths, run
from dataloader.cache import decoded
from dataloader.load_dataset import get_iterator, load_splits, load_unlabeled
from dataloader.loading.decode import image_extensions
from dataloader.readers.files import Files
from dataloader.sources import demo, find
from dataloader.sources.folder import scan_images
from protocols.protocol import missing_labels_reason
from runtime.errors import UserError, WorkError
from runtime.options import get_config


def options(folder, **more):
    given = {
        'preset': 'demo',
        'image_path': str(folder),
        'cache_path': f'{folder}.cache',
        'batch_size': 2,
        'num_workers': 0,
    }
    return get_config(**given | more)


def picture(path, color='teal', size=(48, 48)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size, color).save(path, 'PNG')
    return path


def split_names(folder, **more):
    """{split: {name: class or None}} of what is found."""
    found = {}
    for split, images in load_splits(options(folder, **more)).items():
        if images:
            found[split] = {
                name: images.classes[label] if label >= 0 else None
                for name, label in zip(images.names, images.labels.tolist(), strict=True)
            }
    return found


words = (
    st.text(st.sampled_from('abcXYZ019 _-+.,()[]é漢'), min_size=1, max_size=6)
    .map(str.strip)
    .filter(lambda name: name and name[0] != '.' and name.lower() not in ('train', 'val', 'test', 'valid', 'training'))
)
trees = st.dictionaries(
    words, st.lists(st.tuples(st.lists(words, max_size=2), words), min_size=1, max_size=4), min_size=1, max_size=5
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(trees)
def test_classes_and_labels_equal_image_folder(tmp_path_factory, tree):
    """Any names, any depth: ImageFolder's classes, its numbers, its class for every file."""
    root = tmp_path_factory.mktemp('tree')
    for owner, files in tree.items():
        for folders, name in files:
            path = root.joinpath('train', owner, *folders, f'{name}.jpg')
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b'')
    theirs = ImageFolder(root / 'train')
    part = find.find_splits(root, root / 'cache', lambda names, *_: names)['train']
    assert part.classes == theirs.classes
    ours = dict(zip(part.store.names, part.labels.tolist(), strict=True))
    wanted = {os.path.relpath(path, root / 'train'): label for path, label in theirs.samples}
    assert ours == wanted
    assert len(part.store.names) == len(wanted)


@pytest.mark.parametrize('val', ['val', 'valid', 'validation', 'Valid'])
def test_val_folder_aliases_are_found(val, drawn, tmp_path):
    folder = shutil.copytree(drawn, tmp_path / 'set')
    (folder / 'val').rename(folder / val)
    splits = load_splits(options(folder))
    assert (len(splits['train']), len(splits['val'])) == (72, 24)


def test_two_folders_for_one_split_exit_2(drawn, tmp_path):
    folder = shutil.copytree(drawn, tmp_path / 'set')
    shutil.copytree(folder / 'val', folder / 'validation')
    with pytest.raises(UserError, match='has both val and validation: which of them is val'):
        load_splits(options(folder))


def test_folder_of_class_folders_gets_held_out_val(drawn, tmp_path, capsys):
    """Without train/: classes as ImageFolder's, and a tenth of each held out, said in a line."""
    folder = shutil.copytree(drawn / 'train', tmp_path / 'mine')
    splits = load_splits(options(folder))
    assert splits['train'].classes == ImageFolder(folder).classes
    assert splits['val'].labels.bincount().tolist() == [2, 2, 2]
    assert len(splits['train']) == 66
    assert not set(splits['train'].names) & set(splits['val'].names)
    line = capsys.readouterr().out.strip()
    assert re.fullmatch(r'.*mine has no val: 6 of its 72 images are held out for it, .*--val_fraction=0.1.*', line)
    again = load_splits(options(folder, random_seed=7))
    assert list(again['val'].names) == list(splits['val'].names)  # fixed: no seed moves it
    assert load_splits(options(folder, val_fraction=0.0))['val'] is None
    assert load_splits(options(folder, val_fraction=0.5))['val'].labels.bincount().tolist() == [12, 12, 12]


def test_data_options_without_effect_warn(drawn, tmp_path, capsys):
    """A share for val where there is val; smaller files of what is kept in memory. Where they do something, not."""
    load_splits(options(drawn, val_fraction=0.2, cache_short_side=20, jpeg_draft=True))
    said = capsys.readouterr().err
    assert re.search(r'--val_fraction has no effect: \S+val is val', said)
    for name in ('cache_short_side', 'jpeg_draft'):
        assert f'--{name} has no effect: images this small are kept in memory' in said
    mine = shutil.copytree(drawn / 'train', tmp_path / 'mine')
    load_splits(options(mine, val_fraction=0.2, cache_short_side=20, cache_images='off'))
    load_splits(options(drawn))
    assert 'has no effect' not in capsys.readouterr().err


def test_stratified_holdout_is_stable_when_images_are_added(drawn, tmp_path):
    folder = shutil.copytree(drawn / 'train', tmp_path / 'mine')
    before = set(load_splits(options(folder))['val'].names)
    picture(folder / 'dots/new.png')
    assert len(before - set(load_splits(options(folder))['val'].names)) <= 1


@pytest.mark.parametrize(('count', 'held'), [(1, 0), (2, 1), (3, 1), (30, 3)])
def test_stratified_holdout_leaves_images_in_small_classes(count, held, tmp_path):
    for owner in 'ab':
        for number in range(count):
            picture(tmp_path / f'mine/{owner}/{number}.png')
    splits = load_splits(options(tmp_path / 'mine'))
    assert len(splits['train']) == 2 * (count - held)
    assert (len(splits['val']) if splits['val'] else 0) == 2 * held


def test_plain_folder_has_no_classes(tmp_path):
    """At any depth; pictures beside folders, or a single folder, make no classes."""
    for name in ('a.png', 'trip/b.png', 'trip/day 2/c.PNG', 'z.png'):
        picture(tmp_path / 'mine' / name)
    assert split_names(tmp_path / 'mine') == {
        'train': dict.fromkeys(['a.png', 'z.png', 'trip/b.png', 'trip/day 2/c.PNG'])
    }
    for name in ('DCIM/1.png', 'DCIM/2.png'):
        picture(tmp_path / 'camera' / name)
    assert split_names(tmp_path / 'camera') == {'train': dict.fromkeys(['DCIM/1.png', 'DCIM/2.png'])}


def test_folder_of_class_folders_trains_evaluates_and_infers(tmp_path):
    """A folder of class folders, as it lies there, from the command line to a submission."""
    folder = draw_folder(tmp_path / 'mine', {'train': 24})
    folder = (folder / 'train').rename(tmp_path / 'classes')
    paths = own_paths(tmp_path)
    done = run('train', *TINY, f'--image_path={folder}', '--max_epochs=1', '--evaluate_after=True', *paths)
    assert done.returncode == 0, done.stderr
    assert 'are held out for it' in done.stdout
    assert '66 training and 6 validation images' in done.stdout
    infer = run('infer', '--ckpt_name=model_name_simsiam_ckpt_0', f'--output={tmp_path}/out.csv', *paths)
    assert infer.returncode == 0, infer.stderr
    assert len((tmp_path / 'out.csv').read_text().splitlines()) == 7
    plain = tmp_path / 'plain'
    shutil.copytree(folder / 'dots', plain)
    done = run('train', *TINY, f'--image_path={plain}', '--max_epochs=1', *paths)
    assert done.returncode == 0, done.stderr
    assert 'the kNN monitor is off' in done.stdout


def test_path_list_is_read(drawn, tmp_path, capsys):
    """One path per line, its class after a tab; relative or absolute paths; byte order mark, blank lines, CR LF."""
    files = sorted((drawn / 'train').rglob('*.png'))[::7]
    for name in ('here.png', 'there.png'):
        shutil.copy(files[0], tmp_path / name)
    lines = [f'{file}\t{file.parent.name}' for file in files] + ['here.png\tdots', '', 'there.png']
    (tmp_path / 'mine.txt').write_bytes(b'\xef\xbb\xbf' + '\r\n'.join(lines).encode())
    part = find.load_single_source(tmp_path / 'mine.txt', tmp_path, None)
    assert part.classes == ['checks', 'dots', 'stripes']
    assert [part.classes[label] if label >= 0 else '' for label in part.labels.tolist()] == [
        *(file.parent.name for file in files),
        'dots',
        '',
    ]
    splits = load_splits(options(tmp_path / 'mine.txt'))
    assert (len(splits['train']), len(splits['val'])) == (len(files) + 2 - 3, 3)
    assert capsys.readouterr().err == ''
    (tmp_path / 'train.txt').write_text('\n'.join(map(str, files)))
    (tmp_path / 'val.txt').write_text(str(files[0]))
    splits = load_splits(options(tmp_path))
    assert (len(splits['train']), len(splits['val'])) == (len(files), 1)


def test_path_list_with_repeated_image_counts_it_once(drawn, tmp_path, capsys):
    """However often, and by whatever path, a list names it: val would have what is trained on."""
    files = sorted((drawn / 'train').rglob('*.png'))[:40]
    again = [f'{file.parent}/../{file.parent.name}/./{file.name}' for file in files]
    lines = [f'{file}\t{file.parent.name}' for file in files] + again + [f'{files[3]}\t{files[3].parent.name}']
    (tmp_path / 'mine.txt').write_text('\n'.join(lines))
    splits = load_splits(options(tmp_path / 'mine.txt'))
    names = [os.path.realpath(name) for split in ('train', 'val') for name in splits[split].names]
    assert len(names) == len({*names}) == len(files)
    assert '41 lines of' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('text', 'said'),
    [
        ('', 'names no image'),
        ('\n\n', 'names no image'),
        ('n01440764_18.JPEG 0\n', 'there is no file .*n01440764_18.JPEG 0'),
        ('{"a": 1}', 'there is no file'),
        ('a\0b.png', 'is not a list of paths'),
        ('.', 'which is no file'),
        ('x' * 5000, 'is not a list of paths'),
        ('mine.txt\ta\nmine.txt\tb', 'mine.txt in two classes, a and b: leave one line out'),
        ('mine.txt\ta\n./mine.txt\tb', './mine.txt in two classes'),
        ('mine.txt\n'.encode('utf-16'), 'is in UTF-16: save it as UTF-8'),
        ('mine.txt\ta\t0\n', 'has a third column, behind mine.txt'),
    ],
)
def test_invalid_path_list_exits_2(text, said, tmp_path):
    (tmp_path / 'mine.txt').write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=said):
        load_splits(options(tmp_path / 'mine.txt'))


SYSTEMS = (
    '@eaDir',
    'lost+found',
    '__MACOSX',
    '.ipynb_checkpoints',
    '#recycle',
    '$RECYCLE.BIN',
    '@Recycle',
    '.git',
    'System Volume Information',
    '.Trash-1000',
    '__pycache__',
)


@pytest.mark.parametrize('where', ['train', 'train/dots', '.'])
@pytest.mark.parametrize('name', SYSTEMS)
def test_system_folders_are_skipped(where, name, drawn, tmp_path):
    folder = shutil.copytree(drawn if where != '.' else drawn / 'train', tmp_path / 'set')
    picture(folder / where / name / 'thumbnail.jpg.png')
    train = load_splits(options(folder))['train']
    assert train.classes == ['checks', 'dots', 'stripes']
    assert len(train) == (72 if where != '.' else 66)
    found = scan_images(folder / where)
    assert [entry.rstrip('/').split('/')[-1] for entry in found.skipped_folders] == [name]


def test_image_extensions_equal_those_of_pillow(tmp_path):
    assert {b'.jfif', b'.avif', b'.jp2', b'.jpe', b'.pnm', b'.jpg', b'.webp', b'.tiff', b'.qoi'} <= image_extensions()
    assert not {b'.txt', b'.mpg', b'.h5', b'.eps', b'.pdf', b'.csv', b''} & image_extensions()


@pytest.mark.parametrize('suffix', ['.jfif', '.JPE', '.jp2', '.pnm', '.avif', '.webp', '.tga', '.ppm', '.JPG'])
def test_every_image_ending_is_found(suffix, tmp_path):
    kinds = {
        '.jfif': 'JPEG',
        '.jpe': 'JPEG',
        '.jpg': 'JPEG',
        '.jp2': 'JPEG2000',
        '.pnm': 'PPM',
        '.ppm': 'PPM',
        '.avif': 'AVIF',
        '.webp': 'WEBP',
        '.tga': 'TGA',
    }
    for number in range(4):
        path = picture(tmp_path / f'set/train/one/{number}{suffix}', size=(200, 150))
        Image.new('RGB', (200, 150), 'red').save(path, kinds[suffix.lower()])
    iterators = get_iterator(options(tmp_path / 'set', val_fraction=0.0))
    images, labels = next(iter(iterators['train']))
    assert images.shape == (2, 2, 3, 32, 32)
    assert images[:, :, 0].float().mean() > 60
    assert labels.tolist() == [0, 0]


def test_skipped_files_are_counted_and_logged(drawn, tmp_path):
    folder = shutil.copytree(drawn, tmp_path / 'set')
    for name, count in (('notes.txt', 1), ('film.mpg', 2), ('README', 1), ('Thumbs.db', 1), ('raw.CR2', 3)):
        for number in range(count):
            (folder / f'train/dots/{number}{name}' if count > 1 else folder / 'train/dots' / name).write_text('x')
    os.mkfifo(folder / 'train/checks/pipe.png')
    picture(folder / 'train/dots/@eaDir/thumb.png')
    (folder / 'train/stripes/up').symlink_to('..')
    done = run('check_dataloader', '--preset=demo', '--batch_size=8', f'--image_path={folder}', *own_paths(tmp_path))
    assert done.returncode == 0, done.stderr
    assert (
        'train  not images, not read: 3 .cr2, 2 .mpg, 1 (hidden), 1 (neither file nor folder), 1 (no ending), 1 .txt'
    ) in done.stdout
    assert 'skipped folders: dots/@eaDir/, stripes/up/ (a link to a folder that holds it)' in done.stdout
    assert 'train  72 images' in done.stdout
    (folder / 'beside').mkdir()
    shutil.rmtree(folder / 'val')
    said = run('check_dataloader', '--preset=demo', '--batch_size=8', f'--image_path={folder}', *own_paths(tmp_path))
    lines = (said.stdout + said.stderr).splitlines()
    assert any('has no val' in line for line in lines)
    assert len({*lines}) == len(lines)


@pytest.mark.parametrize('target', ['..', '../..', '.', '../../..', '../dots/../../train'])
def test_link_to_parent_folder_is_not_followed(target, drawn, tmp_path):
    folder = shutil.copytree(drawn, tmp_path / 'set')
    (folder / 'train/dots/up').symlink_to(target)
    assert len(load_splits(options(folder))['train']) == 72


def test_links_to_other_folders_are_followed(drawn, tmp_path):
    folder = shutil.copytree(drawn, tmp_path / 'set')
    (folder / 'train/dots').rename(tmp_path / 'elsewhere')
    (folder / 'train/dots').symlink_to(tmp_path / 'elsewhere')
    (folder / 'train/checks/one.png').symlink_to(folder / 'train/checks/000.png')
    splits = load_splits(options(folder))
    assert splits['train'].labels.bincount().tolist() == [25, 24, 24]
    one, two = tmp_path / 'two/train/a', tmp_path / 'two/train/b'
    for path in (one, two):
        picture(path / '1.png')
    (one / 'b').symlink_to(two)
    (two / 'a').symlink_to(one)  # each holds the other: an end is found
    assert len(load_splits(options(tmp_path / 'two', val_fraction=0.0))['train']) == 4


@pytest.mark.parametrize('target', ['nowhere.png', 'lost.png'])
def test_broken_link_is_an_unreadable_image(target, drawn, tmp_path, capsys):
    folder = shutil.copytree(drawn, tmp_path / 'set')
    (folder / 'train/dots/lost.png').symlink_to(target)
    with pytest.raises(WorkError, match='cannot read the image .*lost.png: (No such file|Too many levels)'):
        load_splits(options(folder))
    train = load_splits(options(folder, on_unreadable='skip'))['train']
    assert len(train) == 72
    assert '1 of 73 images' in capsys.readouterr().out


ODD_NAMES = (
    b'caf\xe9.png',
    b'new\nline.png',
    b'tab\there.png',
    b'\x1b[31mred.png',
    '漢字.png'.encode(),
    b'a [b] *?.png',
    b'-rf.png',
    b'%s {0}.png',
    b'"quote", comma.png',
    b' .png',
)


def test_undecodable_file_names_work_everywhere(drawn, tmp_path):
    """From reading to every output; nothing is encoded, printed or globbed as if it were text."""
    folder = shutil.copytree(drawn, tmp_path / 'set [1] *')
    for split, owner in (('train', 'dots'), ('val', 'dots'), ('train', 'checks')):
        for number, name in enumerate(ODD_NAMES):
            target = os.path.join(os.fsencode(folder / split / owner), name)
            shutil.copy(folder / split / owner / f'{number % 8:03d}.png', target)
    os.rename(folder / 'val/stripes', os.fsencode(folder) + b'/val/str\xefpes')
    os.rename(folder / 'train/stripes', os.fsencode(folder) + b'/train/str\xefpes')
    paths = own_paths(tmp_path)
    for command in (
        ['check_dataloader', '--preset=demo', '--batch_size=8', f'--image_path={folder}'],
        [
            'train',
            *TINY,
            f'--image_path={folder}',
            '--evaluate_after=True',
            '--on_unreadable=skip',
            '--cache_short_side=32',
        ],
        ['infer', '--ckpt_name=model_name_simsiam_ckpt_0', f'--output={tmp_path}/out.csv', '--neighbors=3'],
        ['embed', '--ckpt_name=model_name_simsiam_ckpt_0', f'--output={tmp_path}/out.npz', '--projector_images=40'],
        ['embed', '--ckpt_name=model_name_simsiam_ckpt_0', f'--output={tmp_path}/features.csv'],
        ['report', '--ckpt_name=model_name_simsiam_ckpt_0'],
        ['pack', f'--image_path={folder}', f'--output={tmp_path}/packed'],
    ):
        done = run(*command, *paths)
        assert done.returncode == 0, f'{command[0]}: {done.stderr}'
        assert 'Traceback' not in done.stderr
    with open(tmp_path / 'out.csv', 'rb') as file:
        content = file.read()
    for name in ODD_NAMES:
        assert name.replace(b'"', b'""') in content
    packed = load_splits(options(tmp_path / 'packed'))
    assert list(packed['train'].names) == list(load_splits(options(folder))['train'].names)


@pytest.mark.parametrize('more', [{'cache_short_side': 64}, {'on_unreadable': 'skip'}, {'cache_images': 'on'}])
def test_held_out_val_has_own_cache_files(more, tmp_path, capsys):
    """train and the val held out of the same folder: neither takes the other's file for its own."""
    for number in range(24):
        picture(tmp_path / f'set/{"ab"[number % 2]}/{number:02d}.png', size=(120, 120))
    more = {'val_fraction': 0.25, **more}
    splits = load_splits(options(tmp_path / 'set', val_fraction=0.25, cache_images='off'))
    bad = [*splits['train'].store.names][:2] + [*splits['val'].store.names][:1]
    if 'on_unreadable' in more:
        for name in bad:
            (tmp_path / 'set' / name).write_bytes(b'no image')
    found = [load_splits(options(tmp_path / 'set', **more)) for _ in range(2)]
    wanted = (16, 5) if 'on_unreadable' in more else (18, 6)
    assert all((len(splits['train']), len(splits['val'])) == wanted for splits in found)
    named = [path.read_text() for path in (tmp_path / 'set.cache').rglob('*.txt')]
    assert sorted(text.count('set/') for text in named) == ([1, 2] if 'on_unreadable' in more else [])
    for splits in found:
        splits['train'].read(0, 1, 'moco')


def test_image_readable_again_is_used_again(tmp_path, monkeypatch):
    """A right, a network's disk: what fails for a while leaves no trace in the file, so its time says nothing."""
    for number in range(6):
        picture(tmp_path / f'set/{number}.png', size=(120, 120))
    opened, failing = Files.open, {'2.png', '4.png'}

    def fails(store, index):
        if store.names[index] in failing:
            raise WorkError(f'cannot read {store.names[index]}')
        return opened(store, index)

    monkeypatch.setattr(Files, 'open', fails)
    for left, wanted in (({'2.png', '4.png'}, 4), ({'4.png'}, 5), ({'4.png'}, 5), (set(), 6), (set(), 6)):
        failing.intersection_update(left)
        assert len(load_splits(options(tmp_path / 'set', on_unreadable='skip'))['train']) == wanted


def test_unreadable_first_image_does_not_set_size(tmp_path):
    """The size of the set is reckoned from one that can."""
    for number in range(3):
        picture(tmp_path / f'set/{number}.png', size=(200, 200))
    (tmp_path / 'set/0.png').write_bytes(b'no image')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoded, 'decode_all', None)
        assert not load_splits(options(tmp_path / 'set'))['train'].is_in_memory()


def test_very_deep_folders_and_long_names_are_scanned(tmp_path):
    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        os.mkdir('n' * 255)
        os.chdir('n' * 255)
        for _ in range(1300):
            os.mkdir('d')
            os.chdir('d')
        for number in range(2):
            Image.new('RGB', (40, 30)).save(f'{number}.png')
    finally:
        os.chdir(before)
    given = [
        f'--image_path={tmp_path}/{"n" * 255}',
        '--preset=demo',
        '--batch_size=2',
        *own_paths(tmp_path, 'log', 'cache'),
    ]
    try:
        assert cli.main(['check_dataloader', *given]) == 0
    finally:
        subprocess.run(['rm', '-r', tmp_path / ('n' * 255)], check=True)  # shutil's way is recursive


def test_image_path_longer_than_allowed_exits_2(tmp_path, capsys):
    for option in ('image_path', 'ckpt_name', 'output', 'log_path', 'init_from'):
        assert cli.main(['infer', '--preset=demo', '--ckpt_name=none', f'--{option}={"n" * 5000}']) == 2
    assert cli.main(['train', '--preset=demo', f'--model_name={"n" * 300}']) == 2
    assert 'File name too long' in capsys.readouterr().err


def test_message_with_control_characters_is_one_line(drawn, tmp_path):
    folder = shutil.copytree(drawn, tmp_path / 'set')
    with open(os.fsencode(folder) + b'/train/dots/caf\xe9\n\x1b.png', 'wb') as file:
        file.write(b'no image')
    done = run('train', *TINY, f'--image_path={folder}', *own_paths(tmp_path))
    assert done.returncode == 1
    assert re.search(r'caf\\udce9\\n\\x1b.png: it is not an image that Pillow can read', one_line(done.stderr))


def test_outdated_cache_file_is_deleted(drawn_large, tmp_path):
    folder = shutil.copytree(drawn_large, tmp_path / 'set')
    args = options(folder, cache_short_side=100, cache_path=str(tmp_path / 'cache [1] *'))
    old = load_splits(args)['train'].store.memmap_path
    os.utime(folder / 'train/dots/000.jpg', (1, 1))
    new = load_splits(args)['train'].store.memmap_path
    assert new != old
    assert not old.exists()
    assert sum(path.suffix == '.bin' for path in old.parent.iterdir()) == 2  # of train and of val


@pytest.mark.skipif(os.geteuid() != 0, reason='only root can become somebody who may not read')
def test_folder_without_permission_is_named(drawn, tmp_path):
    folder = shutil.copytree(drawn, tmp_path / 'set')
    (folder / 'train/dots').chmod(0)
    for path in [tmp_path, *tmp_path.parents][:4]:
        path.chmod(0o755)
    code = f"""
import os, sys
sys.path.insert(0, {str(CODE)!r})
from pathlib import Path
from dataloader.sources import find
from dataloader.cache import decoded
os.setuid(65534)
try:
    find.find_splits(Path({str(folder)!r}), Path('/nowhere'), lambda names, *_: names)
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
    assert re.match('UserError the folder .*train/dots cannot be read: Permission denied', done.stdout), done.stderr


def test_folder_without_images_names_its_files(tmp_path):
    (tmp_path / 'set').mkdir()
    for name in ('a.txt', 'b.txt', 'c.pdf'):
        (tmp_path / 'set' / name).write_text('x')
    with pytest.raises(UserError, match=r'holds no images that Pillow can open \(2 .txt, 1 .pdf\)'):
        load_splits(options(tmp_path / 'set'))


def test_infer_accepts_one_file(drawn):
    path = next((drawn / 'val').rglob('*.png'))
    images = load_unlabeled(options(drawn), path)
    assert list(images.names) == [path.name]


def test_scan_time_does_not_depend_on_number_of_classes(tmp_path):
    """40,000 files in 20 and in 4,000 classes: the counts are right, and both take a like time of the CPU."""
    import time

    taken = {}
    (tmp_path / 'one').write_bytes(b'')
    for classes in (20, 4000):
        for owner in range(classes):
            folder = tmp_path / f'{classes}/train/{owner:05d}'
            folder.mkdir(parents=True)
            for number in range(40000 // classes):
                os.link(tmp_path / 'one', folder / f'{number}.jpg')
        started = time.process_time()
        part = find.find_splits(tmp_path / str(classes), tmp_path, lambda names, *_: names)['train']
        taken[classes] = time.process_time() - started
        assert part.labels.bincount().tolist() == [40000 // classes] * classes
        shutil.rmtree(tmp_path / str(classes))
    assert taken[4000] < 5 * taken[20] + 0.5


def test_path_array_is_small_and_correct():
    rng = random.Random(0)
    names = [''.join(rng.choice('abc/é\udce9') for _ in range(rng.randint(1, 12))) for _ in range(500)]
    kept = find.PathArray(names)
    assert list(kept) == names
    assert [kept[-1], kept[3]] == [names[-1], names[3]]
    rows = torch.tensor([4, 4, 0, 499])
    assert list(kept.select(rows)) == [names[row] for row in rows]
    with pytest.raises(IndexError):
        kept[500]


def test_unread_entries_beside_splits_are_named(drawn, tmp_path, capsys):
    folder = shutil.copytree(drawn, tmp_path / 'set')
    picture(folder / 'unlabeled' / 'a.png')
    picture(folder / 'stray.png')
    (folder / '.git').mkdir()
    load_splits(options(folder))
    for name in ('val.tar.gz', 'train.txt', 'notes.txt', 'testing.zip'):
        (folder / name).write_text('x')
    load_splits(options(folder))
    said = capsys.readouterr().err
    assert f'not read: stray.png, testing.zip, train.txt, unlabeled, val.tar.gz, beside train in {folder}\n' in said
    load_splits(options(drawn))
    assert 'not read' not in capsys.readouterr().err


def test_nested_splits_are_found(drawn, tmp_path, capsys):
    """As unzipped into a folder of its own; what lies beside, or a link that leads back, makes it another set."""
    shutil.copytree(drawn, tmp_path / 'set/photos/2024')
    assert {name: len(names) for name, names in split_names(tmp_path / 'set').items()} == {'train': 72, 'val': 24}
    assert 'set are in photos/2024' in capsys.readouterr().out
    picture(tmp_path / 'set/beside.png')
    with pytest.raises(UserError, match='folders called train and val lie below it: is .*set/photos/2024 meant'):
        split_names(tmp_path / 'set')
    (tmp_path / 'loop').mkdir()
    (tmp_path / 'loop/again').symlink_to('.')
    with pytest.raises(UserError, match='holds no images'):
        load_splits(options(tmp_path / 'loop'))


def test_split_folders_with_year_are_found(drawn, tmp_path):
    """COCO's."""
    for name in ('train', 'val'):
        shutil.copytree(drawn / name, tmp_path / f'set/{name}2017')
    assert {name: len(names) for name, names in split_names(tmp_path / 'set').items()} == {'train': 72, 'val': 24}
    shutil.copytree(drawn / 'train', tmp_path / 'set/train2014')
    with pytest.raises(UserError, match='has both train2014 and train2017: which of them is train?'):
        load_splits(options(tmp_path / 'set'))


def test_unreachable_split_exits_2(drawn, tmp_path):
    folder = shutil.copytree(drawn, tmp_path / 'set')
    shutil.rmtree(folder / 'val')
    (folder / 'val').symlink_to('/nowhere/val')
    with pytest.raises(UserError, match='set/val is a broken link'):
        load_splits(options(folder))


@pytest.mark.parametrize('kind', ['unknown', 'empty'])
def test_unusable_test_folder_is_ignored_with_message(kind, drawn, tmp_path, capsys):
    """Kaggle's test/unknown, whose classes are a secret; a folder that was never filled."""
    folder = shutil.copytree(drawn, tmp_path / 'set')
    (folder / 'test').mkdir()
    if kind == 'unknown':
        picture(folder / 'test/unknown/1.png')
    splits, said = load_splits(options(folder)), capsys.readouterr().out
    if kind == 'unknown':
        assert (splits['test'].labels.tolist(), splits['train'].classes) == ([-1], ['checks', 'dots', 'stripes'])
        assert re.search(
            r"set/test has the class 'unknown', which \S+train has not: 1 of its 1 images count as without", said
        )
    else:
        assert splits['test'] is None
        assert 'set/test holds no images that Pillow can open (nothing else either); test is ignored' in said


def test_empty_val_folder_says_what_happens_without_it(drawn, tmp_path):
    folder = shutil.copytree(drawn / 'train', tmp_path / 'set' / 'train').parent
    (folder / 'val').mkdir()
    with pytest.raises(UserError, match=r'set/val holds no images .*; without this folder a tenth of train is val'):
        load_splits(options(folder))
    (folder / 'val').rmdir()
    assert load_splits(options(folder))['val']


def test_reason_for_no_classes_is_logged(tmp_path, capsys):
    for name in ('cat/1.png', 'cat/2.png', 'dog/1.png', 'cover.png'):
        picture(tmp_path / 'set' / name)
    assert not load_splits(options(tmp_path / 'set'))['train'].classes
    assert re.search(
        'set has 2 folders of images, which are not classes, because there are 1 images beside them, the first '
        'cover.png',
        capsys.readouterr().out,
    )


def test_dataset_with_one_class_warns(tmp_path, capsys):
    for number in range(4):
        picture(tmp_path / f'set/train/dogs/{number}.png')
    load_splits(options(tmp_path / 'set'))
    assert "set/train has one class, 'dogs': no accuracy can be measured" in capsys.readouterr().err


@pytest.mark.parametrize('name', ['train.txt', 'train.tar', 'val.tar', 'mine.tar', 'mine.txt'])
def test_pipe_instead_of_file_exits_2(name, drawn, tmp_path):
    """Where a list or an archive is expected."""
    folder = tmp_path / 'set'
    folder.mkdir()
    if name == 'val.tar':
        shutil.copytree(drawn / 'train', folder / 'train')
    os.mkfifo(folder / name)
    with pytest.raises(UserError):
        load_splits(options(folder / name if 'mine' in name else folder))


def test_class_called_train_exits_2(drawn, tmp_path, capsys):
    """COCO and VOC have such a class: beside it others would not be trained on."""
    shutil.copytree(drawn / 'train', tmp_path / 'set')
    sorted((tmp_path / 'set').iterdir())[0].rename(tmp_path / 'set/train')
    with pytest.raises(UserError, match='train may be the training split, or a class like dots and stripes'):
        load_splits(options(tmp_path / 'set'))
    shutil.rmtree(tmp_path / 'set/dots')  # train and one folder more: what is trained on, and it is said
    assert split_names(tmp_path / 'set')['train']
    assert 'warning: not read: stripes, beside train' in capsys.readouterr().err


def test_folder_without_images_is_logged_as_no_class(drawn, tmp_path, capsys):
    shutil.copytree(drawn / 'train', tmp_path / 'set')
    (tmp_path / 'set/phone').mkdir()
    (tmp_path / 'set/phone/1.raw').write_text('x')
    assert len(load_splits(options(tmp_path / 'set'))['train'].classes) == 3
    said = capsys.readouterr().out
    assert 'set: not a class: phone (no images that Pillow can open)' in said
    assert 'train  not images, not read: 1 .raw' in said


@pytest.mark.parametrize('how', ['exchanged', 'written'])
@pytest.mark.parametrize('kept', ['in memory', 'resized', 'archive'])
def test_files_of_equal_size_and_mtime_have_different_fingerprint(kept, how, tmp_path):
    """As mv leaves them, or a copy that keeps times (rsync -t, unzip)."""
    side = 48 if kept == 'in memory' else 120
    files = [tmp_path / f'set/train/{name}/1.bmp' for name in 'ab']
    for file, color in zip(files, ('red', 'blue'), strict=True):
        file.parent.mkdir(parents=True)
        Image.new('RGB', (side, side), color).save(file)
    more = {'cache_short_side': 32} if kept == 'resized' else {}

    def red():
        for path in (*files, tmp_path / 'tars/train.tar'):
            if path.exists():
                os.utime(path, (10**9, 10**9))
        where = tmp_path / ('tars' if kept == 'archive' else 'set')
        store = load_splits(options(where, **more))['train'].store
        found = []
        for row in range(2):
            with store.open(row) as image:
                found.append(image.convert('RGB').getpixel((3, 3)) == (255, 0, 0))
        return found

    def packed():
        (tmp_path / 'tars').mkdir(exist_ok=True)
        with tarfile.open(tmp_path / 'tars/train.tar', 'w') as archive:
            for file in files:
                archive.add(file, f'{file.parent.name}/1.bmp')

    packed()
    assert red() == [True, False]
    if how == 'exchanged':
        files[0].rename(tmp_path / 'x')
        files[1].rename(files[0])
        (tmp_path / 'x').rename(files[1])
    else:
        for file, color in zip(files, ('blue', 'red'), strict=True):
            Image.new('RGB', (side, side), color).save(file)
    packed()
    assert red() == [False, True]


@pytest.mark.parametrize('fraction', [0.1, 0])
def test_reason_for_no_val_is_logged(fraction, tmp_path):
    for name in 'abcdefgh':
        picture(tmp_path / f'set/{name}/1.png')
    said = missing_labels_reason(load_splits(options(tmp_path / 'set', val_fraction=fraction)))
    why = 'no class has two images, one of which could be held out' if fraction else '--val_fraction=0 holds none out'
    assert said == f'{tmp_path}/set has no val: {why}'


@pytest.mark.parametrize(
    ('name', 'where', 'said'),
    [
        ('set.zip', 'set.zip', 'set.zip is compressed: unpack it, and point `image_path` at the folder'),
        ('set/train.zip', 'set', 'unpack compressed files first'),
        ('set/train.tar.gz', 'set', 'unpack compressed files first'),
        ('set/pictures.tar', 'set', 'archives are recognized by their names: train.tar, or train-000000.tar'),
    ],
)
def test_compressed_files_give_hint(name, where, said, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b'PK\0\0')
    with pytest.raises(UserError, match=re.escape(said)):
        load_splits(options(tmp_path / where))


@pytest.mark.parametrize('name', ['n' * 90, '测试', 'a b'])
def test_cache_file_names_are_unique_per_split(name, drawn_large, tmp_path):
    """Names that are cut or spelled otherwise in that of the file; the folder beside, whose name becomes the same."""
    other = {'测试': '训练', 'a b': 'a_b'}.get(name, name + 'm')
    cache = tmp_path / 'cache'
    for folder in (name, other):
        shutil.copytree(drawn_large, tmp_path / folder)
        (tmp_path / folder / f'train/dots/{folder[-1]}.jpg').write_text('damaged')
    for _ in range(2):
        for folder in (name, other):
            given = options(tmp_path / folder, cache_short_side=40, on_unreadable='skip', cache_path=str(cache))
            splits = load_splits(given)
            assert (len(splits['train']), len(splits['val'])) == (24, 12)
    assert len(list(cache.glob('*.bin'))) == 4
    assert len([path for path in cache.glob('*unreadable.txt') if path.read_text()]) == 2


def test_replaced_cache_file_stays_readable_for_open_readers(drawn_large, tmp_path):
    """Another command on the same images, after one has changed: its workers may open the old file no more."""
    folder = shutil.copytree(drawn_large, tmp_path / 'set')
    first = get_iterator(options(folder, cache_short_side=40, num_workers=1))
    os.utime(folder / 'train/dots/000.jpg', (1, 1))
    os.utime(folder / 'val/dots/000.jpg', (1, 1))
    second = load_splits(options(folder, cache_short_side=40))
    assert first['train'].dataset.store.memmap_path != second['train'].store.memmap_path
    assert sum(len(labels) for _, labels in first['val']) == 12


@pytest.mark.parametrize('place', ['', 'train/'])
def test_numbered_archive_beside_images_exits_2(place, drawn, tmp_path, capsys):
    """It was read in place of the whole dataset."""
    shutil.copytree(drawn if place else drawn / 'train', tmp_path / 'set')
    with tarfile.open(tmp_path / f'set/{place}backup-2024.tar', 'w') as archive:
        archive.add(drawn / 'val', 'x')
    assert cli.main(['train', *TINY, f'--image_path={tmp_path}/set', *own_paths(tmp_path)]) == 2
    assert 'backup-2024.tar, and beside them images' in one_line(capsys.readouterr().err)


def test_numbered_archives_beside_other_files_are_read(drawn, tmp_path):
    """As img2dataset writes them: 00000.tar, 00000.parquet, 00000_stats.json."""
    (tmp_path / 'set/empty').mkdir(parents=True)
    for number in range(2):
        with tarfile.open(tmp_path / f'set/0000{number}.tar', 'w') as archive:
            archive.add(drawn / 'val', '.')
        (tmp_path / f'set/0000{number}_stats.json').write_text('{}')
    assert sum(map(len, filter(None, load_splits(options(tmp_path / 'set')).values()))) == 48
    assert len(load_unlabeled(options(tmp_path / 'set'), tmp_path / 'set')) == 48  # infer reads the same


def test_demo_keeps_files_of_users(tmp_path):
    mine = picture(tmp_path / 'demo/train/cat/a.png')
    with pytest.raises(UserError, match='holds other files'):
        demo.write_demo_dataset(tmp_path / 'demo', list)
    assert mine.is_file()


def test_demo_of_another_process_stays(tmp_path, monkeypatch):
    """It is finished while this process draws: readers have it open."""
    monkeypatch.setattr(demo, 'TRAIN_PER_CLASS', 1)
    monkeypatch.setattr(demo, 'VAL_PER_CLASS', 1)

    def other_is_first(jobs):
        (tmp_path / 'demo').mkdir()
        (tmp_path / 'demo/made_by_demo.txt').write_text(demo.VERSION)
        return jobs

    demo.write_demo_dataset(tmp_path / 'demo', other_is_first)
    assert [path.name for path in tmp_path.iterdir()] == ['demo']
    assert [path.name for path in (tmp_path / 'demo').iterdir()] == ['made_by_demo.txt']


def test_classes_below_outer_folders_are_found(drawn, tmp_path, capsys):
    shutil.copytree(drawn / 'train', tmp_path / 'photos/archive/flowers')
    shutil.copytree(drawn / 'train', tmp_path / 'same')
    inner, same = (load_splits(options(tmp_path / name)) for name in ('photos', 'same'))
    assert inner['train'].classes == same['train'].classes != []
    assert [*inner['train'].names] == [*same['train'].names]
    assert 'are in archive/flowers' in capsys.readouterr().out


def test_only_class_folder_stays_one(drawn, tmp_path):
    shutil.copytree(drawn / 'train/dots', tmp_path / 'photos/dots')
    assert all(name.startswith('dots/') for name in load_splits(options(tmp_path / 'photos'))['train'].names)


def test_unread_entries_of_nested_root_are_named(drawn, tmp_path, capsys):
    shutil.copytree(drawn, tmp_path / 'outer/inner')
    shutil.copytree(drawn / 'val', tmp_path / 'outer/inner/Trian2')
    load_splits(options(tmp_path / 'outer'))
    assert f'not read: Trian2, beside train in {tmp_path}/outer/inner\n' in capsys.readouterr().err


def test_classes_of_test_that_train_lacks_are_counted(drawn, tmp_path, capsys):
    shutil.copytree(drawn, tmp_path / 'set')
    for number, name in enumerate(('x', 'y', 'y', 'dots')):
        picture(tmp_path / f'set/test/{name}/{number}.png')
    load_splits(options(tmp_path / 'set'))
    assert "'x', 'y', which" in (said := capsys.readouterr().out)
    assert '3 of its 4 images count as without a class' in said


def test_resized_cache_counts_all_unreadable_images(drawn_large, tmp_path, capsys):
    shutil.copytree(drawn_large, tmp_path / 'set')
    for path in sorted((tmp_path / 'set/train/dots').iterdir())[:3]:
        path.write_bytes(b'no image')
    given = ['train', *TINY, f'--image_path={tmp_path}/set', '--cache_short_side=64', '--cache_images=off']
    assert cli.main([*given, '--num_workers=0', *own_paths(tmp_path)]) == 1
    assert '(and 2 more; ' in (error := one_line(capsys.readouterr().err))
    assert '--on_unreadable=skip' in error


@pytest.mark.parametrize('option', ['--mean=0.5,0.5', '--std=0.2,0.2,0.2,0.2'])
@pytest.mark.parametrize('command', ['check_dataloader', 'train'])
def test_wrong_number_of_mean_values_exits_2(command, option, drawn, tmp_path, capsys):
    assert cli.main([command, option, f'--image_path={drawn}', *own_paths(tmp_path, 'cache')]) == 2
    assert option in one_line(capsys.readouterr().err)
