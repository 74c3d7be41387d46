"""A result says what it is of, no two questions share a file, and a classifier is used for its own classes."""

import csv
import json
import shlex
import shutil

import pytest
import torch

import cli
from config import OPTIONS
from conftest import TINY, draw_folder, one_line, own_paths
from dataloader.load_dataset import load_splits
from dataloader.sources.path_array import PathArray
from protocols import results
from protocols.protocol import has_effect
from protocols.results import NOT_IN_SPEC, eval_spec, load_results, write_result
from runtime.checkpoints.load_state import build_model
from runtime.options import get_config

RUN = 'model_name_simsiam_ckpt_0'


@pytest.fixture(scope='module')
def trained(drawn, tmp_path_factory):
    folder = tmp_path_factory.mktemp('results')
    assert cli.main(['train', *TINY, f'--image_path={drawn}', '--knn_every=0', *own_paths(folder)]) == 0
    return folder


@pytest.fixture
def copied(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / 'copy')


@pytest.fixture
def other(tmp_path):
    """Another set, whose classes are named otherwise."""
    folder = draw_folder(tmp_path / 'other', {'train': 9, 'val': 6})
    for split in ('train', 'val'):
        for entry in list((folder / split).iterdir()):
            entry.rename(entry.with_name(f'other_{entry.name}'))
    return folder


def evaluate(copied, *options):
    assert cli.main(['evaluate', f'--ckpt_name={RUN}', *own_paths(copied), '--probe_epochs=5', *options]) == 0


def infer(copied, output, *options):
    """The classes that were predicted."""
    argv = ['infer', f'--ckpt_name={RUN}', f'--output={output}', *own_paths(copied, 'ckpt', 'cache'), *options]
    assert cli.main(argv) == 0
    with open(output, newline='') as file:
        return {row['prediction'].removeprefix('other_') != row['prediction'] for row in csv.DictReader(file)}


def test_classifier_is_used_for_its_dataset_only(copied, drawn, other, tmp_path, capsys):
    """Of set A, then of set B: A's images never get B's classes."""
    out, (ours, theirs) = tmp_path / 'o.csv', ({False}, {True})
    evaluate(copied, f'--image_path={other}')
    assert infer(copied, out) == ours  # by kNN: B's classifier is not for the checkpoint's own images
    assert 'predicted by kNN' in capsys.readouterr().out
    assert infer(copied, out, f'--image_path={other}') == theirs
    assert f'the linear classifier that evaluate trained on {other}' in capsys.readouterr().out
    evaluate(copied)
    assert infer(copied, out) == ours
    assert f'the linear classifier that evaluate trained on {drawn}' in capsys.readouterr().out
    evaluate(copied, f'--image_path={other}')
    assert infer(copied, out) == ours
    assert infer(copied, out, f'--image_path={other}/val') == theirs
    elsewhere = shutil.copytree(other / 'val', tmp_path / 'elsewhere')
    assert infer(copied, out, f'--image_path={elsewhere}') == ours  # the checkpoint's own set goes first
    assert infer(copied, out, f'--image_path={elsewhere}', f'--classifier={other}') == theirs
    capsys.readouterr()
    argv = ['infer', f'--ckpt_name={RUN}', f'--classifier={tmp_path}', *own_paths(copied, 'ckpt', 'cache')]
    assert cli.main(argv) == 2
    assert 'this checkpoint has classifiers for' in one_line(capsys.readouterr().err)
    files = [result['images']['path'] for result in load_results(copied / 'ckpt' / RUN, protocol='linear')]
    assert sorted(files) == sorted(map(str, (drawn, other)))  # asked again, a question has its file again


def test_classifier_with_the_preprocessing_of_the_run_goes_first(copied, drawn, tmp_path, capsys):
    """Of several for one dataset; `runs` shows the accuracy of the same one. A named option selects another."""
    evaluate(copied, '--probe_epochs=1', '--probe_learning_rate=1e-9')
    evaluate(copied, '--image_size=40', '--probe_epochs=30')
    (command,) = (
        line for line in capsys.readouterr().out.splitlines() if 'infer' in line and '--image_size=40' in line
    )
    ours, larger = load_results(copied / 'ckpt' / RUN, protocol='linear')
    assert larger['top1'] > ours['top1']
    infer(copied, tmp_path / 'o.csv')
    assert f'top-1 {ours["top1"]:.2f} %' in capsys.readouterr().out
    assert cli.main(['runs', f'--ckpt_path={copied}/ckpt']) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(f'{ours["top1"]:.2f}')
    shown = shlex.split(command.partition('cli.py ')[2])
    assert cli.main([*shown, f'--output={tmp_path}/o.csv', *own_paths(copied, 'cache')]) == 0
    assert f'top-1 {larger["top1"]:.2f} %' in capsys.readouterr().out
    argv = ['infer', f'--ckpt_name={RUN}', f'--classifier={tmp_path}', *own_paths(copied, 'ckpt', 'cache')]
    assert cli.main(argv) == 2
    assert one_line(capsys.readouterr().err).count('(classifier_') == 2


