"""Going on from pretrained weights: what is trained when, the start that is kept, the best that is named."""

import json
import math
import shutil

import pytest
import torch
from torch import nn

import cli
from ckpt import get_model_ckpt
from config import INIT_FROM_DEFAULTS, init_from_defaults
from conftest import CODE, own_paths
from engine import set_up
from model.weights import average_weights
from protocols import collapse_verdict, compare, few_labels
from protocols.monitor import Monitor
from runtime.checkpoints.best_epoch import FEW_LABELS, SIMILARITY, find_best_epoch
from runtime.checkpoints.load_state import build_model
from runtime.checkpoints.run_folder import checkpoints
from runtime.errors import UserError
from runtime.files import read_json, read_metrics
from runtime.options import get_config, replace_args
from test_distributed import TORCHRUN, begin

RUN = 'model_name_simsiam_ckpt_0'
RESNET = ('--preset=imagenet', '--backbone=resnet18', '--image_size=32', '--batch_size=24', '--amp=off', '--device=cpu')
AVERAGED = ('--start_share=0.5', '--save_every_epochs=1')
SMALL = (*RESNET, '--proj_layers=2', '--proj_dim=32', '--pred_dim=8', '--knn_every=1', '--num_workers=0')


@pytest.fixture(scope='session')
def pretrained(tmp_path_factory):
    """A file of torchvision's layout: ResNet-18 at random, its BN with statistics of its own."""
    import torchvision

    torch.manual_seed(11)
    network = torchvision.models.resnet18()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    path = tmp_path_factory.mktemp('pretrained') / 'resnet18.pth'
    torch.save(network.state_dict(), path)
    return path


def train(folder, images, pretrained, *options):
    given = [
        'train',
        *SMALL,
        '--distill_size=32',
        f'--init_from={pretrained}',
        f'--image_path={images}',
        *own_paths(folder),
        *options,
    ]
    return cli.main(given)


def state_of(folder, epoch, run=RUN):
    (path,) = (folder / 'ckpt' / run).glob(f'loss_*_epoch_{epoch}')
    return torch.load(path, weights_only=True)


@pytest.fixture(scope='module')
def run(drawn, pretrained, tmp_path_factory):
    folder = tmp_path_factory.mktemp('run')
    assert train(folder, drawn, pretrained, *AVERAGED, '--max_epochs=3', '--heads_epochs=1') == 0
    return folder


def is_statistic(name):
    return name.endswith(('running_mean', 'running_var', 'num_batches_tracked'))


def test_heads_epochs_freeze_backbone_and_bn_statistics(run):
    states = [state_of(run, epoch)['model'] for epoch in range(4)]
    for name, value in states[0].items():
        later = [torch.equal(value, state[name]) for state in states[1:]]
        if name.startswith('backbone.'):
            assert later == ([True] * 3 if is_statistic(name) else [True, False, False]), name
        elif name == 'projector.0.weight':
            assert later == [False] * 3


def test_learning_rates_are_per_part(run):
    lines = read_metrics(run / 'ckpt' / RUN / 'metrics.jsonl')[1:]
    scale = init_from_defaults()['backbone_lr_scale']
    assert lines[0]['schedule/learning_rate_backbone'] == 0
    for line in lines[1:]:
        wanted = scale * line['schedule/learning_rate_projector']
        assert line['schedule/learning_rate_backbone'] == pytest.approx(wanted)


@pytest.mark.parametrize(
    ('options', 'moves'),
    [
        (['--freeze_bn_affine=True'], {'statistic': False, 'affine': False, 'weight': True}),
        (['--freeze_bn=False'], {'statistic': True, 'affine': True, 'weight': True}),
        (['--backbone_lr_scale=0'], {'statistic': False, 'affine': False, 'weight': False}),
        (['--heads_epochs=5'], {'statistic': False, 'affine': False, 'weight': False}),
    ],
)
def test_init_from_defaults_can_be_overridden(options, moves, drawn, pretrained, tmp_path):
    given = ['--max_epochs=1', '--heads_epochs=0', '--knn_every=0', *options]
    assert train(tmp_path, drawn, pretrained, *given) == 0
    first, last = (state_of(tmp_path, epoch)['model'] for epoch in (0, 1))
    moved = {
        name for name, value in first.items() if name.startswith('backbone.') and not torch.equal(value, last[name])
    }
    norms = {name for name in first if name.startswith('backbone.') and 'bn' in name and not is_statistic(name)}
    found = {
        'statistic': any('running' in name for name in moved),
        'affine': bool(moved & norms),
        'weight': any('conv' in name for name in moved),
    }
    assert found == moves


