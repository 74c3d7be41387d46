"""Runs on one page, to be explored: verdict, results, curves, map, neighbours, doubles, odd ones, confusion, options.

One file of HTML that needs no network. page/report.html is its template; style.css and explore.js go into it.
"""

import base64
import io
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

import plots
from ckpt import whole_ones
from commands.list_runs import differing
from config import OPTIONS
from dataloader.load_dataset import in_order, load_splits
from errors import UserError, path_of
from infer import pixels_of, same_class, shown_of
from logger import read_scalars
from metric import subset_selection
from metric.accuracy import confusion
from metric.knn import knn_scores, nearest, neighbours
from metric.projection_2d import plane
from protocols import collapse_verdict
from protocols.features import features_of
from protocols.protocol import find_protocol
from protocols.results import of_run
from runtime.atomic_write import save_picture, write_aside
from runtime.console import complain, shown
from runtime.device import get_device, use_device
from runtime.files import is_number, try_writing
from runtime.messages import say
from runtime.options import changed
from runtime.tensors import evenly_spaced

PAGE = Path(__file__).resolve().parent / 'report_page'
NEAR, GALLERY = 8, 24  # neighbours of an image; doubles and odd ones that are shown
TILE, ACROSS, SHEET = 64, 32, 1024  # px of a thumbnail at most; thumbnails of a row, and of a sheet
CHARTS = (  # file name, title, bounds, {tag: name of its line}
    ('loss', 'loss', None, {'pretraining/loss': ''}),
    ('std', 'std of z / |z|, times sqrt(d)', (0, 1.1), {'pretraining/std': ''}),
    ('knn', 'kNN top-1 on val, %', None, {'pretraining/knn_top1': ''}),
    ('few', 'top-1 on val with 10 labels a class, %', None, {'pretraining/few_labels_top1': ''}),
    ('rank', 'rank of the own other view', None, {'pretraining/rank': ''}),
    (
        'rate',
        'learning rate',
        None,
        {'schedule/learning_rate_encoder': 'backbone, projector', 'schedule/learning_rate_predictor': 'predictor'},
    ),
)


@dataclass
class Shown:
    """A run on the page. features, labels: of its network, {split: N x d, N}; the images are the first run's."""

    args: object
    checkpoint: dict
    backbone: object
    logged: dict
    splits: dict = field(default_factory=dict)
    features: dict = field(default_factory=dict)
    labels: dict = field(default_factory=dict)
    of_epoch: str = ''  # in the name, where several checkpoints of the run are on the page

    @property
    def name(self):
        return self.checkpoint['run'].name + self.of_epoch


def report(args):
    """Write --output, by default <log folder>/<run>/report.html, and its curves, map and confusion beside it as PNG.
    Of several runs, --ckpt_name=RUN1,RUN2, the default is comparison.html. Returns the page's path.

    Raises UserError without a checkpoint. What a run has not (labels, curves of another tool's file) is left out.
    """
    if not args.ckpt_name:
        raise UserError('report wants --ckpt_name=<run>, or several: <run>,<run>; python3 cli.py runs lists them')
    use_device(args)
    names = [name.strip() for name in args.ckpt_name.split(',')]
    if '' in names:
        raise UserError(f'--ckpt_name={args.ckpt_name}: there is nothing beside a comma')
    runs = [opened(*one) for one in whole_ones(args, names)]
    if len({run.checkpoint['path'] for run in runs}) < len(runs):
        raise UserError(f'--ckpt_name={args.ckpt_name} names a checkpoint twice')
    if len({run.name for run in runs}) < len(runs):
        for run in runs:
            run.of_epoch = f', epoch {run.checkpoint["epoch"]}'
    folder = path_of(args.log_path) / runs[0].checkpoint['run'].name
    page = path_of(args.output) if args.output else folder / ('report.html' if len(runs) == 1 else 'comparison.html')
    try_writing(page)
    for run in runs:
        look(run, runs[0].args)
    content, data = {}, {}
    for part in (training, explored, galleries, judged):
        for_page, for_script = part(runs, page)
        content, data = {**content, **for_page}, {**data, **for_script}
    text = rendered(runs, content, data)
    write_aside(page, lambda aside: aside.write_text(text, encoding='utf-8', errors='backslashreplace'))
    say(f'report     {page}')
    return page


