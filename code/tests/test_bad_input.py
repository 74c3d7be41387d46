"""Bad input of every kind, as the table in README.md beside this says: what is printed, in one line, and the exit code.

Each row of the table is a case here and each case a row; `...` in the table stands for any text.
"""

import io
import re
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

import cli
from conftest import CODE, TINY, one_line, own_paths
from dataloader.loading.decode import decode

RUN = 'model_name_simsiam_ckpt_0'
README = CODE / 'tests/README.md'


def rows():
    """{kind: (exit code, what is printed)} of that table."""
    table = README.read_text().split('| bad input |', 1)[1].split('\n\n', 1)[0]
    found = re.findall(r'^\| ([^|]+) \| (\d) \| `([^|]+)` \|$', table, re.M)
    return {kind.strip(): (int(code), said) for kind, code, said in found}


class Case:
    """A folder to spoil: images, and a run that was trained on them."""

    def __init__(self, folder, drawn, trained):
        self.folder = folder
        self.images = shutil.copytree(drawn, folder / 'set')
        shutil.copytree(trained, folder / 'out')
        self.ckpt = next((folder / 'out/ckpt' / RUN).glob('loss_*'))

    def train(self, *options):
        paths = own_paths(self.folder / 'out')
        return cli.main(['train', *TINY, '--knn_every=0', f'--image_path={self.images}', *paths, *options])

    def image(self, data, name='train/dots/bad.png'):
        (self.images / name).write_bytes(data)
        return self.train()

    def evaluate(self, *options, name=RUN):
        return cli.main(['evaluate', f'--ckpt_name={name}', *own_paths(self.folder / 'out'), *options])

    def checkpoint(self, change):
        content = torch.load(self.ckpt, weights_only=True)
        torch.save(change(content), self.ckpt.with_name('changed'))
        return self.evaluate(name=f'{RUN}/changed')


def encoded(kind, side=48):
    buffer = io.BytesIO()
    Image.effect_noise((side, side), 60).convert('RGB').save(buffer, kind)
    return buffer.getvalue()


def bomb():
    """A PNG of 20,000 x 20,000 pixels: 49 KB on disk, 1.2 GB decoded."""
    buffer = io.BytesIO()
    Image.new('1', (20000, 20000)).save(buffer, 'PNG')
    return buffer.getvalue()


class Harmful:
    def __reduce__(self):
        return eval, ('1 / 0',)


def full_disk(case):
    options = ' '.join((*TINY, '--knn_every=0', f'--image_path={case.images}', *own_paths(case.folder / 'out')))
    command = f'ulimit -f 300; exec "{sys.executable}" cli.py train {options}'
    done = subprocess.run(['bash', '-c', command], cwd=CODE, capture_output=True, text=True, check=False)
    print(done.stderr, file=sys.stderr, end='')
    return done.returncode


def rename(before, after):
    def change(content):
        content['model'][after] = content['model'].pop(before)
        return content

    return change


CASES = {
    'text named .png': lambda case: case.image(b'not an image'),
    'empty image file': lambda case: case.image(b''),
    'truncated JPEG': lambda case: case.image(encoded('JPEG', 150)[:3000], 'train/dots/bad.jpg'),
    'truncated PNG': lambda case: case.image(encoded('PNG')[:2000]),
    'decompression bomb': lambda case: case.image(bomb()),
    'no such folder': lambda case: case.train(f'--image_path={case.folder}/nothing'),
    'folder without images': lambda case: case.train(f'--image_path={empty(case)}'),
    'empty class': lambda case: (case.images / 'train/zebra').mkdir() or case.train(),
    'class in val alone': lambda case: (case.images / 'val/dots').rename(case.images / 'val/dot') and case.train(),
    'image beside classes': lambda case: case.image(encoded('PNG'), 'train/stray.png'),
    'mistyped option': lambda case: case.train('--batchsize=8'),
    'value of another type': lambda case: case.train('--max_epochs=many'),
    'value out of range': lambda case: case.train('--momentum=1.5'),
    'unknown choice': lambda case: case.train('--backbone=resnet49'),
    'batch larger than the set': lambda case: case.train('--batch_size=128'),
    'checkpoint cut short': lambda case: case.ckpt.write_bytes(case.ckpt.read_bytes()[:9000]) and case.evaluate(),
    'checkpoint that runs code': lambda case: case.checkpoint(lambda content: {**content, 'extra': Harmful()}),
    'checkpoint with a key renamed': lambda case: case.checkpoint(rename('projector.0.weight', 'projector.0.wight')),
    'no such checkpoint': lambda case: case.evaluate(name='nothing'),
    'other architecture than the checkpoint': lambda case: case.evaluate('--proj_dim=7'),
    'label list of other images': lambda case: case.evaluate('--protocol=semi', f'--subset_list={names(case)}'),
    'learning rate too high': lambda case: case.train(
        '--learning_rate=100', '--weight_decay=1', '--momentum=0.9999', '--max_epochs=60'
    ),
    'disk full': full_disk,
}