@pytest.mark.parametrize(
    ('given', 'distilled'),
    [
        ({}, True),
        ({'stem': 'cifar'}, False),
        ({'distill_weight': 0.0}, False),
        ({'stem': 'cifar', 'distill_weight': 2.0}, True),
    ],
)
def test_without_distillation_runs_are_averaged_and_have_moco(given, distilled, pretrained):
    args = get_config(preset='imagenet', backbone='resnet18', image_size=32, init_from=str(pretrained), **given)
    if given.get('stem'):
        weights = build_model(args).backbone.state_dict()
        torch.save(weights, pretrained.parent / 'cifar.pth')
        args = replace_args(args, init_from=str(pretrained.parent / 'cifar.pth'))
    args, _, _ = get_model_ckpt(args)
    wanted = (0.0, 'mild') if distilled else (0.5, 'moco')
    assert (args.start_share, args.augmentation) == wanted
    assert (args.distill_weight > 0) is distilled


@pytest.mark.parametrize(('steps', 'epochs'), [(1, 80), (7, 12), (41, 2), (48, 2), (80, 1), (5000, 1)])
def test_heads_epochs_auto_is_80_steps(steps, epochs, capsys):
    args = set_up.set_heads_epochs(get_config(heads_epochs=-1, max_epochs=epochs + 1), steps)
    assert args.heads_epochs == epochs
    assert f'for {epochs} epochs of {steps} steps' in capsys.readouterr().out
    assert set_up.set_heads_epochs(get_config(heads_epochs=3), steps).heads_epochs == 3


def test_run_shorter_than_heads_epochs_warns_and_resumes(drawn, pretrained, tmp_path, capsys):
    for _ in range(2):
        assert train(tmp_path, drawn, pretrained, '--max_epochs=1', '--heads_epochs=-1', '--resume=auto') == 0
        said = capsys.readouterr()
        assert '--max_epochs=1 is not more than --heads_epochs=27' in said.err
    assert 'has all of its 1 epochs' in said.out
    assert read_json(tmp_path / 'ckpt' / RUN / 'run.json')['args']['heads_epochs'] == 27  # of 3 steps


def test_resume_across_heads_epochs_equals_unbroken_run(run, drawn, pretrained, tmp_path):
    for minutes in ('0.0001', '0'):
        given = [
            *AVERAGED,
            '--max_epochs=3',
            '--heads_epochs=1',
            '--resume=auto',
            f'--max_minutes={minutes}',
        ]
        assert train(tmp_path, drawn, pretrained, *given) == 0
    whole, gone_on = state_of(run, 3), state_of(tmp_path, 3)
    assert all(torch.equal(value, gone_on['model'][name]) for name, value in whole['model'].items())
    assert all(torch.equal(value, gone_on['start'][name]) for name, value in whole['start'].items())
    keys = [[line['epoch'] for line in read_metrics(f / 'ckpt' / RUN / 'metrics.jsonl')] for f in (run, tmp_path)]
    assert keys[0] == keys[1] == [0, 1, 2, 3]


def test_evaluate_uses_average_with_start(run):
    (path,) = (run / 'ckpt' / RUN).glob('loss_*_epoch_3')
    content = torch.load(path, weights_only=True)
    args, model, _ = get_model_ckpt(get_config(ckpt_name=str(path), device='cpu'))
    trained = {n.removeprefix('backbone.'): v for n, v in content['model'].items() if n.startswith('backbone.')}
    assert args.start_share == 0.5
    wanted = average_weights(content['start'], trained, args.start_share)
    assert all(torch.equal(value, wanted[name]) for name, value in model.backbone.state_dict().items())
    _, raw, _ = get_model_ckpt(get_config(ckpt_name=str(path), device='cpu'), training=True)
    assert all(torch.equal(value, trained[name]) for name, value in raw.backbone.state_dict().items())
    _, other, _ = get_model_ckpt(get_config(ckpt_name=str(path), device='cpu', start_share=1.0))
    assert all(torch.equal(value, content['start'][name]) for name, value in other.backbone.state_dict().items())


def metrics_lines(values, errors=0.5):
    """metrics.jsonl of a run whose accuracy with few labels had these gains, and its rank falls."""
    lines = [
        {'epoch': 0, FEW_LABELS.value: 50.0, 'pretraining/rank': 10.0, 'pretraining/area': 0.7, 'pretraining/std': 1.0}
    ]
    for epoch, gain in enumerate(values, 1):
        line = {
            **lines[0],
            'epoch': epoch,
            FEW_LABELS.value: 50.0 + gain,
            FEW_LABELS.gain: gain,
            FEW_LABELS.error: errors,
        }
        lines.append({**line, 'pretraining/rank': 10.0 / (epoch + 1)})
    return lines


# Gains after each epoch; the best epoch; what the verdict says.
ENDS = {
    'rising': ([1.0, 2.0, 3.0], 3, 'better than the start'),
    'rising and falling': ([1.0, 4.0, -3.0], 2, 'better than the start'),
    'a little better': ([0.2, 0.6, 0.4], 2, 'perhaps better than the start'),
    'within its error': ([0.1, 0.4, 0.2], 0, 'no better than the start'),
    'nothing': ([0.0, 0.0, 0.0], 0, 'no better than the start'),
    'worse': ([-1.0, -5.0, -13.0], 0, 'worse than the start'),
}


