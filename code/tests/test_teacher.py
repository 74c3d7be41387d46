"""Distillation from the initial weights: the targets, the loss, the images they belong to, and runs with it."""

import copy
import math
import shutil
import signal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity, normalize

import cli
import train as train_module
from ckpt import get_model_ckpt
from commands.ablate import plan_variants
from conftest import own_paths
from dataloader.load_dataset import eval_loader, get_iterator, select
from engine import teacher as teacher_module
from engine.set_up import make_train_state
from engine.teacher import TARGETS_FILE, Teacher, make_targets, set_distill_size
from loss.negative_cosine import simsiam_loss
from protocols.features import extract_features
from runtime import precision, signals
from runtime.checkpoints.best_epoch import SIMILARITY, find_best_epoch
from runtime.checkpoints.load_state import build_model
from runtime.checkpoints.run_folder import checkpoints
from runtime.errors import UserError
from runtime.files import read_json, read_metrics
from runtime.options import get_config, replace_args
from test_distributed import TORCHRUN
from test_distributed import run as run_process
from test_training_from_weights import RUN, pretrained, state_of, train  # noqa: F401
from train import train_step

DISTILLED = ('--heads_epochs=0', '--distill_weight=4', '--distill_size=48')


@pytest.fixture
def setup(drawn, pretrained, tmp_path):  # noqa: F811
    """(args, model, start, iterators) of a run from weights, whose backbone has moved away from its start."""
    options = {'preset': 'imagenet', 'backbone': 'resnet18', 'image_size': 32, 'batch_size': 24, 'proj_dim': 16}
    options |= {'init_from': str(pretrained), 'image_path': str(drawn), 'amp': 'off', 'num_workers': 0}
    args = get_config(**options, cache_path=str(tmp_path), distill_weight=4.0, distill_size=64)
    args, model, _ = get_model_ckpt(args)
    start = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    with torch.no_grad():
        for weight in model.backbone.parameters():
            weight.add_(0.01)
    return args, model, start, get_iterator(args)


@pytest.mark.parametrize('neighbors', [0, 4, 100])
def test_targets_are_standardized_features_of_start(neighbors, setup, tmp_path):
    """Of center crops at distill_size, in the order of the training set, from the weights of the start."""
    args, model, start, iterators = setup
    args = replace_args(args, distill_neighbors=neighbors)
    moved = copy.deepcopy(model.backbone.state_dict())
    dataset = iterators['train'].dataset
    teacher = Teacher(args, model.backbone, start, dataset, tmp_path)
    assert all(torch.equal(value, moved[name]) for name, value in model.backbone.state_dict().items())
    assert dataset.views == 2
    assert dataset.args.image_size == 32

    model.backbone.load_state_dict(start)
    large = replace_args(args, image_size=64)
    wanted, _ = extract_features(large, model.backbone, eval_loader(large, dataset), '')
    mean, std = wanted.mean(0), wanted.std(0).clamp(min=1e-3)
    wanted = average_neighbors_slowly(normalize((wanted - mean) / std), neighbors)
    torch.testing.assert_close(teacher.targets(torch.arange(72)), wanted, atol=0.001, rtol=0.01)
    torch.testing.assert_close(teacher.targets(torch.tensor([70, 3])), wanted[[70, 3]], atol=0.001, rtol=0.01)
    small, _ = extract_features(args, model.backbone, eval_loader(args, dataset), '')
    assert cosine_similarity((small - mean) / std, wanted).mean() < 0.99  # of another size


def average_neighbors_slowly(x, k):
    """Half of each row and half of the mean of its k nearest others, of weights exp(cosine / 0.1). x: unit length."""
    averaged = []
    for i, row in enumerate(x):
        others = sorted((j for j in range(len(x)) if j != i), key=lambda j: -(row @ x[j]).item())[:k]
        weights = [math.exp((row @ x[j]).item() / 0.1) for j in others]
        mean = sum(weight * x[j] for weight, j in zip(weights, others, strict=True)) / sum(weights) if others else row
        averaged.append((row + mean) / 2)
    return torch.stack(averaged)


