"""Tar archives in place: as files, to the bit; ImageNet as it is downloaded; WebDataset; hostile members."""

import bz2
import gzip
import io
import lzma
import os
import re
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

import cli
from conftest import CODE, TINY, one_line, own_paths, run
from dataloader.load_dataset import get_iterator, load_splits
from dataloader.loading import decode
from dataloader.sources import find, tar_index
from runtime.errors import UserError, WorkError
from runtime.options import get_config
from test_cli import newest, same


def options(folder, **more):
    given = {
        'preset': 'demo',
        'image_path': str(folder),
        'cache_path': f'{folder}.cache',
        'batch_size': 8,
        'num_workers': 0,
    }
    return get_config(**given | more)


def png(color='teal', size=(40, 30)):
    buffer = io.BytesIO()
    Image.new('RGB', size, color).save(buffer, 'PNG')
    return buffer.getvalue()


def write(path, members, **more):
    """An archive of (name, content) pairs; a content that is a TarInfo is taken as it is, without bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w', **more) as archive:
        for name, content in members:
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
                continue
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def tarred(folder, top, *, inside='', reverse=False):
    """<top>/<split>.tar of each split of `folder`."""
    top.mkdir(exist_ok=True)
    for split in sorted(entry.name for entry in folder.iterdir() if entry.is_dir()):
        files = sorted((folder / split).rglob('*.*'), reverse=reverse)
        with tarfile.open(top / f'{split}.tar', 'w') as archive:
            for file in files:
                archive.add(file, inside + str(file.relative_to(folder / split)))
    return top


@pytest.fixture(params=['plain', 'dotted', 'named', 'reversed', 'shards', 'one', 'one in a folder'])
def packed(request, drawn_large, tmp_path):
    """The large drawn set in archives of every shape."""
    top = tmp_path / 'packed'
    if request.param == 'named':
        top.mkdir()
        for split in ('train', 'val'):
            subprocess.run(['tar', 'cf', top / f'{split}.tar', '-C', drawn_large, split], check=True)
        return top
    if request.param == 'shards':
        args = ['pack', f'--image_path={drawn_large}', f'--output={top}', '--shard_megabytes=0.02']
        assert run(*args, *own_paths(tmp_path, 'cache')).returncode == 0
        assert len(list(top.glob('train-*.tar'))) > 2
        return top
    if request.param.startswith('one'):
        inner = ['-C', drawn_large, '.'] if request.param == 'one' else ['-C', drawn_large.parent, drawn_large.name]
        subprocess.run(['tar', 'cf', tmp_path / 'all.tar', *inner], check=True)
        return tmp_path / 'all.tar'
    return tarred(
        drawn_large, top, inside='./' if request.param == 'dotted' else '', reverse=request.param == 'reversed'
    )


def test_tar_images_equal_files(packed, drawn_large):
    files, archive = load_splits(options(drawn_large)), load_splits(options(packed))
    for name in ('train', 'val'):
        assert list(archive[name].names) == list(files[name].names)
        assert torch.equal(archive[name].labels, files[name].labels)
        assert archive[name].classes == files[name].classes
    for workers in (0, 2):
        ours = get_iterator(options(packed, num_workers=workers))['train']
        for (images, labels), (wanted, right) in zip(ours, get_iterator(options(drawn_large))['train'], strict=True):
            assert torch.equal(images, wanted)
            assert torch.equal(labels, right)


def test_train_and_resume_on_tar_equal_files(drawn_large, tmp_path):
    top = tarred(drawn_large, tmp_path / 'packed')
    runs = {}
    for name, images in (('files', drawn_large), ('tar', top)):
        common = [
            *TINY,
            f'--image_path={images}',
            '--batch_size=8',
            '--knn_every=0',
            '--save_every_epochs=1',
            '--max_epochs=3',
            *own_paths(tmp_path / name),
        ]
        for more in (['--max_minutes=0.0001'], ['--resume=auto']):
            done = run('train', *common, *more)
            assert done.returncode == 0, done.stderr
        runs[name] = newest(tmp_path / name)[1]
    assert same(runs['files']['model'], runs['tar']['model'])
    assert same(runs['files']['optimizer'], runs['tar']['optimizer'])


def test_tar_index_is_built_once(drawn_large, tmp_path, monkeypatch):
    top = tarred(drawn_large, tmp_path / 'packed')
    first = load_splits(options(top))['train']
    with monkeypatch.context() as patch:
        patch.setattr(tar_index, 'build_index', lambda *_: pytest.fail('indexed again'))
        assert list(load_splits(options(top))['train'].names) == list(first.names)
    with tarfile.open(top / 'train.tar', 'a') as archive:
        archive.add(drawn_large / 'val/dots/000.jpg', 'dots/zzz.jpg')
    assert len(load_splits(options(top))['train']) == len(first) + 1


def test_small_images_of_tar_are_cached_in_memory(drawn, tmp_path):
    train = load_splits(options(tarred(drawn, tmp_path / 'packed')))['train']
    assert torch.equal(train.pixels, load_splits(options(drawn))['train'].pixels)


def test_webdataset_shards_have_classes_of_cls_files(tmp_path):
    """A key's image and its class beside it; numbers are sorted as numbers; other members are counted."""
    for shard in range(2):
        members = []
        for i in range(6):
            key = f'{shard:03d}{i:03d}'
            members += [(f'{key}.jpg', png()), (f'{key}.cls', str(9 + i % 3).encode() + b'\n'), (f'{key}.json', b'{}')]
        write(tmp_path / f'set/train-{shard:06d}.tar', members)
    splits = load_splits(options(tmp_path / 'set', val_fraction=0.0, batch_size=4))
    assert splits['train'].classes == ['9', '10', '11']
    assert splits['train'].labels.tolist() == [0, 1, 2] * 4
    part = find.find_splits(tmp_path / 'set', tmp_path / 'cache', archives_bar)['train']
    assert dict(part.other_files) == {'.json': 12}