@pytest.mark.parametrize('end', ENDS)
def test_best_checkpoint_is_never_below_start(end, run, tmp_path, capsys):
    """What infer, select, report and export take, and the verdict; the loss and the rank look good in all of them."""
    gains, best, word = ENDS[end]
    shutil.copytree(run / 'ckpt', tmp_path / 'ckpt')
    folder = tmp_path / 'ckpt' / RUN
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in metrics_lines(gains)))
    args, _, checkpoint = get_model_ckpt(get_config(ckpt_path=str(tmp_path / 'ckpt'), ckpt_name=RUN, device='cpu'))
    assert checkpoint['epoch'] == best
    said = f'epoch {best} is its best on val' if best else 'epoch 0, the start, is used: no epoch was better on val'
    assert (said in capsys.readouterr().out) == (best != 3)
    found = collapse_verdict.judge_run(folder, 3, args)
    assert found[0] == word
    assert ('Keep the start' in found[1]) == (best == 0)
    _, _, checkpoint = get_model_ckpt(get_config(ckpt_path=str(tmp_path / 'ckpt'), ckpt_name=RUN), training=True)
    assert checkpoint['epoch'] == 3
    name = next(folder.glob('loss_*_epoch_1')).name
    _, _, named = get_model_ckpt(get_config(ckpt_path=str(tmp_path / 'ckpt'), ckpt_name=f'{RUN}/{name}'))
    assert named['epoch'] == 1


@pytest.mark.parametrize('end', ENDS)
def test_verdict_is_of_the_best_epoch_only(end, run, tmp_path):
    """A run is judged by its best epoch: reports and model cards of its other checkpoints have no verdict."""
    gains, best, word = ENDS[end]
    shutil.copytree(run / 'ckpt', tmp_path / 'ckpt')
    folder = tmp_path / 'ckpt' / RUN
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in metrics_lines(gains)))
    for path in checkpoints(folder):
        args, _, checkpoint = get_model_ckpt(get_config(ckpt_name=str(path), device='cpu'))
        found = collapse_verdict.judge_checkpoint(checkpoint, args)
        assert (found and found[0]) == (word if checkpoint['epoch'] == best else None)
    args, _, checkpoint = get_model_ckpt(get_config(ckpt_name=str(folder), start_share=0.9, device='cpu'))
    assert collapse_verdict.judge_checkpoint(checkpoint, args) is None  # of an average that was not measured


def test_best_checkpoint_without_labels_is_start(run, tmp_path):
    """The rank falls in runs that become better and in runs that become worse."""
    shutil.copytree(run / 'ckpt', tmp_path / 'ckpt')
    folder = tmp_path / 'ckpt' / RUN
    complete = metrics_lines([1.0, 2.0, 3.0])
    lines = [{name: value for name, value in line.items() if 'few' not in name} for line in complete]
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    args, _, checkpoint = get_model_ckpt(get_config(ckpt_path=str(tmp_path / 'ckpt'), ckpt_name=RUN, device='cpu'))
    assert checkpoint['epoch'] == 0
    assert collapse_verdict.judge_run(folder, 3, args)[0] == 'not known to be better than the start'


@pytest.mark.parametrize(
    ('gains', 'best', 'word'),
    [
        ([0.1, 0.3, 0.2], 2, 'probably better than the start'),
        ([0.0, 0.0, 0.1], 3, 'probably better than the start'),
        ([0.0, -0.1, -0.2], 0, 'not known to be better than the start'),
        ([0.0, 0.01, 0.019], 0, 'not known to be better than the start'),  # not two standard errors
    ],
)
def test_best_checkpoint_without_labels_is_most_similar_to_targets(gains, best, word, run, tmp_path, capsys):
    shutil.copytree(run / 'ckpt', tmp_path / 'ckpt')
    folder = tmp_path / 'ckpt' / RUN
    lines = [
        {name: value for name, value in line.items() if 'few' not in name}
        | {SIMILARITY.value: 0.5 + gain, SIMILARITY.gain: gain, SIMILARITY.error: 0.01}
        for line, gain in zip(metrics_lines([1.0, 2.0, 3.0]), [0.0, *gains], strict=True)
    ]
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    args, _, checkpoint = get_model_ckpt(get_config(ckpt_path=str(tmp_path / 'ckpt'), ckpt_name=RUN, device='cpu'))
    assert checkpoint['epoch'] == best
    found = collapse_verdict.judge_run(folder, 3, args)
    assert found[0] == word
    shown = best or 3
    assert f'{0.5 + gains[shown - 1]:.3f} after epoch {shown}, {gains[shown - 1]:+.3f} ± 0.010' in found[1]
    assert ('by similarity to the targets' in capsys.readouterr().out) == (best in (1, 2))


