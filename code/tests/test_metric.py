"""kNN, top-k, the confusion counts and the collapse measure against counting by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metric import knn
from metric.accuracy import confusion_matrix, topk_accuracy
from metric.feature_std import feature_std
from metric.knn import clip_k, knn_scores


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


@pytest.mark.parametrize('temperature', [0.001, 0.01, 0.1, 1.0])
@pytest.mark.parametrize('far', [0.0, 0.5, 1.5])
def test_weighted_vote_equals_formula_for_any_temperature(temperature, far):
    """Against double precision and the plain formula, with neighbors that are all `far` from the query; the nearest
    alone votes where the temperature is small."""
    cosine = (torch.tensor([[1.0, 0.99, 0.6], [0.7, 0.6, 0.6]], dtype=torch.float64) - far).clamp(min=-1)
    shares = knn.weighted_vote(cosine.float(), torch.tensor([[2, 0, 0], [1, 2, 2]]), 3, temperature)
    weight = torch.exp((cosine - cosine[:, :1]) / temperature)
    weight = weight / weight.sum(1, keepdim=True)
    wanted = torch.stack(
        (torch.tensor([weight[0, 1:].sum(), 0, weight[0, 0]]), torch.tensor([0, *weight[1, :1], weight[1, 1:].sum()]))
    )
    torch.testing.assert_close(shares.double(), wanted.double(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(('k', 'temperature', 'piece'), [(1, 0.1, 7), (5, 0.1, 1024), (20, 0.5, 3), (500, 0.1, 10)])
def test_knn_scores_equal_brute_force(k, temperature, piece, monkeypatch):
    monkeypatch.setattr(knn, 'BANK_CHUNK', piece)
    monkeypatch.setattr(knn, 'QUERY_CHUNK', 10)
    generator = torch.Generator().manual_seed(1)
    queries, bank = torch.randn(23, 6, generator=generator), torch.randn(60, 6, generator=generator)
    labels = torch.randint(4, (60,), generator=generator)
    ours = knn_scores(queries.double(), bank.double(), labels, 4, k, temperature)
    for query, row in zip(queries.double().tolist(), ours.tolist(), strict=True):
        near = sorted(
            ((cosine(query, b), label) for b, label in zip(bank.double().tolist(), labels.tolist(), strict=True)),
            reverse=True,
        )[:k]
        votes = [0.0] * 4
        for similarity, label in near:
            votes[label] += math.exp(similarity / temperature)
        assert row == pytest.approx([vote / sum(votes) for vote in votes], abs=1e-9)


def test_knn_of_bank_itself_returns_own_label():
    """A feature's nearest neighbor is itself; at a low temperature its own label wins, in single precision too."""
    bank = torch.randn(50, 8, generator=torch.Generator().manual_seed(2))
    labels = torch.arange(50) % 7
    scores = knn_scores(100 * bank, bank, labels, 7, 10, 0.001)
    assert torch.equal(scores.argmax(1), labels)
    assert torch.isfinite(scores).all()


def test_clip_k_limits_to_class_size():
    labels = torch.arange(30) % 3
    assert (clip_k(200, labels), clip_k(4, labels), clip_k(200, labels[:2])) == (10, 4, 1)


@pytest.mark.parametrize('k', [1, 2, 5, 9])
def test_topk_accuracy_equals_brute_force(k):
    generator = torch.Generator().manual_seed(3)
    scores, labels = torch.randn(200, 6, generator=generator), torch.randint(6, (200,), generator=generator)
    right = 0
    for row, label in zip(scores.tolist(), labels.tolist(), strict=True):
        right += sum(other > row[label] for other in row) < k
    assert topk_accuracy(scores, labels, k) == pytest.approx(100 * right / 200)


def test_confusion_matrix_equals_brute_force():
    generator = torch.Generator().manual_seed(4)
    scores, labels = torch.randn(80, 5, generator=generator), torch.randint(4, (80,), generator=generator)
    counts = [[0] * 5 for _ in range(5)]
    for row, label in zip(scores.tolist(), labels.tolist(), strict=True):
        counts[label][row.index(max(row))] += 1
    assert confusion_matrix(scores, labels).tolist() == counts


def test_feature_std_is_one_on_sphere_and_zero_in_collapse():
    z = torch.randn(20000, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    unit = [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in z[:50].tolist()]
    by_hand = 0
    for channel in zip(*unit, strict=True):
        mean = sum(channel) / 50
        by_hand += math.sqrt(sum((x - mean) ** 2 for x in channel) / 49) / 16
    assert feature_std(z[:50]).item() == pytest.approx(by_hand * 4)
    assert feature_std(z).item() == pytest.approx(1, abs=0.01)
    assert feature_std(z[:1].expand(50, -1) * torch.arange(1, 51)[:, None]).item() == pytest.approx(0, abs=1e-7)


def test_topk_accuracy_of_ties_and_of_votes():
    """Of equal scores the first class counts as the highest, as in argmax; a class without a vote is no prediction."""
    scores = torch.tensor([[0.0, 2.0, 0.0, 2.0], [3.0, 0.0, 0.0, 0.0]])
    assert topk_accuracy(scores, torch.tensor([1, 0]), 1) == 100
    assert topk_accuracy(scores, torch.tensor([3, 0]), 1) == 50
    assert topk_accuracy(scores, torch.tensor([3, 1]), 2) == 100
    assert topk_accuracy(scores, torch.tensor([3, 1]), 2, least=0) == 50
    assert topk_accuracy(torch.tensor([[float('nan'), 1.0]]), torch.tensor([0]), 1) == 0


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.integers(1, 6))
def test_topk_accuracy_equals_stable_sort(seed, k):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 4, (20, 6), generator=generator).float()
    labels = torch.randint(0, 6, (20,), generator=generator)
    best = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    assert topk_accuracy(scores, labels, k) == pytest.approx(
        100 * (best == labels[:, None]).any(1).double().mean().item()
    )
