"""The measures without labels: spectra made by hand, second derivations, and properties."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dataloader.load_dataset import load_splits
from loss.negative_cosine import negative_cosine, simsiam_loss
from metric import representation
from metric.feature_std import feature_std
from model.simsiam import SimSiam
from protocols.collapse_verdict import judge_collapse, judge_run_metrics
from protocols.label_free import projector_batch_stats, view_features
from runtime.options import get_config


def with_singular_values(values, n=400, seed=0, mean=0.0):
    """n x d of these singular values; its columns have mean zero, but for `mean`."""
    generator, d = torch.Generator().manual_seed(seed), len(values)
    left = torch.randn(n, d, generator=generator, dtype=torch.float64)
    left, _ = torch.linalg.qr(left - left.mean(0))
    right, _ = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    return left @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right.T + mean


@pytest.mark.parametrize(
    ('more', 'word'), [({}, 'collapsed'), ({'std_judged': 0.95}, 'healthy'), ({'std_batch': 0.95}, 'healthy')]
)
def test_verdict_uses_largest_measured_std(more, word):
    """One rule for train, evaluate and report: the largest std that was measured."""
    now, before = {'std': 0.3, 'rank': 10.0, 'area': 0.8}, {'std': 0.9, 'rank': 100.0, 'area': 0.9}
    assert judge_collapse({**now, **more}, before)[0] == word


def test_verdict_of_run_from_weights_names_start():
    now, before = {'std': 0.99, 'rank': 11.0, 'area': 0.8}, {'std': 0.9, 'rank': 11.6, 'area': 0.9}
    word, said = judge_collapse(now, before, True)
    assert word == 'nothing learned'
    assert 'It is no better than at the start' in said
    assert 'ten times as much' not in said


def test_projector_batch_stats_uses_batch_statistics():
    """Of other images than BN's averages are of: z lies off its mean by these, and around it by its own."""
    projector = SimSiam(get_config(preset='demo')).projector.eval()
    x = torch.randn(200, projector[0].in_features, generator=torch.Generator().manual_seed(0)) + 20
    before = {name: value.clone() for name, value in projector.state_dict().items()}
    with torch.no_grad():
        assert feature_std(projector(x)) < 0.5
    assert feature_std(projector_batch_stats(projector, x)) > 0.9
    assert all(torch.equal(value, before[name]) for name, value in projector.state_dict().items())
    assert not projector.training


def test_view_features_do_not_depend_on_storage(drawn, tmp_path):
    """In memory or in files, which workers read or this process, whatever the batch: to a gray level or two."""
    model, found = SimSiam(get_config(preset='demo')), []
    for held, workers, size in (('on', 0, 16), ('off', 0, 16), ('off', 2, 7)):
        args = get_config(
            preset='demo',
            image_path=str(drawn),
            cache_path=str(tmp_path),
            cache_images=held,
            num_workers=workers,
            device='cpu',
            amp='off',
            batch_size=size,
            random_seed=size,
        )
        found.append(view_features(args, model, load_splits(args)['train'], 2)[0])
    spread_of = found[0].std(0).mean()
    for other in found[1:]:
        assert (other - found[0]).abs().max() < 0.2 * spread_of
    assert (found[0][:, 0] - found[0][:, 1]).abs().max() > spread_of
    torch.testing.assert_close(found[1], found[2])


@pytest.mark.parametrize('d', [2, 16, 100])
def test_spectrum_measures_of_isotropic_features(d):
    x = with_singular_values([3.0] * d)
    assert representation.rankme(x) == pytest.approx(d, rel=1e-4)
    assert representation.cumulative_spectrum_auc(x) == pytest.approx(1 / 2 + 1 / (2 * d), abs=1e-9)
    if d > 4:
        assert representation.alpha_req(x) == pytest.approx(0, abs=1e-9)


def test_spectrum_measures_of_rank_one_and_zero_features():
    one = with_singular_values([5.0] + [0.0] * 9)
    assert representation.rankme(one) == pytest.approx(1, abs=1e-3)
    assert representation.cumulative_spectrum_auc(one) == pytest.approx(1, abs=1e-9)
    assert math.isnan(representation.alpha_req(one))
    same = torch.ones(50, 8)
    assert representation.rankme(same) == pytest.approx(1, abs=1e-3)  # not centered: the mean is a direction
    assert representation.cumulative_spectrum_auc(same) == 1.0
    assert representation.rankme(torch.zeros(5, 3)) == 1.0


@pytest.mark.parametrize('alpha', [0.5, 1.0, 2.0])
def test_alpha_req_of_power_law_is_its_exponent(alpha):
    values = [i ** (-alpha / 2) for i in range(1, 101)]  # eigenvalues are their squares
    x = with_singular_values(values, mean=7.0)
    assert representation.alpha_req(x) == pytest.approx(alpha, abs=1e-6)
    shares = np.array(values) / sum(values)
    assert representation.cumulative_spectrum_auc(x) == pytest.approx(np.cumsum(shares).mean(), abs=1e-9)
    centered = with_singular_values(values)
    assert representation.rankme(centered) == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-3)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 30), st.integers(2, 30), st.integers(0, 1000), st.floats(0.01, 100))
def test_spectrum_measures_are_bounded_and_invariant(n, d, seed, factor):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.3
    turn, _ = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64))
    for measure in (representation.rankme, representation.cumulative_spectrum_auc):
        assert measure(factor * x @ turn) == pytest.approx(measure(x), rel=1e-4)
    assert 1 <= representation.rankme(x) <= min(n, d)
    assert 0.5 <= representation.cumulative_spectrum_auc(x) <= 1


