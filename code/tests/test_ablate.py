"""What the paper takes away or changes: each option does that and nothing else; the tables as a user runs them."""

import json
import shutil
from dataclasses import asdict
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import cli
import plots
from commands.ablate import plan_variants
from config import OPTIONS
from conftest import TINY, draw_folder, one_line, own_paths
from engine.ablation_tables import TABLES
from engine.run_dir import args_from_run
from loss.negative_cosine import cross_entropy, negative_cosine, simsiam_loss
from model.simsiam import SimSiam
from optimizer.sgd import make_sgd, set_learning_rates
from runtime.errors import UserError
from runtime.options import get_config, ignored_in_train, replace_args
from train import train_step

SMALL = {'preset': 'demo', 'proj_dim': 12, 'pred_dim': 5}


def outputs():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(7, 6, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(4)]


def test_ablation_of_a_run_from_weights_has_no_teacher_unless_given(tmp_path):
    """--from_run fixes what the weights had set, which nobody gave; and no variant warns of options of the table."""
    saved = asdict(get_config(preset='demo', init_from='weights.pth', distill_weight=8.0, start_share=0.25))
    (tmp_path / 'run').mkdir()
    for explicit, weight in ((['init_from'], 0.0), (['init_from', 'distill_weight'], 8.0)):
        (tmp_path / 'run/run.json').write_text(json.dumps({'args': saved, 'explicit': explicit}))
        args = args_from_run(get_config(from_run='run', ckpt_path=str(tmp_path), ablation='predictor'))
        variants = [variant for *_, variant in plan_variants(args, {*explicit})]
        assert {variant.distill_weight for variant in variants} == {weight}
        assert {variant.start_share for variant in variants} == {0.0}
        assert not [name for variant in variants for name, _ in ignored_in_train(variant)]


def test_loss_variants_equal_their_formulas():
    p1, p2, z1, z2 = outputs()
    simsiam_loss(p1, p2, z1, z2).backward()
    assert z1.grad is None
    assert z2.grad is None
    simsiam_loss(p1, p2, z1, z2, stop_gradient=False).backward()
    assert z1.grad.abs().max() > 0
    one_way = simsiam_loss(p1, p2, z1, z2, symmetric=False)
    assert one_way == negative_cosine(p1, z2)
    assert simsiam_loss(p1, p2, z1, z2).item() == pytest.approx((one_way + negative_cosine(p2, z1)).item() / 2)


def test_cross_entropy_equals_sum_formula():
    """-softmax(z) . log softmax(p), written with sums."""
    p, z, _, _ = (value.detach() for value in outputs())
    wanted = 0
    for a, b in zip(p.numpy(), z.numpy(), strict=True):
        soft = np.exp(b) / np.exp(b).sum()
        wanted -= (soft * np.log(np.exp(a) / np.exp(a).sum())).sum() / len(p)
    assert cross_entropy(p, z).item() == pytest.approx(wanted, abs=1e-12)
    assert simsiam_loss(p, p, z, z, similarity='softmax').item() == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(
    ('bn', 'projector', 'predictor'), [('none', 0, 0), ('hidden', 1, 1), ('default', 2, 1), ('all', 2, 2)]
)
def test_proj_bn_variant_has_expected_bn_layers(bn, projector, predictor):
    """Counts of BN; a layer has a bias where no BN follows."""
    model = SimSiam(get_config(**SMALL, proj_bn=bn))
    for part, count in ((model.projector, projector), (model.predictor, predictor)):
        modules = list(part)
        assert sum(isinstance(module, torch.nn.BatchNorm1d) for module in modules) == count
        for module, following in zip(modules, [*modules[1:], None], strict=True):
            if isinstance(module, torch.nn.Linear):
                assert (module.bias is None) == isinstance(following, torch.nn.BatchNorm1d)
    outputs = model(*torch.randn(2, 6, 3, 16, 16))
    assert {tuple(output.shape) for output in outputs} == {(6, 12)}


def step(**options):
    """A model before and after one step with its predictor's rate far from zero."""
    model = SimSiam(get_config(**SMALL, **options))
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = make_sgd(model, 0.9, 1e-2)
    set_learning_rates(optimizer, 0.5, 0.5, 0.5)
    train_step(model, optimizer, torch.randn(2, 6, 3, 16, 16).unbind())
    return model, {name: not torch.equal(value, before[name]) for name, value in model.named_parameters()}


def test_predictor_variant_is_mlp_identity_or_frozen():
    model, moved = step()
    assert moved['predictor.0.weight']
    model, moved = step(predictor='fixed')
    assert not any(changed for name, changed in moved.items() if name.startswith('predictor'))
    assert moved['projector.0.weight']
    model, _ = step(predictor='none')
    p1, p2, z1, z2 = model(*torch.randn(2, 6, 3, 16, 16))
    assert torch.equal(p1, z1)
    assert torch.equal(p2, z2)