def opened(args, model, checkpoint):
    backbone = model.backbone.to(get_device(args), memory_format=torch.channels_last)
    return Shown(args, checkpoint, backbone, read_scalars(path_of(args.log_path) / checkpoint['run'].name))


def look(run, first):
    """Features of train and val; first: the options of the run whose images they are."""
    same = {name: getattr(first, name) for name in ('preset', 'image_path', 'val_fraction', 'pixel_max', 'bad_images')}
    own = changed(run.args, **same)
    run.splits = {name: images for name, images in load_splits(own).items() if images and name in ('train', 'val')}
    for name, images in run.splits.items():
        title = f'{run.name}: features of {name}'
        run.features[name], run.labels[name] = features_of(own, run.backbone, in_order(own, images), title)


def saved(drawn, page, name):
    """A figure as SVG for the page; beside the page it is a PNG file."""
    save_picture(plots.image_of(drawn, scale=2), page.with_name(f'{page.stem}_{name}.png'))
    return plots.svg_of(drawn, name)


def training(runs, page):
    """What training logged, as far as it did: the charts, and for the script where their lines run."""
    charts, places = [], {}
    for name, title, bounds, tags in CHARTS:
        tags = tags if len(runs) == 1 else dict([*tags.items()][:1])
        lines = [
            (run.name if len(runs) > 1 else line, points)
            for run in runs
            for tag, line in tags.items()
            if (points := [point for point in run.logged.get(tag, []) if math.isfinite(point[1])])
        ]
        if not lines:
            continue
        mark = None
        if name == 'std':
            mark = 'collapse is warned of', runs[0].args.collapse_threshold
        elif name in ('knn', 'few', 'rank') and lines[0][1][0][0] == 0 and len(runs) == 1:
            mark = collapse_verdict.began(runs[0].args), lines[0][1][0][1]
        drawn = plots.curves([plots.Panel(title, lines, bounds, mark)], (440, 290))
        charts.append((name, title, saved(drawn, page, name)))
        places[name] = {**of_axes(drawn), 'lines': lines}
    return {'charts': charts}, {'charts': places}


def of_axes(drawn):
    """Where the axes of a figure with one chart lie, in shares of it, and what they span; once it is drawn."""
    axes = drawn.axes[0]
    box = axes.get_position()
    return {
        'box': [box.x0, 1 - box.y1, box.x1, 1 - box.y0],
        'x': axes.get_xlim(),
        'y': axes.get_ylim(),
    }


def explored(runs, page):
    """The map: for the script the images that are shown, their thumbnails, and of each run where it sees them."""
    first = runs[0]
    places = [(name, row) for name, images in first.splits.items() for row in range(len(images))]
    of = len(places)
    places = [places[row] for row in evenly_spaced(of, first.args.map_images).tolist()]
    classes = first.splits['train'].classes
    labels = torch.tensor([int(first.labels[name][row]) for name, row in places])
    maps = []
    for run in runs:
        x = on_map(run, first)
        say(f'map        {len(x)} images as {run.name} sees them')
        points = torch.as_tensor(plane(x))
        directions = subset_selection.directions(x)
        cosine, rows = nearest(directions, directions, NEAR + 1)
        others = [[row for row in found if row != own][:NEAR] for own, found in enumerate(rows.tolist())]
        maps.append({'run': run.name, 'points': unit(points), 'near': others, 'cosine': rounded(cosine[:, 1:], 3)})
        if run is first:
            drawn = plots.scatter(points.numpy(), labels.numpy(), classes)
            save_picture(plots.image_of(drawn, scale=2), page.with_name(f'{page.stem}_map.png'))
    data = {
        'maps': maps,
        'classes': [shown(name) for name in classes],
        'splits': [*first.splits],
        'names': [shown(first.splits[name].names[row]) for name, row in places],
        'labels': labels.tolist(),
        'split': [[*first.splits].index(name) for name, _ in places],
        'colours': plots.COLOURS,
        **sheets(first, places),
    }
    return {'on_map': len(places), 'of': of, 'map_runs': [run.name for run in runs]}, data


def on_map(run, first):
    """Features of the images that are shown, N x d; first: the run whose images they are."""
    every = torch.cat([*run.features.values()])
    return every[evenly_spaced(len(every), first.args.map_images).to(every.device)]