def empty(case):
    (case.folder / 'empty/train').mkdir(parents=True)
    return case.folder / 'empty'


def names(case):
    (case.folder / 'names.txt').write_text('n01440764_18.JPEG\n')
    return case.folder / 'names.txt'


@pytest.fixture(scope='module')
def trained(drawn, tmp_path_factory):
    folder = tmp_path_factory.mktemp('trained') / 'out'
    options = ('--max_epochs=1', '--knn_every=0', f'--image_path={drawn}', *own_paths(folder))
    assert cli.main(['train', *TINY, *options]) == 0
    return folder


def test_bad_input_table_matches_readme():
    assert list(rows()) == list(CASES)
    assert len(CASES) > 15


@pytest.mark.parametrize('kind', CASES)
def test_bad_input_prints_one_line(kind, drawn, trained, tmp_path, capsys):
    code, said = rows()[kind]
    case = Case(tmp_path, drawn, trained)
    before = {path: path.stat().st_size for path in (tmp_path / 'out/ckpt' / RUN).glob('loss_*')}
    assert CASES[kind](case) == code
    error = one_line('\n'.join(line for line in capsys.readouterr().err.splitlines() if not line.startswith('warning')))
    pattern = '.*'.join(re.escape(part) for part in said.split('...'))
    assert re.fullmatch(pattern, error), error
    if kind != 'checkpoint cut short':
        assert all(path.stat().st_size == size for path, size in before.items())


def test_on_unreadable_skip_counts_and_lists_images(drawn, trained, tmp_path, capsys):
    """Counted, named in a file, and left out everywhere; they are not looked for again."""
    case = Case(tmp_path, drawn, trained)
    (case.images / 'train/dots/text.png').write_bytes(b'text')
    (case.images / 'train/checks/empty.jpg').write_bytes(b'')
    (case.images / 'val/dots/half.jpg').write_bytes(encoded('JPEG', 150)[:3000])
    assert case.train('--on_unreadable=skip', '--evaluate_after=True', '--probe_epochs=3') == 0
    said = capsys.readouterr().out
    assert re.search('2 of 74 images of .*train cannot be read and are left out; they are named in ', said)
    assert re.search('1 of 25 images of .*val cannot be read', said)
    assert ': small, 72 images' in said
    assert '72 training and 24 validation images' in said
    listed = re.search('2 of 74 images .* named in (.*)', said)[1]
    with open(listed) as file:
        lines = file.read().splitlines()
    assert len(lines) == 2
    assert re.match('cannot read the image .*train/checks/empty.jpg: ', lines[0])
    assert re.match('cannot read the image .*train/dots/text.png: ', lines[1])


def gray(path):
    """Mean of the decoded pixels."""
    image = decode(path)
    return sum(image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))) / 3


def test_unusual_image_formats_are_decoded(tmp_path):
    """CMYK, 16 bits, palette with transparency, animation, EXIF rotation, a single pixel, a very long side."""
    Image.new('CMYK', (20, 10), (0, 0, 0, 128)).save(tmp_path / 'cmyk.jpg', quality=95)
    assert gray(tmp_path / 'cmyk.jpg') == pytest.approx(127, abs=4)
    Image.new('I;16', (20, 10), 128 * 257).save(tmp_path / 'deep.png')
    assert gray(tmp_path / 'deep.png') == pytest.approx(128, abs=1)
    palette = Image.new('RGB', (20, 10), (200, 100, 0)).convert('P')
    palette.save(tmp_path / 'palette.png', transparency=0)
    assert gray(tmp_path / 'palette.png') == pytest.approx(100, abs=12)
    frames = [Image.new('L', (20, 10), level) for level in (10, 250)]
    frames[0].save(tmp_path / 'film.gif', save_all=True, append_images=frames[1:])
    assert gray(tmp_path / 'film.gif') == pytest.approx(10, abs=2)
    turned, exif = Image.new('RGB', (20, 10)), Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / 'turned.jpg', exif=exif)
    assert decode(tmp_path / 'turned.jpg').size == (20, 10)
    Image.new('RGB', (1, 1), (9, 9, 9)).save(tmp_path / 'dot.png')
    assert decode(tmp_path / 'dot.png').size == (1, 1)
    Image.new('L', (20000, 50)).save(tmp_path / 'long.png')
    assert decode(tmp_path / 'long.png').size == (20000, 50)
