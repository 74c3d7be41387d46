"""--amp on a CPU: what the trial in a process of its own decides, and that a run keeps what it began with."""

import json
import shutil
import sys

import pytest
import torch
from torch.nn.functional import cosine_similarity

from conftest import TINY, own_paths, run
from optimizer.sgd import make_sgd, set_learning_rates
from runtime import precision
from runtime.checkpoints.load_state import build_model
from runtime.errors import UserError
from runtime.options import get_config
from runtime.tensors import channels_last
from test_cli import newest, same
from train import train_step

HAS_IT = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
needs_bf16 = pytest.mark.skipif(not HAS_IT, reason='this CPU has no bfloat16')
# What the child may come to: (its code, the dtype of auto, what is said of it, whether it is remembered).
ENDS = {
    'faster': ('print(\'{"ratio": 2.5, "difference": 0.001}\')', torch.bfloat16, '2.5 times as fast', True),
    'not clearly faster': ('print(\'{"ratio": 1.29, "difference": 0.001}\')', None, 'would be 1.3 times', True),
    'another loss': ('print(\'{"ratio": 2.5, "difference": 0.5}\')', None, 'another loss', True),
    'no number': ('print(\'{"ratio": 2.5, "difference": NaN}\')', None, 'another loss', True),
    'illegal instruction': ('import os; os.kill(os.getpid(), 4)', None, 'an illegal instruction', True),
    'killed': ('import os; os.kill(os.getpid(), 9)', None, 'SIGKILL', False),
    'an exception': ('raise MemoryError("no room")', None, 'no room', False),
    'silent': ('', None, 'no output', False),
    'too long': ('import time; time.sleep(60)', None, 'longer than', False),
}


@pytest.fixture
def child(monkeypatch, tmp_path):
    """Sets what the trial's process runs, counts how often it ran, and lets it decide."""
    monkeypatch.setattr(precision, 'bf16_benchmark_shared', precision.cached_benchmark)
    monkeypatch.setattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', lambda: True)
    monkeypatch.setattr(precision, 'TIMEOUT_S', 3)
    script, count = tmp_path / 'child.py', tmp_path / 'count'
    monkeypatch.setattr(precision, 'TRIAL', [sys.executable, str(script)])

    def set_to(code):
        script.write_text(f'open({str(count)!r}, "a").write("x")\n{code}\n')
        return lambda: len(count.read_text()) if count.is_file() else 0

    return set_to


@pytest.mark.parametrize('name', ENDS)
def test_bf16_benchmark_decides_precision(name, child, tmp_path, monkeypatch):
    code, dtype, said, remembered = ENDS[name]
    if name == 'too long':
        monkeypatch.setattr(precision, 'TIMEOUT_S', 1)
    times = child(code)
    args = get_config(preset='demo', device='cpu', cache_path=str(tmp_path / 'cache'))
    assert precision.precision(args) == dtype
    assert times() == 1
    assert said in precision.describe_precision(args)
    assert (times() == 1) == remembered
    assert precision.resolve_amp(args).amp == ('bf16' if dtype else 'off')


def test_amp_bf16_with_illegal_instruction_exits_2(child, tmp_path):
    child(ENDS['illegal instruction'][0])
    args = get_config(preset='demo', device='cpu', amp='bf16', cache_path=str(tmp_path))
    with pytest.raises(UserError, match='an illegal instruction on this CPU; try --amp=off'):
        precision.precision(args)


def test_bf16_benchmark_is_cached_per_network_batch_and_machine(child, monkeypatch, tmp_path):
    times = child(ENDS['faster'][0])
    known = {'preset': 'demo', 'device': 'cpu', 'cache_path': str(tmp_path)}
    for changes, count in (({}, 1), ({'random_seed': 1}, 1), ({'batch_size': 32}, 2), ({'proj_dim': 64}, 3)):
        precision.precision(get_config(**known, **changes))
        assert times() == count
    precision.precision(get_config(**known))
    assert times() == 3  # the results of other batches and networks stay in the file
    monkeypatch.setattr(precision, 'cpu_fingerprint', lambda: 'another')
    precision.precision(get_config(**known))
    assert times() == 4
    assert len(json.loads((tmp_path / 'precision.json').read_text())) == 4
    (tmp_path / 'precision.json').write_text('{"damaged"')
    assert precision.precision(get_config(**known)) == torch.bfloat16
    assert len(json.loads((tmp_path / 'precision.json').read_text())) == 1


def test_resumed_run_keeps_precision(child, capsys, tmp_path):
    child(ENDS['faster'][0])
    args = get_config(preset='demo', device='cpu', cache_path=str(tmp_path))
    assert precision.inherit_amp(args, 'off').amp == 'off'
    assert precision.inherit_amp(args, 'bf16').amp == 'bf16'
    assert precision.inherit_amp(args, 'auto').amp == 'off'  # of before this was settled at a run's start
    assert precision.inherit_amp(get_config(preset='demo', device='cpu', amp='off'), 'bf16').amp == 'off'
    assert capsys.readouterr().out == 'benchmarking bfloat16 on this CPU, once for this network and batch\n'
    assert precision.inherit_amp(args, 'fp16').amp == 'off'
    assert 'the run began with --amp=fp16 and continues in float32' in capsys.readouterr().out


@needs_bf16
def test_bf16_benchmark_measures_ratio():
    found = precision.run_in_subprocess(
        json.dumps({'backbone': 'small', 'image_size': 16, 'proj_dim': 32, 'batch_size': 8})
    )
    assert not found['failed']
    assert found['ratio'] > 0


@needs_bf16
def test_bf16_step_is_close_to_float32():
    args = get_config(preset='demo')
    generator, losses, features = torch.Generator().manual_seed(0), {}, {}
    views = [channels_last(torch.randn(32, 3, 32, 32, generator=generator)) for _ in range(2)]
    for dtype in (None, torch.bfloat16):
        model = build_model(args).to(memory_format=torch.channels_last)
        optimizer = make_sgd(model, 0.9, 0.0)
        set_learning_rates(optimizer, 0.05, 0.05, 0.05)
        losses[dtype] = [train_step(model, optimizer, views, amp=precision.MixedPrecision(dtype))[0] for _ in range(5)]
        with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=dtype is not None):
            features[dtype] = model.eval().backbone(views[0]).float()
    torch.testing.assert_close(losses[torch.bfloat16], losses[None], atol=5e-3, rtol=0)
    assert cosine_similarity(features[None], features[torch.bfloat16]).min() > 0.999


@needs_bf16
def test_resumed_run_in_bf16_equals_unbroken_run(drawn, tmp_path):
    common = [*TINY, '--amp=bf16', f'--image_path={drawn}', '--knn_every=0', '--save_every_epochs=1', '--max_epochs=3']
    cache = own_paths(tmp_path, 'cache')
    assert run('train', *common, *cache, *own_paths(tmp_path / 'whole', 'ckpt', 'log')).returncode == 0
    parts = [*cache, *own_paths(tmp_path / 'parts', 'ckpt', 'log')]
    assert run('train', *common, *parts, '--max_minutes=0.0001').returncode == 0
    auto = [option for option in common if not option.startswith('--amp')]
    resumed = run('train', *auto, *parts, '--resume=auto')
    assert resumed.returncode == 0, resumed.stderr
    assert ', bfloat16' in resumed.stdout
    (_, whole), (_, again) = newest(tmp_path / 'whole'), newest(tmp_path / 'parts')
    assert same(whole['model'], again['model'])
    assert same(whole['optimizer'], again['optimizer'])
    shutil.rmtree(tmp_path)
