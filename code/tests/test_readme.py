"""README.md, and those beside the code, as a newcomer takes them: every command as it is written, from top to bottom,
in a copy of this repository.

The programs that the commands call are made small, or stood in for, by stand_in.py; the folders of images that they
name are drawn. `make test` alone is left to the continuous integration, which calls it.
"""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
import warm
from torch.nn.functional import normalize

import test_detection
import test_export
from config import OPTIONS
from conftest import CODE, draw_folder
from loss.negative_cosine import simsiam_loss

ROOT = CODE.parent
README = (ROOT / 'README.md').read_text()
BESIDE = (CODE / 'TUTORIAL.md',)
PAGES = {path: path.read_text() for path in (ROOT / 'README.md', *sorted(CODE.glob('**/README.md')), *BESIDE)}
SHELL = [
    block
    for path, page in PAGES.items()
    if path not in BESIDE
    for block in re.findall(r'^```sh\n(.*?)^```$', page, re.M | re.S)
]
PYTHON = re.findall(r'^```python\n(.*?)^```$', README, re.M | re.S)
STANDS_IN = (
    'python3',
    'python',
    'pip3',
    'make',
    'docker',
    'sudo',
    'torchrun',
    'tensorboard',
    'srun',
    'scontrol',
)
TOP = ('make', 'sudo', 'cd code')  # a block that begins so runs at the top, any other in code/
# Options of other programs and of the benchmarks, and two that stand for any or a mistyped one.
OF_OTHERS = {
    'neighbors',
    'disable_projection',
    'index_url',
    'nproc_per_node',
    'nnodes',
    'rdzv_backend',
    'rdzv_endpoint',
    'rdzv_id',
    'max_restarts',
    'logdir',
    'ntasks_per_node',
    'nodes',
    'gpus_per_node',
    'cpus_per_task',
    'time',
    'signal',
    'requeue',
    'open_mode',
    'help',
    'kills',
    'terms',
    'name',
    'batchsize',
    'held_out',
    'seeds',
    'set',
}


@pytest.fixture(scope='module')
def clone(tmp_path_factory):
    """A copy of the files in git, with an environment that counts as installed and the images that the page names."""
    top = tmp_path_factory.mktemp('readme')
    listed = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip('this is not a git checkout')
    for name in listed.stdout.splitlines():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, top / name)
    for folder in (top / 'bin', top / '.venv/bin'):
        folder.mkdir(parents=True)
        for name in STANDS_IN:
            script = f'exec "{sys.executable}" "{top}/code/tests/support/stand_in.py" {name} "$@"'
            (folder / name).write_text(f'#!/bin/sh\n{script}\n')
            (folder / name).chmod(0o755)
    (top / '.venv/installed').touch()
    draw_folder(top / 'data/photos', {'train': 24, 'val': 8}, side=120, suffix='.jpg')
    shutil.copytree(top / 'data/photos/val', top / 'data/new')
    draw_folder(top / 'data/clothing', {'train': 24, 'validation': 8}, side=120, suffix='.jpg')
    draw_folder(top / 'data/flowers', {'train': 8, 'val': 4}, side=60, suffix='.jpg')
    draw_folder(top / 'data/cifar10-jpeg', {'train': 24, 'val': 8}, side=32, suffix='.jpg')
    for name in ('VOC2007', 'blood-cells'):
        test_detection.voc(top / 'data' / name, {'train': 6, 'val': 2})
    test_export.save_official(top / 'data/checkpoint_0099.pth.tar', test_export.Official(width=512))
    return top


def first_command(block):
    """What names a block in the list of tests."""
    return re.sub(r'\W+', '_', next(line for line in block.splitlines() if not line.startswith(('#', 'RUN='))))[:60]


