"""The files beside code/: shell scripts, the Makefile's promises, requirements, the layout."""

import os
import re
import shutil
import subprocess

import pytest

from conftest import CODE

ROOT = CODE.parent
FAKE_DOCKER = """#!/bin/sh
echo "$@" >> "$DOCKER_LOG"
[ "$1" = info ] && echo "$RUNTIMES"
[ "$1" != "$FAILS" ]
"""


@pytest.fixture
def docker(tmp_path):
    """Run setup-docker.sh in a copy of the repository's top, with a docker that writes down how it was called."""
    (tmp_path / 'top').mkdir()
    (tmp_path / 'bin').mkdir()
    shutil.copy(ROOT / 'setup-docker.sh', tmp_path / 'top')
    (tmp_path / 'bin/docker').write_text(FAKE_DOCKER)
    (tmp_path / 'bin/docker').chmod(0o755)
    log = tmp_path / 'calls'

    def call(*argv, **environment):
        log.write_text('')
        path = f'{tmp_path}/bin:{os.environ["PATH"]}'
        environment = {'PATH': path, 'DOCKER_LOG': str(log), 'RUNTIMES': '', 'FAILS': ''} | environment
        done = subprocess.run([str(tmp_path / 'top/setup-docker.sh'), *argv], cwd='/', env=environment, check=False,
                              capture_output=True, text=True, stdin=subprocess.DEVNULL)  # fmt: skip
        return done, log.read_text().splitlines()

    call.top = tmp_path / 'top'
    return call


def test_docker_runs_the_given_command_on_data(docker):
    done, calls = docker('evaluate', '--ckpt_name=some run')
    assert done.returncode == 0, done.stderr
    assert calls[0] == 'build --tag simsiam .'
    assert calls[-1].startswith('run ')
    assert calls[-1].endswith(' simsiam evaluate --ckpt_name=some run')
    assert f'--volume {docker.top}/data:/home/data ' in calls[-1]
    assert f'--user {os.getuid()}:{os.getgid()} ' in calls[-1]
    assert '--gpus' not in calls[-1]
    assert '--tty' not in calls[-1]
    assert (docker.top / 'data').is_dir()


def test_docker_uses_gpus_where_the_toolkit_is_and_trains_by_default(docker):
    _, calls = docker(RUNTIMES='{"nvidia":{},"runc":{}}', IMAGE='host/simsiam')
    assert '--gpus all ' in calls[-1]
    assert calls[-1].endswith(' host/simsiam train')


def test_docker_files_belong_to_who_called_sudo(docker):
    _, calls = docker('train', SUDO_UID='1234', SUDO_GID='567')
    assert '--user 1234:567 ' in calls[-1]


def test_docker_pushes_on_request(docker):
    _, calls = docker('push', IMAGE='registry.example/simsiam')
    assert calls == ['build --tag registry.example/simsiam .', 'push registry.example/simsiam']


def test_docker_stops_where_the_build_fails(docker):
    done, calls = docker('train', FAILS='build')
    assert done.returncode != 0
    assert len(calls) == 1


def test_shell_scripts_pass_shellcheck():
    checker = shutil.which('shellcheck')
    if not checker:
        pytest.skip('shellcheck is not installed (Debian: apt-get install shellcheck)')
    subprocess.run([checker, ROOT / 'setup-docker.sh', ROOT / '.ci/run'], check=True)


def test_requirements_are_bounded_and_installable_from_code():
    lines = (ROOT / 'requirements.txt').read_text().split()
    packages = {re.match(r'[A-Za-z]+', line)[0].lower() for line in lines}
    assert packages == {'torch', 'torchvision', 'tensorboard', 'fire', 'tqdm', 'pillow'}
    for line in lines:
        assert re.fullmatch(r'[A-Za-z]+>=[\d.]+,<\d+', line)
    assert (CODE / 'requirements.txt').read_text() == '-r ../requirements.txt\n'


def test_nothing_else_at_the_top():
    """The layout of the first README."""
    listed = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip('this is not a git checkout')
    assert {path.split('/')[0] for path in listed.stdout.split()} == {
        'code', 'data', 'images', 'setup-docker.sh', 'Dockerfile', 'requirements.txt', 'README.md',
        'Makefile', 'LICENSE', 'pyproject.toml', '.gitignore', '.dockerignore', '.ci',
    }  # fmt: skip
