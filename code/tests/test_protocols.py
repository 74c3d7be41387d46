"""Evaluation protocols: optimizers and classifiers against independent ones, and each protocol as a user runs it."""

import csv
import os
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.linear_model import LogisticRegression
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import cli
from conftest import TINY, draw_folder, one_line, own_paths
from dataloader.augment.augmentations import get_augmentation
from dataloader.load_dataset import load_splits, select, supervised_loader
from dataloader.readers.memory import Memory
from dataloader.sources.path_array import PathArray
from optimizer.lars import Lars
from protocols import finetune
from protocols.linear import cache_features, rebatch, train_probe, warn_of_options
from protocols.logistic import L2, holdout_mask, logistic_regression
from protocols.results import load_results
from protocols.semi import class_balanced_rows, rows_from_list, select_labeled_fraction
from protocols.transfer import logistic_eval
from runtime.errors import UserError
from runtime.files import read_metrics
from runtime.options import get_config
from runtime.seeding import generator_for

RUN = 'model_name_simsiam_ckpt_0'


def test_lars_step_equals_formula():
    """Equation 6 and algorithm 1, in numpy: v = m v + lr eta |w| / (|g| + b |w|) (g + b w); w = w - v."""
    rng = np.random.default_rng(0)
    start = [rng.standard_normal((3, 4)), rng.standard_normal(5), np.zeros(3)]
    params = [torch.nn.Parameter(torch.from_numpy(w.copy())) for w in start]
    optimizer, decay = Lars(params, lr=0.0, momentum=0.9, weight_decay=0.05), 0.05
    wanted, velocity = [w.copy() for w in start], [np.zeros_like(w) for w in start]
    for step in range(6):
        rate = 3.0 - 0.4 * step
        optimizer.param_groups[0]['lr'] = rate
        for i, (parameter, w) in enumerate(zip(params, wanted, strict=True)):
            g = rng.standard_normal(w.shape)
            parameter.grad = torch.from_numpy(g)
            size, slope = np.sqrt((w * w).sum()), np.sqrt((g * g).sum())
            local = 0.001 * size / (slope + decay * size) if size > 0 else 1.0
            velocity[i] = 0.9 * velocity[i] + rate * local * (g + decay * w)
            wanted[i] = w - velocity[i]
        optimizer.step()
        for parameter, w in zip(params, wanted, strict=True):
            np.testing.assert_allclose(parameter.detach().numpy(), w, atol=1e-6, rtol=0)
    assert not np.allclose(wanted[0], start[0], atol=1e-3)


def clusters(count, seed):
    """Features of ten overlapping classes, as a backbone gives them: not negative, of unlike scales."""
    generator = torch.Generator().manual_seed(7)
    centers, scales = torch.randn(10, 32, generator=generator), 0.2 + torch.rand(32, generator=generator)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=generator)
    noise = torch.randn(count, 32, generator=generator)
    return (0.75 * centers[labels] + 1.6 * noise).clamp(min=-1).add(1) * scales / 4, labels


def accuracy(weight, bias, x, labels):
    return 100 * (x @ weight.T + bias).argmax(1).eq(labels).double().mean().item()


def test_train_probe_agrees_with_scikit_learn():
    """On the same features, within half a point."""
    x, labels = clusters(6000, 1)
    val_x, val_labels = clusters(6000, 2)
    args = get_config(preset='cifar10')

    def pairs_of(epoch):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
        return ((x[rows], labels[rows]) for rows in order.split(100))

    ours = accuracy(*train_probe(args, pairs_of, len(x), 256, 10), val_x, val_labels)
    theirs = 100 * LogisticRegression(C=1e4, max_iter=2000).fit(x, labels).score(val_x, val_labels)
    assert 60 < theirs < 95
    assert ours == pytest.approx(theirs, abs=0.5)