@given(st.integers(1, 9), st.integers(0, 12), st.booleans())
@settings(max_examples=40, deadline=None)
def test_targets_of_any_number_of_images_are_finite(count, k, equal):
    """One image, as many neighbors as images, equal images and constant features: no nan, and at most unit length."""
    features = torch.randn(1 if equal else count, 6).expand(count, 6) * torch.tensor([1, 1, 1, 1, 0, 1e-9])
    targets = make_targets(features, k)
    assert targets.shape == (count, 6)
    assert targets.isfinite().all()
    assert targets.norm(dim=1).max() < 1.001


def test_neighbor_of_an_image_is_never_itself():
    """Of two pairs of equal images each is the other's nearest: their targets are as without neighbors."""
    features = torch.randn(2, 5).repeat(2, 1)
    torch.testing.assert_close(make_targets(features, 1), make_targets(features, 0))
    single = features[:2].repeat(2, 1) + torch.randn(4, 5)
    assert cosine_similarity(make_targets(single, 1), make_targets(single, 0)).max() < 0.999


def test_similarity_to_targets_is_that_of_center_crops(setup, tmp_path):
    """Of features at image_size, standardized; its gain is paired with the initial weights."""
    args, model, start, iterators = setup
    dataset = iterators['train'].dataset
    teacher = Teacher(args, model.backbone, start, dataset, tmp_path)
    mean, gain, error = teacher.measure(args, model.backbone)
    wanted = []
    for weights in (model.backbone.state_dict(), start):
        other = copy.deepcopy(model.backbone)
        other.load_state_dict(weights)
        features, _ = extract_features(args, other, eval_loader(args, dataset), '')
        wanted.append(cosine_similarity(standardize(features), teacher.targets(torch.arange(72))))
    assert mean == pytest.approx(wanted[0].mean().item(), abs=1e-4)
    difference = wanted[0] - wanted[1]
    assert gain == pytest.approx(difference.mean().item(), abs=1e-4)
    assert gain != 0
    assert error == pytest.approx(difference.std().item() / 72**0.5, abs=1e-4)
    model.backbone.load_state_dict(start)
    again = Teacher(args, model.backbone, start, dataset, tmp_path)  # from the file
    assert again.measure(args, model.backbone)[1:] == pytest.approx((0, 0), abs=1e-6)
    equal = replace_args(args, distill_size=args.image_size, distill_neighbors=0)
    same = Teacher(equal, model.backbone, start, dataset, tmp_path)
    assert same.measure(equal, model.backbone)[0] == pytest.approx(1, abs=1e-3)


def test_distillation_loss_is_zero_at_targets_and_two_opposite(setup, tmp_path):
    """Features are standardized over the views of the batch, so their mean and scale do not matter."""
    args, model, start, iterators = setup
    teacher = Teacher(args, model.backbone, start, iterators['train'].dataset, tmp_path)
    targets = standardize(teacher.targets(torch.arange(40)))
    shift, scale = torch.randn(2, 512)
    assert teacher.loss([targets], targets).item() == pytest.approx(0, abs=1e-4)
    assert teacher.loss([(0.1 + scale.abs()) * targets + shift], targets).item() == pytest.approx(0, abs=1e-4)
    assert teacher.loss([-targets], targets).item() == pytest.approx(2, abs=1e-4)
    assert teacher.loss([targets, -targets], targets).item() == pytest.approx(1, abs=1e-4)


def standardize(x):
    return (x - x.mean(0)) / x.std(0, correction=0).clamp(min=1e-3)


