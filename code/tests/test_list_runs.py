"""The table of runs: what it says of each, by real runs and processes, and how fast."""

import csv
import io
import json
import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cli
from commands import list_runs
from conftest import CODE, TINY, Python, one_line, own_paths, wait_for
from infer import join_names
from logger import Logger
from protocols import collapse_verdict, results
from runtime import console, run_lock
from runtime.files import dumps_nan_safe, read_metrics
from runtime.options import get_config

RUN = 'model_name_simsiam_ckpt_'


def made(root, name, epoch=3, mark=None, **options):
    """A run's folder with its small files."""
    folder = root / 'ckpt' / name
    folder.mkdir(parents=True)
    (folder / 'run.json').write_text(json.dumps({'args': {'max_epochs': 3, 'learning_rate': 0.05, **options}}))
    lines = [{'epoch': i, 'pretraining/loss': -0.1 * i, 'pretraining/rank': 100.0 - i} for i in range(epoch + 1)]
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    if mark:
        (folder / list_runs.LOCK_FILE).write_text(json.dumps(mark))
    return folder


def rows(root, *options):
    return {row['run']: row for row in list_runs.runs(get_config(ckpt_path=str(root / 'ckpt'), **dict(options)))}


def test_linear_of_runs_of_early_versions_and_of_starts(tmp_path):
    """Options that run.json does not have yet hide no result; any average of the start with itself is the start."""
    folder = made(tmp_path, 'run', init_from='weights.pth', image_size=32, start_share=0.5)
    settings = {'image_size': 32, 'npy_axes': 'auto', 'start_share': 0.0}
    for epoch, changed, shown in ((0, {}, '50.00'), (0, {'image_size': 64}, ''), (2, {}, '')):
        result = {'protocol': 'linear', 'epoch': epoch, 'top1': 50.0, 'settings': settings | changed}
        (folder / 'evaluate_linear_1.json').write_text(json.dumps(result))
        assert rows(tmp_path)['run']['linear'] == shown


def test_runs_table_has_state_and_metrics(tmp_path, capsys):
    here = run_lock.lock_content()
    made(tmp_path, 'a')
    made(tmp_path, 'b', epoch=1, learning_rate=0.5)
    made(tmp_path, 'c', epoch=1, mark=here)
    made(tmp_path, 'd', epoch=1, mark={**here, 'started': '1'})  # its number has another process now
    made(tmp_path, 'e', epoch=1, mark={'host': 'elsewhere', 'pid': 1, 'started': '1'})
    (made(tmp_path, 'f', epoch=2) / 'run.json').write_text('{damaged')
    (made(tmp_path, 'g', epoch=2) / 'metrics.jsonl').write_text('{"epoch": 1, "pretraining/loss": -0.1}\n{"epo')
    found = rows(tmp_path)
    states = {name: row['state'] for name, row in found.items()}
    assert states == {
        'a': 'finished',
        'b': 'stopped',
        'c': 'running',
        'd': 'lost',
        'e': 'running on elsewhere',
        'f': 'unknown',
        'g': 'stopped',
    }
    assert (found['b']['epoch'], found['b']['loss'], found['b']['rank']) == ('1/3', '-0.1000', '99.0')
    assert found['b']['options'] == 'learning_rate=0.5'
    assert found['g']['epoch'] == '1/3'
    said = capsys.readouterr().out
    assert all(name in said for name in found)


DAMAGED = (
    *(
        b'',
        b'5',
        b'null',
        b'[1]',
        b'"a"',
        b'\xff\n',
        b'{"epoch"',
        b'{}',
        b'{"a": 1}',
        b'{"args": 3}',
        b'{"top1": null}',
    ),
    *(b'{"top1": "x"}', b'{"epoch": "x", "top1": 3}', b'{"epoch": 1, "pretraining/loss": "low"}', b'{"epoch": [1]}'),
    *(b'{"args": {"max_epochs": "two"}}', b'{"args": {"max_epochs": null, "batch_size": [1, 2], "preset": {}}}'),
    *(b'{"epoch": 0, "pretraining/rank": 3}\n{"epoch": 1, "pretraining/rank": 2}', b'{"epoch": true, "host": []}'),
)