@pytest.mark.parametrize('l2', [0.01, 1.0, 100.0])
def test_logistic_regression_equals_scikit_learn(l2):
    """The same weights: scikit-learn's C is 1 / l2, and neither penalizes the bias."""
    x, labels = clusters(1500, 3)
    weight, bias = logistic_regression(x.double(), labels, 10, l2, iterations=2000)
    theirs = LogisticRegression(C=1 / l2, tol=1e-9, max_iter=5000).fit(x.double(), labels)
    ours = x.double() @ weight.T + bias
    np.testing.assert_allclose(ours.softmax(1), theirs.predict_proba(x.double()), atol=2e-3)


def test_logistic_regression_of_tiny_features_is_finite():
    """As those of a network of random weights in eval mode: the penalty must not overflow."""
    generator = torch.Generator().manual_seed(0)
    x, labels = 1e-12 * torch.randn(60, 5, generator=generator), torch.arange(60) % 3
    for l2 in L2:
        weight, bias = logistic_regression(x, labels, 3, l2)
        assert (x @ weight.T + bias).isfinite().all()


@pytest.mark.parametrize('scale', [100.0, 0.1, 0.003, 0.0003])
@pytest.mark.parametrize('l2', [1e-6, 1e-3, 1.0, 1e3])
def test_logistic_regression_converges_for_any_feature_scale(scale, l2):
    """In single precision, within its 200 steps, from nothing or from a stronger one."""
    x, labels = clusters(600, 3)
    x = x * scale
    units = x.double() / scale  # the same, in units that its solver can bear
    theirs = LogisticRegression(C=scale**2 / l2, tol=1e-9, max_iter=20000).fit(units, labels)

    def loss(weight, bias):
        value = torch.nn.functional.cross_entropy(x.double() @ weight.double().T + bias.double(), labels)
        return (value + l2 / 1200 * (weight.double() ** 2).sum()).item()

    wanted = loss(torch.from_numpy(theirs.coef_) / scale, torch.from_numpy(theirs.intercept_))
    stronger = logistic_regression(x, labels, 10, 10 * l2)
    for start in (None, stronger):
        assert loss(*logistic_regression(x, labels, 10, l2, start)) == pytest.approx(wanted, abs=2e-3)


def test_train_probe_does_not_depend_on_loader_batches():
    """A batch of 4096 that does not fit into memory at once gives the same classifier as one that does."""
    x, labels = clusters(1000, 4)
    args = get_config(preset='cifar10', probe_epochs=3, probe_learning_rate=1.0)
    found = []
    for size in (1000, 300, 64, 7):
        parts = list(zip(x.split(size), labels.split(size), strict=True))
        found.append(train_probe(args, lambda epoch, parts=parts: parts, 1000, 300, 10))
    for weight, bias in found[1:]:
        torch.testing.assert_close(weight, found[0][0])
        torch.testing.assert_close(bias, found[0][1])
    assert [len(part) for part, _ in rebatch([(x, labels)], 300)] == [300, 300, 300, 100]


def test_cache_features_equal_those_of_first_epochs(drawn):
    args = get_config(
        preset='demo', image_path=str(drawn), cache_path=str(drawn.parent / 'c'), cache_epochs=2, crop_scale=0.3
    )
    crops = supervised_loader(args, load_splits(args)['train'], drop_last=False)
    pairs_of = cache_features(args, torch.nn.Flatten(), crops, 50)
    sums = [torch.cat([x.sum(1) for x, _ in pairs_of(epoch)]).sort().values for epoch in range(4)]
    torch.testing.assert_close(sums[0], sums[2])
    torch.testing.assert_close(sums[1], sums[3])
    assert (len(sums[0]), torch.allclose(sums[0], sums[1])) == (72, False)


