"""Few labels, few images in val, classes without images, little memory: what is judged by what, and what is said."""

import re
import shutil

import pytest
import torch

import cli
from conftest import one_line, own_paths
from dataloader.load_dataset import find_split_sources
from engine import auto_preset
from protocols.collapse_verdict import FOR_UNSURE, judge_run_metrics
from protocols.few_labels import accuracy_and_error, mean_and_error
from protocols.logistic import select_l2
from runtime.checkpoints.best_epoch import FEW_LABELS, SIMILARITY, find_best_epoch, find_best_epoch_in_metrics
from runtime.checkpoints.run_folder import checkpoints
from runtime.files import read_json
from runtime.options import get_config
from test_training_from_weights import RESNET, RUN, pretrained, train  # noqa: F401


def lines_of(accuracy, similarity, error=10.0):
    """metrics.jsonl of a run: gains of the epochs in few-label accuracy and in similarity; None: not measured."""
    lines = []
    for epoch in range(len(accuracy or similarity) + 1):
        line = {'epoch': epoch, 'pretraining/rank': 5.0, 'pretraining/area': 0.5, 'pretraining/std': 1.0}
        if accuracy:
            gain = accuracy[epoch - 1] if epoch else 0.0
            line[FEW_LABELS.value] = 50 + gain
            line |= {FEW_LABELS.gain: gain, FEW_LABELS.error: error} if epoch else {}
        if similarity:
            gain = similarity[epoch - 1] if epoch else 0.0
            line |= {SIMILARITY.value: 0.5 + gain, SIMILARITY.gain: gain, SIMILARITY.error: 0.01}
        lines.append(line)
    return lines


@pytest.mark.parametrize(
    ('accuracy', 'similarity', 'best', 'word'),
    [
        ([8.0, 5.0], [0.1, 0.2], 2, 'probably better than the start'),  # labels tell nothing
        ([-3.0, -2.0], [0.2, 0.1], 1, 'probably better than the start'),
        ([8.0, 5.0], [-0.1, -0.2], 0, 'no better than the start'),
        ([8.0, 5.0], [0.01, 0.015], 0, 'no better than the start'),
        ([8.0, 5.0], None, 0, 'no better than the start'),
        ([25.0, 5.0], [0.1, 0.2], 1, 'better than the start'),  # labels tell: they select
        ([12.0, 5.0], [0.1, 0.2], 1, 'perhaps better than the start'),
        ([5.0, -12.0], [0.1, 0.2], 0, 'worse than the start'),
        ([-12.0, 5.0], [0.1, 0.2], 0, 'no better than the start'),
        (None, [0.1, 0.2], 2, 'probably better than the start'),
        (None, [-0.1, 0.0], 0, 'not known to be better than the start'),
        ([0.0, 0.0], [0.0, 0.0], 0, 'no better than the start'),
    ],
)
def test_similarity_selects_where_labels_tell_nothing(accuracy, similarity, best, word):
    """Four images in val kept the start, whatever had been gained, and the advice was to train less."""
    lines = lines_of(accuracy, similarity)
    assert find_best_epoch_in_metrics(lines) == best
    said, sentence = judge_run_metrics(lines, True)
    assert said == word
    if accuracy == [8.0, 5.0] and not best:
        assert FOR_UNSURE in sentence
        assert 'fewer epochs' not in sentence


def test_list_with_few_labels_uses_what_was_trained(drawn, pretrained, tmp_path, capsys):  # noqa: F811
    """Three labels per class, of which one is in val: with one per class, and no val, the trained epoch was used."""
    lines = []
    for folder in sorted((drawn / 'train').iterdir()):
        for number, path in enumerate(sorted(folder.iterdir())):
            lines.append(f'{path}\t{folder.name}' if number < 3 else f'{path}')
    (tmp_path / 'list.txt').write_text('\n'.join(lines))
    given = ('--max_epochs=3', '--heads_epochs=0', '--distill_weight=4', '--distill_size=48', '--learning_rate=0.1')
    assert train(tmp_path, tmp_path / 'list.txt', pretrained, *given) == 0
    assert re.search(r'verdict +(probably |perhaps )?better than the start', capsys.readouterr().out)
    assert find_best_epoch(tmp_path / 'ckpt' / RUN) > 0


@pytest.mark.parametrize('images', [2, 3, 24])
@pytest.mark.parametrize('draws', [1, 5])
def test_error_is_at_least_one_image(draws, images):
    right = torch.ones(draws, images, dtype=torch.float64)
    assert accuracy_and_error(right) == (100.0, pytest.approx(100 / images))
    assert accuracy_and_error(0 * right) == (0.0, pytest.approx(100 / images))
    assert mean_and_error(0 * right) == (0.0, 0.0)  # the same backbone twice
    assert mean_and_error(right)[1] == pytest.approx(100 / images)


def test_columns_that_no_class_can_fill_are_left_out(drawn, pretrained, tmp_path, capsys):  # noqa: F811
    given = [f'--ckpt_name={pretrained}', '--backbone=resnet18', '--image_size=32', '--beside=untrained']
    given += [f'--image_path={drawn}', '--labels=1,24,25', '--num_workers=0', '--amp=off', '--device=cpu']
    assert cli.main(['evaluate', *given, *own_paths(tmp_path)]) == 0
    assert 'no class has 25 labeled images' in capsys.readouterr().out
    (path,) = (tmp_path / 'ckpt').rglob('evaluate_compare*.json')
    columns = read_json(path)['rows'][0]['columns']
    assert {'1 per class', '24 per class', 'all labels'} < {*columns}
    assert '25 per class' not in columns