def test_lidar_equals_generalized_eigenproblem():
    """With scipy's eigh of the pair, and n - 1 equal discriminants where images differ alike."""
    linalg = pytest.importorskip('scipy.linalg')
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(30, 1, 6, generator=generator) * torch.tensor([3.0, 2, 1, 1, 0.5, 0.1])
    x = (x + 0.3 * torch.randn(30, 5, 6, generator=generator)).double()
    means = x.mean(1).numpy()
    within = sum(np.cov(views.numpy().T) for views in x) / len(x) + 1e-4 * np.eye(6)
    values = linalg.eigh(np.cov(means.T), within, eigvals_only=True)
    shares = values / values.sum() + 1e-7
    assert representation.lidar(x) == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-9)
    assert representation.lidar(torch.ones(4, 3, 6)) == 1.0


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.integers(1, 8), st.integers(0, 1000))
def test_positive_ranks_equal_brute_force(n, d, seed):
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, n, d, generator=generator, dtype=torch.float64)
    if seed % 3 == 0:
        second[0] = second[-1]  # a tie
    ranks = []
    for i in range(n):
        cosines = [float(first[i] @ other / first[i].norm() / other.norm()) for other in second]
        ranks.append(sum(cosine >= cosines[i] - 1e-12 for cosine in cosines))
    assert representation.geometric_mean_rank(first, second) == pytest.approx(math.exp(np.log(ranks).mean()), rel=1e-6)
    assert representation.view_retrieval_top1(first, second).item() == pytest.approx(
        100 * np.mean([rank == 1 for rank in ranks])
    )


def test_view_retrieval_of_equal_and_random_views():
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    assert representation.view_retrieval_top1(x, 3 * x).item() == 100
    assert representation.geometric_mean_rank(x, x) == 1
    same = torch.ones(50, 8)
    assert representation.view_retrieval_top1(same, same).item() == 0  # collapsed: a tie is not found
    assert representation.geometric_mean_rank(same, same) == pytest.approx(50, rel=1e-5)


def test_alignment_and_uniformity_of_known_features():
    x = torch.eye(4)
    assert representation.alignment(x, 2 * x) == pytest.approx(0)
    assert representation.alignment(x, -x) == pytest.approx(4)
    assert representation.uniformity(x) == pytest.approx(-4)  # all pairs at a squared distance of 2
    assert representation.uniformity(torch.ones(3, 2)) == pytest.approx(0)


def test_output_statistics_of_known_outputs():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(4000, 8, generator=generator)
    found = representation.output_statistics(z, with_singular_values([1.0, 1.0] + [0.0] * 6, 4000).float())
    assert found['mean_direction'] < 0.05
    assert found['correlation'] < 0.05
    assert found['rank_z_minus_p'] == pytest.approx(6, abs=0.1)
    assert found['norm_z'] == pytest.approx(8**0.5, rel=0.05)
    collapsed = representation.output_statistics(torch.ones(20, 8), torch.ones(20, 8))
    assert collapsed['mean_direction'] == pytest.approx(1)
    assert collapsed['rank_z_minus_p'] == pytest.approx(0)
    twice = torch.cat((z[:, :4], z[:, :4]), 1)
    wanted = np.abs(np.corrcoef(twice.numpy().T))
    assert representation.mean_abs_channel_correlation(twice) == pytest.approx((wanted.sum() - 8) / 56, abs=1e-6)


@pytest.mark.parametrize('n', [2, 3, 5])
def test_loss_of_n_views_equals_formula(n):
    """Each p against the mean of the others' z; of two views SimSiam to the bit, and its gradient through p alone."""
    generator = torch.Generator().manual_seed(n)
    p, z = torch.randn(2, n, 6, 4, generator=generator).requires_grad_().unbind()
    loss = simsiam_loss(*p, *z)
    wanted = [negative_cosine(p[i], torch.stack([z[j] for j in range(n) if j != i]).mean(0)) for i in range(n)]
    assert loss.item() == pytest.approx(sum(wanted).item() / n, abs=1e-6)
    if n == 2:
        by_hand = negative_cosine(p[0], z[1].detach()) / 2 + negative_cosine(p[1], z[0].detach()) / 2
        assert torch.equal(loss, by_hand)
    of_p, of_z = torch.autograd.grad(loss, (p, z), allow_unused=True)
    assert of_p.abs().sum() > 0
    assert of_z is None or not of_z.any()


BEFORE = {'std': 0.3, 'rank': 150.0, 'area': 0.88}


@pytest.mark.parametrize(
    ('now', 'word'),
    [
        ({'std': 0.98, 'rank': 40.0, 'area': 0.82}, 'healthy'),
        ({'std': 0.98, 'rank': 40.0, 'area': 0.82, 'correlation': 0.4}, 'healthy'),
        ({'std': 0.10, 'rank': 40.0, 'area': 0.82}, 'collapsed'),
        ({'std': 0.98, 'rank': 149.0, 'area': 0.82}, 'nothing learned'),
        ({'std': 0.70, 'rank': 40.0, 'area': 0.82}, 'partly collapsed'),
        ({'std': 0.98, 'rank': 40.0, 'area': 0.93}, 'partly collapsed'),
        ({'std': 0.98, 'rank': 40.0, 'area': 0.82, 'correlation': 0.97}, 'partly collapsed'),
    ],
)
def test_verdict_follows_thresholds(now, word):
    said = judge_collapse(now, BEFORE)
    assert said[0] == word
    assert f'{now["std"]:.2f}' in said[1]
    lines = [
        {'epoch': epoch, **{f'pretraining/{name}': value for name, value in values.items()}}
        for epoch, values in ((0, BEFORE), (3, now))
    ]
    assert judge_run_metrics([lines[0], {'epoch': 1, 'pretraining/loss': 0.1}, lines[1]]) == said
    assert judge_run_metrics(lines[1:]) is judge_run_metrics([]) is None
