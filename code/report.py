"""A run on one page: verdict, results, curves, views, map, neighbours, confusion, options. HTML without a network."""

import base64
import html
import io
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image
from torch.nn.functional import normalize

import pictures
from ckpt import get_model_ckpt
from config import OPTIONS, UserError, path_of
from dataloader.load_dataset import in_order, load_splits
from evaluate import NAMES
from infer import neighbours_picture, shown_of
from logger import read_scalars, say
from metric.accuracy import confusion
from metric.knn import knn_scores, nearest, neighbours
from protocols.features import features_of
from records import read_metrics
from results import of_run
from utils import evenly_spaced, save_picture, use_device, write_aside
from verdict import of_metrics

POINTS = 2000  # images on the map
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 0 auto; padding: 1rem }
body { max-width: 64rem }
h1 { font-size: 1.5rem; margin-bottom: 0; overflow-wrap: anywhere } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem }
p { margin: .3rem 0; max-width: 46rem } .verdict { border-left: .4rem solid #1b9e77; padding: .2rem .8rem }
.verdict { margin: 1rem 0; background: #f6f6f6 } .bad { border-color: #d6301f }
.numbers { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1rem 0 }
.numbers div { border: 1px solid #ddd; border-radius: .4rem; padding: .4rem .8rem }
.numbers b { display: block; font-size: 1.4rem } img { max-width: 100%; height: auto; display: block; margin: .5rem 0 }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 0 1rem }
table { border-collapse: collapse; font-size: .9rem } tr { border-bottom: 1px solid #eee }
td { padding: .15rem .8rem .15rem 0; text-align: left; overflow-wrap: anywhere; vertical-align: top }
.options td:first-child { white-space: nowrap } details { margin-top: .5rem }
"""


def report(args):
    """Write <log folder>/<run>/report.html and its pictures beside it as PNG files. Returns the page's path.

    Raises UserError without a checkpoint. What a run has not (labels, curves of another tool's file) is left out.
    """
    if not args.ckpt_name:
        raise UserError('report wants --ckpt_name=<run>: python3 cli.py evaluate lists them')
    args, model, checkpoint = get_model_ckpt(args)
    run, folder = checkpoint['run'], path_of(args.log_path) / checkpoint['run'].name
    backbone = model.backbone.to(use_device(args), memory_format=torch.channels_last)
    splits, logged = load_splits(args), read_scalars(folder)
    results = of_run(run)
    parts = [*curves(args, logged), *two_views(folder), *of_features(args, backbone, splits)]
    for _, name, _, image in parts:
        save_picture(image, folder / f'report_{name}.png')
    page = folder / 'report.html'
    text = page_of(args, checkpoint, logged, results, parts)
    write_aside(page, lambda aside: aside.write_text(text, encoding='utf-8', errors='backslashreplace'))
    say(f'report     {page}')
    return page


def curves(args, logged):
    """(title, file name, caption, picture) of what training logged, as far as it did. logged: read_scalars'."""

    def line(name, tag):
        return [(name, logged[tag])] if tag in logged else []

    knn = line('', 'pretraining/knn_top1')
    untrained = dict(knn[0][1]).get(0) if knn else None
    panels = (
        ('loss', pictures.Panel('loss', line('', 'pretraining/loss'))),
        (
            'std',
            pictures.Panel(
                'std of z / |z|, times sqrt(d)',
                line('', 'pretraining/std'),
                (0, 1.1),
                ('collapse is warned of', args.collapse_threshold),
            ),
        ),
        ('knn', pictures.Panel('kNN top-1 on val, %', knn, None, untrained and ('untrained', untrained))),
        (
            'rate',
            pictures.Panel(
                'learning rate',
                [
                    *line('backbone, projector', 'schedule/learning_rate_encoder'),
                    *line('predictor', 'schedule/learning_rate_predictor'),
                ],
            ),
        ),
    )
    return [('', f'curve_{name}', '', pictures.curves([panel], (480, 280))) for name, panel in panels if panel.lines]


def two_views(folder):
    path = folder / 'two_views.png'
    if not path.is_file():
        return []
    with Image.open(path) as image:
        return [
            (
                'What the network sees',
                'two_views',
                "Two random views of each image, one above the other; the first batch's.",
                image.convert('RGB'),
            )
        ]


def of_features(args, backbone, splits):
    """The pictures that need the features of train and val: map, neighbours, confusion of kNN."""
    train, val = splits['train'], splits['val'] or splits['train']
    features, labels = features_of(args, backbone, in_order(args, train), 'features of train')
    val_features, val_labels = features_of(args, backbone, in_order(args, val), 'features of val')
    rows = evenly_spaced(len(val), POINTS)
    shown = shown_of(val)
    near = nearest(val_features[shown.to(val_features.device)], features, 8)
    points, share = principal(normalize(val_features[rows.to(val_features.device)], dim=1))
    parts = [
        (
            'The space of features',
            'map',
            'Directions of the features of val, in the plane in which they vary most '
            f'(PCA; {share:.0%} of their variance); a colour is a class.',
            pictures.scatter(points.cpu(), val_labels[rows].cpu(), val.classes),
        ),
        (
            'Nearest neighbours',
            'neighbours',
            'Images of val, and the training images nearest to each, in green where '
            'they are of its class and in red where they are not.',
            neighbours_picture(args, val, shown, train, *near),
        ),
    ]
    known = labels >= 0
    if splits['val'] and known.any() and (val_labels >= 0).all():
        k = neighbours(args.knn_k, labels[known])
        scores = knn_scores(val_features, features[known], labels[known], len(val.classes), k, args.knn_temperature)
        counts = confusion(scores, val_labels).cpu()
        parts.append(('Confusion', 'confusion', 'Of kNN on val.', pictures.confusion(counts, val.classes)))
    return parts


def principal(x):
    """The projection of x, N x d, on its two main axes, N x 2, and the share of the variance that lies in them."""
    x = x - x.mean(0)
    _, strengths, axes = torch.linalg.svd(x, full_matrices=False)
    return x @ axes[:2].T, (strengths[:2].square().sum() / strengths.square().sum()).item()


def page_of(args, checkpoint, logged, results, parts):
    """The page as text; pictures are inside it."""
    numbers = [('epoch', f'{checkpoint["epoch"]} of {args.max_epochs}'), ('loss', f'{checkpoint["loss"]:.4f}')]
    for name, tag, form in (
        ('std', 'pretraining/std', '{:.3f}'),
        ('kNN top-1', 'pretraining/knn_top1', '{:.2f} %'),
        ('images/s', 'speed/images_per_second', '{:.0f}'),
    ):
        if tag in logged:
            numbers.append((name, form.format(logged[tag][-1][1])))
    boxes = ''.join(f'<div><b>{html.escape(value)}</b>{html.escape(name)}</div>' for name, value in numbers)
    judged = verdict_on(checkpoint['run'])
    training = ''.join(figure(*part) for part in parts if part[1].startswith('curve'))
    if training:
        caption = (
            'Loss falls while std stays near 1: the views of an image agree, images differ. A falling std is '
            'collapse, whatever the loss.'
        )
        training = f'<h2>Training</h2><p>{caption}</p><div class="pair">{training}</div>'
    pairs = [(f'--{name}', value, OPTIONS[name]) for name, value in asdict(args).items()]
    own = [pair for pair in pairs if pair[1] != pair[2].default]
    title = html.escape(f'{checkpoint["run"].name}: {args.backbone}, {path_of(args.image_path).name}')
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><link rel="icon" href="data:,"><style>{STYLE}</style></head>
<body><h1>{title}</h1>
{judged}<div class="numbers">{boxes}</div>
{results_table(results)}
{training}
{''.join(figure(*part) for part in parts if not part[1].startswith('curve'))}
<h2>Options</h2><p>Those that differ from the default, by the preset or on the command line.</p>
{options_table(own)}
<details><summary>all {len(pairs)}</summary>{options_table(pairs)}</details></body></html>
"""


def verdict_on(run):
    """What the measures without labels say of a run, as a paragraph; nothing of one that has none."""
    said = of_metrics(read_metrics(run / 'metrics.jsonl'))
    if not said:
        return ''
    good = '' if said[0] == 'healthy' else ' bad'
    return f'<p class="verdict{good}"><b>{html.escape(said[0].capitalize())}.</b> {html.escape(said[1])}</p>'


def figure(title, _, caption, image):
    """A picture with its title and what it shows, either of which may be missing."""
    buffer = io.BytesIO()
    image.save(buffer, 'PNG')
    data = base64.b64encode(buffer.getvalue()).decode()
    heading = f'<h2>{html.escape(title)}</h2>' if title else ''
    alt = html.escape(title or 'curve')
    text = f'<p>{html.escape(caption)}</p>' if caption else ''
    size = f'width="{image.width}" height="{image.height}"'
    return f'{heading}{text}<img {size} alt="{alt}" src="data:image/png;base64,{data}">\n'


def results_table(results):
    """What evaluate measured: a row for each result, its first number in front."""
    rows = ''
    for result in results:
        first, *others = [(NAMES[key], f'{result[key]:.2f}') for key in NAMES if result.get(key) is not None]
        beside = ', '.join(' '.join(pair) for pair in others)
        name = f'{result["protocol"]}, epoch {result["epoch"]}'
        of = Path(result['images']['path']).name if 'images' in result else ''
        cells = ''.join(f'<td>{html.escape(cell)}</td>' for cell in (name, of))
        rows += f'<tr>{cells}<td><b>{first[1]}</b> {first[0]}</td><td>{beside}</td></tr>'
    return f'<h2>Results, %</h2><table>{rows}</table>' if rows else ''


def options_table(pairs):
    """pairs: (option, value, its field in config.Config)."""
    rows = ''
    for name, value, option in pairs:
        cells = (name, str(value), option.metadata['meaning'])
        rows += f'<tr>{"".join(f"<td>{html.escape(cell)}</td>" for cell in cells)}</tr>'
    return f'<table class="options">{rows}</table>'