@pytest.mark.parametrize('micro_batches', [1, 2])
def test_step_minimizes_sum_and_returns_simsiam_loss(setup, micro_batches, tmp_path):
    args, model, start, iterators = setup
    teacher = Teacher(args, model.backbone, start, iterators['train'].dataset, tmp_path)
    model.freeze_bn()
    for part in (model.projector, model.predictor, teacher.norm):
        part.eval()  # no BN over micro-batches
    views, targets = torch.randn(2, 8, 3, 32, 32).unbind(), teacher.targets(torch.arange(8))
    outputs = model(*views, with_features=True)
    assert len(outputs) == 6
    assert torch.equal(outputs[4], model.backbone(views[0]))
    loss = simsiam_loss(*outputs[:4])
    distill_loss = teacher.loss(outputs[4:], targets)
    (loss + args.distill_weight * distill_loss).backward()
    wanted = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    inputs = [*views, targets]
    returned, (p, z), distilled = train_step(model, optimizer, inputs, micro_batches=micro_batches, teacher=teacher)
    assert returned.item() == pytest.approx(loss.item(), abs=1e-5)
    assert distilled.item() == pytest.approx(distill_loss.item(), abs=1e-5)
    assert len(p) == len(z) == 2
    for name, weight in model.named_parameters():
        if name in wanted:
            torch.testing.assert_close(weight.grad, wanted[name], atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize('options', [(), ('--loss_symmetry=2x',), ('--num_views=3',), ('--grad_accum_steps=2',)])
def test_each_view_gets_target_of_its_image(options, drawn, pretrained, tmp_path, monkeypatch):  # noqa: F811
    """The targets are replaced with the rows' pixels, and compared with the images of the step."""
    made, asked, draw = [], [], train_module.draw_views

    def record(args, images, augmentation, state, dataset):
        views = draw(args, images, augmentation, state, dataset)
        monkeypatch.setattr(Teacher, 'targets', lambda self, rows: dataset.pixels[rows].flatten(1).float())
        made.append(images.flatten(1).repeat(len(views[0]) // len(images), 1))
        return views

    def loss(self, features, targets):
        asked.append((len(features), targets))
        return 0 * features[0].sum()

    monkeypatch.setattr(train_module, 'draw_views', record)
    monkeypatch.setattr(Teacher, 'loss', loss)
    monkeypatch.setattr(Teacher, 'measure', lambda self, args, backbone: (0.0, 0.0, 0.0))
    assert train(tmp_path, drawn, pretrained, '--max_epochs=2', '--knn_every=0', *DISTILLED, *options) == 0
    assert len(made) == 6
    assert torch.equal(torch.cat([targets for _, targets in asked]), torch.cat(made).float())
    assert {views for views, _ in asked} == {3 if '--num_views=3' in options else 2}


def test_distillation_moves_views_toward_targets(drawn, tmp_path, monkeypatch):
    """The distillation loss of the last four of eight epochs, with and nearly without it."""
    given = ['train', '--preset=demo', f'--image_path={drawn}', '--batch_size=24', '--amp=off', '--num_workers=0']
    assert cli.main([*given, '--max_epochs=4', '--knn_every=0', *own_paths(tmp_path / 'first')]) == 0
    given += [f'--init_from={tmp_path}/first/ckpt/{RUN}', '--freeze_bn=True', '--learning_rate=0.2', '--max_epochs=8']
    losses, compute = [], Teacher.loss

    def record(self, features, targets):
        loss = compute(self, features, targets)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(Teacher, 'loss', record)
    for weight in (0.0001, 2):
        assert (
            cli.main([*given, f'--distill_weight={weight}', '--knn_every=0', *own_paths(tmp_path / str(weight))]) == 0
        )
    shown = read_metrics(tmp_path / '2' / 'ckpt' / RUN / 'metrics.jsonl')[1:]
    without, with_it = torch.tensor(losses).view(2, 8, 3).mean(2).tolist()  # weight, epoch, step
    assert [line['pretraining/distillation'] for line in shown] == pytest.approx(with_it, abs=1e-4)
    assert 0 < sum(with_it[4:]) < 0.95 * sum(without[4:]), (without, with_it)


@pytest.mark.parametrize('saved', ['kept', 'deleted', 'damaged'])
def test_resumed_run_with_teacher_equals_unbroken_run(saved, drawn, pretrained, tmp_path, capsys):  # noqa: F811
    """The targets of the start are read again, or computed again, also with --start_share=0."""
    given = ['--max_epochs=2', '--knn_every=0', '--start_share=0', *DISTILLED]
    assert train(tmp_path / 'whole', drawn, pretrained, *given) == 0
    assert train(tmp_path / 'cut', drawn, pretrained, *given, '--resume=auto', '--max_minutes=0.0001') == 0
    targets = tmp_path / 'cut' / 'ckpt' / RUN / TARGETS_FILE
    if saved != 'kept':
        targets.unlink()
    if saved == 'damaged':
        targets.write_bytes(b'half')
    capsys.readouterr()
    assert train(tmp_path / 'cut', drawn, pretrained, *given, '--resume=auto') == 0
    assert ('the targets of 72 images are read' in capsys.readouterr().out) == (saved == 'kept')
    assert not targets.exists()
    whole, cut = (state_of(tmp_path / name, 2)['model'] for name in ('whole', 'cut'))
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())
    whole, cut = (read_metrics(tmp_path / name / 'ckpt' / RUN / 'metrics.jsonl') for name in ('whole', 'cut'))
    assert whole[-1][SIMILARITY.gain] == cut[-1][SIMILARITY.gain] != 0
    means = [f'pretraining/{name}' for name in ('loss', 'std', 'distillation')]
    for before, after in zip(whole[1:], cut[1:], strict=True):  # of the first epoch, stopped after one of three steps
        assert [before[name] for name in means] == [after[name] for name in means]


@pytest.mark.parametrize('change', [{}, {'distill_neighbors': 3}, {'distill_size': 48}, {'mean': '0.5,0.5,0.5'}])
def test_saved_targets_are_used_only_with_same_options(change, setup, tmp_path, capsys):
    args, model, start, iterators = setup
    dataset, rows = iterators['train'].dataset, torch.arange(72)
    first = Teacher(args, model.backbone, start, dataset, tmp_path).targets(rows)
    capsys.readouterr()
    second = Teacher(replace_args(args, **change), model.backbone, start, dataset, tmp_path).targets(rows)
    assert ('are read from targets.pt' in capsys.readouterr().out) == (not change)
    assert torch.equal(first, second) == (not change)


def test_saved_targets_are_used_only_for_same_images(setup, tmp_path, capsys):
    args, model, start, iterators = setup
    dataset = iterators['train'].dataset
    Teacher(args, model.backbone, start, dataset, tmp_path)
    fewer = Teacher(args, model.backbone, start, select(dataset, torch.arange(71)), tmp_path)
    assert len(fewer.features) == 71


def test_targets_that_cannot_be_saved_are_used_all_the_same(setup, tmp_path, capsys):
    args, model, start, iterators = setup
    (tmp_path / 'file').touch()
    teacher = Teacher(args, model.backbone, start, iterators['train'].dataset, tmp_path / 'file')
    assert teacher.targets(torch.arange(72)).isfinite().all()
    assert 'targets.pt is not cached' in capsys.readouterr().out


def test_step_of_two_ranks_with_teacher_equals_that_of_one(drawn, pretrained, tmp_path):  # noqa: F811
    """A step of all images: its batch statistics are those of both ranks."""
    for name, start in (('one', []), ('two', TORCHRUN)):
        command = ('cli.py', 'train', '--preset=imagenet', '--backbone=resnet18', '--image_size=32', '--batch_size=72')
        command += ('--amp=off', '--device=cpu', '--proj_layers=2', '--proj_dim=32', '--pred_dim=8', '--knn_every=0')
        command += (f'--init_from={pretrained}', f'--image_path={drawn}', '--num_workers=0', '--max_epochs=1')
        done = run_process(*start, *command, *DISTILLED, *own_paths(tmp_path / name))
        assert done.returncode == 0, done.stderr
    one, two = (state_of(tmp_path / name, 1)['model'] for name in ('one', 'two'))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-4 if 'running' in name else 1e-6, rtol=1e-4, msg=name)


def test_run_that_keeps_no_start_says_so(drawn, pretrained, tmp_path, capsys):  # noqa: F811
    given = ('--knn_every=0', '--heads_epochs=0', '--start_share=0', '--distill_weight=0')
    assert train(tmp_path, drawn, pretrained, '--max_epochs=1', *given) == 0
    capsys.readouterr()
    assert cli.main(['train', f'--resume={RUN}', '--max_epochs=2', '--distill_weight=2', *own_paths(tmp_path)]) == 0
    assert '--distill_weight has no effect: this run does not keep its initial weights' in capsys.readouterr().err


@pytest.mark.parametrize('name', ['distill_weight=2', 'distill_size=64'])
def test_distillation_from_random_weights_warns(name, drawn, tmp_path, capsys):
    given = ['train', '--preset=demo', f'--image_path={drawn}', '--batch_size=24', '--max_epochs=1', '--knn_every=0']
    assert cli.main([*given, f'--{name}', *own_paths(tmp_path)]) == 0
    assert f'--{name.partition("=")[0]} has no effect with random weights' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('options', 'said'),
    [
        ({'distill_size': 64}, ''),
        ({'distill_size': 24}, 'the targets are of smaller images than the views'),
        ({'distill_size': 64, 'cache_short_side': 48}, '--cache_short_side=48: the targets, of 64 px, are of smaller'),
        ({'distill_size': 64, 'cache_short_side': 64}, ''),
    ],
)
def test_targets_that_know_no_more_than_views_are_warned_of(options, said, capsys):
    args = get_config(
        preset='imagenet', backbone='resnet18', init_from='x', distill_weight=1.0, proj_dim=8, image_size=32, **options
    )
    set_distill_size(args, build_model(args))
    warned = capsys.readouterr().err
    assert (said in warned) if said else not warned
    with pytest.raises(UserError, match='--distill_size=3 is too small: 0, or at least 8 px'):
        set_distill_size(replace_args(args, distill_size=3), build_model(args))