def test_label_fraction_is_balanced_and_seeded():
    labels = torch.tensor([0] * 500 + [1] * 300 + [2] * 3)
    rows = class_balanced_rows(labels, 0.1, 0)
    assert torch.bincount(labels[rows]).tolist() == [39, 38, 3]  # what the small class lacks, the others give
    assert torch.equal(rows, class_balanced_rows(labels, 0.1, 0))
    assert not torch.equal(rows, class_balanced_rows(labels, 0.1, 1))
    assert torch.bincount(labels[class_balanced_rows(labels, 0.0001, 0)]).tolist() == [1, 1, 1]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.floats(0.0001, 1.0), st.integers(0, 5))
def test_label_fraction_covers_classes_of_any_size(counts, fraction, seed):
    """As many as the fraction says, one of each class or more; none has two more than another that has some left."""
    labels = torch.cat([torch.full((count,), 2 * number) for number, count in enumerate(counts)])  # with gaps
    rows = class_balanced_rows(labels, fraction, seed)
    found = [int((labels[rows] == 2 * number).sum()) for number in range(len(counts))]
    assert len(rows.unique()) == sum(found) == max(len(counts), round(fraction * len(labels)))
    assert all(1 <= some <= count for some, count in zip(found, counts, strict=True))
    assert all(one + 1 >= max(found) for one, count in zip(found, counts, strict=True) if one < count)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=8))
def test_holdout_mask_leaves_images_in_every_class(counts):
    labels = torch.cat([torch.full((count,), number) for number, count in enumerate(counts)])
    spare = holdout_mask(labels, 0)
    for number, count in enumerate(counts):
        some = int(spare[labels == number].sum())
        assert some <= count // 2
        assert some >= (count > 1)


def test_lbfgs_probe_is_logistic_regression_and_infer_uses_it(trained, drawn, tmp_path, capsys):
    """Transfer to the same images fits the same classifier. Options of LARS and SGD have no effect: a warning."""
    paths = own_paths(trained)
    options = [f'--ckpt_name={RUN}', '--probe_optimizer=lbfgs', '--probe_epochs=3', *paths]
    assert cli.main(['evaluate', *options]) == 0
    said = capsys.readouterr()
    assert said.err == 'warning: --probe_epochs has no effect with --probe_optimizer=lbfgs\n'
    linear = load_results(trained / 'ckpt' / RUN, protocol='linear')[-1]
    other = ['--protocol=transfer', f'--transfer_path={drawn}']
    assert cli.main(['evaluate', f'--ckpt_name={RUN}', *other, *paths]) == 0
    transfer = load_results(trained / 'ckpt' / RUN, protocol='transfer')[-1]
    assert [linear[name] for name in ('top1', 'l2', 'held_out_top1')] == [
        transfer[name] for name in ('top1', 'l2', 'held_out_top1')
    ]
    capsys.readouterr()
    output = tmp_path / 'submission.csv'
    assert cli.main(['infer', f'--ckpt_name={RUN}', f'--image_path={drawn}/val', f'--output={output}', *paths]) == 0
    rows = list(csv.reader(output.read_text().splitlines()))[1:]
    right = sum(row[0].split('/')[-2] == row[1] for row in rows)
    assert 100 * right / len(rows) == pytest.approx(linear['top1'])


@pytest.mark.parametrize(
    ('options', 'count', 'warns'),
    [
        ({}, 2640, True),  # 90 steps
        ({}, 1_281_167, False),
        ({'probe_batch_size': 64}, 2640, False),
        ({'probe_optimizer': 'sgd'}, 100, False),
        ({'probe_optimizer': 'lbfgs'}, 100, False),
    ],
)
def test_lars_with_few_steps_warns(options, count, warns, capsys):
    warn_of_options(get_config(preset='imagenet', **options), count)
    said = capsys.readouterr().err
    assert ('will be far too low; --probe_optimizer=lbfgs' in said) is warns


