"""The report page: everything in one file, nothing from elsewhere, whole in a real browser."""

import base64
import io
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

import cli
import pictures
import report
from conftest import TINY, one_line, own_paths

RUN = 'model_name_simsiam_ckpt_0'


@pytest.fixture(scope='module')
def page(drawn, tmp_path_factory):
    """The page of a run of two epochs, as a path."""
    folder = tmp_path_factory.mktemp('report')
    options = ('--knn_every=1', '--evaluate_after=True', f'--image_path={drawn}', *own_paths(folder))
    assert cli.main(['train', *TINY, *options]) == 0
    assert cli.main(['report', f'--ckpt_name={RUN}', *own_paths(folder)]) == 0
    return folder / 'log' / RUN / 'report.html'


def test_the_page_is_whole_in_itself(page):
    text = page.read_text()
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert 'http' not in text
    assert '<script' not in text
    pictures = re.findall(r'<img width="(\d+)" height="(\d+)" alt="[^"]+" src="data:image/png;base64,([^"]+)">', text)
    assert len(pictures) == text.count('<img') == 8  # four curves, views, map, neighbours, confusion
    for width, height, data in pictures:
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            assert image.size == (int(width), int(height))
            assert np.asarray(image.convert('L')).std() > 1
    assert len(list(page.parent.glob('report_*.png'))) == 8
    headings = ('Results, %', 'Training', 'Nearest neighbours', 'Confusion', 'Options')
    for said in (*headings, '<td>linear</td>', '--proj_dim', '<b>2 of 2</b>epoch', '<p class="verdict'):
        assert said in text


def test_it_shows_on_a_phone_and_on_a_desk(page, tmp_path):
    """In headless Chromium: rendered, and nothing wider than the window."""
    browser = shutil.which('chromium')
    if not browser:
        pytest.skip('chromium is not installed (Debian: apt-get install chromium)')
    for width in (500, 1200):
        picture = tmp_path / f'{width}.png'
        command = [
            browser,
            '--headless',
            '--no-sandbox',
            '--disable-gpu',
            '--disable-quic',
            '--no-first-run',
            '--disable-background-networking',
            '--disable-component-update',
            '--disable-sync',
            f'--user-data-dir={tmp_path}/profile',
            f'--window-size={width},6000',
            f'--screenshot={picture}',
            '--hide-scrollbars',
            page.as_uri(),
        ]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        with Image.open(picture) as image:
            pixels = np.asarray(image.convert('L')).astype(int)
        rows = (pixels < 128).any(1)
        assert rows.sum() > 800  # it is not an empty page
        assert (pixels[:, -8:] > 250).mean() > 0.99  # the margin is free: nothing runs out of the window


def test_neighbours_of_another_class_are_framed_in_red():
    image = np.asarray(pictures.beside([[torch.zeros(3, 8, 8)] * 3], ['one'], [[True, False]], side=40))
    green, red = (np.argwhere((image == colour).all(2))[:, 1] for colour in ((27, 158, 119), (214, 48, 31)))
    assert 50 < green.min() < green.max() < red.min()


def test_principal_finds_the_plane_of_most_variance():
    generator = torch.Generator().manual_seed(0)
    plane = torch.randn(200, 2, generator=generator) @ torch.randn(2, 9, generator=generator)
    x = plane + 0.01 * torch.randn(200, 9, generator=generator)
    points, share = report.principal(x)
    covariance = np.linalg.eigvalsh(np.cov(x.numpy().T))
    assert share == pytest.approx(covariance[-2:].sum() / covariance.sum(), abs=1e-4)
    torch.testing.assert_close(torch.pdist(points), torch.pdist(x), atol=0.2, rtol=0.05)


def test_report_without_a_name(capsys):
    assert cli.main(['report']) == 2
    assert 'report wants --ckpt_name=<run>' in one_line(capsys.readouterr().err)