@pytest.mark.parametrize(
    ('members', 'labels', 'others'),
    [
        (('1.jpg', '1.cls=dog', '2.jpg', '2.cls=cat'), ['dog', 'cat'], {}),
        (('1.input.jpg', '1.cls=dog', '2.input.jpg', '2.cls=cat'), ['dog', 'cat'], {}),  # the key ends at the first dot
        (('v1.0.jpg', 'v1.0.cls=dog', 'v1.5.jpg', 'v1.5.cls=cat'), ['dog', 'cat'], {}),  # to others it is in the name
        (('./a/1.jpg', 'a/./1.cls=dog', 'a//2.jpg', './a/2.cls=cat'), ['dog', 'cat'], {}),
        (('1.jpg', '1.cls=cat', '1.jpg', '1.cls=dog'), ['dog'], {'(an older one of the same name)': 1}),
    ],
)
def test_undecodable_names_in_tar_work(members, labels, others, tmp_path):
    pairs = [member.partition('=') for member in members]
    write(tmp_path / 'train.tar', [(name, owner.encode() if owner else png()) for name, _, owner in pairs])
    part = find.find_splits(tmp_path, tmp_path / 'cache', archives_bar)['train']
    assert [part.classes[label] for label in part.labels] == labels
    assert dict(part.other_files) == others


def test_equal_keys_in_two_shards_are_separate(tmp_path):
    """Shards that count from 0 again: neither images nor classes are taken for one another's."""
    for shard, kind in enumerate(('dog', 'cat')):
        write(tmp_path / f'train-{shard:06d}.tar', [('0.jpg', png(size=(40 + shard, 30))), ('0.cls', kind.encode())])
    part = find.find_splits(tmp_path, tmp_path / 'cache', archives_bar)['train']
    assert [part.classes[label] for label in part.labels] == ['dog', 'cat']
    widths = []
    for i in range(2):
        with part.store.open(i) as image:
            widths.append(image.width)
    assert widths == [40, 41]


def test_archive_and_shards_for_one_split_exit_2(drawn_large, tmp_path):
    path = tarred(drawn_large, tmp_path / 'set') / 'train.tar'
    shutil.copy(path, path.with_name('train-000000.tar'))
    shutil.copy(path, path.with_name('train-000001.tar'))
    with pytest.raises(UserError, match='has both train-000000.tar and train.tar: which of them is train'):
        load_splits(options(tmp_path / 'set'))


def archives_bar(*_, **__):
    import contextlib
    import types

    return contextlib.nullcontext(types.SimpleNamespace(update=lambda n: None))