@pytest.mark.parametrize(('gain', 'error', 'unchanged'), [(0.0, 0.0, True), (0.0, 11.0, False), (-0.5, 1.0, False)])
def test_verdict_says_that_val_did_not_change_only_if_so(gain, error, unchanged):
    _, sentence = collapse_verdict.judge_run_metrics(metrics_lines([gain, gain], error), True)
    assert ('no image of val is classified otherwise' in sentence) == unchanged
    assert ('try fewer epochs' in sentence) != unchanged


def test_collapsed_run_from_weights_has_collapsed_verdict():
    """If no epoch was better; else the best one counts, which is used and exported, and the collapse is said."""
    lines = metrics_lines([-1.0, -30.0])
    lines[-1]['pretraining/std'] = 0.1
    assert collapse_verdict.judge_run_metrics(lines, True)[0] == 'collapsed'
    lines = metrics_lines([10.0, -30.0])
    lines[-1]['pretraining/std'] = 0.1
    word, sentence = collapse_verdict.judge_run_metrics(lines, True)
    assert word == 'better than the start'
    assert 'After epoch 2 z is collapsed' in sentence


def set_accuracies(monkeypatch, *shares):
    """Let the measured epochs classify these shares of val correctly, one after the other."""
    left = iter(shares)

    def watch_labels(args, backbone, bank, val):
        right = torch.zeros(1, len(val.dataset), dtype=torch.float64)
        right[:, : round(next(left) * len(val.dataset))] = 1.0
        return 50.0, right

    monkeypatch.setattr('protocols.monitor.measure_labels', watch_labels)


def test_keep_checkpoints_keeps_start_and_best(drawn, pretrained, tmp_path, monkeypatch):
    """Epoch 1 is made the best; of the others --keep_checkpoints and --save_every_epochs decide."""
    set_accuracies(monkeypatch, 0.5, 0.9, 0.6, 0.6, 0.6)
    assert train(tmp_path, drawn, pretrained, '--max_epochs=4', '--keep_checkpoints=1', '--save_every_epochs=1') == 0
    found = [path.name.partition('_epoch_')[2] for path in checkpoints(tmp_path / 'ckpt' / RUN)]
    assert found == ['0', '1', '4']
    assert find_best_epoch(tmp_path / 'ckpt' / RUN) == 1


def test_run_from_random_weights_reports_last_epoch(drawn, tmp_path):
    given = ['train', *SMALL, '--max_epochs=2', '--save_every_epochs=1', f'--image_path={drawn}', *own_paths(tmp_path)]
    assert cli.main(given) == 0
    folder = tmp_path / 'ckpt' / RUN
    assert find_best_epoch(folder) is None
    assert not [path for path in checkpoints(folder) if path.name.endswith('_epoch_0')]
    lines = read_metrics(folder / 'metrics.jsonl')
    assert all(FEW_LABELS.value in line and FEW_LABELS.gain not in line for line in lines)


def test_init_from_own_run_keeps_options(run, drawn, tmp_path):
    """Our own checkpoints go on as their options say; those of others get init_from_defaults, said in a line."""
    given = ['train', *SMALL, '--max_epochs=1', f'--init_from={run}/ckpt/{RUN}', f'--image_path={drawn}']
    assert cli.main([*given, *own_paths(tmp_path)]) == 0
    args = read_json(tmp_path / 'ckpt' / RUN / 'run.json')['args']
    assert [args[name] for name in INIT_FROM_DEFAULTS] == [
        get_config(preset='imagenet').__dict__[name] for name in INIT_FROM_DEFAULTS
    ]
    theirs = read_json(run / 'ckpt' / RUN / 'run.json')['args']
    assert {name: theirs[name] for name in INIT_FROM_DEFAULTS} == {
        **init_from_defaults(),
        'heads_epochs': 1,
        'start_share': 0.5,
    }


def test_compare_rows_are_paired_with_checkpoint(run, drawn, tmp_path, capsys):
    """The JSON, the table, the same draws in each row; a row of the same weights gains nothing."""
    name = next((run / 'ckpt' / RUN).glob('loss_*_epoch_0'))
    shutil.copytree(run, tmp_path / 'own')
    given = ['evaluate', f'--ckpt_name={RUN}/{name.name}', f'--beside=untrained,start,{name}', '--labels=1,3']
    assert cli.main([*given, '--draws=3', '--num_workers=0', *own_paths(tmp_path / 'own')]) == 0
    said = capsys.readouterr().out
    result = read_json(next((tmp_path / 'own/ckpt' / RUN).glob('evaluate_compare_*.json')))
    first, untrained, start, same = result['rows']
    assert [*first['columns']] == ['kNN 24', 'all labels', '3 per class', '1 per class']
    for row in (start, same):
        for cell in row['columns'].values():
            assert (cell['gain'], cell['gain_error']) == (0.0, 0.0)
    assert any(cell['gain'] != 0 for cell in untrained['columns'].values())
    for cell in first['columns'].values():
        assert 0 <= cell['error'] < 50
        assert 'gain' not in cell
        assert f'{cell["top1"]:.1f} ± {cell["error"]:.1f}' in said
    assert [cell['draws'] for cell in first['columns'].values()] == [1, 1, 3, 3]