def test_loss_symmetry_2x_equals_mean_of_two_pairs():
    model, views = SimSiam(get_config(**SMALL)).double(), torch.randn(4, 6, 3, 16, 16, dtype=torch.float64)
    optimizer = make_sgd(model, 0.0, 0.0)
    set_learning_rates(optimizer, 0.0, 0.0, 0.0)
    both, *_ = train_step(
        model, optimizer, (torch.cat((views[0], views[2])), torch.cat((views[1], views[3]))), micro_batches=2
    )
    gradient = model.projector[0].weight.grad.clone()
    losses, gradients = [], []
    for pair in (views[:2], views[2:]):
        losses.append(train_step(model, optimizer, pair.unbind())[0])
        gradients.append(model.projector[0].weight.grad.clone())
    assert both.item() == pytest.approx(sum(losses).item() / 2, abs=1e-12)
    torch.testing.assert_close(gradient, sum(gradients) / 2, atol=1e-12, rtol=1e-9)


def test_ablation_tables_use_existing_options():
    for rows in TABLES.values():
        for _, options, _ in rows:
            args = get_config(preset='demo')
            get_config(**{name: value(args) if callable(value) else value for name, value in options.items()})
    assert set(TABLES) == set(OPTIONS['ablation'].metadata['choices'])


@pytest.mark.parametrize('table', ['stopgrad', 'symmetric'])
def test_ablate_called_twice_reuses_finished_runs(table, drawn, tmp_path, capsys, monkeypatch):
    options = (
        *TINY,
        '--max_epochs=1',
        '--knn_every=1',
        f'--image_path={drawn}',
        *own_paths(tmp_path),
        f'--ablation={table}',
    )
    assert cli.main(['ablate', *options]) == 0
    said = capsys.readouterr().out
    rows = json.loads((tmp_path / f'log/{table}.json').read_text())
    assert [row['variant'] for row in rows] == [variant for variant, _, _ in TABLES[table]]
    for row in rows:
        assert f'| {row["variant"]} | {row["linear"]:.1f} | {row["knn"]:.1f} | {row["loss"]:.3f} |' in said
        assert f'| {row["paper"]} |' in said
        assert [epoch for epoch, _ in row['knn_curve']] == [0, 1]
    assert len({row['loss'] for row in rows}) == len(rows)
    with Image.open(tmp_path / f'log/{table}.png') as picture:
        assert picture.width > 1000
    monkeypatch.setattr('commands.ablate.train', lambda args: pytest.fail('trained again'))
    assert cli.main(['ablate', *options]) == 0
    assert json.loads((tmp_path / f'log/{table}.json').read_text()) == rows
    monkeypatch.undo()
    assert cli.main(['ablate', *options, '--probe_epochs=3']) == 0  # evaluated anew, and not trained
    assert 'epoch 1/1' not in capsys.readouterr().out
    again = json.loads((tmp_path / f'log/{table}.json').read_text())
    assert [row['loss'] for row in again] == [row['loss'] for row in rows]
    assert cli.main(['ablate', *options]) == 0  # and the first is still known
    assert json.loads((tmp_path / f'log/{table}.json').read_text()) == rows
    monkeypatch.setattr('commands.ablate.train', asked := mock.Mock(side_effect=UserError('trained again')))
    assert cli.main(['ablate', *options, '--learning_rate=0.123']) == 2  # other options are another table
    assert asked.call_args[0][0].learning_rate == 0.123


def test_ablate_resumes_unfinished_variant(drawn, tmp_path, capsys):
    """Whatever was measured of it meanwhile, and whatever of its end on other images."""
    options = ['ablate', *TINY, '--knn_every=0', f'--image_path={drawn}', *own_paths(tmp_path), '--ablation=similarity']
    options = [*options, '--save_every_epochs=1']
    assert cli.main([*options, '--max_minutes=0.00001']) == 0
    assert 'not all variants are trained; the same command continues' in capsys.readouterr().out
    assert not (tmp_path / 'log/similarity.json').exists()
    assert cli.main(options) == 0
    rows = json.loads((tmp_path / 'log/similarity.json').read_text())
    assert [row['epochs'] for row in rows] == [2, 2]
    other = draw_folder(tmp_path / 'other', {'train': 8, 'val': 4})
    own = own_paths(tmp_path)
    for run in (tmp_path / 'ckpt').iterdir():
        assert cli.main(['evaluate', f'--ckpt_name={run.name}', f'--image_path={other}', *own]) == 0
        assert cli.main(['evaluate', f'--ckpt_name={next(run.glob("*_epoch_1"))}', *own]) == 0
    shutil.rmtree(tmp_path / 'log')
    assert cli.main(options) == 0
    again = json.loads((tmp_path / 'log/similarity.json').read_text())
    assert [row['linear'] for row in again] == [row['linear'] for row in rows]
    assert [row['std'] for row in again] == [row['std'] for row in rows]