def test_weights_without_run_are_used_with_their_classifier(drawn, other, tmp_path, capsys):
    """They have no images of their own: the classifier's are those that neighbors are searched in."""
    model = build_model(get_config(preset='imagenet', backbone='mobilenet_v3_small', image_size=32))
    torch.save(model.backbone.state_dict(), tmp_path / 'w.pth')
    paths = own_paths(tmp_path)
    given = [f'--ckpt_name={tmp_path}/w.pth', '--backbone=mobilenet_v3_small', '--num_workers=0']
    options = ['--image_size=32', '--probe_optimizer=lbfgs', f'--image_path={drawn}']
    elsewhere = shutil.copytree(next((drawn / 'val').iterdir()), tmp_path / 'elsewhere')
    infer_elsewhere = ['infer', *given, f'--image_path={elsewhere}', f'--output={tmp_path}/o.csv', '--neighbors=1']
    infer_elsewhere += own_paths(tmp_path, 'ckpt', 'cache')
    capsys.readouterr()
    assert cli.main(infer_elsewhere) == 2
    assert '--backbone=mobilenet_v3_small' in one_line(capsys.readouterr().err)
    itself = [f'--image_path={drawn}/val' if 'image_path' in option else option for option in infer_elsewhere]
    assert cli.main([option for option in itself if 'neighbors' not in option]) == 2
    assert 'are labeled images that kNN predicts from' in one_line(capsys.readouterr().err)
    assert cli.main(['evaluate', *given, *options, *paths]) == 0
    assert '--backbone=mobilenet_v3_small' in capsys.readouterr().out.splitlines()[-1]
    assert cli.main(infer_elsewhere) == 0
    said = capsys.readouterr().out
    assert f'the linear classifier that evaluate trained on {drawn}' in said
    assert 'their nearest training images' in said
    assert cli.main(['evaluate', *given, *options[:2], f'--image_path={other}', *paths]) == 0
    capsys.readouterr()
    assert cli.main(infer_elsewhere) == 2
    assert one_line(capsys.readouterr().err).startswith('error: --classifier=FOLDER selects one of these classifiers: ')
    assert cli.main([*infer_elsewhere, f'--classifier={other}']) == 0


def test_result_has_spec_versions_and_time(copied, drawn, capsys):
    evaluate(copied, '--protocol=knn', '--knn_k=7')
    (result,) = load_results(copied / 'ckpt' / RUN)
    assert result['checkpoint'] == next((copied / 'ckpt' / RUN).glob('loss_*')).name
    assert (result['epoch'], result['preset'], result['settings']['image_size']) == (2, 'demo', 16)
    assert (result['images']['train']['number'], result['images']['val']['number']) == (72, 24)
    assert result['given'] == ['knn_k']
    assert set(result['versions']) == {'python', 'torch', 'torchvision', 'commit'}
    said = capsys.readouterr().out
    assert f'images {drawn}, 16 px, preset demo, --knn_k=7' in said
    assert json.loads((copied / 'ckpt' / RUN / result['file']).read_text()) == result


def test_different_subset_lists_have_different_files(copied, drawn, tmp_path):
    for name, count in (('1percent.txt', 1), ('10percent.txt', 3)):
        kinds = ('checks', 'dots', 'stripes')
        (tmp_path / name).write_text(''.join(f'{kind}/{i:03d}.png\n' for kind in kinds for i in range(count)))
        evaluate(copied, '--protocol=semi', f'--subset_list={tmp_path / name}', '--finetune_epochs=1')
    assert sorted(result['num_train'] for result in load_results(copied / 'ckpt' / RUN)) == [3, 9]


def test_different_specs_have_different_files(drawn, tmp_path, monkeypatch):
    """Whatever is asked otherwise: each setting, the images, the weights."""
    cache = f'{tmp_path}/cache'
    args = get_config(preset='demo', image_path=str(drawn), cache_path=cache)
    splits = {name: images for name, images in load_splits(args).items() if name != 'test'}
    checkpoint = {'path': tmp_path / 'loss_0.0000_epoch_1', 'epoch': 1}
    files = set()

    def ask(args, splits=splits, checkpoint=checkpoint):
        write_result(tmp_path / 'run', 'linear', eval_spec(args, splits, checkpoint), {'top1': 0.0})
        found = {path.name for path in (tmp_path / 'run').iterdir()}
        assert len(found) == len(files) + 1, 'shares a file with another question'
        files.update(found)

    ask(args)
    for name, option in OPTIONS.items():
        if name in NOT_IN_SPEC or 'evaluate' not in option.metadata['used_by'] or not has_effect(args, name):
            continue
        changed = get_config(preset='demo', image_path=str(drawn), cache_path=cache)
        now = getattr(args, name)
        setattr(changed, name, not now if isinstance(now, bool) else f'{now}x' if isinstance(now, str) else now + 1)
        ask(changed)
    ask(args, checkpoint={**checkpoint, 'path': tmp_path / 'loss_0.0000_epoch_2'})
    monkeypatch.setattr(results, 'precision', lambda args: torch.bfloat16)
    ask(args)
    assert '--amp=bf16' in results.list_options(eval_spec(args, splits, checkpoint))
    fewer = load_splits(args)
    fewer['val'].labels = fewer['val'].labels.roll(1)
    ask(args, {'train': splits['train'], 'val': fewer['val']})
    fewer['val'].store.names = PathArray(f'{name}_' for name in fewer['val'].names)
    ask(args, {'train': splits['train'], 'val': fewer['val']})
    assert torch.is_tensor(fewer['val'].labels)