def test_of_equally_accurate_classifiers_the_surest_is_chosen():
    """Well separated classes: the strongest l2 had the same accuracy, and confidences near chance."""
    torch.manual_seed(0)
    labels = torch.arange(40) % 4
    x = 10 * torch.eye(8)[labels] + torch.randn(40, 8) / 10
    l2, top1 = select_l2(get_config(), x, labels, 4)
    assert top1 == 100
    assert l2 < 1


def test_classes_without_images_are_named(drawn, tmp_path, capsys):
    shutil.copytree(drawn, tmp_path / 'set')
    name = sorted(path.name for path in (drawn / 'val').iterdir())[1]
    shutil.rmtree(tmp_path / 'set/val' / name)
    given = ['check_dataloader', '--preset=demo', f'--image_path={tmp_path}/set', '--num_workers=0']
    assert cli.main([*given, *own_paths(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert re.search(rf'val +16 images, 2 of 3 classes \(none of {name}\)', said)
    assert re.search(r'train +72 images, 3 classes', said)


@pytest.mark.parametrize(('gigabytes', 'batch'), [(4, 32), (8, 32), (16, 64), (1000, 64)])
def test_small_main_memory_halves_the_batch(gigabytes, batch, monkeypatch):
    monkeypatch.setattr(auto_preset, 'main_memory', lambda: gigabytes * 2**30)
    assert auto_preset.choose_batch_size(torch.device('cpu'), 3000) == batch
    assert auto_preset.choose_batch_size(torch.device('mps'), 3000) == 64


def test_unlabeled_val_says_what_helps(drawn, pretrained, tmp_path, capsys):  # noqa: F811
    shutil.copytree(drawn / 'train', tmp_path / 'set/train')
    (tmp_path / 'set/val').mkdir()
    for number, path in enumerate(sorted(drawn.glob('val/*/*'))):
        shutil.copy(path, tmp_path / f'set/val/{number}.png')
    assert train(tmp_path, tmp_path / 'set', pretrained, '--max_epochs=1') == 0
    assert 'val has no classes; without it a part of train would be held out' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('given', 'said'),
    [
        (['train', '--init_from=/no/such.pth'], 'nor a file /no/such.pth'),
        (['evaluate', '--ckpt_name=no/such.pth'], 'such.pth'),
        (['evaluate', '--beside=bogus'], '--beside has untrained, start, imagenet'),
    ],
)
def test_missing_weights_are_called_missing(given, said, drawn, pretrained, tmp_path, capsys):  # noqa: F811
    more = [f'--ckpt_name={pretrained}', '--backbone=resnet18', '--image_size=32'] if '--beside=bogus' in given else []
    assert cli.main([*given, *more, f'--image_path={drawn}', *own_paths(tmp_path)]) == 2
    assert said in one_line(capsys.readouterr().err.splitlines()[-1])


def test_timm_weights_without_a_network_are_those_of_the_preset(drawn):
    args = get_config(image_path=str(drawn), device='cpu', init_from='timm', preset='photos')
    args = auto_preset.choose_preset(args, find_split_sources(args))
    assert (args.backbone, args.init_from) == ('timm/tf_efficientnet_lite0', 'timm')


def test_resume_auto_says_why_a_finished_run_is_not_continued(drawn, tmp_path, capsys):
    given = ['train', *RESNET, '--knn_every=0', '--num_workers=0', f'--image_path={drawn}', '--resume=auto']
    for epochs, runs in ((1, 1), (1, 1), (2, 2)):
        capsys.readouterr()
        assert cli.main([*given, f'--max_epochs={epochs}', *own_paths(tmp_path)]) == 0
        assert len([*(tmp_path / 'ckpt').iterdir()]) == runs
    assert (
        f'{RUN} is finished and has max_epochs=1 (not 2): a new run begins; --resume={RUN} ' in capsys.readouterr().out
    )


def test_advice_for_unreadable_images_works_with_resume_auto(drawn, tmp_path, capsys):
    shutil.copytree(drawn, tmp_path / 'set')
    given = ['train', *RESNET, '--knn_every=0', '--num_workers=0', '--cache_images=off', '--resume=auto']
    given += [f'--image_path={tmp_path}/set', '--max_epochs=2', '--save_every_epochs=1', *own_paths(tmp_path)]
    assert cli.main([*given, '--max_minutes=0.00001']) == 0
    next((tmp_path / 'set/train').glob('*/*')).write_text('no image')
    assert cli.main(given) == 1
    assert cli.main([*given, '--on_unreadable=skip']) == 0
    (run,) = (tmp_path / 'ckpt').iterdir()
    assert checkpoints(run)[-1].name.endswith('_epoch_2')


def test_from_run_evaluates_as_the_run_did(drawn, pretrained, tmp_path):  # noqa: F811
    given = ('--max_epochs=1', '--evaluate_after=True', '--labels=1', '--beside=start')
    assert train(tmp_path, drawn, pretrained, *given) == 0
    assert cli.main(['train', f'--from_run={RUN}', '--model_name=two', '--num_workers=0', *own_paths(tmp_path)]) == 0
    (path,) = (tmp_path / 'ckpt' / RUN.replace('simsiam', 'two')).glob('evaluate_*.json')
    assert read_json(path)['protocol'] == 'compare'


def test_interrupted_evaluation_after_training_says_how_to_repeat_it(drawn, pretrained, tmp_path, monkeypatch, capsys):  # noqa: F811
    import os
    import signal

    monkeypatch.setattr('engine.conclude.run_protocol', lambda *given: os.kill(os.getpid(), signal.SIGTERM))
    assert train(tmp_path, drawn, pretrained, '--max_epochs=1', '--evaluate_after=True', '--labels=1') == 143
    said = capsys.readouterr().err
    assert f'the training is finished and saved; python3 cli.py train --resume={RUN}' in said
