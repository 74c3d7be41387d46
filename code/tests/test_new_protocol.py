"""A protocol is added by one file and one line: what README.md of this folder says of it, done with a toy protocol."""

import json
import os
import shutil
import subprocess
import sys

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from conftest import CODE, TINY, own_paths

RUN = 'model_name_simsiam_ckpt_0'
TOY = '''"""Which share of val has the class of the image before it: a toy."""

from protocols.protocol import Outcome, Protocol, labelled_splits


def toy(args, model, splits, checkpoint):
    labels = splits['val'].labels
    share = 100 * (labels[1:] == labels[:-1]).double().mean().item()
    return Outcome({'same': share, 'num_train': len(splits['train']), 'num_val': len(labels)})


PROTOCOL = Protocol(toy, labelled_splits, numbers={'same': 'as before'}, smaller='--batch_size', unused=('knn_k',))
'''


def test_a_protocol_is_one_file_and_one_line(drawn, tmp_path):
    code = shutil.copytree(CODE, tmp_path / 'code', ignore=shutil.ignore_patterns('results', 'tests', '__pycache__'))
    (code / 'protocols/toy.py').write_text(TOY)
    config, line = (code / 'config.py').read_text(), 'PROTOCOLS = {\n'
    assert config.count(line) == 1
    (code / 'config.py').write_text(config.replace(line, f"{line}    'toy': 'the class of the image before',\n"))

    def call(*words):
        environment = {**os.environ, 'PYTHONDONTWRITEBYTECODE': '1'}
        done = subprocess.run(
            [sys.executable, 'cli.py', *words], cwd=code, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    call('train', *TINY, '--max_epochs=1', f'--image_path={drawn}', '--knn_every=0', *own_paths(tmp_path))
    assert 'toy: the class of the image before' in call('evaluate', '--help')
    said = call('evaluate', f'--ckpt_name={RUN}', '--protocol=toy', '--knn_k=3', *own_paths(tmp_path))
    assert 'as before' in said
    assert '--knn_k has no effect on --protocol=toy' in said
    (path,) = (tmp_path / 'ckpt' / RUN).glob('evaluate_toy_*.json')
    result = json.loads(path.read_text())
    assert 'knn_k' not in result['settings']
    events = EventAccumulator(str(tmp_path / 'log' / RUN)).Reload()
    assert round(events.Scalars('results/toy_same')[-1].value, 3) == round(result['same'], 3)
    call('report', f'--ckpt_name={RUN}', f'--output={tmp_path}/report.html', *own_paths(tmp_path))
    assert 'as before' in (tmp_path / 'report.html').read_text()