def test_mean_and_error_equals_formula():
    """By hand: the mean of n values has the standard deviation / sqrt(n); a gain of all images has one image's."""
    values = torch.tensor([[1.0, 0.0, 1.0, 1.0]], dtype=torch.float64)
    assert few_labels.mean_and_error(values)[1] == pytest.approx(100 * 0.5 / 2)
    assert few_labels.mean_and_error(values - (values - 0.25))[1] == pytest.approx(100 / 4)
    assert math.isnan(few_labels.mean_and_error(values[:, :1])[1])


@pytest.mark.parametrize(('of_images', 'of_draws'), [(0.4, 0.0), (0.4, 0.05), (0.1, 0.1), (0.0, 0.1)])
def test_error_is_that_of_new_images_and_new_draws(of_images, of_draws):
    """Accuracies that images and draws of labels shift at random: the mean of new ones varies by the error."""
    generator, means, errors = torch.Generator().manual_seed(0), [], []
    normal = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    for _ in range(400):
        right = 0.5 + of_images * normal(1, 300) + of_draws * normal(5, 1) + 0.1 * normal(5, 300)
        mean, error = few_labels.mean_and_error(right)
        means.append(mean)
        errors.append(error**2)
    assert torch.tensor(errors).mean().sqrt().item() == pytest.approx(torch.tensor(means).std().item(), rel=0.12)


def test_draw_rows_is_balanced_and_differs(drawn):
    labels = torch.tensor([0] * 30 + [1] * 12 + [2] * 2)
    draws = few_labels.draw_label_subsets(labels, 10, 5)
    assert len(draws) == 5
    for rows in draws:
        assert torch.bincount(labels[rows]).tolist() == [10, 10, 2]
        assert len(rows.unique()) == 22
    assert len({tuple(rows.tolist()) for rows in draws}) == 5
    assert torch.equal(draws[3], few_labels.draw_label_subset(labels, 10, 3))
    many = torch.arange(1000).repeat(30)
    assert len(few_labels.draw_label_subsets(many, 10, 5)) == 2  # MOST_ROWS


@pytest.mark.parametrize('text', ['', '0', 'ten', '1,,5', '-1,5', '1.5'])
def test_invalid_labels_option_exits_2(text):
    with pytest.raises(UserError, match='--labels has numbers of labels per class'):
        compare.parse_label_counts(text)


def test_few_labels_with_two_ranks_equal_one(drawn, pretrained, tmp_path):
    """Few labels and kNN at the start, and every row of the table at the end."""
    given = [*SMALL, f'--init_from={pretrained}', f'--image_path={drawn}', '--max_epochs=1', '--evaluate_after=True']
    given += ['--labels=1,3', '--heads_epochs=1', '--beside=start']
    found = {}
    for name, start in (('one', []), ('two', TORCHRUN)):
        done = begin(*start, CODE / 'cli.py', 'train', *given, *own_paths(tmp_path / name)).done()
        assert done.returncode == 0, done.stderr
        run = tmp_path / name / 'ckpt' / RUN
        found[name] = (
            read_metrics(run / 'metrics.jsonl')[0],
            read_json(next(run.glob('evaluate_compare_*.json')))['rows'],
        )
    (one, rows), (two, others) = found['one'], found['two']
    for key in (FEW_LABELS.value, 'pretraining/knn_top1'):
        assert two[key] == pytest.approx(one[key], abs=0.5)
    for row, other in zip(rows, others, strict=True):  # the backbone waits for the heads: all rows are the start's
        for column, cell in row['columns'].items():
            assert other['columns'][column]['top1'] == pytest.approx(cell['top1'], abs=5)


def test_monitor_few_labels_equal_compare(drawn, tmp_path):
    """The monitor's streaming pass over the bank, and compare with all features at once."""
    from dataloader.load_dataset import eval_loader, load_splits

    args = get_config(preset='demo', image_path=str(drawn), image_size=16, device='cpu', knn_k=5)
    splits, backbone = load_splits(args), build_model(args).backbone
    bank, val = (eval_loader(args, splits[name]) for name in ('train', 'val'))
    top1, right = few_labels.measure_labels(args, backbone, bank, val)
    found = compare.measure_backbone(
        args, backbone, splits['train'], splits['val'], [few_labels.WATCHED], few_labels.DRAWS
    )
    assert top1 == pytest.approx(100 * found['kNN 5']['right'].mean().item())
    assert (right - found[f'{few_labels.WATCHED} per class']['right']).mean(0).abs().max() <= 0.2 + 1e-9
    assert right.mean().item() == pytest.approx(
        found[f'{few_labels.WATCHED} per class']['right'].mean().item(), abs=0.02
    )


