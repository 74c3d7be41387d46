"""report: an interactive HTML page on one or more runs: verdict, results, curves, map of features, neighbors,
near-duplicates, outliers, confusion matrix, options.

The page is one file without network access. report_page/report.html is the template; style.css and explore.js are
embedded.
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
from ckpt import iter_valid_checkpoints
from commands.list_runs import varying_options
from config import OPTIONS
from dataloader.load_dataset import eval_loader, load_splits
from infer import load_crops, same_class, sample_rows
from logger import load_scalars
from metric import subset_selection
from metric.accuracy import confusion_matrix
from metric.knn import clip_k, knn_scores, topk_neighbors
from metric.projection_2d import tsne_2d
from protocols import collapse_verdict
from protocols.compare import format_cell, format_gain
from protocols.features import extract_features
from protocols.protocol import find_protocol
from protocols.results import list_options, load_results, selection_note
from runtime.atomic_write import atomic_write_on_main, save_png
from runtime.checkpoints.best_epoch import WATCHED
from runtime.console import printable
from runtime.device import init_device, move_network
from runtime.errors import UserError, resolve_path
from runtime.files import is_number, try_writing
from runtime.messages import log, warn
from runtime.options import channel_numbers, replace_args
from runtime.tensors import evenly_spaced

PAGE = Path(__file__).resolve().parent / 'report_page'
NEAR, GALLERY = 8, 24  # neighbors of an image; near-duplicates and outliers to show
TILE, ACROSS, SHEET = 64, 32, 1024  # largest thumbnail in pixels; thumbnails per row, and per sheet
CHARTS = (  # file name, title, y limits, {tag: name of the line}
    ('loss', 'loss', None, {'pretraining/loss': ''}),
    ('std', 'std of z / |z|, times sqrt(d)', (0, 1.1), {'pretraining/std': ''}),
    ('knn', 'kNN top-1 on val, %', None, {'pretraining/knn_top1': ''}),
    ('few', f'top-1 on val with {WATCHED} labels per class, %', None, {'pretraining/few_labels_top1': ''}),
    ('similarity', 'similarity to the targets of the distillation', None, {'pretraining/target_similarity': ''}),
    ('rank', 'retrieval rank of the positive view', None, {'pretraining/rank': ''}),
    (
        'rate',
        'learning rate',
        None,
        {
            'schedule/learning_rate_backbone': 'backbone',
            'schedule/learning_rate_projector': 'projector',
            'schedule/learning_rate_predictor': 'predictor',
        },
    ),
)


@dataclass
class ReportRun:
    """A run on the page. features, labels: {split: N x d}, {split: N}, of the images of the first run."""

    args: object
    checkpoint: dict
    backbone: object
    logged: dict
    splits: dict = field(default_factory=dict)
    features: dict = field(default_factory=dict)
    labels: dict = field(default_factory=dict)
    epoch_suffix: str = ''  # in the name, if the page shows several checkpoints of the run

    @property
    def name(self):
        return self.checkpoint['run'].name + self.epoch_suffix


def report(args):
    """Write --output, by default <log folder>/<run>/report.html, or comparison.html for several runs
    (--ckpt_name=RUN1,RUN2), and its curves, map and confusion matrix as PNG files beside it. Returns the page's path.

    Sections without data (no labels, no curves) are left out. Raises UserError without a checkpoint.
    """
    if not args.ckpt_name:
        raise UserError('report needs --ckpt_name=<run>, or several: <run>,<run>; python3 cli.py runs lists them')
    init_device(args)
    names = [name.strip() for name in args.ckpt_name.split(',')]
    if '' in names:
        raise UserError(f'--ckpt_name={args.ckpt_name}: a name is empty')
    runs = [load_run(*one) for one in iter_valid_checkpoints(args, names)]
    if len({run.checkpoint['path'] for run in runs}) < len(runs):
        raise UserError(f'--ckpt_name={args.ckpt_name} names a checkpoint twice')
    if len({run.name for run in runs}) < len(runs):
        for run in runs:
            run.epoch_suffix = f', epoch {run.checkpoint["epoch"]}'
    folder = resolve_path(args.log_path) / runs[0].checkpoint['run'].name
    page = (
        resolve_path(args.output) if args.output else folder / ('report.html' if len(runs) == 1 else 'comparison.html')
    )
    try_writing(page)
    for run in runs:
        if channel_numbers(run.args.channels) != channel_numbers(runs[0].args.channels):
            raise UserError(
                f'{run.name} has --channels={run.args.channels}, and {runs[0].name} {runs[0].args.channels}: runs on '
                'one page see the same images'
            )
        extract_run_features(run, runs[0].args)
    content, data = {}, {}
    for part in (curves_section, map_section, gallery_section, confusion_section):
        for_page, for_script = part(runs, page)
        content, data = {**content, **for_page}, {**data, **for_script}
    text = render_page(runs, content, data)
    atomic_write_on_main(page, lambda aside: aside.write_text(text, encoding='utf-8', errors='backslashreplace'))
    log(f'report     {page}')
    return page


def load_run(args, model, checkpoint):
    backbone = move_network(args, model.backbone)
    return ReportRun(args, checkpoint, backbone, load_scalars(checkpoint['run'], resolve_path(args.log_path)))


def extract_run_features(run, first):
    """Compute the features of train and val. first: the options of the first run, whose images are used."""
    names = ['preset', 'image_path', 'val_fraction', 'exif', 'on_unreadable']
    names += ['white_level'] if run.checkpoint['layout'] != 'ours' else []  # a run has that of its mean and std
    run_args = replace_args(run.args, **{name: getattr(first, name) for name in names})
    run.splits = {name: images for name, images in load_splits(run_args).items() if images and name in ('train', 'val')}
    for name, images in run.splits.items():
        title = f'{run.name}: features of {name}'
        run.features[name], run.labels[name] = extract_features(
            run_args, run.backbone, eval_loader(run_args, images), title
        )


def save_figure(figure, page, name):
    """Save a figure as a PNG file beside the page. Returns it as SVG text."""
    save_png(plots.figure_to_pil(figure, scale=2), page.with_name(f'{page.stem}_{name}.png'))
    return plots.figure_to_svg(figure, name)


def curves_section(runs, page):
    """Build the section of training curves. Returns ({'charts'} for the template, {'charts'} for the script)."""
    charts, places = [], {}
    for name, title, bounds, tags in CHARTS:
        lines = [
            (run.name if len(runs) > 1 else tags[tag], points)
            for run in runs
            # Of several runs the first line each: only a rate of its own is logged for the backbone.
            for tag in [tag for tag in tags if tag in run.logged][: None if len(runs) == 1 else 1]
            if (points := [point for point in run.logged.get(tag, []) if math.isfinite(point[1])])
        ]
        if not lines:
            continue
        mark = None
        if name == 'std':
            mark = 'collapse is warned of', runs[0].args.collapse_threshold
        elif name in ('knn', 'few', 'similarity', 'rank') and lines[0][1][0][0] == 0 and len(runs) == 1:
            mark = collapse_verdict.baseline_label(runs[0].args.init_from), lines[0][1][0][1]
        figure = plots.draw_curves([plots.LineChart(title, lines, bounds, mark)], (440, 290))
        charts.append((name, title, save_figure(figure, page, name)))
        places[name] = {**get_axes_geometry(figure), 'lines': lines}
    return {'charts': charts}, {'charts': places}


def get_axes_geometry(figure):
    """Return the position of the axes in a drawn figure, as shares of its size, and their limits."""
    axes = figure.axes[0]
    box = axes.get_position()
    return {
        'box': [box.x0, 1 - box.y1, box.x1, 1 - box.y0],
        'x': axes.get_xlim(),
        'y': axes.get_ylim(),
    }


def map_section(runs, page):
    """Build the map of features. Returns (template values, script data: images, thumbnails, and points of each run)."""
    first = runs[0]
    places = [(name, row) for name, images in first.splits.items() for row in range(len(images))]
    total = len(places)
    places = [places[row] for row in evenly_spaced(total, first.args.report_max_images).tolist()]
    classes = first.splits['train'].classes
    labels = torch.tensor([int(first.labels[name][row]) for name, row in places])
    maps = []
    for run in runs:
        x = map_features(run, first)
        log(f'map        {len(x)} images as {run.name} sees them')
        points = torch.as_tensor(tsne_2d(x))
        directions = subset_selection.center_and_normalize(x)
        cosine, rows = topk_neighbors(directions, directions, NEAR + 1)
        near = [
            [row for row in neighbors if row != row_number][:NEAR] for row_number, neighbors in enumerate(rows.tolist())
        ]
        maps.append(
            {
                'run': run.name,
                'points': to_unit_square(points),
                'near': near,
                'cosine': round_nested(cosine[:, 1:], 3),
            }
        )
        if run is first:
            figure = plots.draw_scatter(points.numpy(), labels.numpy(), classes)
            save_png(plots.figure_to_pil(figure, scale=2), page.with_name(f'{page.stem}_map.png'))
    data = {
        'maps': maps,
        'classes': [printable(name) for name in classes],
        'splits': [*first.splits],
        'names': [printable(first.splits[name].names[row]) for name, row in places],
        'labels': labels.tolist(),
        'split': [[*first.splits].index(name) for name, _ in places],
        'colors': plots.COLORS,
        **thumbnail_sprites(first, places),
    }
    return {'on_map': len(places), 'of': total, 'map_runs': [run.name for run in runs]}, data


def map_features(run, first):
    """Return the features of the images on the map, N x d. first: the first run, whose images are used."""
    every = torch.cat([*run.features.values()])
    return every[evenly_spaced(len(every), first.args.report_max_images).to(every.device)]


def to_unit_square(points):
    """Scale points, N x 2, to the unit square, with y downwards. Returns a list."""
    low, high = points.min(0).values, points.max(0).values
    unit = 0.5 + (points - (low + high) / 2) / (high - low).max().clamp(min=1e-9)
    return round_nested(torch.stack((unit[:, 0], 1 - unit[:, 1]), 1), 4)


def round_nested(values, digits):
    return [[round(value, digits) for value in row] for row in values.nan_to_num().tolist()]


def thumbnail_sprites(run, places):
    """Build sheets of thumbnails of images, given as (split, row): data URIs of WebP images, with SHEET thumbnails
    each."""
    side, sheets = min(TILE, run.args.image_size), []
    for start in range(0, len(places), SHEET):
        part = places[start : start + SHEET]
        pixels = torch.cat([thumbnails(run, name, [row for of, row in part if of == name]) for name in run.splits])
        sheets.append(data_uri(plots.image_grid(pixels, ACROSS, side), 'WEBP'))
    return {'sheets': sheets, 'tile': side, 'across': ACROSS, 'per_sheet': SHEET}


def thumbnails(run, split, rows):
    if not rows:
        return torch.empty(0, 3, run.args.image_size, run.args.image_size)
    return load_crops(run.args, run.splits[split], torch.tensor(rows))


def data_uri(image, kind):
    """Encode a PIL image as a data URI."""
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=80)
    return f'data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}'


def gallery_section(runs, page):
    """Build the galleries: two views, near-duplicates, outliers, and images of val with their nearest in train."""
    first = runs[0]
    path = resolve_path(first.args.log_path) / first.checkpoint['run'].name / 'two_views.png'
    views = None
    if path.is_file():
        try:
            with Image.open(path) as image:
                views = image.width, image.height, data_uri(image.convert('RGB'), 'PNG')
        except OSError as error:
            warn(f'{path} is damaged, and left out: {error}')
    x = map_features(first, first)
    rows, groups, *nearest_of = subset_selection.near_groups(x, first.args.duplicates)
    pairs = subset_selection.nearest_pairs(rows, *nearest_of)
    odd, near = subset_selection.outliers(x, min(GALLERY, len(x)))
    return {
        'views': views,
        'doubles': pairs[:GALLERY],
        'double_images': len(rows),
        'double_groups': int(groups.max()) + 1 if len(groups) else 0,
        'threshold': first.args.duplicates,
        'odd': [*zip(odd.tolist(), near.tolist(), strict=True)],
        'neighbors': nearest_neighbor_rows(first),
        'queries': 'val' if 'val' in first.splits else 'train',
    }, {}


def nearest_neighbor_rows(run):
    """Return rows of [(data URI, name, cosine, whether the class is the query's)]: a query and its nearest images in
    train."""
    train, val = run.splits['train'], run.splits.get('val', run.splits['train'])
    queries = sample_rows(val)
    features = run.features['val' if 'val' in run.splits else 'train']
    cosine, neighbor_rows = topk_neighbors(
        features[queries.to(features.device)], run.features['train'], NEAR + (val is train)
    )
    rows = []
    for query, *pair in zip(queries.tolist(), cosine.tolist(), neighbor_rows.tolist(), strict=True):
        near = [(value, row) for value, row in zip(*pair, strict=True) if not (val is train and row == query)][:NEAR]
        values, near_rows = [value for value, _ in near], [row for _, row in near]
        tiles = [*load_crops(run.args, val, torch.tensor([query]))]
        tiles += load_crops(run.args, train, torch.tensor(near_rows)) if near_rows else []
        images = [data_uri(plots.tensor_to_pil(tile).resize((96, 96)), 'WEBP') for tile in tiles]
        names = [printable(val.names[query]), *(printable(train.names[row]) for row in near_rows)]
        right = [None, *(same_class(val, query, train, row) for row in near_rows)]
        rows.append([*zip(images, names, [1.0, *values], right, strict=True)])
    return rows


def confusion_section(runs, page):
    """Build the confusion matrix of the first run's kNN on val, if part of val and of train is labeled."""
    run = runs[0]
    labeled = {name: labels >= 0 for name, labels in run.labels.items()}
    if 'val' not in labeled or not labeled['train'].any() or not labeled['val'].any():
        return {'confusion': None}, {}
    (bank, labels), (queries, val_labels) = (
        (run.features[name][labeled[name]], run.labels[name][labeled[name]]) for name in ('train', 'val')
    )
    classes, k = run.splits['val'].classes, clip_k(run.args.knn_k, labels)
    scores = knn_scores(queries, bank, labels, len(classes), k, run.args.knn_temperature)
    return {
        'confusion': save_figure(
            plots.draw_confusion(confusion_matrix(scores, val_labels).cpu(), classes), page, 'confusion'
        )
    }, {}


def render_page(runs, content, data):
    """Render the page as HTML text."""
    first, judged_by = runs[0], {run.name: load_results(run.checkpoint['run']) for run in runs}
    options = [asdict(run.args) for run in runs]
    options_table = (
        varying_options(options) if len(runs) > 1 else [n for n in OPTIONS if options[0][n] != OPTIONS[n].default]
    )
    title = f'{first.name}: {first.args.backbone}, {resolve_path(first.args.image_path).name}'
    environment = Environment(
        loader=FileSystemLoader(PAGE), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    return environment.get_template('report.html').render(
        title=printable(title if len(runs) == 1 else ' and '.join(run.name for run in runs)),
        style=(PAGE / 'style.css').read_text(encoding='utf-8'),
        script=(PAGE / 'explore.js').read_text(encoding='utf-8'),
        data=data,
        runs=[{'name': run.name, 'verdict': find_verdict(run), 'numbers': collect_numbers(run)} for run in runs],
        colors=plots.COLORS,
        good_verdicts=collapse_verdict.GOOD,
        compared=[row for run in runs for row in collect_compare_rows(run, judged_by[run.name])],
        results=[(run.name, *row) for run in runs for row in collect_result_rows(judged_by[run.name])],
        varied=[(name, [each[name] for each in options], OPTIONS[name].metadata['meaning']) for name in options_table],
        options=[(name, options[0][name], OPTIONS[name].metadata['meaning']) for name in OPTIONS],
        **content,
    )


def find_verdict(run):
    """Return the verdict on a run, (word, sentence), or None."""
    return collapse_verdict.judge_checkpoint(run.checkpoint, run.args)


def collect_numbers(run):
    """Return [(name, value)] of a run's metrics."""
    numbers = [
        ('epoch', f'{run.checkpoint["epoch"]} of {run.args.max_epochs}'),
        ('loss', f'{run.checkpoint["loss"]:.4f}'),
    ]
    for name, tag, form in (
        ('std', 'pretraining/std', '{:.3f}'),
        ('kNN top-1', 'pretraining/knn_top1', '{:.2f} %'),
        ('rank', 'pretraining/rank', '{:.1f}'),
        ('images/s', 'speed/images_per_second', '{:.0f}'),
    ):
        run_epoch = run.checkpoint['epoch']
        by_then = [pair for pair in run.logged.get(tag, []) if 0 < pair[0] <= run_epoch or run_epoch == 0 == pair[0]]
        if by_then:  # a value of an earlier epoch is marked with its epoch
            epoch, value = by_then[-1]
            numbers.append((name if epoch == run_epoch else f'{name}, epoch {epoch}', form.format(value)))
    return numbers


def collect_compare_rows(run, results):
    """Yield the tables of --protocol=compare: (run, caption, columns, [(row, [(top-1, gain of the run over it or
    '')])])."""
    for result in results:
        if not result.get('rows'):
            continue
        columns = [*result['rows'][0]['columns']]
        rows = []
        for row in result['rows']:
            cells = [row['columns'][column] for column in columns]
            rows.append((printable(row['name']), [(format_cell(cell), format_gain(cell)) for cell in cells]))
        options = ''.join(f', {option}' for option in list_options(result))
        caption = (
            f'{run.name}, epoch {result["epoch"]}{options}: top-1 in percent ± standard error, and below it the gain '
            f'of the run over that row, paired by image; on the {result["num_val"]} images of '
            f'{result["judged_on"]}{selection_note(result)}.'
        )
        yield run.name, caption, columns, rows


def collect_result_rows(results):
    """Yield the results of evaluate: (protocol and epoch, dataset, name and value of the first number, the others)."""
    for result in results:
        numbers = find_protocol(result['protocol']).numbers
        shown = [(name, f'{result[key]:.2f}') for key, name in numbers.items() if is_number(result.get(key))]
        if not shown:  # label-free measures: they are in the verdict
            continue
        first, *further = shown
        rest = ', '.join(' '.join(pair) for pair in further) + selection_note(result)
        dataset = Path(result['images']['path']).name if 'images' in result else ''
        yield f'{result["protocol"]}, epoch {result["epoch"]}', dataset, *first, rest
