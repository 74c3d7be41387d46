"""Quotas, names of archives and of classes, leftovers, and numbers that were missing: a table of single cases."""

import os
import shutil
import socket
import subprocess
import unicodedata

import joblib
import pytest
import torch

import cli
from conftest import TINY, own_paths
from dataloader.load_dataset import find_split_sources, load_splits
from dataloader.loading import loader
from metric.accuracy import class_accuracies, confusion_matrix
from runtime import environment
from runtime.checkpoints.run_folder import run_display_name
from runtime.errors import ROOT, UserError
from runtime.files import clear_parts
from runtime.options import get_config
from runtime.versions import library_versions
from test_detection import coco
from test_nested_splits import shards

RUN = 'model_name_simsiam_ckpt_0'


def test_resolve_num_workers_respects_cpu_quota(monkeypatch):
    monkeypatch.setattr(joblib, 'cpu_count', lambda: 3)
    environment.cpu_count.cache_clear()
    assert environment.cpu_count() == 3
    environment.cpu_count.cache_clear()


# Names of shards and folders, what --image_path names, and how many images that has.
HUB = ['imagenet1k-train-0000.tar', 'imagenet1k-train-0001.tar', 'imagenet1k-validation-00.tar']
FOLDERS = ['train/shard-000000.tar', 'train/shard-000001.tar', 'val/shard-000000.tar']
THREE = ['train-000000.tar', 'train-000001.tar', 'train-000002.tar']
SHARDS = {
    'img2dataset': (['00000.tar', '00001.tar'], '', {'train': 16}),
    'the hub': (HUB, '', {'train': 16, 'val': 8}),
    'in folders': (FOLDERS, '', {'train': 16, 'val': 8}),
    'braces': (THREE, 'train-{000000..000001}.tar', {'train': 16}),
    'numbered, braces': (['00000.tar', '00001.tar'], '{00000..00001}.tar', {'train': 16}),
}


@pytest.mark.parametrize('kind', SHARDS)
def test_shards_are_found_by_name(kind, tmp_path):
    files, below, wanted = SHARDS[kind]
    shards(tmp_path / 'made', (1, 8), lambda shard, number: f'{number:06d}.png')
    for name in files:
        (tmp_path / 'set' / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / 'made/val-000000.tar', tmp_path / 'set' / name)
    path = tmp_path / 'set' / below
    parts = find_split_sources(get_config(preset='demo', image_path=str(path), cache_path=str(tmp_path / 'cache')))
    assert {name: len(part.labels) for name, part in parts.items()} == wanted


def test_braces_with_missing_archives_exit_2(tmp_path):
    shards(tmp_path / 'set', (1, 2), lambda shard, number: f'{number}.png')
    for braces, said in (('{000000..000004}', '4 are not there'), ('{000002..000001}', 'names no archive')):
        path = tmp_path / f'set/val-{braces}.tar'
        with pytest.raises(UserError, match=said):
            find_split_sources(get_config(preset='demo', image_path=str(path), cache_path=str(tmp_path / 'cache')))


def test_class_names_are_unicode_normalized(drawn, tmp_path):
    """train from a Mac (NFD), val from elsewhere (NFC); both in one split are asked about."""
    names = {form: unicodedata.normalize(form, 'éclair') for form in ('NFC', 'NFD')}
    for split, form in (('train', 'NFD'), ('val', 'NFC')):
        shutil.copytree(drawn / split / 'checks', tmp_path / 'set' / split / names[form])
        shutil.copytree(drawn / split / 'dots', tmp_path / 'set' / split / 'dots')
    args = get_config(preset='demo', image_path=str(tmp_path / 'set'), cache_path=str(tmp_path / 'cache'))
    splits = load_splits(args)
    assert sorted(splits['val'].labels.unique().tolist()) == [0, 1]
    assert len(splits['val'].classes) == 2
    shutil.copytree(drawn / 'train/checks', tmp_path / 'set/train' / names['NFC'])
    with pytest.raises(UserError, match='twice, spelled in two ways of Unicode'):
        load_splits(args)


def test_two_annotation_files_exit_2(tmp_path, capsys):
    from dataloader.detection.dataset import load_detection_dataset

    coco(tmp_path / 'set', {'train': 2, 'val': 1})
    annotations = tmp_path / 'set/annotations'
    shutil.copy(annotations / 'instances_train2017.json', annotations / 'instances_train2014.json')
    with pytest.raises(UserError, match='instances_train2014.json and instances_train2017.json: which of them'):
        load_detection_dataset(tmp_path / 'set', False)