def devkit(path, wnids, truth):
    """The devkit's two files that matter; ILSVRC's numbers are not in the order of the names."""
    rows = np.empty(
        len(wnids) + 1,
        dtype=[('ILSVRC2012_ID', 'O'), ('WNID', 'O'), ('words', 'O'), ('gloss', 'O'), ('num_children', 'O')],
    )
    for i, wnid in enumerate([*wnids, 'n99999999']):
        rows[i] = (i + 1, wnid, 'a word', 'a gloss', 0 if i < len(wnids) else 3)
    buffer = io.BytesIO()
    savemat(buffer, {'synsets': rows})
    top = 'ILSVRC2012_devkit_t12/data/'
    files = [
        (f'{top}meta.mat', buffer.getvalue()),
        (f'{top}ILSVRC2012_validation_ground_truth.txt', '\n'.join(map(str, truth)).encode() + b'\n'),
    ]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w:gz') as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    path.write_bytes(buffer.getvalue())


@pytest.fixture
def imagenet(tmp_path):
    """ImageNet as it is downloaded, of three classes of one color each."""
    top, colors = tmp_path / 'imagenet', {'n03': 'red', 'n01': 'lime', 'n02': 'blue'}
    inner = []
    for wnid, color in colors.items():
        path = write(tmp_path / f'{wnid}.tar', [(f'{wnid}_{i}.JPEG', png(color)) for i in range(4)])
        inner.append((f'{wnid}.tar', path.read_bytes()))
    write(top / 'ILSVRC2012_img_train.tar', inner)
    truth = [1, 3, 2, 2, 1]  # n03 n02 n01 n01 n03
    wnids = list(colors)
    write(
        top / 'ILSVRC2012_img_val.tar',
        [(f'ILSVRC2012_val_{i + 1:08d}.JPEG', png(colors[wnids[number - 1]])) for i, number in enumerate(truth)],
    )
    devkit(top / 'ILSVRC2012_devkit_t12.tar.gz', wnids, truth)
    return top


def test_imagenet_archives_are_read(imagenet):
    splits = load_splits(options(imagenet, cache_images='off'))
    assert splits['train'].classes == splits['val'].classes == ['n01', 'n02', 'n03']
    assert splits['train'].labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert list(splits['train'].names)[:2] == ['n01/n01_0.JPEG', 'n01/n01_1.JPEG']
    assert splits['val'].labels.tolist() == [2, 1, 0, 0, 2]
    channel = {0: 1, 1: 2, 2: 0}  # lime, blue, red
    for images in (splits['train'], splits['val']):
        for row, label in enumerate(images.labels.tolist()):
            with images.store.open(row) as image:
                assert np.asarray(image.convert('RGB'))[0, 0].argmax() == channel[label]