@pytest.mark.parametrize(
    ('image_size', 'given', 'used'), [(96, 0, 224), (224, 0, 224), (288, 0, 288), (96, 160, 160), (96, 64, 64)]
)
def test_default_size_of_targets(image_size, given, used):
    options = {'backbone': 'resnet18', 'init_from': 'x', 'distill_weight': 1.0, 'proj_dim': 8}
    args = get_config(preset='imagenet', image_size=image_size, distill_size=given, **options)
    model = build_model(args)
    assert set_distill_size(args, model).distill_size == used
    assert model.backbone.training
    assert set_distill_size(replace_args(args, stem='cifar'), model).distill_size == (given or image_size)
    assert set_distill_size(replace_args(args, init_from=''), model).distill_size == given


def test_networks_of_one_size_get_targets_of_it(capsys):
    options = {'backbone': 'vit_b_32', 'init_from': 'x', 'distill_weight': 1.0, 'proj_dim': 8}
    args = get_config(preset='imagenet', image_size=64, **options)
    model = build_model(args)
    assert set_distill_size(args, model).distill_size == 64
    assert 'vit_b_32 does not accept images of 224 px' in capsys.readouterr().out
    with pytest.raises(UserError, match='--distill_size=96.*try --distill_size=64'):
        set_distill_size(replace_args(args, distill_size=96), model)


