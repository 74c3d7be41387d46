"""The report page: everything in one file, nothing from elsewhere, whole and alive in a real browser."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.manifold import trustworthiness

import cli
import plots
from commands import report
from conftest import TINY, draw_folder, one_line, own_paths
from dataloader.load_dataset import load_splits
from metric.projection_2d import tsne_2d
from runtime.files import read_metrics
from runtime.options import get_config, replace_args

RUN, OTHER = 'model_name_simsiam_ckpt_0', 'model_name_other_ckpt_0'
ODD = 'a</script><b onclick="x">&$'  # a class that would be mark-up


def no_number(name):
    raise AssertionError(f'{name} is no JSON')


def data_of(text):
    """What the page's script works on; strict: a browser takes no NaN."""
    found = re.search(r'<script type="application/json" id="data">(.*)</script>', text)[1]
    return json.loads(found, parse_constant=no_number)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """The folders of two runs of two epochs, on a set of which a class has a name like mark-up."""
    folder = tmp_path_factory.mktemp('report')
    images = draw_folder(folder / 'set', {'train': 24, 'val': 8})
    for split in ('train', 'val'):
        (images / split / 'dots').rename(images / split / ODD.replace('/', '∕'))
    for name, rate in (('simsiam', 0.8), ('other', 0.1)):
        options = (f'--model_name={name}', f'--learning_rate={rate}', '--knn_every=1', '--evaluate_after=True')
        assert cli.main(['train', *TINY, *options, f'--image_path={images}', *own_paths(folder)]) == 0
    return folder


def reported(folder, *options):
    assert cli.main(['report', *options, *own_paths(folder)]) == 0


@pytest.fixture(scope='module')
def page(folder):
    reported(folder, f'--ckpt_name={RUN}')
    return folder / 'log' / RUN / 'report.html'


@pytest.fixture(scope='module')
def comparison(folder):
    reported(folder, f'--ckpt_name={RUN},{OTHER}')
    return folder / 'log' / RUN / 'comparison.html'


@pytest.fixture(scope='module')
def chromium():
    path = shutil.which('chromium')
    if not path:
        pytest.skip('chromium is not installed (Debian: apt-get install chromium)')
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=['--no-sandbox'])
        yield browser
        browser.close()


@pytest.fixture
def show(chromium):
    """A function that opens a page in a window of a size; at the end nothing may stand in any console."""
    opened, errors = [], []

    def opening(path, width=1200, **options):
        tab = chromium.new_page(viewport={'width': width, 'height': 900}, **options)
        tab.on('pageerror', lambda error: errors.append(str(error)))
        tab.on('console', lambda message: message.type == 'error' and errors.append(message.text))
        tab.on('request', lambda request: request.url.startswith(('file:', 'data:')) or errors.append(request.url))
        tab.goto(path.as_uri())
        tab.wait_for_selector('body[data-ready=yes]')
        opened.append(tab)
        return tab

    yield opening
    for tab in opened:
        tab.close()
    assert not errors


def test_report_has_no_external_resources(page):
    text = page.read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', text)
    assert 'http' not in text
    for heading in ('Results, %', 'Training', 'The space of features', 'Doubles', 'Nearest neighbors', 'Confusion'):
        assert f'<h2>{heading}</h2>' in text
    for said in ('linear, epoch 2', '--proj_dim', '2 of 2', '<p class="verdict'):
        assert said in text
    assert text.count('<svg') == 7  # six charts and the confusion
    names = {path.name for path in page.parent.glob('report_*.png')}
    assert names == {f'report_{name}.png' for name in ('loss', 'std', 'knn', 'few', 'rank', 'rate', 'map', 'confusion')}
    for name in names:
        with Image.open(page.parent / name) as image:
            assert np.asarray(image.convert('L')).std() > 1


def test_report_data_matches_images(page):
    data = data_of(page.read_text())
    assert len(data['names']) == len(data['labels']) == len(data['maps'][0]['points']) == 96
    assert data['splits'] == ['train', 'val']
    assert data['split'].count(1) == 24
    assert data['classes'].count(ODD.replace('/', '∕')) == 1
    for row, (near, cosine) in enumerate(zip(data['maps'][0]['near'], data['maps'][0]['cosine'], strict=True)):
        assert row not in near
        assert len({*near}) == len(near) == 8
        assert cosine == sorted(cosine, reverse=True)
    logged = {line['epoch']: line for line in read_metrics(page.parents[2] / 'ckpt' / RUN / 'metrics.jsonl')}
    for epoch, value in data['charts']['knn']['lines'][0][1]:
        assert value == pytest.approx(logged[epoch]['pretraining/knn_top1'])