def test_imagenet_without_devkit_fails(imagenet):
    kit = imagenet / 'ILSVRC2012_devkit_t12.tar.gz'
    content = kit.read_bytes()
    for damaged in (b'', content[: len(content) // 2], b'text', png()):
        kit.write_bytes(damaged)
        with pytest.raises(WorkError, match='devkit_t12.tar.gz is damaged'):
            load_splits(options(imagenet))
    kit.unlink()
    with pytest.raises(UserError, match='the labels of ILSVRC2012_img_val.tar are in ILSVRC2012_devkit_t12.tar.gz'):
        load_splits(options(imagenet))


def link(name, target, kind):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return name, member


def test_hard_link_in_tar_is_an_image(tmp_path):
    """Hidden, without an ending, before it or behind."""
    members = [
        ('.store/1', png()),
        link('a/1.png', '.store/1', tarfile.LNKTYPE),
        ('blobs/sha0', png()),
        link('b/2.png', 'blobs/sha0', tarfile.LNKTYPE),
        link('b/3.png', 'behind', tarfile.LNKTYPE),
        ('behind', png()),
        link('b/lost.png', 'nowhere', tarfile.LNKTYPE),
    ]
    write(tmp_path / 'set/train.tar', members)
    part = find.find_splits(tmp_path / 'set', tmp_path / 'cache', archives_bar)['train']
    assert list(part.store.names) == ['a/1.png', 'b/2.png', 'b/3.png']
    assert dict(part.other_files) == {'(hidden)': 1, '(no ending)': 2, '(a link, or no plain file)': 1}
    for row in range(3):
        with part.store.open(row) as image:
            assert image.size == (40, 30)


def test_sparse_member_in_tar_is_skipped_with_message(tmp_path, capsys):
    picture = tmp_path / 'a' / '1.bmp'
    picture.parent.mkdir()
    Image.new('RGB', (300, 300)).save(picture)
    Image.new('RGB', (30, 30)).save(tmp_path / 'a' / '2.bmp')
    subprocess.run(['fallocate', '-d', str(picture)], check=True)
    subprocess.run(['tar', '-S', '-cf', 'set.tar', 'a'], cwd=tmp_path, check=True)
    assert len(load_splits(options(tmp_path / 'set.tar'))['train']) == 1
    assert 'not read: 1 (sparse: tar it without -S)' in capsys.readouterr().out


def test_cls_files_may_have_undecodable_names(tmp_path, capsys):
    """Two that are no UTF-8 are two; a mark of UTF-8 is no part of one; one beside no image says nothing."""
    owners = [b'B\xe4r', b'B\xfcr', b'\xef\xbb\xbfHund']
    members = [(f'{i}.png', png()) for i in range(7)]
    members += [(f'{i}.cls', owner + b'\r\n') for i, owner in enumerate(2 * owners)]
    write(tmp_path / 'set.tar', [*members, ('notes.cls', b'x')])
    train = load_splits(options(tmp_path / 'set.tar', val_fraction=0.0))['train']
    assert {os.fsencode(name) for name in train.classes} == {b'B\xe4r', b'B\xfcr', b'Hund'}
    assert sorted(train.labels.tolist()) == [-1, 0, 0, 1, 1, 2, 2]
    assert 'train  1 of 7 images have no class' in capsys.readouterr().out
    write(tmp_path / 'b.tar', [('a/1.png', png()), ('a/notes.cls', b'x'), ('b/1.png', png())])
    assert load_splits(options(tmp_path / 'b.tar', val_fraction=0.0))['train'].classes == ['a', 'b']


@pytest.mark.parametrize('make', [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_file_called_tar_names_format(make, tmp_path):
    write(tmp_path / 'whole.tar', [('a/1.png', png()), ('b/1.png', png())])
    (tmp_path / 'set.tar').write_bytes(make((tmp_path / 'whole.tar').read_bytes()))
    with pytest.raises(WorkError, match='set.tar is not a .tar but .*, without random access: unpack it'):
        load_splits(options(tmp_path / 'set.tar'))


def test_hostile_tar_members_are_skipped_and_counted(tmp_path):
    members = [
        ('a/1.png', png()),
        ('b/2.png', png()),
        ('../out.png', png()),
        ('/etc/out.png', png()),
        ('a/../../up.png', png()),
        link('a/link.png', '/etc/passwd', tarfile.SYMTYPE),
        link('a/hard.png', '../out.png', tarfile.LNKTYPE),
        link('a/device.png', '', tarfile.CHRTYPE),
        link('a/pipe.png', '', tarfile.FIFOTYPE),
        ('a/.hidden.png', png()),
        ('__MACOSX/a/1.png', png()),
        ('a/empty.png', b''),
        ('a/note.txt', b'x'),
    ]
    write(tmp_path / 'set/train.tar', members)
    part = find.find_splits(tmp_path / 'set', tmp_path / 'cache', archives_bar)['train']
    assert list(part.store.names) == ['a/1.png', 'b/2.png']
    assert dict(part.other_files) == {
        '(a path out of the folder)': 3,
        '(a link, or no plain file)': 4,
        '(hidden)': 2,
        '(empty)': 1,
        '.txt': 1,
    }


def test_tar_member_with_false_size_is_refused(tmp_path):
    path = write(tmp_path / 'set/train.tar', [('a/1.png', png()), ('b/2.png', png())])
    content = bytearray(path.read_bytes())
    second = content.index(b'b/2.png')
    header = content[second : second + 512]
    header[124:136] = b'77777777777\0'
    header[148:156] = b' ' * 8
    header[148:156] = b'%06o\0 ' % sum(header)
    content[second : second + 512] = header
    path.write_bytes(content)
    with pytest.raises(WorkError, match='2.png claims 8589934591 bytes, more than the archive has'):
        load_splits(options(tmp_path / 'set'))


@pytest.mark.parametrize('name', ['train.tar', 'train-000000.tar'])
@pytest.mark.parametrize(
    'content', [b'', b'text', b'\0' * 600, b'\x1f\x8b' + bytes(range(200)), bytes(range(256)) * 9, png()]
)
def test_file_that_is_no_tar_fails_in_one_line(name, content, tmp_path):
    (tmp_path / 'set').mkdir()
    (tmp_path / 'set' / name).write_bytes(content)
    with pytest.raises((UserError, WorkError)) as caught:
        load_splits(options(tmp_path / 'set'))
    assert '\n' not in str(caught.value)


def test_tar_truncated_anywhere_raises_or_has_fewer_images(drawn_large, tmp_path):
    """At every place: a WorkError or fewer images, never anything else."""
    whole = (tarred(drawn_large, tmp_path / 'packed') / 'train.tar').read_bytes()
    for end in range(0, len(whole), max(1, len(whole) // 60)):
        path = tmp_path / f'{end}/train.tar'
        path.parent.mkdir()
        path.write_bytes(whole[:end])
        try:
            found = find.load_location([path], tmp_path / 'cache', archives_bar)
        except (UserError, WorkError):
            continue
        assert len(found.labels) <= 24


@pytest.mark.parametrize('damage', ['header', 'cut in a header', 'cut between'])
def test_tar_with_damaged_header_fails(damage, drawn_large, tmp_path, capsys):
    path = tarred(drawn_large, tmp_path / 'set') / 'train.tar'
    (tmp_path / 'set/val.tar').unlink()
    with tarfile.open(path) as archive:
        at = archive.getmembers()[10].offset
    content = bytearray(path.read_bytes())
    content[at : at + 512] = os.urandom(512)
    path.write_bytes({'header': content, 'cut in a header': content[: at + 100], 'cut between': content[:at]}[damage])
    if damage == 'cut between':
        assert len(load_splits(options(tmp_path / 'set', val_fraction=0.0))['train']) == 10
        assert 'train.tar has no end-of-archive mark' in capsys.readouterr().out
        load_splits(options(tmp_path / 'set', val_fraction=0.0))  # by the index that was kept
        assert 'train.tar has no end-of-archive mark' in capsys.readouterr().out
    else:
        with pytest.raises(WorkError, match=f'train.tar is damaged: there is no header at byte {at}'):
            load_splits(options(tmp_path / 'set'))


def test_tar_of_shards_exits_2_and_tar_with_cls_has_splits(tmp_path):
    kinds = {'png': png(), 'cls': b'dog'}
    places = [f'{split}/{number}' for split in ('train', 'val') for number in range(3)]
    write(tmp_path / 'one.tar', [(f'{place}.{kind}', kinds[kind]) for place in places for kind in kinds])
    splits = load_splits(options(tmp_path / 'one.tar'))
    assert [len(splits[name]) for name in ('train', 'val')] == [3, 3]
    assert splits['val'].classes == ['dog']
    write(tmp_path / 'train-000000.tar', [('a/1.png', png()), ('b/1.png', png())])
    write(tmp_path / 'all.tar', [('train-000000.tar', (tmp_path / 'train-000000.tar').read_bytes())])
    with pytest.raises(UserError, match='holds the shards train-000000, ...: unpack it'):
        load_splits(options(tmp_path / 'all.tar'))


@pytest.mark.parametrize('side', [0, 20])
@pytest.mark.parametrize(
    ('names', 'classes'),
    [
        (('1.png', 'trip/1.png', 'trip/.hidden/1.png'), []),
        (('DCIM/1.png', 'DCIM/2.png'), []),
        (('a/1.png', 'a/1.gif', 'b/1'), None),
    ],
)
def test_pack_keeps_images_names_and_classes(names, classes, side, tmp_path):
    """As many images, under as many names, of the same classes, wherever they lay and whatever they were called."""
    for name in names:
        (tmp_path / 'set' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'set' / name).write_bytes(png())
    lines = [name if classes == [] else f'{name}\t{name[0]}' for name in names]
    (tmp_path / 'set/list.txt').write_text('\n'.join(lines))
    path = tmp_path / 'set/list.txt'
    given = [f'--image_path={path}', f'--output={tmp_path}/packed', *own_paths(tmp_path, 'cache')]
    assert cli.main(['pack', *given, '--val_fraction=0', *([f'--pack_short_side={side}'] if side else [])]) == 0
    before, after = (load_splits(options(at, val_fraction=0.0))['train'] for at in (path, tmp_path / 'packed'))
    assert len({*after.store.names}) == len(after) == len(before) == len(names)
    assert after.classes == before.classes
    assert sorted(after.labels.tolist()) == sorted(before.labels.tolist())


def test_more_shards_than_open_file_limit_work(tmp_path):
    for number in range(40):
        write(tmp_path / f'set/train-{number:06d}.tar', [('a/1.png', png()), ('b/1.png', png())])
    code = (
        'import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (30, 200)); import sys, cli; '
        f"sys.exit(cli.main(['check_dataloader', '--preset=demo', '--batch_size=4', '--image_path={tmp_path}/set', "
        f"'--cache_images=off', '--num_workers=0', '--cache_path={tmp_path}/cache', '--log_path={tmp_path}/log']))"
    )
    done = subprocess.run([sys.executable, '-c', code], cwd=CODE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_tar_changed_during_run_fails_in_one_line(drawn_large, tmp_path):
    top = tarred(drawn_large, tmp_path / 'packed')
    train = load_splits(options(top, cache_images='off'))['train']
    os.truncate(top / 'train.tar', 2048)
    with pytest.raises(WorkError, match='the archive has changed or is cut short'):
        train.store.open(len(train) - 1)


@pytest.mark.parametrize('ending', ['.tar.gz', '.tgz', '.tar.xz'])
def test_compressed_archives_are_refused_with_hint(ending, tmp_path):
    path = tmp_path / f'set{ending}'
    path.write_bytes(b'')
    done = run('check_dataloader', '--preset=demo', f'--image_path={path}', *own_paths(tmp_path, 'log', 'cache'))
    assert done.returncode == 2
    assert re.search('is compressed, without random access: make a .tar of it', one_line(done.stderr))


def test_pack_short_side_is_deterministic(drawn_large, tmp_path):
    for name in ('one', 'two'):
        done = run(
            'pack',
            f'--image_path={drawn_large}',
            f'--output={tmp_path}/{name}',
            '--pack_short_side=64',
            *own_paths(tmp_path, 'cache'),
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / 'one/train-000000.tar').read_bytes() == (tmp_path / 'two/train-000000.tar').read_bytes()
    packed = load_splits(options(tmp_path / 'one'))['train']
    assert packed.pixels.shape == (24, 3, 64, 64)
    again = run('pack', f'--image_path={drawn_large}', f'--output={tmp_path}/one', *own_paths(tmp_path, 'cache'))
    assert again.returncode == 2
    assert 'holds train-000000.tar already: pack into another folder' in one_line(again.stderr)
    assert 'pack needs --output' in one_line(run('pack', f'--image_path={drawn_large}').stderr)


def test_pack_with_damaged_image_fails_or_skips(drawn_large, tmp_path):
    folder = shutil.copytree(drawn_large, tmp_path / 'set')
    (folder / 'train/dots/000.jpg').write_bytes(b'text')
    command = ['pack', f'--image_path={folder}', '--pack_short_side=64', *own_paths(tmp_path, 'cache')]
    done = run(*command, f'--output={tmp_path}/one')
    assert done.returncode == 1
    assert 'dots/000.jpg: it is not an image that Pillow can read' in one_line(done.stderr)
    assert not list((tmp_path / 'one').glob('*'))
    done = run(*command, f'--output={tmp_path}/two', '--on_unreadable=skip')
    assert done.returncode == 0
    assert 'train  23 images' in done.stdout


@pytest.mark.parametrize('depth', range(1, 5))
def test_tar_with_leading_folders_is_read(depth, drawn_large, tmp_path):
    """tar cf train.tar data/photos/train; tar cf all.tar data/photos."""
    files, inside = load_splits(options(drawn_large)), ['data', 'my', 'old', 'photos'][:depth]
    holder = tmp_path.joinpath('tree', *inside)
    holder.parent.mkdir(parents=True)
    shutil.copytree(drawn_large, holder)
    (tmp_path / 'set').mkdir()
    for split in ('train', 'val'):
        path = '/'.join([*inside, split])
        subprocess.run(['tar', 'cf', tmp_path / f'set/{split}.tar', '-C', tmp_path / 'tree', path], check=True)
    subprocess.run(['tar', 'cf', tmp_path / 'all.tar', '-C', tmp_path / 'tree', inside[0]], check=True)
    for place in ('set', 'all.tar'):
        found = load_splits(options(tmp_path / place))
        for name in ('train', 'val'):
            assert list(found[name].names) == list(files[name].names)
            assert found[name].classes == files[name].classes
            assert torch.equal(found[name].labels, files[name].labels)


def test_ambiguous_splits_in_tar_exit_2(tmp_path, capsys):
    """Splits without train; two of one kind; what lies beside them."""
    write(tmp_path / 'a.tar', [('test/a/1.png', png()), ('val/a/1.png', png())])
    with pytest.raises(UserError, match='a.tar has test, val but no train'):
        load_splits(options(tmp_path / 'a.tar'))
    members = [(f'{name}/{kind}/1.png', png()) for name in ('train', 'val', 'validation') for kind in 'ab']
    write(tmp_path / 'b.tar', members)
    with pytest.raises(UserError, match='b.tar has both val and validation: which of them is val?'):
        load_splits(options(tmp_path / 'b.tar'))
    write(tmp_path / 'c.tar', [*members[:4], ('extra/1.png', png()), ('loose.png', png())])
    assert len(load_splits(options(tmp_path / 'c.tar'))['train']) == 2
    assert 'not read: extra, 1 images in no folder, beside train in ' in capsys.readouterr().out
    write(tmp_path / 'd.tar', [*members[:4], *((f'{i}/1.png', png()) for i in range(7))])
    assert len(load_splits(options(tmp_path / 'd.tar'))['train']) == 2
    assert 'not read: 0, 1, 2, 3, 4, beside train in ' in capsys.readouterr().out


def test_hard_link_to_earlier_member_is_an_image(tmp_path):
    """tar stores it as a hard link: of a member before it, in the same archive, under the name that it has there."""
    folder = tmp_path / 'set'
    for kind in 'ab':
        (folder / f'train/{kind}').mkdir(parents=True)
        (folder / f'train/{kind}/1.png').write_bytes(png('red' if kind == 'a' else 'blue'))
        os.link(folder / f'train/{kind}/1.png', folder / f'train/{kind}/2.png')
    (tmp_path / 'packed').mkdir()
    subprocess.run(['tar', 'cf', tmp_path / 'packed/train.tar', '-C', folder / 'train', '.'], check=True)
    files, archive = (load_splits(options(path, val_fraction=0.0))['train'] for path in (folder, tmp_path / 'packed'))
    assert list(archive.names) == list(files.names)
    for row in range(4):
        with archive.store.open(row) as image, files.store.open(row) as wanted:
            assert image.convert('RGB').tobytes() == wanted.convert('RGB').tobytes()


@pytest.mark.parametrize('kind', ['v7', 'ustar', 'gnu', 'posix'])
def test_concatenated_tars_of_any_format_are_refused(kind, tmp_path):
    for name in 'ab':
        (tmp_path / name).mkdir()
        (tmp_path / name / '1.png').write_bytes(png())
        subprocess.run(['tar', f'--format={kind}', '-cf', f'{name}.tar', name], cwd=tmp_path, check=True)
    (tmp_path / 'set.tar').write_bytes((tmp_path / 'a.tar').read_bytes() + (tmp_path / 'b.tar').read_bytes())
    with pytest.raises(WorkError, match='another archive after its end, as from cat'):
        load_splits(options(tmp_path / 'set.tar'))


def test_concatenated_tars_are_refused(tmp_path):
    """tar itself reads the first alone, in silence."""
    one, two = (write(tmp_path / f'{kind}.tar', [(f'{kind}/1.png', png())]) for kind in 'ab')
    joined = tmp_path / 'set/train.tar'
    joined.parent.mkdir()
    joined.write_bytes(one.read_bytes() + two.read_bytes())
    with pytest.raises(WorkError, match='another archive after its end, as from cat: tar --concatenate'):
        load_splits(options(joined.parent))
    joined.write_bytes(one.read_bytes() + bytes(100_000))
    assert len(load_splits(options(joined.parent, val_fraction=0.0))['train']) == 1


def jpeg2000():
    buffer = io.BytesIO()
    Image.new('RGB', (40, 30), 'teal').save(buffer, 'JPEG2000')
    return buffer.getvalue()


def of_shards(folder):
    """Keys that begin anew in every archive."""
    for shard in range(2):
        members = [(f'{i}.png', png()) for i in range(6)] + [(f'{i}.cls', b'dog') for i in range(6)]
        write(folder / f'train-{shard:06d}.tar', members)
    return folder, 12


def of_list(names, classes=('x',), content=png):
    def make(folder):
        for name in names:
            (folder / 'lists' / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / 'lists' / name).write_bytes(content())
        lines = [f'{name}\t{classes[i % len(classes)]}'.strip() for i, name in enumerate(names)]
        (folder / 'lists/mine.txt').write_text('\n'.join(lines))
        return folder / 'lists/mine.txt', len(names)

    return make


CROWDED = {
    'shards whose keys restart': of_shards,
    'names above the list': of_list(['a/0.png', '../a/0.png', 'a/1.png', '../a/1.png']),
    'classes that are no names': of_list([f'{i}.png' for i in range(8)], ['.x', '..', '.', 'lost+found']),
    'classes that become one': of_list([f'{i}.png' for i in range(6)], ['a/b', 'a_b']),
    'files without an ending': of_list([f'f{i}' for i in range(5)], [''], jpeg2000),
    'a class like its file': of_list(['x', 'y', 'z'], ['x'], jpeg2000),
}


@pytest.mark.parametrize('case', CROWDED)
def test_pack_keeps_every_image_and_class(case, tmp_path):
    path, count = CROWDED[case](tmp_path / 'from')
    before = load_splits(options(path, val_fraction=0.0))['train']
    args = ['pack', f'--image_path={path}', f'--output={tmp_path}/to', '--val_fraction=0', *own_paths(tmp_path)]
    assert cli.main(args) == 0
    after = load_splits(options(tmp_path / 'to', val_fraction=0.0))['train']
    assert len(before) == len(after) == count
    assert sorted(before.labels.bincount(minlength=1).tolist() if before.classes else []) == sorted(
        after.labels.bincount(minlength=1).tolist() if after.classes else []
    )


def test_pack_into_image_folder_exits_2(drawn, tmp_path, capsys):
    for output in (drawn, tmp_path / 'train.tar'):
        paths = own_paths(tmp_path, 'cache')
        assert cli.main(['pack', f'--image_path={drawn}', f'--output={output}', *paths]) == 2
        assert 'name another folder, for the archives' in one_line(capsys.readouterr().err)


def test_infer_reads_packed_archives(drawn, tmp_path):
    """Images without classes; a list or an archive of test alone; one archive of splits, which are as a folder's."""
    paths = own_paths(tmp_path)
    assert cli.main(['train', *TINY, '--knn_every=0', '--max_epochs=1', f'--image_path={drawn}', *paths]) == 0
    flat = tmp_path / 'flat'
    shutil.copytree(drawn / 'val/dots', flat)
    assert cli.main(['pack', f'--image_path={flat}', f'--output={tmp_path}/packed', *paths]) == 0
    for name in ('listed', 'tested'):
        (tmp_path / name).mkdir()
    (tmp_path / 'listed/test.txt').write_text('\n'.join(f'../flat/{path.name}' for path in flat.iterdir()))
    subprocess.run(['tar', 'cf', tmp_path / 'tested/test.tar', '-C', flat, '.'], check=True)
    subprocess.run(['tar', 'cf', tmp_path / 'all.tar', '-C', drawn, '.'], check=True)
    subprocess.run(['tar', 'cf', tmp_path / 'classes.tar', '-C', drawn / 'val', '.'], check=True)
    counts = {'packed': 8, 'listed': 8, 'tested': 8, 'all.tar': 24, 'classes.tar': 24}
    for name, count in counts.items():
        output = tmp_path / f'{name}.csv'
        given = [f'--image_path={tmp_path / name}', f'--output={output}', *paths]
        assert cli.main(['infer', '--ckpt_name=model_name_simsiam_ckpt_0', *given]) == 0, name
        assert len(output.read_text().splitlines()) == count + 1, name


@pytest.mark.parametrize('shards', [False, True])
def test_tar_with_splits_below_exits_2_like_its_folder(shards, tmp_path, capsys):
    """s1/train, s1/test, s2/train, s2/test: it trained on the test images."""
    members = [
        (f'{site}/{split}/{number}.png', png()) for site in 'ab' for split in ('train', 'test') for number in range(3)
    ]
    name = '00000.tar' if shards else 'all.tar'
    (tmp_path / 'set').mkdir()
    write(tmp_path / 'set' / name, members)
    where = tmp_path / 'set' if shards else tmp_path / 'set' / name
    assert cli.main(['train', *TINY, f'--image_path={where}', *own_paths(tmp_path)]) == 2
    assert 'has no splits itself' in capsys.readouterr().err


def test_tar_index_is_rebuilt_for_new_formats(tmp_path, monkeypatch):
    """A package was installed that reads more endings."""
    write(tmp_path / 'train.tar', [('a/1.png', png()), ('a/2.zzz', png()), ('b/1.png', png())])
    before = len(tar_index.open_archives([tmp_path / 'train.tar'], tmp_path / 'cache', archives_bar)[0].names)
    known = decode.image_extensions()
    monkeypatch.setattr(decode, 'image_extensions', lambda: known | {b'.zzz'})
    monkeypatch.setattr(tar_index, 'image_extensions', lambda: known | {b'.zzz'})
    after = len(tar_index.open_archives([tmp_path / 'train.tar'], tmp_path / 'cache', archives_bar)[0].names)
    assert (before, after) == (2, 3)