def test_invalid_size_of_targets_ends_before_anything_is_written(drawn, pretrained, tmp_path, capsys, monkeypatch):  # noqa: F811
    forward = torch.nn.Conv2d.forward

    def refuse(self, x):
        assert x.shape[-1] < 200, 'image too large'
        return forward(self, x)

    monkeypatch.setattr(torch.nn.Conv2d, 'forward', refuse)
    given = ('--max_epochs=2', '--heads_epochs=1', '--knn_every=0')
    assert train(tmp_path, drawn, pretrained, *given, '--distill_size=224') == 2
    assert '--distill_size=224: resnet18 does not accept images of 224 px (image too large)' in capsys.readouterr().err
    assert not (tmp_path / 'ckpt').exists()
    assert train(tmp_path, drawn, pretrained, *given, '--distill_size=0') == 0
    assert 'the targets of the distillation are of 32 px' in capsys.readouterr().out
    assert read_json(tmp_path / 'ckpt' / RUN / 'run.json')['args']['distill_size'] == 32


def test_start_is_saved_before_targets_are_computed(drawn, pretrained, tmp_path, monkeypatch, capsys):  # noqa: F811
    """A run that is stopped while they are computed can be resumed."""
    compute = teacher_module.extract_features

    def stop(*_):
        raise signals.Interrupted(signal.SIGTERM)

    monkeypatch.setattr(teacher_module, 'extract_features', stop)
    given = ('--max_epochs=2', '--heads_epochs=1', '--knn_every=0', '--resume=auto')
    assert train(tmp_path, drawn, pretrained, *given) == 143
    assert [path.name.partition('_epoch_')[2] for path in checkpoints(tmp_path / 'ckpt' / RUN)] == ['0']
    monkeypatch.setattr(teacher_module, 'extract_features', compute)
    assert train(tmp_path, drawn, pretrained, *given) == 0
    assert 'resuming' in capsys.readouterr().out