def test_names_in_report_are_escaped(page, show):
    assert '<b onclick' not in page.read_text()
    tab = show(page)
    assert ODD.replace('/', '∕') in tab.locator('#classes').inner_text()
    assert ODD.replace('/', '∕') in tab.locator('.confusion').text_content()


@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('width', [360, 1200])
def test_report_fits_window_width(page, show, width, scheme):
    tab = show(page, width, color_scheme=scheme)
    assert tab.evaluate('document.documentElement.scrollWidth') == width
    ink, paper = (tab.evaluate(f'getComputedStyle(document.body).{name}') for name in ('color', 'backgroundColor'))
    brightness = [sum(map(int, re.findall(r'\d+', color)[:3])) for color in (ink, paper)]
    assert (brightness[0] < brightness[1]) == (scheme == 'light')
    assert abs(brightness[0] - brightness[1]) > 400


def drawn(tab):
    """How many pixels of the map are drawn on."""
    return tab.evaluate(
        "(() => {const c = document.getElementById('points'); const d = c.getContext('2d')"
        '.getImageData(0, 0, c.width, c.height).data; let n = 0; for (let i = 3; i < d.length; i += 4) n += d[i] > 0;'
        'return n})()'
    )


def place_of(tab, row):
    """Where image number `row` lies in the window."""
    tab.locator('#marks').scroll_into_view_if_needed()
    box, (x, y) = tab.locator('#marks').bounding_box(), tab.evaluate(f'onScreen({row})')
    return box['x'] + x, box['y'] + y


def apart(tab, data):
    """The image of the map that is farthest from any other: no other is meant where it is pointed at."""
    points = torch.tensor(data['maps'][0]['points'])
    return int((torch.cdist(points, points) + 9 * torch.eye(len(points))).min(1).values.argmax())


def test_map_hover_shows_image_and_click_neighbors(page, show):
    tab, data = show(page), data_of(page.read_text())
    row = apart(tab, data)
    tab.mouse.move(*place_of(tab, row))
    assert data['names'][row].split('/')[-1] in tab.locator('#tip').inner_text()
    assert tab.locator('#tip canvas').count() == 1
    tab.mouse.click(*place_of(tab, row))
    buttons = tab.locator('#chosen button')
    titles = [buttons.nth(i).get_attribute('title') for i in range(buttons.count())]
    assert titles == [data['names'][i] for i in (row, *data['maps'][0]['near'][row])]
    buttons.nth(2).click()  # a neighbor is chosen in turn
    assert tab.locator('#chosen button').first.get_attribute('title') == titles[2]
    tab.mouse.move(2, 2)
    assert tab.locator('#tip').is_hidden()


def test_thumbnail_equals_image(page, show):
    """Its pixels, against the file's."""
    tab, data = show(page), data_of(page.read_text())
    for row in (0, 31, 32, 95):
        name = data['names'][row]
        root = page.parents[2] / 'set' / data['splits'][data['split'][row]]
        with Image.open(root / name if (root / name).is_file() else root.parent / name) as image:
            wanted = np.asarray(image.convert('RGB').resize((data['tile'],) * 2)).astype(float)
        pixels = "c.getContext('2d').getImageData(0, 0, c.width, c.height).data"
        found = tab.evaluate(f'(() => {{const c = thumbnail({row}); return [...{pixels}]}})()')
        found = np.array(found).reshape(data['tile'], data['tile'], 4)[..., :3]
        assert np.abs(found - wanted).mean() < 12


def test_map_toggles_classes_and_splits(page, show):
    tab = show(page)
    every = drawn(tab)
    boxes = tab.locator('#classes input')
    boxes.nth(0).uncheck()
    fewer = drawn(tab)
    assert fewer < 0.9 * every
    tab.locator('#none').click()
    assert drawn(tab) == 0
    tab.locator('#all').click()
    assert drawn(tab) == every
    assert boxes.nth(0).is_checked()
    tab.get_by_label('train', exact=True).uncheck()
    assert 0 < drawn(tab) < 0.5 * every
    tab.get_by_label('val', exact=True).press('Space')  # by keyboard
    assert drawn(tab) == 0


def test_map_works_by_keyboard(page, show):
    tab = show(page)
    tab.locator('#marks').focus()
    for key in ('ArrowRight', 'ArrowRight', 'ArrowUp', 'ArrowUp', 'Enter'):
        tab.keyboard.press(key)
    assert tab.locator('#tip').is_visible()
    assert tab.locator('#chosen button').count() == 9
    before = tab.evaluate('onScreen(0)')
    tab.keyboard.press('+')
    assert tab.evaluate('view.scale') > 1
    assert tab.evaluate('onScreen(0)') != before
    tab.keyboard.press('0')
    assert tab.evaluate('onScreen(0)') == before
    tab.keyboard.press('Escape')
    assert tab.locator('#chosen button').count() == 0
    assert tab.locator('#tip').is_hidden()