@pytest.mark.parametrize('name', ['run.json', 'metrics.jsonl', 'evaluate_linear_1.json', list_runs.LOCK_FILE])
def test_damaged_run_does_not_affect_others(name, tmp_path, capsys):
    whole = made(tmp_path, 'whole', epoch=2)
    (whole / 'evaluate_linear_1.json').write_text('{"protocol": "linear", "epoch": 2, "top1": 50.0}')
    alone = rows(tmp_path)['whole']
    for number, content in enumerate(DAMAGED):
        (made(tmp_path, f'odd{number}', epoch=1) / name).write_bytes(content)
    (made(tmp_path, 'dangling') / name).unlink(missing_ok=True)
    (tmp_path / 'ckpt/dangling' / name).symlink_to('/nowhere')
    for column in list_runs.COLUMNS:
        found = rows(tmp_path, ('sort', column))
        assert len(found) == len(DAMAGED) + 2
        assert {**found['whole'], 'options': ''} == {**alone, 'options': ''}
    for folder in (tmp_path / 'ckpt').iterdir():
        results.load_results(folder, protocol='linear')
        collapse_verdict.judge_run_metrics(read_metrics(folder / 'metrics.jsonl'))


def test_epoch_0_metrics_are_not_shown(tmp_path, capsys):
    folder = made(tmp_path, 'a', epoch=2)
    lines = [{'epoch': 0, 'pretraining/knn_top1': 40.0}, {'epoch': 1, 'pretraining/loss': -0.1}]
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    (folder / 'evaluate_linear_1.json').write_text('{"protocol": "linear", "epoch": 0, "top1": 50.0}')
    assert [rows(tmp_path)['a'][name] for name in ('knn', 'linear', 'loss')] == ['', '', '-0.1000']
    (folder / 'metrics.jsonl').write_text(json.dumps(lines[0]) + '\n')
    assert [rows(tmp_path)['a'][name] for name in ('knn', 'linear')] == ['40.00', '50.00']


def test_accuracy_on_other_dataset_is_not_shown(tmp_path, capsys):
    folder = made(tmp_path, 'a', epoch=2, image_path='/one')
    for path, top1 in (('/one', 50.0), ('/two', 80.0)):
        result = {'protocol': 'linear', 'epoch': 2, 'top1': top1, 'images': {'path': path}}
        (folder / f'evaluate_linear_{top1}.json').write_text(json.dumps(result))
    assert rows(tmp_path)['a']['linear'] == '50.00'


def test_nan_is_sorted_last(tmp_path, capsys):
    for name, rank in (('a', 3.0), ('b', None), ('c', 1.0), ('d', 2.0)):
        folder = made(tmp_path, name)
        (folder / 'metrics.jsonl').write_text(json.dumps({'epoch': 1, 'pretraining/rank': rank}) + '\n')
    assert [*rows(tmp_path, ('sort', 'rank'))] == ['c', 'd', 'a', 'b']


@pytest.mark.parametrize('column', list_runs.COLUMNS)
def test_runs_are_sorted_by_any_column(column, tmp_path):
    for number, name in enumerate(random.Random(1).sample('abcdefg', 7)):
        folder = made(tmp_path, name, epoch=number % 4)
        if number == 3:
            (folder / 'metrics.jsonl').unlink()
    found = [row[column] for row in list_runs.runs(get_config(ckpt_path=str(tmp_path / 'ckpt'), sort=column))]
    there = [value for value in found if value]
    assert found == there + [''] * (len(found) - len(there))
    keys = there if column in ('run', 'state') else [float(value.split('/')[0]) for value in there]
    assert keys == sorted(keys, reverse=list_runs.COLUMNS[column])