def test_compare_uses_labeled_test_instead_of_val(run, drawn, tmp_path, capsys):
    shutil.copytree(drawn, tmp_path / 'set')
    shutil.copytree(drawn / 'val', tmp_path / 'set/test')
    shutil.rmtree(next((tmp_path / 'set/test').iterdir()))
    shutil.copytree(run, tmp_path / 'own')
    given = ['evaluate', f'--ckpt_name={RUN}', '--beside=untrained', '--labels=1', f'--image_path={tmp_path}/set']
    assert cli.main([*given, '--num_workers=0', *own_paths(tmp_path / 'own')]) == 0
    result = read_json(next((tmp_path / 'own/ckpt' / RUN).glob('evaluate_compare_*.json')))
    assert (result['judged_on'], result['num_val']) == ('test', 16)
    assert '72 training and 16 test images' in capsys.readouterr().out


def test_run_stopped_before_metrics_of_start_measures_them_when_resumed(drawn, pretrained, tmp_path, monkeypatch):
    """It is saved, then measured: a signal between them must not make the start the best of all."""

    def stop(*_):
        raise KeyboardInterrupt

    given = ['--max_epochs=2', '--heads_epochs=1', '--save_every_epochs=1', '--resume=auto']
    with monkeypatch.context() as patched:
        patched.setattr(Monitor, 'compute_metrics', stop)
        assert train(tmp_path, drawn, pretrained, *given) != 0
    assert [path.name for path in checkpoints(tmp_path / 'ckpt' / RUN)] == ['loss_0.0000_epoch_0']
    assert train(tmp_path, drawn, pretrained, *given) == 0
    lines = read_metrics(tmp_path / 'ckpt' / RUN / 'metrics.jsonl')
    assert [line['epoch'] for line in lines] == [0, 1, 2]
    assert all(FEW_LABELS.value in line for line in lines)
    assert all(FEW_LABELS.gain in line for line in lines[1:])


def test_start_share_applies_to_evaluated_run_and_not_to_run_that_starts_from_it(run, drawn, tmp_path, capsys):
    (path,) = (run / 'ckpt' / RUN).glob('loss_*_epoch_3')
    for share in ('0', '1'):
        given = [f'--ckpt_name={path}', f'--output={tmp_path}/{share}.pth', f'--start_share={share}']
        assert cli.main(['export', *given]) == 0
    assert 'no effect' not in capsys.readouterr().err
    content, exported = torch.load(path, weights_only=True), torch.load(tmp_path / '1.pth', weights_only=True)
    assert all(torch.equal(value, exported[name]) for name, value in content['start'].items())
    exported = torch.load(tmp_path / '0.pth', weights_only=True)
    assert all(torch.equal(value, content['model'][f'backbone.{name}']) for name, value in exported.items())
    _, new, _ = get_model_ckpt(get_config(init_from=str(path), image_path=str(drawn), start_share=1.0, device='cpu'))
    _, old, _ = get_model_ckpt(get_config(ckpt_name=str(path), device='cpu'))
    state = old.backbone.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in new.backbone.state_dict().items())


@pytest.mark.parametrize('beside', ['untrained,', ',', 'untrained,,start', 'start,start', 'missing.pth,untrained'])
def test_invalid_beside_fails_before_the_first_row(beside, run, drawn, tmp_path, capsys):
    given = [f'--ckpt_name={RUN}', f'--image_path={drawn}', f'--beside={beside}', '--device=cpu']
    assert cli.main(['evaluate', *given, *own_paths(run, 'ckpt', 'log', 'cache')]) == 2
    said = capsys.readouterr()
    assert '--beside' in said.err
    assert 'features' not in said.out


def test_beside_reads_file_of_own_network_and_logs_missing_labels(run, drawn, pretrained, capsys):
    given = [f'--ckpt_name={RUN}', f'--image_path={drawn}', f'--beside={pretrained}', '--labels=99,1', '--device=cpu']
    assert cli.main(['evaluate', *given, '--draws=1', *own_paths(run, 'ckpt', 'log', 'cache')]) == 0
    said = capsys.readouterr().out
    assert 'no class has 99 labeled images' in said
    assert 'fewer than 1 labeled' not in said
    assert f'{pretrained}' in said


def test_run_cannot_be_resumed_with_other_pixels(run, drawn, pretrained, capsys):
    for option in ('--mean=0.1', '--std=0.3', '--white_level=2000'):
        given = ['train', f'--resume={RUN}', '--max_epochs=4', option, *own_paths(run)]
        assert cli.main(given) == 2
        assert f'{option} contradicts the checkpoint' in capsys.readouterr().err