def test_class_accuracies_equal_confusion_matrix():
    scores, labels = torch.randn(60, 7), torch.randint(0, 6, (60,))
    counts = confusion_matrix(scores, labels).double()
    wanted = 100 * counts.diag() / counts.sum(1)
    torch.testing.assert_close(class_accuracies(scores, labels), wanted, equal_nan=True)
    many = torch.randn(10, 6000)
    assert class_accuracies(many, torch.arange(10)).shape == (6000,)


def test_clear_parts_deletes_only_files_of_dead_writers(tmp_path):
    host = socket.gethostname()[:50]
    process = subprocess.Popen(['true'])
    process.wait()
    gone, alive = tmp_path / f'.x.{host}.{process.pid}.part', tmp_path / f'.x.{host}.{os.getpid()}.part'
    other, plain = tmp_path / f'.x.elsewhere.{process.pid}.part', tmp_path / 'x.part'
    for path in (gone, alive, other, plain):
        path.write_text('x')
    clear_parts(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {alive.name, other.name, plain.name}


def test_library_versions_ignore_outer_repository(tmp_path, monkeypatch):
    """Where the code lies in somebody's repository, and is none itself."""
    subprocess.run(['git', 'init', '-q', str(tmp_path)], check=True)
    given = ['-c', 'user.name=x', '-c', 'user.email=x@x', 'commit', '-q', '--allow-empty', '-m', 'x']
    subprocess.run(['git', *given], cwd=tmp_path, check=True)
    (tmp_path / 'inner').mkdir()
    monkeypatch.setattr('runtime.versions.ROOT', tmp_path / 'inner')
    monkeypatch.delenv('SIMSIAM_COMMIT', raising=False)
    library_versions.cache_clear()
    assert library_versions()['commit'] == ''
    monkeypatch.setattr('runtime.versions.ROOT', tmp_path)
    library_versions.cache_clear()
    assert len(library_versions()['commit']) == 40
    library_versions.cache_clear()


def test_printed_command_names_run_outside_ckpt_path_by_path(drawn, tmp_path, capsys):
    given = ['train', *TINY, '--knn_every=0', f'--image_path={drawn}', *own_paths(tmp_path)]
    assert cli.main([*given, '--max_epochs=1']) == 0
    run = tmp_path / 'ckpt' / RUN
    args = get_config(ckpt_path=str(tmp_path / 'ckpt'))
    assert run_display_name(args, run) == RUN
    assert run_display_name(get_config(), run) == str(run)
    capsys.readouterr()
    assert (
        cli.main(['train', f'--resume={run}', '--max_epochs=2', '--knn_every=0', *own_paths(tmp_path, 'log', 'cache')])
        == 0
    )
    assert f'evaluate --ckpt_name={run}/loss' in capsys.readouterr().out
    assert ROOT.is_dir()


def test_class_without_readable_images_warns(drawn, tmp_path, capsys):
    shutil.copytree(drawn, tmp_path / 'set')
    for path in (tmp_path / 'set/train/dots').iterdir():
        path.write_bytes(b'x')
    args = get_config(
        preset='demo', image_path=str(tmp_path / 'set'), on_unreadable='skip', cache_path=str(tmp_path / 'c')
    )
    load_splits(args)
    assert 'no image of the class dots can be read' in capsys.readouterr().err


def test_detectron2_export_of_resnet18_names_fpn(drawn, tmp_path, capsys):
    given = ['train', *TINY, '--backbone=resnet18', '--stem=imagenet', '--max_epochs=1', '--knn_every=0']
    assert cli.main([*given, f'--image_path={drawn}', *own_paths(tmp_path)]) == 0
    given = [
        'export',
        f'--ckpt_name={RUN}',
        '--format=detectron2',
        f'--output={tmp_path}/x.pkl',
        f'--ckpt_path={tmp_path}/ckpt',
    ]
    assert cli.main(given) == 0
    assert 'C4 needs bottlenecks' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('told', 'system', 'wanted'), [(None, 'linux', 'fork'), ('spawn', 'linux', None), (None, 'darwin', None)]
)
def test_start_method_is_fork_on_linux(told, system, wanted, monkeypatch):
    """Python 3.14's default on Linux is forkserver."""
    monkeypatch.setattr(loader.multiprocessing, 'get_start_method', lambda allow_none: told)
    monkeypatch.setattr(loader.sys, 'platform', system)
    assert loader.start_method() == wanted
