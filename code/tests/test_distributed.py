"""Several processes: the same gradients, statistics, images and results as one; and what happens when one dies."""

import csv
import io
import json
import os
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import warm

import cli
from conftest import CODE, TINY, Python, draw_folder, one_line, own_paths, wait_for
from dataloader import vision
from dataloader.augment.augmentations import get_augmentation
from dataloader.load_dataset import eval_loader, get_iterator
from dataloader.loading.sampler import EpochBatchSampler
from protocols.results import load_results
from runtime import device, distributed
from runtime.distributed import shard_range
from runtime.errors import UserError
from runtime.files import read_metrics
from runtime.options import get_config
from runtime.seeding import generator_for

RUN = 'model_name_simsiam_ckpt_0'
TORCHRUN = ['-m', 'torch.distributed.run', '--nproc_per_node=2', '--standalone']


def begin(*command, **environment):
    """`python *command`, begun; from a warm Python (warm.py), as the processes that torchrun starts."""
    python = warm.started()
    return Python(*command, env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHON_EXEC': python, **environment})


def run(*command):
    return begin(*command).done()


def test_two_ranks_compute_step_of_one(tmp_path):
    """Loss, every gradient, weight and running statistic after three steps, in double precision, to 1e-10. BN
    statistics are shared (torch's SyncBatchNorm has no CPU path; ours has the same formula)."""
    for name, start in (('one', []), ('two', TORCHRUN)):
        done = run(*start, CODE / 'tests/support/one_step.py', tmp_path / name)
        assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ('one', 'two'))
    assert two['losses'] == pytest.approx(one['losses'], abs=1e-10)
    assert len(set(one['losses'])) == 3
    for kind in ('gradients', 'state'):
        assert one[kind].keys() == two[kind].keys()
        for name, value in one[kind].items():
            torch.testing.assert_close(two[kind][name], value, atol=1e-10, rtol=1e-10, msg=name)
    assert max(gradient.abs().max() for gradient in one['gradients'].values()) > 1e-3


@pytest.fixture
def as_one_of(monkeypatch):
    """Pretend to be a process of several, for what needs no communication."""

    def pretend(rank, world):
        monkeypatch.setenv('RANK', str(rank))
        monkeypatch.setenv('WORLD_SIZE', str(world))
        monkeypatch.setenv('MASTER_ADDR', '127.0.0.1')
        monkeypatch.setenv('MASTER_PORT', '1')

    return pretend


@pytest.mark.parametrize('world', [2, 4])
def test_ranks_split_images_without_overlap(world, drawn, tmp_path, as_one_of):
    args = get_config(preset='demo', image_path=str(drawn), cache_path=str(tmp_path), batch_size=8, num_workers=0)
    whole = [[key[0] for key in keys] for keys in get_iterator(args)['train'].batch_sampler]
    shares, in_turn = [], []
    for rank in range(world):
        as_one_of(rank, world)
        train = get_iterator(args)
        shares.append([[key[0] for key in keys] for keys in train['train'].batch_sampler])
        val = eval_loader(args, train['val'].dataset)
        in_turn += [key[0] for keys in val.batch_sampler for key in keys]
        assert len(list(val)) == len(val)
    for batch, *parts in zip(whole, *shares, strict=True):
        assert [index for part in parts for index in part] == batch
    assert sorted(index for batch in whole for index in batch) == list(range(72))
    assert in_turn == list(range(24))


