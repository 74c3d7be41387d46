"""Which images `select` names: on points made by hand, and through the command."""

import csv
import shutil
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import cli
from conftest import TINY, one_line, own_paths
from metric import subset_selection
from metric.projection_2d import tsne_2d

RUN = 'model_name_simsiam_ckpt_0'


def clusters(sizes, d=8, spread=0.05, seed=0):
    """(x, the cluster of each row): tight groups around far directions."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.linalg.qr(torch.randn(d, d, generator=generator))[0][: len(sizes)]
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return centers[labels] + spread * torch.randn(len(labels), d, generator=generator), labels


@pytest.mark.parametrize('way', [subset_selection.typiclust, subset_selection.k_center_greedy])
def test_typiclust_covers_all_clusters_first(way):
    x, labels = clusters([40, 30, 20, 5])
    rows = way(x, 4)
    assert sorted(labels[rows].tolist()) == [0, 1, 2, 3]


def test_typiclust_selects_typical_of_largest_cluster_first():
    x, labels = clusters([60, 20])
    first, second = subset_selection.typiclust(x, 2).tolist()
    assert labels[first] == 0
    of_first = subset_selection.center_and_normalize(x)[labels == 0]
    middle = of_first @ of_first.mean(0)
    assert (middle > (subset_selection.center_and_normalize(x)[first] @ of_first.mean(0))).sum() < 15


@settings(max_examples=25, deadline=None)
@given(
    st.integers(2, 40),
    st.integers(1, 60),
    st.integers(0, 50),
    st.sampled_from([subset_selection.typiclust, subset_selection.k_center_greedy]),
)
def test_select_returns_count_distinct_rows(n, count, seed, way):
    x = torch.randn(n, 5, generator=torch.Generator().manual_seed(seed))
    rows = way(x, count, seed).tolist()
    assert len(rows) == len({*rows}) == min(n, count)
    assert all(0 <= row < n for row in rows)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(2, 40),
    st.integers(1, 60),
    st.integers(1, 39),
    st.sampled_from([subset_selection.typiclust, subset_selection.k_center_greedy]),
)
def test_select_never_returns_labeled_rows(n, count, known, way):
    x = torch.randn(n, 5, generator=torch.Generator().manual_seed(n))
    labeled = torch.randperm(n, generator=torch.Generator().manual_seed(known))[: min(known, n - 1)].tolist()
    rows = way(x, count, 0, labeled).tolist()
    assert len(rows) == len({*rows}) == min(count, n - len(labeled))
    assert not {*rows} & {*labeled}


@pytest.mark.parametrize('way', [subset_selection.typiclust, subset_selection.k_center_greedy])
def test_select_covers_clusters_without_labels_first(way):
    x, labels = clusters([40, 30, 20, 5])
    labeled = [int((labels == 0).nonzero()[0]), int((labels == 2).nonzero()[0])]
    assert sorted(labels[way(x, 2, 0, labeled)].tolist()) == [1, 3]


def test_select_leaves_out_labeled_images(drawn, tmp_path, capsys):
    """Of a list in which some images have a class: the others are selected, and no more than there are."""
    paths = sorted((drawn / 'train').rglob('*.png'))
    listed = [f'{path}\t{path.parent.name}' if number % 6 == 0 else f'{path}' for number, path in enumerate(paths)]
    (tmp_path / 'set.txt').write_text('\n'.join(listed))
    given = [f'--image_path={tmp_path}/set.txt', '--num_workers=0', '--val_fraction=0', *own_paths(tmp_path)]
    assert cli.main(['train', *TINY, '--max_epochs=1', '--knn_every=0', *given]) == 0
    given = ['select', '--ckpt_name=model_name_simsiam_ckpt_0', f'--output={tmp_path}/out.csv', *own_paths(tmp_path)]
    capsys.readouterr()
    assert cli.main([*given, '--num_select=60']) == 0
    assert '60 of 72 images to label first, beside the 12 labeled ones' in capsys.readouterr().out
    chosen = {line.rsplit('/', 2)[-1] and line for line in (tmp_path / 'out.csv').read_text().split()[1:]}
    assert len(chosen) == 60
    assert not [path for path in paths[::6] if any(str(path).endswith(name) for name in chosen)]
    assert cli.main([*given, '--num_select=61']) == 2
    assert '60 unlabeled images' in capsys.readouterr().err


def test_k_center_greedy_selects_farthest():
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(1))
    rows, directions = subset_selection.k_center_greedy(x, 10).tolist(), subset_selection.center_and_normalize(x)
    for i in range(1, 10):
        near = (directions @ directions[rows[:i]].T).amax(1)
        assert near[rows[i]] == pytest.approx(near.min().item(), abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 60), st.integers(0, 50), st.floats(-0.5, 0.9))
def test_near_groups_are_connected_components(n, seed, least):
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    d = subset_selection.center_and_normalize(x)
    joined = [{i, *(j for j in range(n) if i != j and d[i] @ d[j] > least)} for i in range(n)]
    wanted = []
    for row in joined:  # merge what touches
        touching = [group for group in wanted if group & row]
        wanted = [group for group in wanted if not group & row] + [row.union(*touching)]
    rows, groups, near, cosines = subset_selection.near_groups(x, least)
    found = [set(rows[groups == group].tolist()) for group in groups.unique()]
    assert sorted(map(sorted, found)) == sorted(sorted(group) for group in wanted if len(group) > 1)
    assert [len(group) for group in found] == sorted(map(len, found), reverse=True)
    for row, other, cosine in zip(rows.tolist(), near.tolist(), cosines.tolist(), strict=True):
        assert cosine == pytest.approx(max(float(d[row] @ d[j]) for j in range(n) if j != row), abs=1e-6)
        assert row != other


def test_near_groups_of_4000_equal_images_uses_little_memory():
    """4,000 alike: eight million pairs, in one group."""
    x = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0)) * 1e-4 + torch.eye(8)[0]
    x = torch.cat((x, torch.randn(100, 8)))
    rows, groups, near, cosines = subset_selection.near_groups(x, 0.99)
    assert (groups == 0).sum() >= 4000
    assert len(rows) == len(groups) == len(near) == len(cosines) <= 4100


def test_outliers_finds_odd_image():
    x, _ = clusters([30, 30, 1])
    rows, near = subset_selection.outliers(x, 3)
    assert rows[0] == 60
    assert near.tolist() == sorted(near.tolist())


@pytest.mark.parametrize('count', [2, 4, 12])
def test_near_groups_of_equal_images_is_one_group(count):
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).expand(count, -1) + 1
    rows, groups, _, cosines = subset_selection.near_groups(x, 0.99)
    assert (rows.tolist(), groups.tolist()) == ([*range(count)], [0] * count)
    assert cosines.tolist() == pytest.approx([1.0] * count)
    apart = torch.cat((x, -x[:1]))
    assert len(subset_selection.near_groups(apart, 0.99)[0]) == count
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert tsne_2d(x).shape == (count, 2)
        assert sorted(subset_selection.typiclust(x, count).tolist()) == [*range(count)]


def test_select_finds_copied_images(drawn, tmp_path, capsys, monkeypatch):
    """A training image copied into another class and one into val are found, at the head of the list."""
    folder = shutil.copytree(drawn, tmp_path / 'set')
    first, second = sorted((folder / 'train').rglob('*.png'))[:2]
    other = sorted(path for path in (folder / 'train').iterdir() if path != first.parent)[0]
    shutil.copy(first, other / 'copy.png')
    shutil.copy(second, folder / 'val' / second.parent.name / 'leak.png')
    paths = own_paths(tmp_path, 'ckpt', 'cache')
    assert cli.main(['train', *TINY, '--max_epochs=1', f'--image_path={folder}', *own_paths(tmp_path)]) == 0
    options = [f'--ckpt_name={RUN}', *paths, f'--output={tmp_path}/out/chosen.csv', '--duplicates=0.9999']
    assert cli.main(['select', *options, '--num_select=7']) == 0
    said = capsys.readouterr().out
    with open(tmp_path / 'out/chosen.csv', newline='') as file:
        rows = list(csv.reader(file))
    assert rows[0] == ['file']
    assert len({row[0] for row in rows[1:]}) == 7
    with open(tmp_path / 'out/chosen_duplicates.csv', newline='') as file:
        pairs = [frozenset((row['file'], row['nearest_file'])) for row in csv.DictReader(file)]
    names = {
        frozenset((f'{first.parent.name}/{first.name}', f'{other.name}/copy.png')),
        frozenset((f'{second.parent.name}/{second.name}', f'{second.parent.name}/leak.png')),
    }
    assert names <= {*pairs}
    assert ' of the groups in two splits' in said
    for name in ('chosen', 'chosen_duplicates', 'chosen_outliers'):
        with Image.open(tmp_path / f'out/{name}.png') as picture:
            assert picture.width > 100
    none = [torch.zeros(0, dtype=torch.int64)] * 3
    monkeypatch.setattr(subset_selection, 'near_groups', lambda *_: (*none, torch.zeros(0)))
    assert cli.main(['select', *options, '--num_select=7']) == 0  # now there are none: nor an old picture of some
    assert not (tmp_path / 'out/chosen_duplicates.png').exists()
    assert cli.main(['select', *options, '--num_select=100000']) == 2
    assert '--num_select=100000' in one_line(capsys.readouterr().err)
    assert cli.main(['select', *paths]) == 2
    assert 'the newest is --ckpt_name=' in one_line(capsys.readouterr().err)


def test_outliers_of_equal_images_are_typical():
    """Nor are those that lie at the mean of the others."""
    _, near = subset_selection.outliers(torch.ones(6, 4), 3)
    assert near.tolist() == pytest.approx([1.0, 1.0, 1.0])


def test_semi_trains_on_the_list_that_select_writes(drawn, tmp_path):
    given = ['--num_workers=0', *own_paths(tmp_path)]
    assert cli.main(['train', *TINY, f'--image_path={drawn}', '--max_epochs=1', *given]) == 0
    run = '--ckpt_name=model_name_simsiam_ckpt_0'
    assert cli.main(['select', run, '--num_select=9', f'--output={tmp_path}/selected.csv', *given]) == 0
    more = ['--protocol=semi', f'--subset_list={tmp_path}/selected.csv', '--finetune_epochs=1']
    assert cli.main(['evaluate', run, *more, *given]) == 0