def test_wide_tables_scroll_by_keyboard(page, show):
    tab = show(page, 360)
    wide = [area for area in tab.locator('.scroll').all() if area.evaluate('x => x.scrollWidth > x.clientWidth')]
    assert wide
    for area in wide:
        assert area.get_attribute('aria-label')
        area.focus()
        tab.keyboard.press('ArrowRight')
        tab.wait_for_function('document.activeElement.scrollLeft > 0')


def test_map_works_by_touch(page, show):
    tab, data = show(page, 360, has_touch=True), data_of(page.read_text())
    row = apart(tab, data)
    tab.touchscreen.tap(*place_of(tab, row))
    assert tab.locator('#chosen button').first.get_attribute('title') == data['names'][row]


def test_curves_show_values_on_hover(page, show):
    tab, data = show(page), data_of(page.read_text())
    chart = tab.locator('.chart[data-chart=loss]')
    chart.hover()
    lines = dict(data['charts']['loss']['lines'][0][1])
    said = tab.locator('#tip').inner_text().split('\n')
    epoch = int(said[0].removeprefix('epoch '))
    assert float(said[1]) == pytest.approx(lines[epoch], rel=1e-4)
    chart.focus()
    tab.keyboard.press('End')
    assert f'epoch {max(lines)}' in tab.locator('#tip').inner_text()
    tab.keyboard.press('ArrowLeft')
    assert f'epoch {max(lines) - 1}' in tab.locator('#tip').inner_text()


def test_script_positions_match_drawn_curves(page, show):
    """The point that the script takes for the last epoch's is where the picture has its mark."""
    tab, chart = show(page), data_of(page.read_text())['charts']['loss']
    epoch, value = chart['lines'][0][1][-1]
    x, y = (
        low + (at - first) / (last - first) * (high - low)
        for at, (first, last), low, high in (
            (epoch, chart['x'], chart['box'][0], chart['box'][2]),
            (value, chart['y'], chart['box'][3], chart['box'][1]),
        )
    )
    box = tab.locator('.chart[data-chart=loss] svg').bounding_box()
    marks = tab.locator('.chart[data-chart=loss] [id*=line2d] use').all()
    places = [mark.bounding_box() for mark in marks]
    wanted = box['x'] + x * box['width'], box['y'] + y * box['height']
    away = [
        np.hypot(at['x'] + at['width'] / 2 - wanted[0], at['y'] + at['height'] / 2 - wanted[1]) for at in places if at
    ]
    assert min(away) < 2


def test_report_of_several_runs_overlays_curves(comparison, show):
    data = data_of(comparison.read_text())
    assert [of['run'] for of in data['maps']] == [RUN, OTHER]
    assert [name for name, _ in data['charts']['loss']['lines']] == [RUN, OTHER]
    assert data['maps'][0]['points'] != data['maps'][1]['points']
    tab = show(comparison)
    assert tab.locator('.run h2').all_inner_texts() == [RUN, OTHER]
    row = tab.locator('tr', has_text='--learning_rate').first.inner_text()
    assert '0.8' in row
    assert '0.1' in row
    assert '--proj_dim' not in tab.locator('.options').first.inner_text()  # the same in both
    before = tab.evaluate('onScreen(0)')
    tab.locator('#which').select_option(label=OTHER)
    assert tab.evaluate('onScreen(0)') != before


def test_report_of_ten_thousand_images_responds(page, show, tmp_path):
    """A page of that many images opens, and answers."""
    text, data = page.read_text(), data_of(page.read_text())
    many, rows = 10_000, np.random.default_rng(0).integers(len(data['labels']), size=10_000)
    data['labels'], data['names'], data['split'] = (
        [data[name][row] for row in rows] for name in ('labels', 'names', 'split')
    )
    data['maps'][0]['points'] = np.random.default_rng(1).random((many, 2)).round(4).tolist()
    data['maps'][0]['near'], data['maps'][0]['cosine'] = [[0] * 8] * many, [[0.5] * 8] * many
    data['per_sheet'] = many
    start, end = text.index('id="data">') + 10, text.index('</script>')
    (tmp_path / 'many.html').write_text(text[:start] + json.dumps(data).replace('<', '\\u003c') + text[end:])
    tab = show(tmp_path / 'many.html')
    tab.mouse.move(*place_of(tab, 5))
    assert tab.locator('#tip').is_visible()
    assert drawn(tab) > 20_000