def unit(points):
    """Points of a plane, N x 2, moved into the unit square, y downward, as a list."""
    low, high = points.min(0).values, points.max(0).values
    where = 0.5 + (points - (low + high) / 2) / (high - low).max().clamp(min=1e-9)
    return rounded(torch.stack((where[:, 0], 1 - where[:, 1]), 1), 4)


def rounded(values, digits):
    return [[round(value, digits) for value in row] for row in values.nan_to_num().tolist()]


def sheets(run, places):
    """Thumbnails of images, (split, row) each, as sheets of SHEET, ACROSS in a row: data of WebP files."""
    side, found = min(TILE, run.args.image_size), []
    for start in range(0, len(places), SHEET):
        part = places[start : start + SHEET]
        pixels = torch.cat([thumbnails(run, name, [row for of, row in part if of == name]) for name in run.splits])
        found.append(embedded(plots.tiles(pixels, ACROSS, side), 'WEBP'))
    return {'sheets': found, 'tile': side, 'across': ACROSS, 'per_sheet': SHEET}


def thumbnails(run, split, rows):
    if not rows:
        return torch.empty(0, 3, run.args.image_size, run.args.image_size)
    return pixels_of(run.args, run.splits[split], torch.tensor(rows))


def embedded(image, kind):
    """A PIL image as a data URI."""
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=80)
    return f'data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}'


def galleries(runs, page):
    """Two views; near-duplicates and the oddest images of the map; some images of val beside the nearest of train."""
    first = runs[0]
    path = path_of(first.args.log_path) / first.checkpoint['run'].name / 'two_views.png'
    views = None
    if path.is_file():
        try:
            with Image.open(path) as image:
                views = image.width, image.height, embedded(image.convert('RGB'), 'PNG')
        except OSError as error:
            complain('warning', f'{path} is damaged, and left out: {error}')
    x = on_map(first, first)
    rows, groups, *nearest_of = subset_selection.near_groups(x, first.args.duplicates)
    pairs = subset_selection.nearest_pairs(rows, *nearest_of)
    odd, near = subset_selection.oddest(x, min(GALLERY, len(x)))
    return {
        'views': views,
        'doubles': pairs[:GALLERY],
        'double_images': len(rows),
        'double_groups': int(groups.max()) + 1 if len(groups) else 0,
        'threshold': first.args.duplicates,
        'odd': [*zip(odd.tolist(), near.tolist(), strict=True)],
        'neighbours': beside(first),
        'queries': 'val' if 'val' in first.splits else 'train',
    }, {}


def beside(run):
    """Rows of [data URI, name, cosine, whether its class is the first one's]: a query and what is nearest in train."""
    train, val = run.splits['train'], run.splits.get('val', run.splits['train'])
    queries = shown_of(val)
    features = run.features['val' if 'val' in run.splits else 'train']
    cosine, found = nearest(features[queries.to(features.device)], run.features['train'], NEAR + (val is train))
    rows = []
    for query, *pair in zip(queries.tolist(), cosine.tolist(), found.tolist(), strict=True):
        near = [(value, row) for value, row in zip(*pair, strict=True) if not (val is train and row == query)][:NEAR]
        values, others = [value for value, _ in near], [row for _, row in near]
        tiles = [*pixels_of(run.args, val, torch.tensor([query]))]
        tiles += pixels_of(run.args, train, torch.tensor(others)) if others else []
        images = [embedded(plots.pil_of(tile).resize((96, 96)), 'WEBP') for tile in tiles]
        names = [shown(val.names[query]), *(shown(train.names[row]) for row in others)]
        right = [None, *(same_class(val, query, train, row) for row in others)]
        rows.append([*zip(images, names, [1.0, *values], right, strict=True)])
    return rows


def judged(runs, page):
    """The confusion of the first run's kNN on val, where all of val and some of train has labels."""
    run = runs[0]
    labels, wanted = run.labels['train'], run.labels.get('val')
    known = labels >= 0
    if wanted is None or not known.any() or (wanted < 0).any():
        return {'confusion': None}, {}
    classes, k = run.splits['val'].classes, neighbours(run.args.knn_k, labels[known])
    bank = run.features['train'][known]
    scores = knn_scores(run.features['val'], bank, labels[known], len(classes), k, run.args.knn_temperature)
    return {'confusion': saved(plots.confusion(confusion(scores, wanted).cpu(), classes), page, 'confusion')}, {}