def test_resumed_earlier_checkpoint_keeps_the_best_before_it(drawn, pretrained, tmp_path, monkeypatch):
    """Epoch 1 is the best; a new run goes on from epoch 2 and has it."""
    set_accuracies(monkeypatch, 0.5, 0.9, 0.6, 0.6, 0.7)
    given = ['--max_epochs=3', '--save_every_epochs=1']
    assert train(tmp_path, drawn, pretrained, *given) == 0
    (second,) = (tmp_path / 'ckpt' / RUN).glob('loss_*_epoch_2')
    resumed = ['train', f'--resume={RUN}/{second.name}', '--max_epochs=3', '--num_workers=0', *own_paths(tmp_path)]
    assert cli.main(resumed) == 0
    (new,) = (path for path in (tmp_path / 'ckpt').iterdir() if path.name != RUN)
    assert [path.name.partition('_epoch_')[2] for path in checkpoints(new)] == ['0', '1', '2', '3']
    assert find_best_epoch(new) == 1


def test_label_free_names_no_epoch_of_a_run_from_weights(run, drawn, tmp_path, capsys):
    shutil.copytree(run, tmp_path / 'own')
    given = [f'--ckpt_name={RUN}', '--protocol=label_free', '--num_workers=0', *own_paths(tmp_path / 'own')]
    assert cli.main(['evaluate', *given]) == 0
    said = capsys.readouterr().out
    assert 'no epoch is named the best' in said
    assert 'the best by rank' not in said
    assert 'untrained' not in ' '.join(line for line in said.splitlines() if line.startswith('verdict'))


def test_compare_rows_share_given_options(run, drawn, tmp_path, monkeypatch, capsys):
    """--knn_temperature and --crop_ratio reached the checkpoint's row only."""
    shutil.copytree(run, tmp_path / 'own')
    seen = []
    measure = compare.measure_backbone
    monkeypatch.setattr(compare, 'measure_backbone', lambda args, *more: seen.append(args) or measure(args, *more))
    given = [f'--ckpt_name={RUN}', '--beside=untrained,start', '--labels=1', '--num_workers=0']
    given += ['--knn_temperature=0.5', '--crop_ratio=1.0', '--interpolation=bicubic', *own_paths(tmp_path / 'own')]
    assert cli.main(['evaluate', *given]) == 0
    assert len(seen) == 3
    for name, value in {'knn_temperature': 0.5, 'crop_ratio': 1.0, 'interpolation': 'bicubic'}.items():
        assert {getattr(args, name) for args in seen} == {value}


