"""The files beside code/: shell scripts, the Makefile's promises, requirements, the layout."""

import contextlib
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import time

import pytest

from conftest import CODE, TINY

ROOT = CODE.parent
FAKE_DOCKER = """#!/bin/sh
echo "$@" >> "$DOCKER_LOG"
case "$*" in
    version*) [ -z "$DAEMON" ] || { echo "$DAEMON" >&2; exit 1; } ;;
    *Runtimes*) echo "$RUNTIMES" ;;
    *Devices*) echo "$DEVICES" ;;
    run*) exit "${RUN_CODE:-0}" ;;
esac
[ "$1" != "$FAILS" ]
"""
FAKE_SMI = '#!/bin/sh\n[ -n "$GPU" ]\n'
WITH_NVIDIA = '{"nvidia":{},"runc":{}}'


@pytest.fixture
def docker(tmp_path):
    """Run setup-docker.sh in a copy of the repository's top, with a docker that writes down how it was called."""
    (tmp_path / 'top').mkdir()
    (tmp_path / 'bin').mkdir()
    shutil.copy(ROOT / 'setup-docker.sh', tmp_path / 'top')
    for name, text in (('docker', FAKE_DOCKER), ('nvidia-smi', FAKE_SMI)):
        (tmp_path / 'bin' / name).write_text(text)
        (tmp_path / 'bin' / name).chmod(0o755)
    log = tmp_path / 'calls'

    def call(*argv, **environment):
        """(the finished process, what docker was called with but for the looks at it, in order)"""
        log.write_text('')
        path = f'{tmp_path}/bin:{os.environ["PATH"]}'
        environment = {'PATH': path, 'DOCKER_LOG': str(log)} | environment
        done = subprocess.run(
            [str(tmp_path / 'top/setup-docker.sh'), *argv],
            cwd='/',
            env=environment,
            check=False,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        return done, [line for line in log.read_text().splitlines() if not line.startswith(('version', 'info'))]

    call.top, call.bin = tmp_path / 'top', tmp_path / 'bin'
    return call


def test_docker_script_runs_from_any_folder(docker, tmp_path):
    (tmp_path / 'a:b').mkdir()
    done, calls = docker('train', DATA=f'{tmp_path}/a:b')
    assert (done.returncode, calls) == (2, [])
    assert done.stderr == f'error: DATA={tmp_path}/a:b: docker takes no folder with a colon in its name\n'
    (tmp_path / 'elsewhere').mkdir()
    link = tmp_path / 'elsewhere/run.sh'
    link.symlink_to(docker.top / 'setup-docker.sh')
    (tmp_path / 'some where').mkdir()
    environment = {'PATH': f'{docker.bin}:{os.environ["PATH"]}', 'DOCKER_LOG': str(tmp_path / 'calls')}
    environment |= {'CDPATH': str(tmp_path), 'DATA': 'some where', 'GPU': '1', 'RUNTIMES': '{"runc":{}}'}
    for command in (['tensorboard', '--reload_interval=5'], ['train', '--device', 'cpu']):
        given = {'cwd': tmp_path, 'env': environment, 'check': False, 'capture_output': True, 'text': True}
        done = subprocess.run([link, *command], **given)
        assert done.returncode == 0, done.stderr
    calls = [line for line in (tmp_path / 'calls').read_text().splitlines() if line.startswith('run')]
    assert all(f'--volume {tmp_path}/some where:/home/data ' in call for call in calls)
    assert '--logdir /home/data/logs --reload_interval=5 ' in calls[0]
    assert calls[1].endswith(' simsiam train --device cpu')
    assert not (tmp_path / 'elsewhere/data').exists()


def test_docker_script_passes_command_and_mounts_data(docker):
    done, calls = docker('evaluate', '--ckpt_name=some run')
    assert done.returncode == 0, done.stderr
    assert calls[0] == 'build --tag simsiam .'
    assert calls[-1].startswith('run ')
    assert calls[-1].endswith(' simsiam evaluate --ckpt_name=some run')
    assert f'--volume {docker.top}/data:/home/data ' in calls[-1]
    assert f'--user {os.getuid()}:{os.getgid()} ' in calls[-1]
    for option in ('--gpus', '--device', '--tty', '--publish'):
        assert option not in calls[-1]
    assert (docker.top / 'data').is_dir()


def test_docker_script_returns_exit_code(docker):
    assert docker('train', '--batchsize=4', RUN_CODE='2')[0].returncode == 2


@pytest.mark.parametrize(
    ('runtimes', 'devices', 'wanted'),
    [
        (WITH_NVIDIA, '', ' --gpus all simsiam train'),
        ('{"runc":{}}', '[{"Source":"cdi","ID":"nvidia.com/gpu=all"}]', ' --device nvidia.com/gpu=all simsiam train'),
    ],
)
def test_docker_script_uses_gpus_and_trains_by_default(runtimes, devices, wanted, docker):
    _, calls = docker(RUNTIMES=runtimes, DEVICES=devices, GPU='1')
    assert calls[-1].endswith(wanted)


@pytest.mark.parametrize('command', [['runs'], ['pack', '--output=x'], ['train', '--help'], ['--help=views'], ['help']])
def test_docker_script_without_gpu_need_requests_none(command, docker):
    done, calls = docker(*command, GPU='1', RUNTIMES='{"runc":{}}')
    assert done.returncode == 0, done.stderr
    assert calls[-1].endswith(' simsiam ' + ' '.join(command))


def test_docker_script_runs_without_gpu(docker):
    _, calls = docker('train', RUNTIMES=WITH_NVIDIA)
    assert '--gpus' not in calls[-1]
    _, calls = docker('train', '--device=cpu', GPU='1')
    assert calls[-1].endswith(' simsiam train --device=cpu')


def test_docker_script_under_sudo_keeps_owner(docker):
    (docker.top / 'data').mkdir()
    _, calls = docker('train', SUDO_UID='1234', SUDO_GID='567')
    assert '--user 1234:567 ' in calls[-1]


@pytest.mark.skipif(os.getuid() != 0, reason='only root may give a folder to another')
def test_docker_script_under_sudo_creates_data_for_user(docker):
    docker('train', SUDO_UID='1234', SUDO_GID='567')
    assert ((docker.top / 'data').stat().st_uid, (docker.top / 'data').stat().st_gid) == (1234, 567)


def test_docker_script_pushes_to_named_registry(docker, tmp_path):
    (tmp_path / 'mine').mkdir()
    _, calls = docker('train', REGISTRY='registry.example/me/', IMAGE='simsiam:1', DATA=f'{tmp_path}/mine')
    name = 'registry.example/me/simsiam:1'
    assert calls[:2] == [f'build --tag {name} .', f'push {name}']
    assert f'--volume {tmp_path}/mine:/home/data ' in calls[2]
    assert calls[2].endswith(f' {name} train')
    assert not (docker.top / 'data').exists()


def test_docker_script_resolves_data_in_current_folder(docker, tmp_path):
    (tmp_path / 'mine').mkdir()
    _, calls = docker('train', DATA=f'{tmp_path.relative_to("/")}/mine')  # the fixture calls it in /
    assert f'--volume {tmp_path}/mine:/home/data ' in calls[-1]


def test_docker_script_binds_tensorboard_to_localhost(docker):
    done, calls = docker('tensorboard', PORT='7007', GPU='1')
    assert 'TensorBoard: http://localhost:7007' in done.stdout
    assert '--publish 127.0.0.1:7007:6006 --entrypoint tensorboard simsiam --logdir /home/data/logs' in calls[-1]


def test_docker_script_runs_torchrun(docker):
    _, calls = docker('torchrun', '--nproc_per_node=8', 'cli.py', 'train')
    assert calls[-1].endswith(' --entrypoint torchrun simsiam --nproc_per_node=8 cli.py train')


@pytest.mark.parametrize(
    ('environment', 'said'),
    [
        (
            {'DAEMON': 'Cannot connect to the Docker daemon at unix:///var/run/docker.sock'},
            'error: the docker daemon does not answer: sudo systemctl start docker, or start Docker Desktop',
        ),
        (
            {'DAEMON': 'permission denied while trying to connect to the Docker daemon socket'},
            'error: docker may only be used by root and the group docker: sudo ./setup-docker.sh',
        ),
        ({'GPU': '1', 'RUNTIMES': '{"runc":{}}'}, 'error: there is a GPU, but docker cannot reach it; install'),
        ({'DATA': '/nowhere'}, 'error: DATA=/nowhere is not a folder'),
        ({'FAILS': 'build'}, 'error: the image was not built'),
        (
            {'FAILS': 'push', 'REGISTRY': 'registry.example/me'},
            'error: registry.example/me/simsiam was not pushed: docker login registry.example?',
        ),
    ],
)
def test_docker_script_names_missing_argument(environment, said, docker):
    done, calls = docker('train', **environment)
    assert done.returncode == (2 if 'DATA' in environment else 1)
    assert not [call for call in calls if call.startswith('run')]
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(said)


def test_docker_script_without_docker_fails_in_one_line(docker):
    (docker.bin / 'docker').unlink()
    for name in ('bash', 'dirname', 'id', 'env'):
        (docker.bin / name).symlink_to(shutil.which(name))
    done, _ = docker('train', PATH=str(docker.bin))
    assert (done.returncode, done.stderr) == (
        1,
        'error: docker is not installed: https://docs.docker.com/engine/install\n',
    )


def test_docker_image_files_work_for_unknown_user(drawn, tmp_path):
    """The Dockerfile's files, laid out as it says; a user whom the system does not know."""
    if os.getuid() != 0 or not shutil.which('setpriv'):
        pytest.skip('to become another user takes root and setpriv')
    home = tmp_path / 'home'
    home.mkdir()
    for source, target in re.findall(r'^COPY (.*) /home(\S*)$', (ROOT / 'Dockerfile').read_text(), re.M):
        for name in source.split():
            path = ROOT / name
            if path.is_dir():
                shutil.copytree(
                    path, f'{home}{target}', ignore=shutil.ignore_patterns('tests', 'results', 'bench', '__pycache__')
                )
            else:
                shutil.copy(path, f'{home}{target}')
    (home / 'data/photos').parent.mkdir()
    shutil.copytree(drawn, home / 'data/photos')
    subprocess.run(['chown', '-R', '12345:12345', home / 'data'], check=True)
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(0o755)
    # It may read all files, for this machine's Python may lie where only root looks; and write its own alone.
    become = [
        'setpriv',
        '--reuid=12345',
        '--regid=12345',
        '--clear-groups',
        '--inh-caps=+dac_read_search',
        '--ambient-caps=+dac_read_search',
    ]
    environment = {
        'PATH': os.environ['PATH'],
        'HOME': '/tmp',
        'USER': 'simsiam',
        'PYTHONDONTWRITEBYTECODE': '1',
        'SIMSIAM_COMMIT': 'abc123',
    }
    run = 'model_name_simsiam_ckpt_0'
    commands = (
        ['train', *TINY, '--image_path=data/photos', '--evaluate_after=True'],
        ['infer', f'--ckpt_name={run}'],
        ['report', f'--ckpt_name={run}'],
    )
    code = f'import cli, sys; sys.exit(max(map(cli.main, {commands})))'
    words = [*become, sys.executable, '-c', code]
    done = subprocess.run(words, cwd=home / 'code', env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for file in ('submission.csv', f'logs/{run}/report.html', f'checkpoints/{run}/run.json'):
        assert (home / 'data' / file).stat().st_uid == 12345
    assert json.loads((home / f'data/checkpoints/{run}/run.json').read_text())['versions']['commit'] == 'abc123'


def test_docker_context_is_small_and_complete():
    kept = [line[1:] for line in (ROOT / '.dockerignore').read_text().splitlines() if line.startswith('!')]
    assert kept == ['requirements.txt', 'code']
    left_out = ('code/tests', 'code/results', 'code/bench')
    assert {*left_out} <= {*(ROOT / '.dockerignore').read_text().splitlines()}
    for source, _ in re.findall(r'^COPY (.*) (/home\S*)$', (ROOT / 'Dockerfile').read_text(), re.M):
        for name in source.split():
            assert name.split('/')[0] in kept
            assert (ROOT / name).exists()
    listed = subprocess.run(['git', 'ls-files', *kept], cwd=ROOT, capture_output=True, text=True, check=False)
    copied = [path for path in listed.stdout.split() if not path.startswith(tuple(f'{folder}/' for folder in left_out))]
    assert sum((ROOT / path).stat().st_size for path in copied) < 1e6


def test_shell_scripts_pass_shellcheck():
    checker = shutil.which('shellcheck')
    if not checker:
        pytest.skip('shellcheck is not installed (Debian: apt-get install shellcheck)')
    scripts = [ROOT / 'setup-docker.sh', ROOT / '.ci/run', *CODE.glob('*/*.sh')]
    subprocess.run([checker, *scripts], check=True)


def test_requirements_have_bounds():
    lines = (ROOT / 'requirements.txt').read_text().split()
    packages = {re.match(r'[A-Za-z-]+', line)[0].lower() for line in lines}  # Jinja2 without its number
    assert packages == {
        *('torch', 'torchvision', 'tensorboard', 'fire', 'tqdm', 'pillow'),
        *('scikit-learn', 'matplotlib', 'jinja'),
    }
    for line in lines:
        assert re.fullmatch(r'[A-Za-z-]+2?>=[\d.]+,<\d+', line)
    assert (CODE / 'requirements.txt').read_text() == '-r ../requirements.txt\n'


def test_top_level_has_only_expected_entries():
    """The layout of the first README."""
    listed = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip('this is not a git checkout')
    assert {path.split('/')[0] for path in listed.stdout.split()} == {
        'code',
        'data',
        'images',
        'setup-docker.sh',
        'Dockerfile',
        'requirements.txt',
        'README.md',
        'Makefile',
        'LICENSE',
        'pyproject.toml',
        '.gitignore',
        '.dockerignore',
        '.ci',
    }


def test_gpu_script_stops_on_ctrl_c(tmp_path):
    """bench/gpu.sh at its first measurement, on a terminal: neither this one nor the next goes on."""
    text = (CODE / 'bench/gpu.sh').read_text()
    start = text[: text.index("python3 -c 'import torch;")]
    (tmp_path / 'code/bench').mkdir(parents=True)
    script = tmp_path / 'code/bench/gpu.sh'
    script.write_text(start + 'measure one bash -c "echo begun; sleep 60"\nmeasure two sleep 60\n')
    pid, terminal = pty.fork()
    if not pid:
        os.execvp('bash', ['bash', str(script), str(tmp_path / 'out')])
    said, begun = b'', time.time()
    with contextlib.suppress(OSError):  # the terminal is gone with the last that had it
        while part := os.read(terminal, 1000):
            said += part
            if part.rstrip().endswith(b'begun'):
                os.write(terminal, b'\x03')
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    assert time.time() - begun < 30
    assert b'two' not in said


def test_gpu_script_passes_image_path(tmp_path):
    """bench/gpu.sh with a python3 that writes down how it was called: a folder named relative to code/ reaches every
    command whole, for to those a relative path starts elsewhere."""
    shutil.copytree(CODE / 'bench', tmp_path / 'code/bench')
    (tmp_path / 'some images').mkdir()
    (tmp_path / 'bin').mkdir()
    (tmp_path / 'bin/python3').write_text('#!/bin/sh\nfor word; do printf "%s|" "$word"; done; echo\n')
    (tmp_path / 'bin/python3').chmod(0o755)
    words = ['bench/gpu.sh', '../out', '../some images', '--epochs=60']
    env = {**os.environ, 'PATH': f'{tmp_path / "bin"}:{os.environ["PATH"]}'}
    done = subprocess.run(['bash', *words], cwd=tmp_path / 'code', env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    called = {path.stem: path.read_text() for path in (tmp_path / 'out').glob('*.txt')}
    assert set(called) >= {'tests', 'step', 'epoch', 'loader', 'switches', 'cifar10'}
    for name in ('switches', 'cifar10'):
        assert f'|--image_path={tmp_path / "some images"}|' in called[name]
    assert called['cifar10'].endswith('|--epochs=60|\n')
