"""--tracker: the scalars of metrics.jsonl arrive in each tracker's own file, offline, in one entry a run."""

import json
import sqlite3
import struct
import sys
import time

import pytest

import cli
from conftest import TINY, one_line, own_paths, wait_for
from runtime import trackers
from runtime.files import read_metrics
from runtime.trackers import Tracker

RUN = 'model_name_simsiam_ckpt_0'


def records_of(path):
    """The records of a .wandb file: LevelDB's log format (blocks of 32 KiB; checksum, length and kind before each
    part) after seven bytes of its own."""
    data, at, whole = path.read_bytes(), 7, b''
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack('<HB', data[at + 4 : at + 7])
        if at + 7 + length > len(data):  # being written
            return
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield whole
            whole = b''


def in_wandb(folder):
    """{entry: {epoch: {tag: number}}} of what was written offline."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = {}
    for path in sorted(folder.glob('log/wandb/offline-run-*/*.wandb')):
        entry = None
        for data in records_of(path):
            record = Record.FromString(data)
            entry = record.run.run_id or entry
            if record.HasField('history'):
                items = record.history.item
                values = {item.nested_key[0] if item.nested_key else item.key: item.value_json for item in items}
                values = {name: json.loads(value) for name, value in values.items()}
                found.setdefault(entry, {}).setdefault(values.pop('epoch'), {}).update(values)
    return found


def in_trackio(folder):
    found = {}
    with sqlite3.connect(folder / 'trackio/simsiam.db') as data:
        for name, step, values in data.execute('select run_name, step, metrics from metrics'):
            found.setdefault(name, {}).setdefault(step, {}).update(json.loads(values))
    return found


def in_mlflow(folder):
    found = {}
    with sqlite3.connect(folder / 'log/mlflow.db') as data:
        for name, step, key, value in data.execute('select run_uuid, step, key, value from metrics'):
            found.setdefault(name, {}).setdefault(step, {})[key] = value
    return found


@pytest.mark.parametrize('name', ['wandb', 'trackio', 'mlflow'])
def test_tracker_gets_scalars_of_tensorboard(name, drawn, tmp_path, monkeypatch):
    """A run that is stopped in its first epoch, gone on with, and evaluated: one entry."""
    for variable in ('WANDB_PROJECT', 'MLFLOW_TRACKING_URI', 'MLFLOW_EXPERIMENT_NAME'):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('TRACKIO_DIR', str(tmp_path / 'trackio'))
    pytest.importorskip(name)  # trackio looks at where to write when it is imported
    options = (f'--tracker={name}', '--knn_every=1', '--resume=auto', f'--image_path={drawn}', *own_paths(tmp_path))
    assert cli.main(['train', *TINY, *options, '--max_minutes=0.00001']) == 0
    assert cli.main(['train', *TINY, *options[:2], *options[3:], f'--resume={RUN}', '--save_every_epochs=7']) == 0
    time.sleep(1.1)  # wandb calls its folders by the second in which an entry is opened
    assert cli.main(['evaluate', f'--ckpt_name={RUN}', f'--tracker={name}', *own_paths(tmp_path)]) == 0
    read = {'wandb': in_wandb, 'trackio': in_trackio, 'mlflow': in_mlflow}[name]
    # wandb's own process writes its file's end after `finish` has returned
    wait_for(lambda: 'results/linear_top1' in next(iter(read(tmp_path).values())).get(2, {}))
    ((_, found),) = read(tmp_path).items()
    logged = read_metrics(tmp_path / 'ckpt' / RUN / 'metrics.jsonl')
    assert [line['epoch'] for line in logged] == [0, 1, 2]
    for line in logged:
        for tag, value in line.items():
            if '/' in tag:
                assert found[line['epoch']][tag] == pytest.approx(value, nan_ok=True), tag
    if name == 'mlflow':
        with sqlite3.connect(tmp_path / 'log/mlflow.db') as data:
            tags = dict(data.execute("select key, value from tags where key like 'now %'"))
        assert tags == {'now save_every_epochs': '7'}
    result = json.loads(next((tmp_path / 'ckpt' / RUN).glob('evaluate_linear_*.json')).read_text())
    assert found[2]['results/linear_top1'] == pytest.approx(result['top1'])


def test_missing_tracker_package_exits_2(drawn, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'wandb', None)
    assert cli.main(['train', *TINY, '--tracker=wandb', f'--image_path={drawn}', *own_paths(tmp_path)]) == 2
    assert '--tracker=wandb needs wandb: pip3 install' in one_line(capsys.readouterr().err)
    assert not (tmp_path / 'ckpt').exists()


def test_failing_tracker_start_exits_2(drawn, tmp_path, capsys, monkeypatch):
    pytest.importorskip('mlflow')
    monkeypatch.setenv('MLFLOW_TRACKING_URI', 'sqlite:////dev/null/no.db')
    assert cli.main(['train', *TINY, '--tracker=mlflow', f'--image_path={drawn}', *own_paths(tmp_path)]) == 2
    assert '--tracker=none turns it off' in capsys.readouterr().err


def test_failing_tracker_warns_once(capsys):
    def fails(*_):
        raise ConnectionError('the network\nis gone')

    tracker = Tracker('wandb', fails, fails)
    for epoch in range(3):
        tracker.log(epoch, {'a/b': 1.0})
    tracker.close()
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 2
    assert 'is turned off for this run: the network is gone' in said[0]


def test_failing_tracker_start_leaves_no_run_folder(drawn, tmp_path, capsys, monkeypatch):
    def refuses(*_):
        raise OSError('no such server')

    monkeypatch.setattr(trackers, 'import_tracker', lambda args: None)
    monkeypatch.setattr(trackers, 'mlflow', refuses)
    monkeypatch.setattr('engine.set_up.import_tracker', lambda args: None)
    given = ['train', *TINY, '--knn_every=0', f'--image_path={drawn}', *own_paths(tmp_path)]
    assert cli.main([*given, '--tracker=mlflow']) == 2
    assert '--tracker=mlflow does not start: no such server' in one_line(capsys.readouterr().err)
    assert not list((tmp_path / 'ckpt').iterdir())
    assert cli.main([*given, '--max_epochs=3', '--max_minutes=0.0001']) == 0
    (run,) = (tmp_path / 'ckpt').iterdir()
    assert cli.main(['train', f'--resume={run.name}', '--tracker=mlflow', *own_paths(tmp_path)]) == 2
    assert list(run.glob('loss_*'))