def test_reduced_draws_are_logged(drawn, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(few_labels, 'MAX_ROWS', 8)
    given = [f'--image_path={drawn}', '--beside=untrained', '--labels=1', '--draws=5', '--num_workers=0']
    torch.save(build_model(get_config(backbone='resnet18')).backbone.state_dict(), tmp_path / 'x.pth')
    given += [f'--ckpt_name={tmp_path}/x.pth', '--image_size=32', '--device=cpu', '--amp=off', *own_paths(tmp_path)]
    assert cli.main(['evaluate', *given]) == 0
    assert '1 per class: 2 of 5 draws' in capsys.readouterr().out


SELECTED = 'they also selected the epoch'


@pytest.mark.parametrize('unlabeled', [0, 1])
@pytest.mark.parametrize(
    'more', [('--beside=start', '--labels=1'), ('--protocol=knn',), ('--protocol=linear', '--probe_optimizer=lbfgs')]
)
def test_val_that_selected_the_epoch_is_said(more, unlabeled, drawn, pretrained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('protocols.results.find_best_epoch', lambda folder: 1)
    monkeypatch.setattr('protocols.results.is_judged_by_labels', lambda lines: True)
    for split in ('train', 'val'):
        lines = [f'{path}\t{path.parent.name}' for path in sorted((drawn / split).rglob('*.png'))]
        lines[0] = lines[0].partition('\t')[0] if unlabeled else lines[0]
        (tmp_path / 'set').mkdir(exist_ok=True)
        (tmp_path / f'set/{split}.txt').write_text('\n'.join(lines))
    assert train(tmp_path, tmp_path / 'set', pretrained, '--max_epochs=1', '--heads_epochs=0') == 0
    (last,) = (tmp_path / 'ckpt' / RUN).glob('loss_*_epoch_1')
    assert cli.main(['evaluate', f'--ckpt_name={last}', *more, '--num_workers=0', *own_paths(tmp_path)]) == 0
    assert f'{24 - unlabeled} validation images ({SELECTED}' in capsys.readouterr().out
    (path,) = (tmp_path / 'ckpt' / RUN).glob('evaluate_*.json')
    assert read_json(path)['selected_on_val']


def test_val_of_other_images_did_not_select_the_epoch(drawn, pretrained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('protocols.results.find_best_epoch', lambda folder: 1)
    monkeypatch.setattr('protocols.results.is_judged_by_labels', lambda lines: True)
    assert train(tmp_path, drawn, pretrained, '--max_epochs=1', '--heads_epochs=0') == 0
    (last,) = (tmp_path / 'ckpt' / RUN).glob('loss_*_epoch_1')
    shutil.copytree(drawn, tmp_path / 'other')
    next((tmp_path / 'other/val').glob('*/*')).unlink()
    for images, selected in ((drawn, True), (tmp_path / 'other', False)):
        capsys.readouterr()
        given = [f'--ckpt_name={last}', '--beside=start', '--labels=1', '--num_workers=0', *own_paths(tmp_path)]
        assert cli.main(['evaluate', *given, f'--image_path={images}']) == 0
        assert (SELECTED in capsys.readouterr().out) == selected


@pytest.mark.parametrize('own', ['resnet18', 'mobilenet_v3_small'])
@pytest.mark.parametrize('other', ['resnet18', 'mobilenet_v3_small', 'densenet121'])
def test_beside_reads_files_of_the_same_network_and_of_resnets(own, other, drawn, tmp_path, capsys):
    import torchvision

    for name in {own, other}:
        torch.save(torchvision.models.get_model(name).state_dict(), tmp_path / f'{name}.pth')
    given = [f'--ckpt_name={tmp_path}/{own}.pth', f'--backbone={own}', f'--beside={tmp_path}/{other}.pth']
    given += [f'--image_path={drawn}', '--labels=1', '--draws=1', '--image_size=32', '--num_workers=0', '--device=cpu']
    read = other in (own, 'resnet18')
    assert cli.main(['evaluate', *given, *own_paths(tmp_path)]) == (0 if read else 2)
    said = capsys.readouterr()
    assert read or f'--ckpt_name={tmp_path}/{other}.pth --backbone=<its network>' in said.err


def test_ablation_from_weights_evaluates_last_checkpoints(drawn, pretrained, tmp_path, monkeypatch):
    """Not the start, which is the best one of variants that become worse: of all it has the same accuracy. Called
    again, nothing is trained or evaluated."""
    given = ['ablate', *SMALL, f'--init_from={pretrained}', f'--image_path={drawn}', *own_paths(tmp_path)]
    given += ['--ablation=similarity', '--knn_every=1', '--heads_epochs=0', '--learning_rate=30', '--max_epochs=2']
    given += ['--probe_optimizer=lbfgs']
    assert cli.main(given) == 0
    runs = sorted((tmp_path / 'ckpt').iterdir())
    assert len(runs) == 2
    rows = json.loads((tmp_path / 'log' / 'similarity.json').read_text())
    for run, row in zip(runs, rows, strict=True):
        (result,) = [read_json(path) for path in run.glob('evaluate_linear*.json')]
        assert result['epoch'] == 2
        assert result['settings']['start_share'] == 0
        assert result['top1'] == row['linear']
        measured = read_metrics(run / 'metrics.jsonl')
        assert row['knn'] == pytest.approx(measured[-1]['pretraining/knn_top1'])
        assert row['knn'] < measured[0]['pretraining/knn_top1']
    monkeypatch.setattr('commands.ablate.train', lambda args: pytest.fail('trained again'))
    assert cli.main(given) == 0


def test_partly_labeled_val_is_evaluated_on_its_labels(drawn, pretrained, tmp_path, capsys):
    """Val stands in for a missing test: it was taken for one, and the run failed after its last epoch."""
    lines = {split: [] for split in ('train', 'val')}
    for split, listed in lines.items():
        for path in sorted((drawn / split).rglob('*.png')):
            listed.append(f'{path}\t{path.parent.name}')
    lines['val'][3] = lines['val'][3].partition('\t')[0]
    for split, listed in lines.items():
        (tmp_path / 'set').mkdir(exist_ok=True)
        (tmp_path / f'set/{split}.txt').write_text('\n'.join(listed))
    given = ['--max_epochs=1', '--evaluate_after=True', '--heads_epochs=0', '--beside=start', '--labels=1']
    assert train(tmp_path, tmp_path / 'set', pretrained, *given) == 0
    assert '1 of the 24 images of val have no class, and are left out' in capsys.readouterr().out
    (path,) = (tmp_path / 'ckpt' / RUN).glob('evaluate_compare_*.json')
    assert read_json(path)['num_val'] == 23


@pytest.mark.parametrize('share', [0.001, 0.4, 1.0])
def test_trained_share_trains_the_last_layers(share, drawn, pretrained, tmp_path):
    given = ['--max_epochs=1', '--heads_epochs=0', '--knn_every=0', f'--trained_share={share}']
    assert train(tmp_path, drawn, pretrained, *given) == 0
    first, last = (state_of(tmp_path, epoch)['model'] for epoch in (0, 1))
    names = [
        f'backbone.{name}'
        for name, _ in build_model(get_config(preset='imagenet', backbone='resnet18')).backbone.named_parameters()
    ]
    moved = [not torch.equal(first[name], last[name]) for name in names]
    assert moved == sorted(moved)  # the first stay, the last move
    sizes = [first[name].numel() * is_moved for name, is_moved in zip(names, moved, strict=True)]
    total = sum(first[name].numel() for name in names)
    assert sum(sizes) >= share * total - 1
    assert sum(sizes) - next(size for size in sizes if size) < share * total