def test_diff_shows_options_that_differ(tmp_path, capsys):
    made(tmp_path, 'a')
    made(tmp_path, 'b', epoch=1, learning_rate=0.5)
    paths = [f'--ckpt_path={tmp_path}/ckpt']
    assert cli.main(['runs', '--diff=a,b', *paths]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1].split() == ['--learning_rate', '0.05', '0.5']
    assert ['epoch', '3/3', '1/3'] in [line.split() for line in said]
    for wrong, why in (('a,x', 'no run x'), ('a', 'needs two runs')):
        assert cli.main(['runs', f'--diff={wrong}', *paths]) == 2
        assert why in one_line(capsys.readouterr().err)
    assert cli.main(['runs', f'--ckpt_path={tmp_path}/none']) == 2
    assert 'there is no run in' in one_line(capsys.readouterr().err)


def test_thousand_runs_are_listed_without_torch(tmp_path):
    for number in range(1000):
        made(tmp_path, f'model_name_x_ckpt_{number}', learning_rate=number / 100)
    command = [
        sys.executable,
        '-X',
        'importtime',
        'cli.py',
        'runs',
        f'--ckpt_path={tmp_path}/ckpt',
        f'--output={tmp_path}/runs.csv',
        '--sort=rank',
    ]
    before = os.times()
    done = subprocess.run(command, cwd=CODE, capture_output=True, text=True, check=True)
    after = os.times()
    assert '| torch\n' not in done.stderr
    assert after.children_user + after.children_system - before.children_user - before.children_system < 2
    assert 'model_name_x_ckpt_999' in done.stdout
    with open(tmp_path / 'runs.csv', newline='') as file:
        assert len(list(csv.DictReader(file))) == 1000


def test_run_state_changes_from_running_to_lost_to_finished(drawn, tmp_path):
    """Killed in the middle; gone on with, it ends, and its mark with it."""
    options = [
        *TINY,
        '--max_epochs=400',
        f'--image_path={drawn}',
        *own_paths(tmp_path),
        '--save_every_epochs=1',
        '--knn_every=0',
    ]
    process = Python('cli.py', 'train', *options)
    folder = tmp_path / 'ckpt' / f'{RUN}0'
    wait_for(lambda: list(folder.glob('loss_*')), 120)
    (row,) = rows(tmp_path).values()
    assert row['state'] == 'running'
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (row,) = rows(tmp_path).values()
    assert row['state'] == 'lost'
    epoch = max(int(path.name.rsplit('_', 1)[1]) for path in folder.glob('loss_*_epoch_*'))  # its line may be missing
    began = json.loads((folder / 'run.json').read_text())['started']
    assert cli.main(['train', *options, f'--max_epochs={epoch + 1}', f'--resume={folder.name}']) == 0
    assert not (folder / list_runs.LOCK_FILE).exists()
    about = json.loads((folder / 'run.json').read_text())
    assert (about['args']['max_epochs'], about['started']) == (epoch + 1, began)
    (row,) = rows(tmp_path).values()
    assert (row['state'], row['epoch']) == ('finished', f'{epoch + 1}/{epoch + 1}')