def test_report_skips_missing_sections(folder, tmp_path, show):
    """Images without classes or val, no logs, measures that are no numbers: a page all the same."""
    images, names = tmp_path / 'flat', []
    images.mkdir()
    for path in (folder / 'set/train/checks').iterdir():
        shutil.copy(path, images)
        names.append(path.name)
    shutil.copytree(folder / 'ckpt', tmp_path / 'ckpt')
    (tmp_path / 'ckpt' / RUN / 'metrics.jsonl').unlink()
    page, paths = tmp_path / 'mine.html', own_paths(tmp_path, 'ckpt', 'log')
    assert cli.main(['report', f'--ckpt_name={RUN}', f'--image_path={images}', f'--output={page}', *paths]) == 0
    text = page.read_text()
    data = data_of(text)
    assert data['charts'] == {}
    assert '<h2>Training' not in text
    assert '<h2>Confusion' not in text
    assert {*data['labels']} == {-1}
    assert sorted(name.split('/')[-1] for name in data['names']) == sorted(names)
    tab = show(page)
    assert 'no class (24)' in tab.locator('#classes').inner_text()


def test_report_of_renamed_run_has_its_curves(folder, tmp_path):
    shutil.copytree(folder / 'ckpt' / RUN, tmp_path / 'ckpt/renamed')
    page, paths = tmp_path / 'mine.html', own_paths(tmp_path, 'ckpt', 'log')
    assert cli.main(['report', '--ckpt_name=renamed', f'--image_path={folder}/set', f'--output={page}', *paths]) == 0
    assert {'loss', 'std', 'knn'} <= data_of(page.read_text())['charts'].keys()


DAMAGED = (b'', b'{"protocol"', b'\xff', b'[]', b'{"a": 1}', b'{"protocol": "linear", "epoch": 1, "top1": "x"}')


def test_report_skips_damaged_files_with_message(folder, tmp_path, capsys):
    """Results, pictures and metrics of a run, and the checkpoint of one of several."""
    copied = shutil.copytree(folder, tmp_path / 'copied')
    for number, content in enumerate(DAMAGED):
        (copied / 'ckpt' / RUN / f'evaluate_linear_{number}.json').write_bytes(content)
    (copied / 'log' / RUN / 'two_views.png').write_bytes(b'xx')
    with open(copied / 'ckpt' / RUN / 'metrics.jsonl', 'ab') as file:
        file.write(b'{"a": 1}\n5\n\xff\n')
    (copied / 'ckpt' / OTHER / 'loss_-0.5000_epoch_9').touch()
    reported(copied, f'--ckpt_name={OTHER},{RUN}')
    said = capsys.readouterr().err.splitlines()
    assert sum('no result of evaluate: left out' in line for line in said) == len(DAMAGED) - 1
    assert sum('two_views.png is damaged' in line for line in said) == 1
    assert sum(OTHER in line and line.endswith('left out') for line in said) == 1
    assert len(said) == len(DAMAGED) + 1
    assert cli.main(['report', f'--ckpt_name={OTHER}', *own_paths(copied)]) == 1
    assert cli.main(['report', f'--ckpt_name={OTHER},', *own_paths(copied)]) == 2


def test_report_skips_nan_points():
    made = plots.draw_curves(
        [plots.LineChart('a', [('up', [(0, 0.0), (1, 1.0)])]), plots.LineChart('b', [('none', [])])]
    )
    assert 'not measured' in plots.figure_to_svg(made, 'x')


def test_neighbor_grid_frames_other_class_in_orange():
    image = np.asarray(plots.neighbor_grid([[torch.zeros(3, 8, 8)] * 3], ['one'], [[True, False]], side=40))
    right, wrong = (np.argwhere((image == color).all(2))[:, 1] for color in ((0, 114, 178), (213, 94, 0)))
    assert 50 < right.min() < right.max() < wrong.min()