def rendered(runs, content, data):
    """The page as text."""
    first, judged_by = runs[0], {run.name: of_run(run.checkpoint['run']) for run in runs}
    options = [asdict(run.args) for run in runs]
    varied = differing(options) if len(runs) > 1 else [n for n in OPTIONS if options[0][n] != OPTIONS[n].default]
    title = f'{first.name}: {first.args.backbone}, {path_of(first.args.image_path).name}'
    environment = Environment(
        loader=FileSystemLoader(PAGE), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    return environment.get_template('report.html').render(
        title=shown(title if len(runs) == 1 else ' and '.join(run.name for run in runs)),
        style=(PAGE / 'style.css').read_text(encoding='utf-8'),
        script=(PAGE / 'explore.js').read_text(encoding='utf-8'),
        data=data,
        runs=[{'name': run.name, 'verdict': verdict_on(run), 'numbers': numbers(run)} for run in runs],
        colours=plots.COLOURS,
        compared=[row for run in runs for row in compared_rows(run, judged_by[run.name])],
        results=[(run.name, *row) for run in runs for row in result_rows(run, judged_by[run.name])],
        varied=[(name, [of[name] for of in options], OPTIONS[name].metadata['meaning']) for name in varied],
        options=[(name, options[0][name], OPTIONS[name].metadata['meaning']) for name in OPTIONS],
        **content,
    )


def verdict_on(run):
    """What the measures without labels say of a run, (word, sentence); None of one that has none."""
    return collapse_verdict.of_run(run.checkpoint['run'], run.checkpoint['epoch'], run.args)


def numbers(run):
    """(name, value) of what a run has come to."""
    found = [
        ('epoch', f'{run.checkpoint["epoch"]} of {run.args.max_epochs}'),
        ('loss', f'{run.checkpoint["loss"]:.4f}'),
    ]
    for name, tag, form in (
        ('std', 'pretraining/std', '{:.3f}'),
        ('kNN top-1', 'pretraining/knn_top1', '{:.2f} %'),
        ('rank', 'pretraining/rank', '{:.1f}'),
        ('images/s', 'speed/images_per_second', '{:.0f}'),
    ):
        own = run.checkpoint['epoch']
        by_then = [pair for pair in run.logged.get(tag, []) if 0 < pair[0] <= own or own == 0 == pair[0]]
        if by_then:  # the untrained network's is not the run's; what is of an earlier epoch says so
            epoch, value = by_then[-1]
            found.append((name if epoch == own else f'{name}, epoch {epoch}', form.format(value)))
    return found


def compared_rows(run, results):
    """The tables of --protocol=compare: (run, about, columns, [(row, [(top-1, gain of the run over it or '')])])."""
    for result in results:
        if not result.get('rows'):
            continue
        columns = [*result['rows'][0]['columns']]
        rows = []
        for row in result['rows']:
            cells = [row['columns'][column] for column in columns]
            gains = [f'{c["gain"]:+.1f} ± {c["gain_error"]:.1f}' if 'gain' in c else '' for c in cells]
            values = [f'{cell["top1"]:.1f} ± {cell["error"]:.1f}' for cell in cells]
            rows.append((shown(row['name']), [*zip(values, gains, strict=True)]))
        about = (
            f'{run.name}, epoch {result["epoch"]}, on the {result["num_val"]} images of {result["judged_on"]}: top-1 '
            'in percent, ± standard error; below it how far the run is above that row, paired by image.'
        )
        yield run.name, about, columns, rows


def result_rows(run, results):
    """What evaluate measured: (protocol and epoch, images, first number and its name, the others)."""
    for result in results:
        numbers = find_protocol(result['protocol']).numbers
        found = [(name, f'{result[key]:.2f}') for key, name in numbers.items() if is_number(result.get(key))]
        if not found:  # the measures without labels: the verdict tells them
            continue
        first, *others = found
        beside = ', '.join(' '.join(pair) for pair in others)
        of = Path(result['images']['path']).name if 'images' in result else ''
        yield f'{result["protocol"]}, epoch {result["epoch"]}', of, *first, beside
