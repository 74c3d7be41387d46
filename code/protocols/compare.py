"""Several backbones on the same images, a row each: kNN, and linear classifiers on all labels and on few.

All that differs between two rows is the backbone (and the preprocessing that its weights want): the images, the labels
that are drawn and the classifier are the same, so differences are paired by image.
"""

from dataclasses import replace

import torch

from ckpt import build_model, checkpoints, get_model_ckpt
from dataloader.load_dataset import eval_loader, labeled_subset
from metric.knn import clip_k, knn_scores
from model.weights import is_off_the_shelf
from protocols.features import extract_features
from protocols.few_labels import classify, draw_label_subsets, score_few_labels
from protocols.protocol import Outcome, Protocol, labeled_splits
from runtime.console import format_columns
from runtime.device import get_device
from runtime.errors import UserError
from runtime.messages import log
from runtime.options import replace_args

ALL = 'all labels'  # the column of the classifier on all of train
# Options that every row shares with the call; all else is its own weights'.
SHARED = ('image_path', 'val_fraction', 'channels', 'white_level', 'exif', 'npy_axes', 'on_unreadable')
SHARED += ('batch_size', 'image_size', 'knn_k')


def compare(args, model, splits, checkpoint):
    """Rows for the checkpoint and for each of --beside.

    result['rows']: {'name', 'columns': {column: {'top1': percent, 'error': its standard error, perhaps 'spread': the
    standard deviation over draws of labels, and from the second row on 'gain' and 'gain_error': of the checkpoint over
    this row, paired by image}}}.
    """
    train, judged = labeled_subset(splits['train']), splits['val']
    rows = []
    for name, own, backbone in iter_backbones(args, model, checkpoint):
        log(f'compare: {name}')
        columns = measure(own, backbone, train, judged, parse_label_counts(args.labels), args.draws)
        rows.append({'name': name, 'columns': columns})
    for row in rows:
        for column, found in row['columns'].items():
            right, first = found['right'], rows[0]['columns'][column]['right']
            found['top1'], found['error'] = mean_and_error(right)
            if row is not rows[0]:
                found['gain'], found['gain_error'] = mean_and_error(first - right)
    for row in rows:
        for found in row['columns'].values():
            del found['right']
    log(f'compare: judged on the {len(judged)} images of {judged.folder.name}')
    result = {'rows': rows, 'judged_on': judged.folder.name, 'num_train': len(train), 'num_val': len(judged)}
    return Outcome(result)


def mean_and_error(values):
    """Mean and its standard error, in percent, of one value an image; the error of a single one is nan. values: N
    float64."""
    error = 100 * (values.std() / len(values) ** 0.5).item() if len(values) > 1 else float('nan')
    return 100 * values.mean().item(), error


def splits_to_compare(args, own):
    """{'train', 'val'} of labelled_splits; val is test, where that is a split of its own with labels, for training has
    looked at val."""
    parse_label_counts(args.labels)
    splits, test = labeled_splits(args, own), own.get('test')
    if test is not None and len(test) and (test.labels >= 0).all():
        return {'train': own['train'], 'val': test}
    return splits


def parse_label_counts(text):
    """The numbers of --labels, the largest first. Raises UserError."""
    try:
        numbers = sorted({int(part) for part in text.split(',')}, reverse=True)
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise UserError(f'--labels has numbers of labels a class, such as 1,5,10,30, not {text!r}')
    return numbers


def iter_backbones(args, model, checkpoint):
    """(name, args, backbone on the device) of the checkpoint and of each of --beside, one at a time."""
    device = get_device(args)
    yield f'{checkpoint["path"].name}', args, model.backbone
    for name in [part.strip() for part in args.beside.split(',')]:
        if name == 'untrained':
            own, other = args, build_model(args)
        elif name == 'start':
            own, other = load_start_weights(args, checkpoint)
            if own is None:
                continue
        else:
            own, other, _ = get_model_ckpt(row_args(args, name))
            if own.num_channels != args.num_channels:
                raise UserError(f'--beside={name} takes --channels={own.channels}, and this one {args.channels}')
        yield row_title(name, own, args), own, other.backbone.to(device, memory_format=torch.channels_last)