@pytest.mark.parametrize(('blur', 'atol'), [(0.0, 1e-5), (0.5, 0.05)])
def test_ranks_sample_views_of_one_process(blur, atol):
    """Views of the parts of a batch are those of the whole batch (a blur reaches as far as the largest of a batch)."""
    images = torch.randint(0, 256, (8, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    transform = get_augmentation(get_config(image_size=24, blur_prob=blur), 'moco')

    def views(place, these):
        return vision.random_views(these, transform, generator_for(1), shard=place)

    whole = views((0, 8), images)
    for rank in range(4):
        for ours, wanted in zip(views((2 * rank, 8), images[2 * rank : 2 * rank + 2]), whole, strict=True):
            torch.testing.assert_close(ours, wanted[2 * rank : 2 * rank + 2], atol=atol, rtol=0)


OPTIONS = (*TINY, '--max_epochs=3', '--knn_every=1', '--evaluate_after=True', '--probe_optimizer=lars')


def losses_of(said):
    return [(float(loss), float(top1)) for loss, top1 in re.findall(r'epoch \d/3  loss (\S+) .* kNN (\S+) %', said)]


def test_run_with_two_ranks_equals_run_with_one(drawn, tmp_path):
    """The whole command: losses, kNN and linear accuracy, and one set of files."""
    said = {}
    for name, start in (('one', []), ('two', TORCHRUN)):
        done = run(*start, 'cli.py', 'train', *OPTIONS, f'--image_path={drawn}', *own_paths(tmp_path / name))
        assert done.returncode == 0, done.stderr
        said[name] = done.stdout
    assert 'on cpu, 2 processes' in said['two']
    one, two = losses_of(said['one']), losses_of(said['two'])
    assert len(one) == len(two) == 3
    for (loss, top1), (other, other_top1) in zip(one, two, strict=True):
        assert other == pytest.approx(loss, abs=2e-3)
        assert other_top1 == pytest.approx(top1, abs=9)  # two of 24 images
    print('epoch: loss, kNN of one process and of two:', list(zip(one, two, strict=True)))
    one, two = (read_metrics(tmp_path / name / 'ckpt' / RUN / 'metrics.jsonl') for name in ('one', 'two'))
    for tag in ('rank', 'retrieval', 'rank_z', 'std_judged', 'rankme', 'area', 'knn_top1'):  # of the same weights
        assert two[0][f'pretraining/{tag}'] == pytest.approx(one[0][f'pretraining/{tag}'], rel=1e-3), tag
    for tag, rel in (('std', 0.02), ('mean_direction', 0.1), ('norm_z', 0.05)):
        assert two[-1][f'pretraining/{tag}'] == pytest.approx(one[-1][f'pretraining/{tag}'], rel=rel), tag
    varying = '_-?[0-9.]+_|_[0-9a-f]{12}'
    files = {
        name: sorted(re.sub(varying, '_', path.name) for path in (tmp_path / name / 'ckpt' / RUN).iterdir())
        for name in said
    }
    assert files['one'] == files['two']
    result = load_results(tmp_path / 'two/ckpt' / RUN, protocol='linear')[-1]
    assert (result['num_train'], result['num_val']) == (72, 24)
    judge = ('cli.py', 'evaluate', '--protocol=knn', '--amp=off', f'--ckpt_name={RUN}', *own_paths(tmp_path / 'two'))
    done = run(*TORCHRUN, *judge)
    assert done.returncode == 0, done.stderr
    alone = run(*judge)
    assert re.search(r'top-1 .*', done.stdout)[0] == re.search(r'top-1 .*', alone.stdout)[0]


def test_batch_not_divisible_by_ranks_exits_2(drawn, as_one_of, capsys, monkeypatch):
    as_one_of(0, 3)
    monkeypatch.setattr(device, 'init_process_group', lambda device: None)
    assert cli.main(['train', *TINY, f'--image_path={drawn}']) == 2
    assert '--batch_size=16 cannot be split over 3 processes' in capsys.readouterr().err


def test_error_of_all_ranks_is_printed_once(as_one_of, capsys, monkeypatch):
    """By the first of them; what one alone meets, by that one; also where the store has gone."""
    as_one_of(0, 2)
    monkeypatch.setitem(distributed.STORE, 'store', torch.distributed.HashStore())
    for reason in ('a', 'b', 'a', UserError('a')):
        assert cli.print_error(reason, 2) == 2
    assert capsys.readouterr().err == 'error: a\nerror: b\n'
    store = torch.distributed.TCPStore('localhost', 0, is_master=True)
    other = torch.distributed.TCPStore('localhost', store.port)
    del store
    monkeypatch.setitem(distributed.STORE, 'store', other)
    assert cli.print_error('a') == 1
    assert capsys.readouterr().err == 'error: a\n'


def workers_of(parent):
    """The processes that torchrun has started: {rank: pid}."""
    found = {}
    for pid in filter(str.isdigit, os.listdir('/proc')):
        try:
            status = Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()
            if int(status[1]) == parent:
                environment = Path(f'/proc/{pid}/environ').read_text().split('\0')
                found[int(next(v for v in environment if v.startswith('RANK=')).split('=')[1])] = int(pid)
        except (OSError, StopIteration):
            continue
    return found


@pytest.mark.skipif(not os.path.isdir('/proc'), reason='finds processes in /proc, which only Linux has')
def test_dead_rank_ends_others_and_restart_resumes(drawn, tmp_path):
    options = [
        *TINY,
        '--batch_size=8',
        '--max_epochs=4',
        '--knn_every=0',
        f'--image_path={drawn}',
        '--save_every_epochs=1',
        '--keep_checkpoints=2',
        '--resume=auto',
    ]
    whole = run(*TORCHRUN, 'cli.py', 'train', *options, *own_paths(tmp_path / 'whole'))
    assert whole.returncode == 0, whole.stderr
    folder = tmp_path / 'broken/ckpt' / RUN
    again = (*TORCHRUN, '--max-restarts=1')
    process = begin(*again, 'cli.py', 'train', *options, *own_paths(tmp_path / 'broken'))
    wait_for(lambda: list(folder.glob('loss_*')))
    victim, other = (workers_of(process.pid)[rank] for rank in (1, 0))
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: not os.path.exists(f'/proc/{other}') or workers_of(process.pid).get(0) != other, 20)
    said, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert re.search(rf'resuming {RUN} (after epoch \d|in epoch \d, after \d+ images) ', said), said
    one, two = (
        torch.load(next((tmp_path / name / 'ckpt' / RUN).glob('loss_*_epoch_4')), weights_only=True)
        for name in ('whole', 'broken')
    )
    if f'resuming {RUN} after epoch' in said:
        assert all(torch.equal(one['model'][name], two['model'][name]) for name in one['model'])
    for name, value in one['model'].items():  # BN's means may have those of the step in which the other one died
        if 'running' in name:
            torch.testing.assert_close(two['model'][name], value, atol=2e-3, rtol=0, msg=name)
        elif 'num_batches' not in name:
            assert torch.equal(two['model'][name], value), name


def test_checkpoint_within_epoch_has_loss_of_all_ranks(drawn, tmp_path):
    """One of them writes the checkpoint: what the other has seen of the epoch is in it, where the time was up as where
    a checkpoint was due."""
    options = [*TINY, '--batch_size=8', '--max_epochs=4', '--knn_every=0', f'--image_path={drawn}', '--resume=auto']
    train = [*TORCHRUN, 'cli.py', 'train', *options, '--save_every_epochs=1000']
    paths = {name: own_paths(tmp_path / name) for name in ('whole', 'stopped', 'killed')}
    assert run(*train, *paths['stopped'], '--max_minutes=0.00001').returncode == 0
    process = begin(*train, *paths['killed'], '--save_every_minutes=0.0000001')
    wait_for(lambda: list((tmp_path / 'killed/ckpt' / RUN).glob('loss_*_images_*')))
    for number in [*workers_of(process.pid).values(), process.pid]:
        os.kill(number, signal.SIGKILL)
    process.communicate()
    found = {}
    for name, own in paths.items():
        folder = tmp_path / name / 'ckpt' / RUN
        assert name == 'whole' or list(folder.glob('loss_*_images_*'))
        done = run(*train, *own)
        assert done.returncode == 0, done.stderr
        lines = [line for line in read_metrics(folder / 'metrics.jsonl') if 'pretraining/loss' in line]
        found[name] = [line[f'pretraining/{tag}'] for line in lines for tag in ('loss', 'std')]
    assert len(found['whole']) == 8
    assert found['stopped'] == pytest.approx(found['whole'], abs=1e-6)
    assert found['killed'] == pytest.approx(found['whole'], abs=1e-6)


def test_ranks_take_what_rank_0_finds(drawn, tmp_path):
    """The run to resume, the results of an ablation, errors and warnings: said once, and no rank waits for another."""
    given = [*TINY, '--batch_size=8', '--max_epochs=2', '--knn_every=0', f'--image_path={drawn}', *own_paths(tmp_path)]
    train = [*TORCHRUN, 'cli.py', 'train', *given, '--resume=auto', '--start_share=0.5']
    done = run(*train, '--max_minutes=0.00001')
    assert done.returncode == 0, done.stderr
    assert done.stderr.count('--start_share has no effect with random weights') == 1
    done = run(*train, '--learning_rate=0.123')
    assert done.returncode
    assert done.stderr.count('error: --resume=auto: the unfinished run') == 1
    done = run(*TORCHRUN, 'cli.py', 'ablate', *given, '--ablation=similarity', '--probe_epochs=2')
    assert done.returncode == 0, done.stderr
    assert 'not all variants are trained' not in done.stdout
    assert len(json.loads((tmp_path / 'log/similarity.json').read_text())) == 2


def test_local_main_first_prepares_files_once(drawn_large, tmp_path):
    """Into an empty cache, and a set that is drawn: all processes want it at once."""
    options = (
        *TINY,
        '--max_epochs=1',
        '--batch_size=8',
        '--cache_short_side=64',
        '--num_workers=1',
        '--on_unreadable=skip',
    )
    done = run(*TORCHRUN, 'cli.py', 'train', *options, f'--image_path={drawn_large}', *own_paths(tmp_path))
    assert done.returncode == 0, done.stderr
    assert 'kNN' in done.stdout
    assert len(list((tmp_path / 'cache').glob('*.bin'))) == 2
    done = run(*TORCHRUN, CODE / 'tests/support/draw_together.py', tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(re.findall(r'rank \d: .*', done.stdout)) == ['rank 0: drew 150, has 120', 'rank 1: drew 0, has 120']


def test_evaluate_with_more_ranks_than_images_works(tmp_path):
    folder = draw_folder(tmp_path / 'set', {'train': 16, 'val': 1})
    four = [word.replace('=2', '=4') for word in TORCHRUN]
    options = (*TINY, '--max_epochs=1', f'--image_path={folder}', *own_paths(tmp_path))
    done = run(*four, 'cli.py', 'train', *options)
    assert done.returncode == 0, done.stderr
    assert re.search(r'epoch 1/1 .* kNN', done.stdout)


@pytest.fixture(scope='module')
def trained(drawn, tmp_path_factory):
    """One epoch on the drawn set. To be read only."""
    folder = tmp_path_factory.mktemp('trained')
    options = ('--max_epochs=1', '--knn_every=0', f'--image_path={drawn}', *own_paths(folder))
    assert cli.main(['train', *TINY, *options]) == 0
    return folder


@pytest.mark.parametrize(('world', 'batch', 'cached'), [(3, 64, True), (2, 700, False), (4, 71, False)])
def test_linear_with_several_ranks_equals_one(world, batch, cached, trained, tmp_path):
    """However the batch can be cut, and with a last one of one image: 72 are trained on. The classifier is the same."""
    copied = shutil.copytree(trained, tmp_path / 'run')
    weights = {}
    for name, start in (('one', []), ('all', [word.replace('=2', f'={world}') for word in TORCHRUN])):
        options = (
            f'--ckpt_name={RUN}',
            '--amp=off',
            f'--batch_size={batch}',
            '--probe_epochs=3',
            '--probe_batch_size=50',
        )
        done = run(*start, 'cli.py', 'evaluate', *options, f'--cache_features={cached}', *own_paths(copied))
        assert done.returncode == 0, done.stderr
        (path,) = (copied / 'ckpt' / RUN).glob('classifier_*')
        weights[name] = torch.load(path, weights_only=True)
        path.unlink()
    for kind in ('weight', 'bias'):
        torch.testing.assert_close(weights['all'][kind], weights['one'][kind], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize('world', [2, 3, 4])
@pytest.mark.parametrize(('count', 'size', 'drop_last'), [(10, 4, False), (9, 4, False), (3, 8, False), (12, 4, True)])
def test_all_gather_rows_restores_shuffled_batches(count, size, drop_last, world, as_one_of):
    """As distributed.all_gather_rows joins them, each as long as the largest; an image that fills a place is cut
    off."""
    whole = EpochBatchSampler(count, size, 0, 'crop', shuffled=True, drop_last=drop_last)
    batches, sizes, parts = [*whole], whole.sizes(), []
    assert [len(batch) for batch in batches] == sizes
    for rank in range(world):
        as_one_of(rank, world)
        parts.append([*whole])
        for part, number in zip(parts[-1], sizes, strict=True):
            first, of = shard_range(len(part), number)
            assert of == number
            assert 0 <= first <= first + len(part) <= number
    for i, batch in enumerate(batches):
        most = -(-len(batch) // world)
        joined = [key for part in parts for key in part[i] + [None] * (most - len(part[i]))]
        assert joined[: len(batch)] == batch


def test_infer_and_embed_with_two_ranks_equal_one(drawn, tmp_path):
    assert cli.main(['train', *TINY, '--knn_every=0', f'--image_path={drawn}', *own_paths(tmp_path)]) == 0
    written = {}
    for name, start in (('one', []), ('two', TORCHRUN)):
        for command, file in (('infer', 'o.csv'), ('embed', 'f.csv')):
            more = ('--neighbors=3',) if command == 'infer' else ('--projector_images=5',)
            output = tmp_path / f'{name}_{file}'
            argv = (command, f'--ckpt_name={RUN}', f'--output={output}', '--amp=off', *more, *own_paths(tmp_path))
            done = run(*start, 'cli.py', *argv)
            assert done.returncode == 0, done.stderr
            written[name, command] = output.read_text()
    one, two = (list(csv.DictReader(io.StringIO(written[name, 'infer']))) for name in ('one', 'two'))
    assert [row['file'] for row in one] == [row['file'] for row in two]
    shares = [np.array([float(row['confidence']) for row in rows]) for rows in (one, two)]
    np.testing.assert_allclose(*shares, atol=1e-3)
    one, two = (
        np.array([row.split(',')[1:] for row in written[name, 'embed'].splitlines()[1:]], float)
        for name in ('one', 'two')
    )
    np.testing.assert_allclose(one, two, atol=1e-5)


@pytest.mark.parametrize('command', ['report', 'export', 'pack', 'check_dataloader'])
def test_single_process_command_with_torchrun_exits_2(command, as_one_of, capsys):
    as_one_of(1, 2)
    with pytest.raises(SystemExit, match='2'):  # what both have to say is said by the first
        cli.main([command])
    assert not capsys.readouterr().err
    as_one_of(0, 2)
    assert cli.main([command]) == 2
    assert capsys.readouterr().err == f'error: {command} runs in one process: start it without torchrun\n'


@pytest.mark.parametrize(
    ('environment', 'said'),
    [
        ({'WORLD_SIZE': 'abc'}, 'WORLD_SIZE=abc is in the environment and is not a number; torchrun sets it'),
        ({'WORLD_SIZE': '-2'}, 'WORLD_SIZE=-2 is in the environment and is not a number'),
        ({'RANK': ''}, 'RANK= is in the environment and is not a number'),
        ({'LOCAL_RANK': '1.5'}, 'LOCAL_RANK=1.5 is in the environment and is not a number'),
        ({'RANK': '1'}, 'RANK=1 is in the environment and must be below WORLD_SIZE=1'),
        ({'LOCAL_RANK': '1'}, 'LOCAL_RANK=1 is in the environment and must be below LOCAL_WORLD_SIZE=1'),
        (
            {'LOCAL_RANK': '1', 'LOCAL_WORLD_SIZE': '8'},
            'LOCAL_RANK=1 is in the environment and must be below LOCAL_WORLD_SIZE=1',
        ),
        ({'WORLD_SIZE': '0'}, 'WORLD_SIZE=0 is in the environment and is not a number of processes'),
        ({'LOCAL_WORLD_SIZE': '00'}, 'LOCAL_WORLD_SIZE=00 is in the environment and is not a number of processes'),
        (
            {'WORLD_SIZE': '4', 'RANK': '3', 'LOCAL_RANK': '2', 'LOCAL_WORLD_SIZE': '2'},
            'LOCAL_RANK=2 is in the environment and must be below LOCAL_WORLD_SIZE=2',
        ),
        (
            {'WORLD_SIZE': '2', 'RANK': '5', 'MASTER_ADDR': 'a', 'MASTER_PORT': '1'},
            'RANK=5 is in the environment and must be below',
        ),
        ({'WORLD_SIZE': '2'}, 'WORLD_SIZE=2 is in the environment, and RANK is not; torchrun sets it'),
        ({'WORLD_SIZE': '2', 'RANK': '0'}, 'WORLD_SIZE=2 is in the environment, and MASTER_ADDR is not'),
        (
            {'WORLD_SIZE': '2', 'RANK': '0', 'MASTER_ADDR': 'a'},
            'WORLD_SIZE=2 is in the environment, and MASTER_PORT is',
        ),
        *(
            ({'WORLD_SIZE': '2', 'RANK': '0', 'MASTER_ADDR': 'a', 'MASTER_PORT': port}, f'MASTER_PORT={port} is in the')
            for port in ('tcp://10.0.0.7:29500', '29500.0', '-1', '0', '65536')
        ),
    ],
)
def test_invalid_torchrun_environment_exits_2(environment, said, capsys, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cli.main(['train', '--preset=demo']) == 2
    assert said in one_line(capsys.readouterr().err)


@pytest.mark.parametrize('environment', [{}, {'WORLD_SIZE': '1', 'RANK': '0'}])
@pytest.mark.parametrize('port', ['tcp://10.0.0.7:29500', '', '65536'])
def test_single_process_ignores_master_port(environment, port, monkeypatch):
    """Kubernetes sets MASTER_PORT=tcp://... where a service is called master."""
    for name, value in {**environment, 'MASTER_PORT': port}.items():
        monkeypatch.setenv(name, value)
    cli.check_torchrun_env('train')


@pytest.mark.parametrize('rank', [0, 1])
@pytest.mark.parametrize('stopped', [False, True])
def test_missing_ranks_warn_then_fail(rank, stopped, drawn, tmp_path):
    """A signal is heard the while; when the time is up that is an error."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    code = (
        f'import sys; sys.path.insert(0, {str(CODE)!r}); import cli; from runtime import distributed; '
        f'distributed.WARN_AFTER_S = 0.5; distributed.INIT_TIMEOUT_S = {600 if stopped else 1.5}; '
        f'sys.exit(cli.main(sys.argv[1:]))'
    )
    place = {'WORLD_SIZE': '2', 'RANK': str(rank), 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)}
    (tmp_path / 'patient.py').write_text(code)
    process = begin(tmp_path / 'patient.py', 'train', *TINY, f'--image_path={drawn}', *own_paths(tmp_path), **place)
    if stopped:
        wait_for(lambda: 'waiting up to' in process.said()[1])
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=30)
        assert process.returncode == 128 + signal.SIGTERM
    else:
        _, said = process.communicate(timeout=60)
        assert process.returncode == 1
        assert re.search(r'waited for [12] s. Were all processes started, each with its own RANK?', said)
    assert ('1 of 2 processes have started yet' if not rank else 'does not answer yet') in said


def test_srun_without_torchrun_warns(capsys, monkeypatch):
    monkeypatch.setenv('SLURM_STEP_NUM_TASKS', '2')
    assert cli.main(['train', '--preset=nothing']) == 2
    assert 'srun has started 2 processes, and each trains a run of its own' in capsys.readouterr().err


def test_launch_id_is_agreed_after_separate_restarts(tmp_path):
    """torchrun counts on each machine apart, and keeps its store: a start's own keys may depend on neither."""
    store = torch.distributed.TCPStore('localhost', 0, is_master=True, wait_for_workers=False)
    shared = {
        'WORLD_SIZE': '2',
        'MASTER_ADDR': 'localhost',
        'MASTER_PORT': str(store.port),
        'TORCHELASTIC_USE_AGENT_STORE': 'True',
    }
    for count in range(2):
        file, counts = tmp_path / str(count), [str(count * rank) for rank in range(2)]
        pair = [
            begin(
                CODE / 'tests/support/one_step.py',
                file,
                **shared,
                RANK=str(rank),
                TORCHELASTIC_RESTART_COUNT=counts[rank],
            )
            for rank in range(2)
        ]
        assert [process.done(60).returncode for process in pair] == [0, 0]
        assert file.is_file()


def test_signal_to_one_rank_during_metrics_stops_all(drawn, tmp_path):
    """kNN takes most of the time: the other rank waited for the one that had left."""
    options = [*TINY, '--batch_size=24', '--max_epochs=200', f'--image_path={drawn}', *own_paths(tmp_path)]
    folder = tmp_path / 'ckpt' / RUN
    for number in range(3):
        process = begin(*TORCHRUN, 'cli.py', 'train', *options, '--resume=auto')
        wait_for(lambda: workers_of(process.pid).keys() >= {0, 1} and process.said()[0].count('epoch ') > 2)  # noqa: B023
        time.sleep(0.07 * number)
        os.kill(workers_of(process.pid)[1], signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
        assert 'SIGTERM: saved ' in errors, errors
    assert list(folder.glob('loss_*'))


def test_rocm_has_other_names_of_architectures(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.version, 'cuda', None)
    monkeypatch.setattr(torch.cuda, 'get_arch_list', lambda: ['gfx90a'])
    device.unsupported_gpu.cache_clear()
    assert device.unsupported_gpu(0) == ''
    device.unsupported_gpu.cache_clear()


@pytest.mark.parametrize(
    ('major', 'minor', 'architectures', 'works'),
    [
        (8, 0, ['sm_75', 'sm_80', 'sm_90'], True),
        (8, 6, ['sm_75', 'sm_80', 'sm_90'], True),
        (9, 0, ['sm_80', 'sm_90a'], True),
        (6, 1, ['sm_75', 'sm_80', 'sm_90'], False),
        (7, 0, ['sm_75', 'sm_80'], False),
        (12, 0, ['sm_90', 'compute_90'], True),
        (12, 0, ['sm_90'], False),
        (10, 0, ['sm_80', 'sm_100'], True),
        (7, 5, [], True),
    ],
)
def test_gpu_without_kernels_is_recognized(major, minor, architectures, works):
    assert device.has_kernels(major, minor, architectures) is works


def test_gpu_that_torch_is_not_built_for_is_not_used(drawn, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda _: (5, 2))
    monkeypatch.setattr(torch.cuda, 'get_arch_list', lambda: ['sm_80'])
    device.unsupported_gpu.cache_clear()
    try:
        assert device.get_device(get_config()).type == 'cpu'
        assert cli.main(['train', *TINY, '--device=cuda', f'--image_path={drawn}', *own_paths(tmp_path)]) == 2
        assert 'compute capability 5.2' in (error := one_line(capsys.readouterr().err))
        assert '--device=cpu works' in error
    finally:
        device.unsupported_gpu.cache_clear()