def test_tsne_2d_keeps_groups_together():
    """Thirty groups in 32 dimensions: two main axes lay them over one another."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(30, 32, generator=generator)
    x = (centers[:, None] + 0.2 * torch.randn(30, 12, 32, generator=generator)).reshape(-1, 32)
    points = tsne_2d(x)
    axes = PCA(2).fit_transform(x)
    assert trustworthiness(x, points, n_neighbors=10) > trustworthiness(x, axes, n_neighbors=10) + 0.05
    np.testing.assert_array_equal(tsne_2d(x), points)


@pytest.mark.parametrize('count', [1, 2, 3, 9, 10, 11])
def test_tsne_2d_of_few_rows_works(count):
    points = tsne_2d(torch.randn(count, 7))
    assert points.shape == (count, 2)
    assert np.isfinite(points).all()


def test_neighbors_without_val_exclude_query(tmp_path):
    """Not where it has a double either; and one image alone has none."""
    folder = draw_folder(tmp_path / 'set', {'train': 4})
    for path in [*folder.glob('train/*/*')]:
        shutil.copy(path, path.with_stem(f'{path.stem}_again'))
    args = get_config(preset='demo', image_path=str(folder), cache_path=str(tmp_path), val_fraction=0.0)
    train = load_splits(args)['train']
    features = torch.eye(12).repeat_interleave(2, 0)  # a double lies behind its own
    run = report.ReportRun(args, {}, None, {}, {'train': train}, {'train': features})
    for query, *others in report.nearest_neighbor_rows(run):
        assert query[1] not in [name for _, name, _, _ in others]
        assert others[0][2] == pytest.approx(1)
    alone = tmp_path / 'alone/train/one'
    alone.mkdir(parents=True)
    shutil.copy(next(folder.glob('train/*/*')), alone)
    train = load_splits(replace_args(args, image_path=str(tmp_path / 'alone')))['train']
    run = report.ReportRun(args, {}, None, {}, {'train': train}, {'train': torch.ones(1, 3)})
    assert [len(row) for row in report.nearest_neighbor_rows(run)] == [1]


def test_report_without_ckpt_name_exits_2(capsys):
    assert cli.main(['report']) == 2
    assert 'report needs --ckpt_name=<run>' in one_line(capsys.readouterr().err)


@pytest.mark.parametrize('name', ['$', '$a', 'a$b$c', '\udcff', 'ü', '犬', '<b>', '_^{', '\\frac', 'a\nb', ' ', ''])
def test_class_names_in_plots_are_escaped(name):
    """What a folder may be called is drawn as it is, wherever a picture names classes."""
    for drawn in (
        plots.draw_confusion(torch.tensor([[3, 1], [0, 2]]), [name, 'other']),
        plots.draw_scatter(np.random.rand(4, 2), np.array([0, 1, 0, -1]), [name, 'other']),
        plots.draw_curves([plots.LineChart(name, [(name, [(0, 1.0), (1, 2.0)]), ('other', [(0, 1.0)])])]),
    ):
        assert np.asarray(plots.figure_to_pil(drawn)).std() > 1
        assert '<svg' in plots.figure_to_svg(drawn, 'x')


@pytest.mark.parametrize('letters', [3, 24, 40, 200])
def test_draw_confusion_has_room_for_long_names(letters):
    """The matrix keeps most of the width that it has without names, however long these are."""
    classes = [f'{i}' * letters for i in range(6)]
    drawn = plots.draw_confusion(torch.eye(6, dtype=torch.int64) * 4, classes)
    drawn.draw_without_rendering()
    (axes,) = drawn.axes
    assert axes.get_window_extent().width > 200 * drawn.dpi / 100
    assert axes.get_title('left') == '24 of 24 right'


def test_draw_chart_keeps_lines_in_axes():
    panel = plots.LineChart('std', [('a', [(1, 0.9), (2, 1.414), (3, float('nan'))])], (0, 1.1))
    (axes,) = plots.draw_curves([panel]).axes
    assert axes.get_ylim()[1] > 1.414


def test_report_numbers_are_of_the_checkpoints_epoch(drawn, tmp_path):
    """kNN of every fifth epoch: an earlier checkpoint has none, a later one says of which epoch it is."""
    options = [
        *TINY,
        '--max_epochs=7',
        '--save_every_epochs=1',
        '--knn_every=5',
        f'--image_path={drawn}',
        *own_paths(tmp_path),
    ]
    assert cli.main(['train', *options]) == 0
    run = tmp_path / 'ckpt' / RUN
    for epoch, said in ((1, None), (5, 'kNN top-1'), (6, 'kNN top-1, epoch 5')):
        (path,) = run.glob(f'*_epoch_{epoch}')
        reported(tmp_path, f'--ckpt_name={path}')
        text = (tmp_path / 'log' / RUN / 'report.html').read_text()
        names = re.findall(r'<dt>([^<]*)</dt>', text)
        assert [name for name in names if name.startswith('kNN')] == ([said] if said else []), epoch


def test_report_of_two_checkpoints_names_epochs(folder, capsys):
    (path,) = (folder / 'ckpt' / RUN).glob('loss_*')
    assert cli.main(['report', f'--ckpt_name={path},{path}', *own_paths(folder)]) == 2
    assert 'names a checkpoint twice' in one_line(capsys.readouterr().err)