def test_transfer_with_one_image_per_class_works(drawn, tmp_path):
    args = get_config(preset='demo', image_path=str(drawn), cache_path=str(tmp_path))
    train = load_splits(args)['train']
    one = select(train, class_balanced_rows(train.labels, 0.0001, 0))
    result, _, _ = logistic_eval(args, torch.nn.Flatten(), one, load_splits(args)['val'])
    assert (result['num_train'], result['held_out_top1']) == (3, None)
    assert result['top1'] > 20


def test_subset_list_in_published_format_is_read(drawn, tmp_path):
    """One `n02105855_2933.JPEG` a line; names that several classes have want their class."""
    images = load_splits(get_config(preset='demo', image_path=str(drawn), cache_path=str(tmp_path)))['train']
    names = PathArray(name.replace('/', '/x_' + name.split('/')[0]) for name in images.names)
    unique = replace(images, store=Memory(names, images.pixels))
    path = tmp_path / '1percent.txt'
    path.write_text('x_dots003.png\nx_checks000.png\n\n')
    args = get_config(subset_list=str(path))
    assert [unique.names[row] for row in rows_from_list(args, unique)] == [
        'checks/x_checks000.png',
        'dots/x_dots003.png',
    ]
    path.write_text('dots/003.png\nchecks/003.png\n')
    assert [images.names[row] for row in rows_from_list(args, images)] == ['checks/003.png', 'dots/003.png']
    for text, said in (
        ('003.png', "3 images .* named '003.png': write <class>/003.png"),
        ('', 'names no image'),
        ('dots/003.png\nnone.png', "1 of its 2 names are not in .*; the first is 'none.png'"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=said):
            rows_from_list(args, images)
    path.unlink()
    with pytest.raises(UserError, match='cannot be read'):
        rows_from_list(args, images)


@pytest.fixture(scope='module')
def trained(drawn, tmp_path_factory):
    """A folder with a run of two epochs; the protocols write beside it."""
    folder = tmp_path_factory.mktemp('protocols')
    assert cli.main(['train', *TINY, f'--image_path={drawn}', '--knn_every=0', *own_paths(folder)]) == 0
    return folder


FEW = ('--finetune_epochs=3', '--finetune_batch_size=16')


@pytest.mark.parametrize(
    ('name', 'options', 'keys'),
    [
        (
            'linear',
            ('--protocol=linear', '--cache_features=False', '--probe_epochs=3', '--probe_optimizer=lars'),
            {'top1', 'top5', 'knn_top1', 'knn_top1_untrained'},
        ),
        (
            'linear',
            ('--protocol=linear', '--probe_optimizer=lbfgs'),
            {'top1', 'top5', 'knn_top1', 'knn_top1_untrained', 'l2', 'held_out_top1'},
        ),
        ('knn', ('--protocol=knn', '--knn_raw_pixels=True'), {'top1', 'top5', 'knn_top1_untrained', 'knn_top1_pixels'}),
        (
            'semi_0.3',
            ('--protocol=semi', '--label_fraction=0.3', '--baseline=True', *FEW),
            {'top1', 'top5', 'top1_from_scratch', 'top5_from_scratch'},
        ),
        (
            'transfer_linear_other',
            ('--protocol=transfer', '--transfer_path={other}'),
            {'top1', 'top5', 'l2', 'held_out_top1'},
        ),
        (
            'transfer_finetune_other',
            ('--protocol=transfer', '--transfer_path={other}', '--transfer=finetune', *FEW),
            {'top1', 'top5'},
        ),
    ],
)
def test_protocols_write_result_scalars_and_picture(name, options, keys, trained, tmp_path, capsys):
    """A table, a JSON file, scalars, and a confusion picture whose counts give the accuracy."""
    other = draw_folder(tmp_path / 'other', {'train': 12, 'val': 6})
    options = [option.format(other=other) for option in options]
    assert cli.main(['evaluate', f'--ckpt_name={RUN}', *own_paths(trained), *options]) == 0
    said = capsys.readouterr().out
    result = load_results(trained / 'ckpt' / RUN)[-1]
    assert result['file'].startswith(f'evaluate_{name}_')
    assert {key for key, value in result.items() if isinstance(value, float)} == keys | {'seconds', 'mean_per_class'}
    assert (result['epoch'], result['protocol']) == (2, name.split('_')[0])
    assert f'top-1                 {result["top1"]:6.2f} %' in said
    in_val = {'other': 18}.get(name.split('_')[-1], 24)
    assert result['num_val'] == in_val
    assert sum(result['per_class'].values()) / 3 == pytest.approx(result['top1'])
    events = EventAccumulator(str(trained / 'log' / RUN)).Reload()
    assert events.Scalars(f'results/{name}_top1')[-1].value == pytest.approx(result['top1'])
    assert f'results/{name}_confusion' in events.Tags()['images']
    with Image.open(trained / 'log' / RUN / f'{name}_confusion.png') as picture:
        assert min(picture.size) > 100


def test_finetune_learns_and_keeps_checkpoint(trained, capsys):
    before = next((trained / 'ckpt' / RUN).glob('loss_*')).read_bytes()
    options = (
        '--protocol=semi',
        '--label_fraction=1',
        '--finetune_epochs=30',
        '--finetune_batch_size=16',
        '--finetune_learning_rate=2',
    )
    assert cli.main(['evaluate', f'--ckpt_name={RUN}', *own_paths(trained), *options]) == 0
    result = load_results(trained / 'ckpt' / RUN)[-1]
    assert result['top1'] > 70  # of three classes
    assert next((trained / 'ckpt' / RUN).glob('loss_*')).read_bytes() == before


@pytest.mark.parametrize('scale', [0.05, 0.5])
def test_crop_scale_sets_smallest_crop(scale):
    transform = get_augmentation(get_config(crop_scale=scale), 'crop')
    crops = transform.crop.sample(3000, 96, 96, generator_for('crops'))
    area = crops[:, 2] * crops[:, 3] / 96**2
    assert scale - 0.02 < area.min() < scale + 0.05
    assert area.max() > 0.95
    assert not transform.changes_pixels
    assert 0.45 < crops[:, 4].mean() < 0.55


@pytest.mark.parametrize(
    ('options', 'said'),
    [
        (('--protocol=linaer',), 'the nearest is linear'),
        (('--protocol=transfer',), 'needs --transfer_path=FOLDER'),
        (('--protocol=transfer', '--transfer_path=/nowhere'), '/nowhere is not there'),
        (('--protocol=semi', '--subset_list=/nowhere.txt'), '--subset_list: /nowhere.txt cannot be read'),
        (('--protocol=detection',), 'needs --detection_path=FOLDER'),
        (('--label_fraction=0',), '--label_fraction must lie between'),
    ],
)
def test_invalid_protocol_setup_exits_2(options, said, trained, capsys):
    assert cli.main(['evaluate', f'--ckpt_name={RUN}', *own_paths(trained), *options]) == 2
    assert said in one_line(capsys.readouterr().err)


def test_missing_package_names_install_command(trained, capsys, monkeypatch):
    import importlib

    real = importlib.import_module
    monkeypatch.setattr(importlib, 'import_module', lambda name: real(name.replace('pycocotools', 'no_such_package')))
    assert cli.main(['evaluate', f'--ckpt_name={RUN}', *own_paths(trained), '--protocol=detection']) == 2
    error = one_line(capsys.readouterr().err)
    assert '--protocol=detection needs pycocotools: pip3 install -r ' in error
    assert error.endswith('code/requirements-extra.txt')


def test_protocol_warns_of_unused_options(drawn, tmp_path, capsys):
    paths = (f'--image_path={drawn}', *own_paths(tmp_path))
    assert cli.main(['train', *TINY, '--max_epochs=1', '--knn_every=0', *paths]) == 0
    for protocol, said in (('knn', True), ('label_free', True), ('linear', False)):
        given = (f'--protocol={protocol}', '--probe_epochs=2', '--ckpt_name=model_name_simsiam_ckpt_0')
        assert cli.main(['evaluate', *given, *paths]) == 0
        errors = capsys.readouterr().err
        assert (f'warning: --probe_epochs has no effect on --protocol={protocol}' in errors) == said


@pytest.mark.parametrize(
    ('content', 'rows', 'said'),
    [
        (b'\xef\xbb\xbfchecks/000.png\r\ndots/001.png\r\nstripes/002.png', 3, ''),
        (b'checks/000.png\ndots/001.png', 2, '1 of 3 classes have no image, such as stripes'),
        (b'checks/000.png\nchecks/000.png\ndots/001.png\nstripes/002.png', 3, '1 of its 4 names occur twice'),
    ],
)
def test_subset_list_with_bom_and_blank_lines_is_read(content, rows, said, drawn, tmp_path, capsys):
    path = tmp_path / 'list.txt'
    path.write_bytes(content)
    args = get_config(preset='demo', image_path=str(drawn), subset_list=str(path), protocol='semi')
    assert len(select_labeled_fraction(args, load_splits(args)['train'])) == rows
    assert said in capsys.readouterr().err


def test_semi_with_one_label_exits_2(drawn, tmp_path):
    folder = tmp_path / 'set'
    shutil.copytree(drawn, folder)
    name = os.fsencode(folder / 'train/dots') + b'/caf\xe9.png'
    shutil.copy(folder / 'train/dots/000.png', name)
    path = tmp_path / 'list.txt'
    args = get_config(preset='demo', image_path=str(folder), subset_list=str(path), cache_path=str(tmp_path))
    path.write_bytes(b'caf\xe9.png\nchecks/000.png')
    assert len(select_labeled_fraction(args, load_splits(args)['train'])) == 2
    path.write_bytes(b'caf\xe9.png')
    with pytest.raises(UserError, match='only one image has a label; fine-tuning needs two'):
        select_labeled_fraction(args, load_splits(args)['train'])


def test_unlabeled_images_are_counted(drawn, tmp_path, trained, capsys):
    """They are left out, in train and in val, and that is said; of val nothing but the labeled images counts."""
    names = {split: sorted((drawn / split).rglob('*.png')) for split in ('train', 'val')}
    for split, paths in names.items():
        lines = [
            f'{path}\t{path.parent.name}' if i % 2 or split == 'val' else str(path) for i, path in enumerate(paths)
        ]
        (tmp_path / f'{split}.txt').write_text('\n'.join(lines))
    given = ('evaluate', f'--ckpt_name={RUN}', *own_paths(trained), '--probe_epochs=2')
    for more in ((f'--image_path={tmp_path}',), ('--protocol=transfer', f'--transfer_path={tmp_path}')):
        assert cli.main([*given, *more]) == 0
        assert '36 of the 72 images of train have no class, and are left out' in capsys.readouterr().out
    half = [
        line if i % 2 else line.split('\t')[0] for i, line in enumerate((tmp_path / 'val.txt').read_text().split('\n'))
    ]
    (tmp_path / 'val.txt').write_text('\n'.join(half))
    (tmp_path / 'labeled').mkdir()
    for split, lines in (('train', (tmp_path / 'train.txt').read_text().split('\n')), ('val', half)):
        (tmp_path / 'labeled' / f'{split}.txt').write_text('\n'.join(line for line in lines if '\t' in line))
    for more in (given[-1:], ('--protocol=knn',), ('--protocol=compare', '--labels=2')):
        said = []
        for folder in (tmp_path, tmp_path / 'labeled'):
            assert cli.main([*given[:-1], *more, f'--image_path={folder}']) == 0
            said.append(capsys.readouterr().out)
        assert '12 of the 24 images of val have no class, and are left out' in said[0]
        numbers = [re.findall(r'[\d.]+(?= %| ±)', text) for text in said]
        assert numbers[0]
        assert numbers[0] == numbers[1]
    assert cli.main([*given[:-1], '--protocol=transfer', f'--transfer_path={tmp_path}']) == 0
    assert '12 of the 24 images of val have no class, and are left out' in capsys.readouterr().out
    (tmp_path / 'val.txt').write_text('\n'.join(line.split('\t')[0] for line in half))
    assert cli.main([*given[:-1], '--protocol=transfer', f'--transfer_path={tmp_path}']) == 2
    assert 'needs images of two classes in train, and labels in val' in one_line(capsys.readouterr().err)


def test_knn_in_training_counts_labeled_images_of_val(drawn, tmp_path):
    """The same accuracy as with the labeled images alone."""
    lines = {
        split: [f'{path}\t{path.parent.name}' for path in sorted((drawn / split).rglob('*.png'))]
        for split in ('train', 'val')
    }
    for name, val in (
        ('half', [line if i % 2 else line.split('\t')[0] for i, line in enumerate(lines['val'])]),
        ('labeled', lines['val'][1::2]),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / 'train.txt').write_text('\n'.join(lines['train']))
        (folder / 'val.txt').write_text('\n'.join(val))
        assert cli.main(['train', *TINY, '--max_epochs=1', f'--image_path={folder}', *own_paths(folder)]) == 0
    half, labeled = (read_metrics(tmp_path / name / 'ckpt' / RUN / 'metrics.jsonl') for name in ('half', 'labeled'))
    for key in ('pretraining/knn_top1', 'pretraining/few_labels_top1'):
        assert [line[key] for line in half] == [line[key] for line in labeled]


def test_label_free_with_few_images_exits_2(tmp_path, trained, capsys):
    folder = draw_folder(tmp_path / 'set', {'train': 4, 'val': 1})
    given = ('evaluate', f'--ckpt_name={RUN}', *own_paths(trained), '--protocol=label_free', f'--image_path={folder}')
    assert cli.main(given) == 2
    assert 'has 12, and it needs 20' in one_line(capsys.readouterr().err)


def test_result_file_name_is_valid_for_any_folder(drawn, tmp_path, trained):
    folder = tmp_path / ('n' * 240)
    shutil.copytree(drawn, folder)
    given = ('evaluate', f'--ckpt_name={RUN}', *own_paths(trained), '--protocol=transfer')
    assert cli.main([*given, f'--transfer_path={folder}']) == 0
    os.rename(folder, os.fsencode(tmp_path) + b'/by\xff')
    assert cli.main([*given, f'--transfer_path={os.fsdecode(os.fsencode(tmp_path))}/by\udcff']) == 0


@pytest.mark.parametrize('protocol', ['semi', 'transfer'])
def test_finetune_with_infinite_loss_fails(protocol, trained, drawn, tmp_path, capsys, monkeypatch):
    """Scores that are no numbers would be an accuracy: all images the first class."""
    folder = shutil.copytree(trained / 'ckpt', tmp_path / 'ckpt')
    before = {*folder.rglob('evaluate_*')}
    monkeypatch.setattr(finetune, 'cross_entropy', lambda scores, labels: scores.mean() * float('inf'))
    given = [f'--ckpt_name={RUN}', f'--protocol={protocol}', '--finetune_epochs=2']
    if protocol == 'transfer':
        given += ['--transfer=finetune', f'--transfer_path={drawn}']
    assert cli.main(['evaluate', *given, '--num_workers=0', '--amp=off', *own_paths(tmp_path)]) == 1
    line = [line for line in capsys.readouterr().err.splitlines() if line.startswith('error')]
    assert 'try a lower --finetune_learning_rate' in one_line('\n'.join(line))
    assert {*folder.rglob('evaluate_*')} == before