def test_ablate_from_run_uses_its_options(drawn, tmp_path):
    """--from_run: all that varies is the table; and a name of one's own keeps two tables apart."""
    paths = own_paths(tmp_path)
    given = ['train', *TINY, '--max_epochs=1', '--knn_every=0', f'--image_path={drawn}', '--proj_dim=24', *paths]
    assert cli.main(given) == 0
    options = ['ablate', '--from_run=model_name_simsiam_ckpt_0', '--model_name=own', '--ablation=similarity', *paths]
    for _ in range(2):
        assert cli.main(options) == 0
    assert {path.name for path in (tmp_path / 'log').glob('*.json')} == {'own_similarity.json'}
    runs = {path.name: json.loads((path / 'run.json').read_text())['args'] for path in (tmp_path / 'ckpt').iterdir()}
    names = ('simsiam', 'own_similarity_0', 'own_similarity_1')
    assert {name: args['proj_dim'] for name, args in runs.items()} == {
        f'model_name_{name}_ckpt_0': 24 for name in names
    }


def test_ablation_tables_have_published_warmup():
    """Ten epochs of 100 rise for batches from 1024 on and without BN; figure 2 is of before the constant rate."""
    args = get_config(preset='imagenet')
    schedules = {
        (table, variant): (own.warmup_epochs, own.fix_pred_lr)
        for table in ('batch_size', 'bn', 'stopgrad')
        for variant, options, _ in TABLES[table]
        for own in [
            replace_args(args, **{key: value(args) if callable(value) else value for key, value in options.items()})
        ]
    }
    rising = {('batch_size', size) for size in ('1024', '2048', '4096')} | {('bn', 'none')}
    assert {key for key, (epochs, _) in schedules.items() if epochs} == rising
    assert {epochs for epochs, _ in schedules.values()} == {0, args.max_epochs // 10}
    assert {table for (table, _), (_, fixed) in schedules.items() if not fixed} == {'stopgrad'}


@pytest.mark.parametrize('name', ['ckpt_name=x', 'resume=auto', 'protocol=knn', 'evaluate_after=False'])
def test_ablate_with_its_own_option_given_exits_2(name, capsys):
    assert cli.main(['ablate', f'--{name}']) == 2
    assert 'is not for ablate' in one_line(capsys.readouterr().err)


def test_draw_curves_places_lines_at_values():
    """A line from the lower left to the upper right, one that falls, and a panel without measurements."""
    image = plots.draw_curves(
        [
            plots.LineChart('a', [('up', [(0, 0.0), (10, 1.0)]), ('down', [(0, 1.0), (10, 0.0)])]),
            plots.LineChart('b', [('up', [])]),
        ]
    )
    pixels = np.asarray(plots.figure_to_pil(image)).astype(int)
    blue = tuple(int(plots.COLORS[0][at : at + 2], 16) for at in (1, 3, 5))
    up = np.argwhere((pixels[:250] == blue).all(2))
    left, right = up[up[:, 1] < 120], up[(up[:, 1] > 330) & (up[:, 1] < 420)]
    assert left[:, 0].mean() > right[:, 0].mean() + 100


def test_ablate_with_varied_option_given_exits_2(drawn, tmp_path, capsys):
    """Or two rows would be one run. What a variant makes of it, ten times the rate, is given as one likes."""
    for table, option in (
        ('stopgrad', '--stop_gradient=False'),
        ('bn', '--proj_bn=none'),
        ('batch_size', '--batch_size=8'),
        ('collapse', '--augmentation=simclr'),
    ):
        given = [
            'ablate',
            f'--ablation={table}',
            option,
            '--preset=demo',
            f'--image_path={drawn}',
            *own_paths(tmp_path),
        ]
        assert cli.main(given) == 2
        name = option.partition('=')[0]
        assert f'{name} is what --ablation={table} varies: leave it out' in one_line(capsys.readouterr().err)
    args = get_config(preset='demo', image_path=str(drawn), cache_path=str(tmp_path), ablation='collapse')
    args = replace_args(args, learning_rate=0.01, batch_size=64)
    args.explicit |= {'learning_rate', 'batch_size', 'image_path', 'preset', 'ablation', 'cache_path'}
    assert [own.learning_rate for _, _, _, own in plan_variants(args)][:6] == [0.01] * 4 + [0.1, 0.001]


def test_ablate_checks_all_variants_before_training(drawn, tmp_path, capsys):
    args = get_config(preset='demo', image_path=str(drawn), cache_path=str(tmp_path), ablation='batch_size')
    assert [own.batch_size for _, _, _, own in plan_variants(args)] == [64]  # of 72 images
    assert capsys.readouterr().out.count('is left out: there are only 72 images') == 6
    options = ['--ablation=symmetric', '--num_views=3', '--preset=demo', f'--image_path={drawn}', *own_paths(tmp_path)]
    assert cli.main(['ablate', *options]) == 2
    assert '--loss_symmetry=false is for two views, not --num_views=3' in one_line(capsys.readouterr().err)
    assert not (tmp_path / 'ckpt').exists()
