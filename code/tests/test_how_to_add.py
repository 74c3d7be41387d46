"""What code/README.md says of how to add something, done: a protocol, an option, an operation, a transform."""

import json
import os
import shutil
import subprocess
import sys

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from conftest import CODE, TINY, own_paths

RUN = 'model_name_simsiam_ckpt_0'
TOY = '''"""Which share of val has the class of the image before it: a toy."""

from protocols.protocol import Outcome, Protocol, labeled_splits


def toy(args, model, splits, checkpoint):
    labels = splits['val'].labels
    share = 100 * (labels[1:] == labels[:-1]).double().mean().item()
    return Outcome({'same': share, 'num_train': len(splits['train']), 'num_val': len(labels)})


PROTOCOL = Protocol(toy, labeled_splits, numbers={'same': 'as before'}, smaller='--batch_size', unused=('knn_k',))
'''


def copy_of_code(folder):
    ignored = shutil.ignore_patterns('results', 'tests', '__pycache__')
    return shutil.copytree(CODE, folder / 'code', ignore=ignored)


def add_line(path, after, line):
    """Add `line` below the line `after`, which is in the file once."""
    text = path.read_text()
    assert text.count(f'{after}\n') == 1
    path.write_text(text.replace(f'{after}\n', f'{after}\n{line}\n'))


def call(code, *words):
    """What a command line of this copy of the code says."""
    environment = {**os.environ, 'PYTHONDONTWRITEBYTECODE': '1'}
    done = subprocess.run(
        [sys.executable, 'cli.py', *words], cwd=code, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_new_protocol_needs_one_file_and_one_line(drawn, tmp_path):
    code, paths = copy_of_code(tmp_path), own_paths(tmp_path)
    (code / 'protocols/toy.py').write_text(TOY)
    add_line(code / 'config.py', 'PROTOCOLS = {', "    'toy': 'the class of the image before',")
    call(code, 'train', *TINY, '--max_epochs=1', f'--image_path={drawn}', '--knn_every=0', *paths)
    assert 'toy: the class of the image before' in call(code, 'evaluate', '--help')
    said = call(code, 'evaluate', f'--ckpt_name={RUN}', '--protocol=toy', '--knn_k=3', *paths)
    assert 'as before' in said
    assert '--knn_k has no effect on --protocol=toy' in said
    (path,) = (tmp_path / 'ckpt' / RUN).glob('evaluate_toy_*.json')
    result = json.loads(path.read_text())
    assert 'knn_k' not in result['settings']
    events = EventAccumulator(str(tmp_path / 'log' / RUN)).Reload()
    assert round(events.Scalars('results/toy_same')[-1].value, 3) == round(result['same'], 3)
    call(code, 'report', f'--ckpt_name={RUN}', f'--output={tmp_path}/report.html', *paths)
    assert 'as before' in (tmp_path / 'report.html').read_text()


def test_new_option_needs_one_line_and_meaning(drawn, tmp_path):
    code = copy_of_code(tmp_path)
    line = '    grad_clip: float = option(0.0, between=(0.0, 100.0))\n    """largest norm of the gradient; 0: any"""'
    add_line(code / 'config.py', 'class OptimizationOptions:', line)
    assert '--grad_clip=0.0' in call(code, 'train', '--help')
    assert 'largest norm of the gradient; 0: any' in call(code, 'train', '--help=grad_clip')
    call(code, 'train', *TINY, '--grad_clip=2', '--max_epochs=1', f'--image_path={drawn}', *own_paths(tmp_path))
    about = json.loads((tmp_path / 'ckpt' / RUN / 'run.json').read_text())
    assert about['args']['grad_clip'] == 2.0


INVERT = """
import torch

@dataclass(frozen=True)
class Invert:
    prob: float

    columns = 1

    def sample(self, n, generator):
        return (torch.rand(n, 1, generator=generator) < self.prob).float()

    def on_cpu(self, x, draws):
        return self.on_gpu(x, draws)

    def on_gpu(self, x, draws):
        return torch.where(draws[..., None, None] > 0, 1 - x, x)

    def torchvision(self, v2):
        return v2.RandomInvert(self.prob)
"""


def test_new_operation_and_augmentation_need_class_and_lines(drawn, tmp_path):
    code = copy_of_code(tmp_path)
    row = "    'inverted': (RandomResizedCrop(scale=(0.5, 1.0)), RandomGrayscale(0.5), Invert(0.3)),"
    augmentations = code / 'dataloader/augment/augmentations.py'
    add_line(augmentations, 'AUGMENTATIONS = {', row)
    augmentations.write_text(
        augmentations.read_text().replace('AUGMENTATIONS = {', f'{INVERT}\n\nAUGMENTATIONS = {{', 1)
    )
    config = code / 'config.py'
    choices = "augmentation: str = option('moco', ('moco', 'simclr', 'mild')"
    assert f'    {choices}' in config.read_text()
    config.write_text(config.read_text().replace(f'    {choices}', f"    {choices[:-1]}, 'inverted')"))
    given = ('--augmentation=inverted', '--max_epochs=1', f'--image_path={drawn}')
    call(code, 'train', *TINY, *given, *own_paths(tmp_path))