def test_unwritable_csv_keeps_old_file(tmp_path, monkeypatch):
    made(tmp_path, 'a')
    table = tmp_path / 'runs.csv'
    table.write_text('as it was')

    def full(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(csv, 'writer', full)
    with pytest.raises(OSError, match='No space left'):
        rows(tmp_path, ('output', str(table)))
    assert table.read_text() == 'as it was'
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ['runs.csv']


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(VALUES)
def test_dumps_nan_safe_writes_valid_json(value):
    """What is no number becomes null, and nothing else changes."""

    def refuse(name):
        raise AssertionError(f'{name} is no JSON')

    def same(one, other):
        if isinstance(one, dict):
            return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
        if isinstance(one, list):
            return len(one) == len(other) and all(map(same, one, other))
        return one == other if not isinstance(one, float) or math.isfinite(one) else other is None

    assert same(value, json.loads(dumps_nan_safe(value), parse_constant=refuse))


@pytest.mark.parametrize('before', ['', '{"epoch": 0}\n', '{"epoch": 0}\n{"epoch": 1, "pretrai', '{"epo'])
def test_incomplete_metrics_line_is_skipped(before, tmp_path):
    """As a kill or a full disk leaves it; the next line stands for itself."""
    path = tmp_path / 'metrics.jsonl'
    path.write_text(before)
    logger = Logger(tmp_path / 'log', metrics=path)
    logger.scalars(2, {'pretraining/loss': -0.5})
    logger.scalars(3, {'pretraining/loss': -0.6})
    logger.close()
    kept = [line['epoch'] for line in read_metrics(path)]
    assert kept == [0] * before.startswith('{"epoch": 0}\n') + [2, 3]


@given(st.lists(st.text(st.characters(exclude_characters='\0')) | st.sampled_from(('a;b', '"', 'x\ny')), min_size=1))
def test_join_names_is_reversible(names):
    """infer's top5, whatever the classes are called; a class has a name, so one alone is not empty."""
    if names != ['']:
        cell = io.StringIO(join_names(names), newline='')
        assert next(csv.reader(cell, delimiter=';')) == names


def test_runs_output_follows_links_and_pipes(tmp_path, capsys):
    """Through a link, into a pipe; a folder that is full of others' text, and a name that moves the cursor."""
    made(tmp_path, 'a\n\x1b[2J')
    (tmp_path / 'link.csv').symlink_to(tmp_path / 'target.csv')
    os.mkfifo(tmp_path / 'pipe.csv')
    with subprocess.Popen(['cat', tmp_path / 'pipe.csv'], stdout=subprocess.PIPE, text=True) as reader:
        for name in ('link.csv', 'pipe.csv'):
            assert cli.main(['runs', f'--ckpt_path={tmp_path}/ckpt', f'--output={tmp_path}/{name}']) == 0
        read = reader.communicate(timeout=20)[0]
    assert (tmp_path / 'link.csv').is_symlink()
    assert read == (tmp_path / 'target.csv').read_text().replace('\n\n', '\n')
    said = capsys.readouterr().out
    assert '\x1b' not in said
    assert 'a\\n\\x1b[2J' in said


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full')
def test_full_disk_error_names_file(tmp_path, capsys):
    made(tmp_path, 'a')
    (tmp_path / 'full').symlink_to('/dev/full')
    assert cli.main(['runs', f'--ckpt_path={tmp_path}/ckpt', f'--output={tmp_path}/full']) == 1
    assert f'No space left on device ({tmp_path}/full)' in one_line(capsys.readouterr().err)
    assert Path('/dev/full').is_char_device()


def test_unreadable_json_is_skipped(tmp_path, capsys):
    folder = made(tmp_path, 'a')
    (folder / 'metrics.jsonl').write_text('[' * 100_000 + '\n{"epoch": 1, "pretraining/loss": 1' + '0' * 400 + '}\n')
    (folder / 'run.json').write_text('[' * 100_000)
    assert cli.main(['runs', f'--ckpt_path={tmp_path}/ckpt']) == 0
    assert 'a' in capsys.readouterr().out


@pytest.mark.parametrize('name', ['run', 'ナイキ_ckpt_0', '가방', 'e\u0301te\u0301', '照片\n照片', '', '🙂'])
def test_format_columns_aligns_wide_characters(name):
    """In cells of a terminal, of which a wide letter takes two and an accent of its own none."""
    lines = console.format_columns([['run', 'epoch'], [name, '7'], ['x' * 20, '12']])
    assert len(lines) == 3
    places = [
        console.display_width(line[: line.rindex(last)]) for line, last in zip(lines, ('epoch', '7', '12'), strict=True)
    ]
    assert places == [22, 22, 22]
    for width in (5, 11, 30):
        assert all(console.display_width(console.truncate(line, width)) <= width for line in lines)