def row_title(name, own, args):
    """What a row is called: with its network, where that is another."""
    if name == 'start' and args.init_from:
        return f'start: {args.init_from}'
    return name if own.backbone == args.backbone else f'{name}, {own.backbone}'


def load_start_weights(args, checkpoint):
    """(args, model) that a run began with: its epoch 0, else the weights of --init_from; (None, None) of a run that
    began with random weights, which `untrained` has."""
    folder = checkpoint['run']
    first = [path for path in (checkpoints(folder) if folder.is_dir() else []) if path.name.endswith('_epoch_0')]
    if first:
        own, model, _ = get_model_ckpt(row_args(args, str(first[0])))
        return own, model
    if not args.init_from:
        return None, None
    own, model, _ = get_model_ckpt(row_args(args, args.init_from, backbone=args.backbone))
    return own, model


def row_args(args, name, backbone=''):
    """Options to load the weights `name` with: what all rows share, and nothing else of this checkpoint's.
    backbone: the network that they are of, where the name does not say it."""
    shared = {option: getattr(args, option) for option in SHARED}
    known = (
        is_off_the_shelf(name) and (not backbone) and not args.backbone.startswith('timm/') and args.backbone != 'small'
    )
    shared |= {'backbone': backbone or (args.backbone if known else 'resnet50'), 'preset': 'imagenet', 'init_from': ''}
    if args.num_channels == 3:
        shared |= {'mean': 'imagenet', 'std': 'imagenet'}
    own = replace_args(args, **shared, ckpt_name=name, stem='imagenet')
    own.given = {*SHARED} - {'channels'} | ({'backbone'} if backbone else set())
    return own


def measure(args, backbone, train, judged, labels, draws):
    """{column: {'right': share of draws in which each image is right, N float64, perhaps 'spread'}} of one backbone."""
    train, judged = replace(train, args=args), replace(judged, args=args)
    x, y = extract_features(args, backbone, eval_loader(args, train), 'features of train')
    queries, wanted = extract_features(args, backbone, eval_loader(args, judged), f'features of {judged.folder.name}')
    return compute_columns(args, (x, y), (queries, wanted), len(train.classes), labels, draws)


def compute_columns(args, bank, judged, classes, labels, draws):
    """`measure`, of (features, N x d, and labels, N) of train and of the images that are judged."""
    (x, y), (queries, wanted), k = bank, judged, clip_k(args.knn_k, bank[1])
    scores = knn_scores(queries, x, y, classes, k, args.knn_temperature)
    found = {f'kNN {k}': {'right': (scores.argmax(1) == wanted).cpu().double()}}
    mean, deviation = x.mean(0), x.std(0).clamp(min=1e-6)
    x, queries = (x - mean) / deviation, (queries - mean) / deviation
    found[ALL] = {'right': (classify(x, y, queries, classes) == wanted).cpu().double()}
    for count in labels:
        rows = draw_label_subsets(y.cpu(), count, draws)
        few = x[torch.cat(rows).unique().to(x.device)]
        right, accuracies = score_few_labels(few, y.cpu(), rows, queries, wanted, classes)
        spread = torch.tensor(accuracies).std().item() if len(accuracies) > 1 else None
        found[f'{count} a class'] = {'right': right, 'spread': spread}
    return found


def format_table(rows):
    """Rows as lines of text, the gains of the first over each of the others below it."""
    columns = [*rows[0]['columns']]
    lines = [['backbone', *columns]]
    for row in rows:
        cells = [row['columns'][column] for column in columns]
        lines.append([row['name'], *(f'{cell["top1"]:.1f} ± {cell["error"]:.1f}' for cell in cells)])
        if 'gain' in cells[0]:
            gains = [f'{cell["gain"]:+.1f} ± {cell["gain_error"]:.1f}' for cell in cells]
            lines.append([f'  {rows[0]["name"].split("_epoch_")[-1]} over it', *gains])
    return format_columns(lines)


PROTOCOL = Protocol(
    compare, splits_to_compare, numbers={}, smaller='--batch_size', several_ranks=True, unused=('knn_raw_pixels',)
)