def run_shell(block, clone, folder):
    """What is said by shell commands that end well, in `folder`, with the stand-ins in the path."""
    python = warm.started()
    environment = {
        warm.WARM: os.environ[warm.WARM],
        warm.AS_PYTHON: python,
        'PYTHON_EXEC': python,  # torchrun's name for it
        'PATH': f'{clone}/bin:/usr/bin:/bin',
        'HOME': str(clone),
        'SLURM_NNODES': '1',
        'SLURM_JOB_ID': '7',
        'SLURM_JOB_NODELIST': 'here',
        'OMP_NUM_THREADS': '1',
    }
    done = subprocess.run(
        ['bash', '-euo', 'pipefail', '-c', block],
        cwd=folder,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert 'Traceback' not in done.stderr
    assert 'has no effect' not in done.stderr.replace('--cache_epochs has no effect', '')  # of TINY
    return done


@pytest.mark.parametrize('block', SHELL, ids=first_command)
def test_readme_commands_run(block, clone):
    done = run_shell(block, clone, clone if block.startswith(TOP) else clone / 'code')
    if 'make train' in block:
        (clone / 'made').write_text(done.stdout)
    for name in re.findall(r'# (data/\S+\.\w+)', block):
        assert (clone / name.rstrip(',')).is_file()


RECIPES = {
    'demo.sh': (),
    'photos.sh': ('../data/photos',),
    'cifar10.sh': ('--download=False', '--image_path=data/cifar10-jpeg'),
    'imagenet.sh': ('../data/photos',),
    'slurm.sh': ('data/photos',),
    'keep_training.sh': ('--preset=imagenet', '--image_path=data/photos', '--model_name=kept'),
}


def test_all_recipes_are_tested():
    assert set(RECIPES) == {path.name for path in (CODE / 'recipes').iterdir()}


@pytest.mark.parametrize('name', RECIPES)
def test_recipe_scripts_run(name, clone):
    run_shell(f'recipes/{name} {" ".join(RECIPES[name])}', clone, clone / 'code')


def test_make_train_prints_what_readme_shows(clone):
    """Six of its fifteen epochs; after four, some CPUs fall below the bounds. Needs the test of its block."""
    if not (clone / 'made').is_file():
        pytest.skip('make train was not among the tests that ran')
    said = (clone / 'made').read_text()
    shown = README.split('`make train` ends with', 1)[1].split('```', 2)[1]
    for line in shown.strip().splitlines():
        assert line.strip().split('...')[0][:8] in said, line
    kNN, untrained, pixels = (
        float(re.search(rf'^{name} +([\d.]+) %$', said, re.M)[1])
        for name in ('kNN top-1', 'kNN top-1 untrained', 'kNN top-1 raw pixels')
    )
    assert kNN > untrained + 10
    assert kNN > pixels + 20
    assert float(re.search(r'^top-1 +([\d.]+) %$', said, re.M)[1]) > 65


def test_readme_pseudocode_equals_loss():
    space = {'normalize': lambda x: normalize(x, dim=1)}
    exec('def D' + PYTHON[0].split('def D', 1)[1], space)
    p1, p2, z1, z2 = torch.randn(4, 6, 9, dtype=torch.float64, requires_grad=True)
    loss = space['D'](p1, z2) / 2 + space['D'](p2, z1) / 2
    assert loss.item() == pytest.approx(simsiam_loss(p1, p2, z1, z2).item(), abs=1e-12)


def test_readme_python_example_runs():
    view1, view2 = torch.randn(2, 4, 3, 32, 32)
    space = {'view1': view1, 'view2': view2}
    exec(PYTHON[1], space)
    assert space['z1'].shape == space['p2'].shape == (4, 2048)
    assert space['model'].backbone(view1).shape == (4, 512)


def test_options_and_files_named_in_pages_exist():
    text = '\n'.join(PAGES.values()).replace('-ckpt_', '')
    options = {name.replace('-', '_') for name in re.findall(r'(?<![\w-])--([a-z][a-z0-9_-]+)', text)}
    assert options - set(OPTIONS) - OF_OTHERS == set()
    tree = PAGES[CODE / 'README.md'].split('├── code/\n', 1)[1].split('```', 1)[0]
    listed = set(re.findall(r'([\w-]+\.(?:py|txt|sh)|Dockerfile|Makefile)', tree))
    for name in listed:
        assert list(ROOT.glob(f'**/{name}')), name
    modules = {path.name for path in CODE.glob('*.py')}
    assert modules <= listed


@pytest.mark.parametrize('page', PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_in_pages_exist(page):
    text = PAGES[page]
    headings = {
        re.sub(r'[^\w -]', '', line).strip().lower().replace(' ', '-') for line in re.findall(r'^#+ (.*)$', text, re.M)
    }
    for link in re.findall(r'\]\(([^)]+)\)|<img src="([^"]+)"', text):
        path, _, heading = (link[0] or link[1]).partition('#')
        if path.startswith('http'):
            continue
        assert not path or (page.parent / path).exists(), link
        assert path or heading in headings, link


def commands_in(text):
    """The commands of a page's blocks for the shell, without comments."""
    lines = '\n'.join(re.findall(r'^```sh\n(.*?)^```$', text, re.M | re.S)).splitlines()
    return {line.partition('#')[0].strip() for line in lines} - {''}


def test_tutorial_commands_are_tested():
    """Which are run, in this order."""
    assert commands_in(PAGES[CODE / 'TUTORIAL.md']) <= commands_in(README)
    assert len(commands_in(PAGES[CODE / 'TUTORIAL.md'])) > 8


def test_readme_is_at_most_200_lines():
    assert len(README.splitlines()) <= 200
