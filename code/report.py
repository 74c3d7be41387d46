"""A run on one page: curves, views, neighbours, confusion, map of features, options. HTML without a network."""

import base64
import html
import io
import json
from dataclasses import asdict

import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import pictures
from ckpt import get_model_ckpt
from config import OPTIONS, UserError, path_of
from dataloader.load_dataset import in_order, load_splits
from evaluate import figures
from infer import neighbours_picture
from logger import say
from metric.accuracy import confusion
from protocols.features import features_of
from protocols.knn import vote
from utils import get_device, write_aside

CURVES = {'loss': 'train/loss', 'std of z / |z|, times sqrt(d)': 'train/std', 'kNN top-1, %': 'knn/top1',
          'learning rate': 'learning/rate_encoder'}  # fmt: skip
POINTS = 2000  # images on the map
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 0 auto; padding: 1rem }
body { max-width: 60rem }
h1 { font-size: 1.5rem; overflow-wrap: anywhere } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem }
p { margin: .3rem 0; max-width: 42rem } .numbers { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1rem 0 }
.numbers div { border: 1px solid #ddd; border-radius: .4rem; padding: .4rem .8rem }
.numbers b { display: block; font-size: 1.4rem } img { max-width: 100%; height: auto; display: block; margin: .5rem 0 }
table { border-collapse: collapse; font-size: .85rem } td { padding: .1rem .8rem .1rem 0; overflow-wrap: anywhere }
.changed { font-weight: 600 } details { margin-top: .5rem }
"""


def report(args):
    """Write <log folder>/<run>/report.html and its pictures beside it as PNG files. Returns the page's path.

    Raises UserError without a checkpoint. What a run has not (labels, curves of another tool's file) is left out.
    """
    if not args.ckpt_name:
        raise UserError('report wants --ckpt_name=<run>: python3 cli.py evaluate lists them')
    args, model, checkpoint = get_model_ckpt(args)
    run, folder = checkpoint['run'], path_of(args.log_path) / checkpoint['run'].name
    backbone = model.backbone.to(get_device(args), memory_format=torch.channels_last)
    splits = load_splits(args)
    results = [json.loads(path.read_text()) for path in sorted(run.glob('evaluate_*.json'))]
    parts = [*curves(folder), *two_views(folder), *of_features(args, backbone, splits)]
    for _, name, _, image in parts:
        write_aside(folder / f'report_{name}.png', lambda aside, image=image: image.save(aside, 'PNG'))
    page = folder / 'report.html'
    text = page_of(args, checkpoint, results, parts)
    write_aside(page, lambda aside: aside.write_text(text, encoding='utf-8'))
    say(f'report     {page}')
    return page


def curves(folder):
    """(title, file name, caption, picture) of what training logged, as far as it did."""
    if not folder.is_dir():
        return []
    events = EventAccumulator(str(folder), size_guidance={'scalars': 0}).Reload()
    tags = set(events.Tags()['scalars'])
    lines = {title: [('', [(event.step, event.value) for event in events.Scalars(tag)])]
             for title, tag in CURVES.items() if tag in tags}  # fmt: skip
    caption = ('The loss falls while std stays near 1: the views of an image agree, and images differ. A falling std '
               'is collapse, whatever the loss. kNN at epoch 0 is the untrained backbone.')  # fmt: skip
    found = []
    for number, (title, line) in enumerate(lines.items()):
        text = caption if number == len(lines) - 1 else ''
        found.append(
            ('Training' if not number else '', f'curve_{number}', text, pictures.curves({title: line}, (640, 300)))
        )
    return found


def two_views(folder):
    path = folder / 'two_views.png'
    if not path.is_file():
        return []
    with Image.open(path) as image:
        return [('What the network sees', 'two_views', 'Two random views of each image, one above the other; the first '
                 "batch's.", image.convert('RGB'))]  # fmt: skip


def of_features(args, backbone, splits):
    """The pictures that need the features of train and val: map, neighbours, confusion of kNN."""
    train, val = splits['train'], splits['val'] or splits['train']
    features, labels = features_of(args, backbone, in_order(args, train), 'features of train')
    val_features, val_labels = features_of(args, backbone, in_order(args, val), 'features of val')
    rows = torch.linspace(0, len(val) - 1, min(POINTS, len(val))).round().long()
    points = principal(val_features[rows.to(val_features.device)]).cpu()
    caption = 'The two directions in which the features of val vary most (PCA); a colour is a class.'
    parts = [('The space of features', 'map', caption, pictures.scatter(points, val_labels[rows].cpu(), val.classes))]
    picture = neighbours_picture(args, val, val_features, train, features, 6)
    parts.append(
        ('Nearest neighbours', 'neighbours', 'Images of val, and the training images nearest to each.', picture)
    )
    known = labels >= 0
    if splits['val'] and known.any() and (val_labels >= 0).all():
        scores = vote(args, features[known], labels[known], val_features, len(val.classes))
        counts = confusion(scores, val_labels).cpu()
        parts.append(('Confusion', 'confusion', 'Of kNN on val.', pictures.confusion(counts, val.classes)))
    return parts


def principal(x):
    """The projection of x, N x d, on its two main axes: N x 2."""
    x = x - x.mean(0)
    _, _, axes = torch.linalg.svd(x, full_matrices=False)
    return x @ axes[:2].T


def page_of(args, checkpoint, results, parts):
    """The page as text; pictures are inside it."""
    numbers = [('epoch', str(checkpoint['epoch'])), ('loss', f'{checkpoint["loss"]:.4f}')]
    for result in results:
        for line in figures(result):
            name, value = line[:22].strip(), line[22:].strip()
            numbers.append((f'{result["file"].removeprefix("evaluate_").removesuffix(".json")}: {name}', value))
    boxes = ''.join(f'<div><b>{html.escape(value)}</b>{html.escape(name)}</div>' for name, value in numbers)
    body = []
    for title, _, caption, image in parts:
        buffer = io.BytesIO()
        image.save(buffer, 'PNG')
        data = base64.b64encode(buffer.getvalue()).decode()
        body.append(f'<h2>{html.escape(title)}</h2>' if title else '')
        alt = html.escape(title or caption or 'curve')
        body.append(
            f'<img width="{image.width}" height="{image.height}" alt="{alt}" src="data:image/png;base64,{data}">'
        )
        body.append(f'<p>{html.escape(caption)}</p>' if caption else '')
    options = []
    for name, value in asdict(args).items():
        kind = 'changed' if value != OPTIONS[name].default else ''
        cells = (f'--{name}', str(value), OPTIONS[name].metadata['meaning'])
        options.append(f'<tr class="{kind}">{"".join(f"<td>{html.escape(cell)}</td>" for cell in cells)}</tr>')
    title = html.escape(f'{checkpoint["run"].name}: {args.backbone}, {path_of(args.image_path).name}')
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><link rel="icon" href="data:,"><style>{STYLE}</style></head>
<body><h1>{title}</h1><div class="numbers">{boxes}</div>
{''.join(body)}
<h2>Options</h2><p>Those that differ from their default are bold.</p>
<details><summary>all</summary><table>{''.join(options)}</table></details></body></html>
"""