def test_bfloat16_is_not_benchmarked_for_larger_images(drawn, pretrained, tmp_path, monkeypatch):  # noqa: F811
    asked = []
    monkeypatch.setattr(
        precision, 'bf16_benchmark', lambda args: asked.append(args.image_size) or {'ratio': 2.0, 'failed': ''}
    )
    given = ('--max_epochs=1', '--heads_epochs=0', '--knn_every=0', '--distill_size=64', '--amp=bf16')
    assert train(tmp_path, drawn, pretrained, *given) == 0
    assert {*asked} == {32}


@pytest.mark.parametrize(('given', 'weight'), [([], 0.0), (['--distill_weight=3'], 3.0)])
def test_ablations_from_weights_have_no_teacher_unless_told(given, weight):
    args = get_config(preset='demo', init_from='x', **dict(option.strip('-').split('=') for option in given))
    args.explicit = {'init_from', *(['distill_weight'] if given else [])}
    assert {planned[3].distill_weight for planned in plan_variants(args)} == {weight}
    assert {planned[3].start_share for planned in plan_variants(args)} == {0}


def test_state_keeps_start_for_distillation(pretrained):  # noqa: F811
    for weight, share, kept in ((0.0, 0.0, False), (1.0, 0.0, True), (0.0, 0.5, True)):
        args = get_config(preset='demo', init_from=str(pretrained), distill_weight=weight, start_share=share)
        assert (make_train_state(args, build_model(args)).start is not None) == kept


def test_run_without_labels_is_used_if_more_similar_to_targets(drawn, pretrained, tmp_path, capsys):  # noqa: F811
    """A folder without classes."""
    flat = tmp_path / 'flat'
    flat.mkdir()
    for number, path in enumerate(sorted(drawn.glob('train/*/*.png'))):
        shutil.copy(path, flat / f'{number}.png')
    given = (*DISTILLED, '--knn_every=1', '--learning_rate=0.1', '--max_epochs=3')
    assert train(tmp_path / 'whole', flat, pretrained, *given) == 0
    printed = capsys.readouterr().out
    lines = read_metrics(tmp_path / 'whole' / 'ckpt' / RUN / 'metrics.jsonl')
    gains = [line[SIMILARITY.gain] for line in lines]
    assert len(gains) == 4
    assert gains[0] == 0
    assert max(gains) > 0.01
    assert 'verdict      probably better than the start' in printed
    best = find_best_epoch(tmp_path / 'whole' / 'ckpt' / RUN)
    assert gains[best] == max(gains)
