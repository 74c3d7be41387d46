"""Compare backbones on the same images, one row each: kNN, and linear classifiers on all labels and on few labels.

Two rows differ only in the backbone and the preprocessing of its weights. Images, label subsets and classifier are the
same, so differences are paired by image.
"""

import math

import torch

from ckpt import get_model_ckpt
from config import PREPROCESSING
from dataloader.load_dataset import eval_loader, labeled_subset, num_labeled_classes
from metric.knn import clip_k, knn_scores
from metric.standardization import mean_and_std
from model.foreign_checkpoints import RESNET_BLOCKS, convert_state_dict
from model.weights import adapt_channels, copy_weights, is_off_the_shelf
from protocols.features import extract_features
from protocols.few_labels import (
    MAX_ROWS,
    accuracy_and_error,
    classify,
    draw_label_subsets,
    log_missing_labels,
    mean_and_error,
    score_few_labels,
)
from protocols.protocol import Outcome, Protocol, labeled_splits, leave_out_unlabeled
from runtime.checkpoints.format import is_ours
from runtime.checkpoints.load_state import build_model
from runtime.checkpoints.pretrained import are_foreign
from runtime.checkpoints.read_file import load_file
from runtime.checkpoints.run_folder import checkpoints, find_named, finished_epoch
from runtime.console import format_columns
from runtime.device import move_network
from runtime.errors import UserError, WorkError
from runtime.files import is_number
from runtime.messages import log
from runtime.options import replace_args

ALL_LABELS = 'all labels'  # the column of the classifier on all of train
# Options that all rows take from the call, also PREPROCESSING if it is given; the others come with the weights.
SHARED_OPTIONS = ('image_path', 'val_fraction', 'channels', 'exif', 'npy_axes', 'on_unreadable')
SHARED_OPTIONS += ('batch_size', 'image_size', 'knn_k', 'knn_temperature')
BESIDE_HINT = '; evaluate --protocol=compare --ckpt_name={} --backbone=<its network> --image_path={} measures another'


def compare_backbones(args, model, splits, checkpoint):
    """Measure the checkpoint and each backbone of --beside. Returns an Outcome.

    splits: train, and val or test. result['rows'] is a list of {'name', 'columns': {column: {'top1': percent, 'error':
    its standard error, 'draws': the number of label subsets; in all rows but the first 'gain' and 'gain_error': of the
    checkpoint over this row, paired by image and label subset}}}.
    """
    judged_on = next(name for name in splits if name != 'train')
    train, judged = labeled_subset(splits['train']), splits[judged_on]
    rows, counts = [], available_label_counts(parse_label_counts(args.labels), train.labels)
    log_missing_labels('compare', train.labels, counts)
    for name, backbone_args, backbone in iter_backbones(args, model, checkpoint):
        log(f'compare: {name}')
        columns = measure_backbone(backbone_args, backbone, train, judged, counts, args.draws)
        rows.append({'name': name, 'columns': columns})
    for row in rows:
        for column, cell in row['columns'].items():
            right, first = cell['right'], rows[0]['columns'][column]['right']
            cell['top1'], cell['error'] = accuracy_and_error(right)
            if row is not rows[0]:
                cell['gain'], cell['gain_error'] = mean_and_error(first - right)
    for row in rows:
        for cell in row['columns'].values():
            cell['draws'] = len(cell.pop('right'))
    result = {'rows': rows, 'judged_on': judged_on, 'num_train': len(train), 'num_val': len(judged)}
    return Outcome(result)


def splits_to_compare(args, own_splits):
    """Return {'train', 'test'} for compare if there is a labeled test, because training selects its checkpoint on val,
    else {'train', 'val'}. Raises UserError if labels are missing."""
    parse_label_counts(args.labels)
    parse_beside(args.beside)
    train, test = own_splits['train'], own_splits.get('test')
    if test is None or not num_labeled_classes(test.labels) or num_labeled_classes(train.labels) < 2:
        return labeled_splits(args, own_splits)
    return leave_out_unlabeled({'train': train, 'test': test})


def parse_label_counts(text):
    """Parse --labels to numbers, the largest first. Raises UserError."""
    try:
        numbers = sorted({int(part) for part in text.split(',')}, reverse=True)
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise UserError(f'--labels has numbers of labels per class, such as 1,5,10,30, not {text!r}')
    return numbers


def available_label_counts(counts, labels):
    """Leave out, with a line, the numbers of labels per class that no class has: all labels are a column of their own.
    labels: N, >= 0."""
    most = int(labels.unique(return_counts=True)[1].max())
    for count in counts:
        if count > most:
            log(f'compare: no class has {count} labeled images, so there is no column of them')
    return [count for count in counts if count <= most]


def iter_backbones(args, model, checkpoint):
    """Yield (name, args, backbone on the device) of the checkpoint and of each backbone of --beside."""
    others = [(name, *load_row(args, name, checkpoint)) for name in parse_beside(args.beside)]  # errors come first
    yield f'{checkpoint["path"].name}', args, model.backbone
    for name, other_args, other in others:
        if other is not None:
            backbone = move_network(args, other.backbone)
            yield row_title(name, other_args, args), other_args, backbone


def parse_beside(text):
    """Parse --beside to a list of names. Raises UserError for an empty or repeated one."""
    names = [part.strip() for part in text.split(',')]
    if '' in names or len({*names}) < len(names):
        raise UserError(f'--beside={text} has an empty or repeated part: it is a list such as untrained,start,imagenet')
    return names


def load_row(args, name, checkpoint):
    """Load the backbone `name` of --beside. Returns (args, model); (args, None) if there is no start to compare with,
    which is logged. Raises the errors of get_model_ckpt."""
    if name == 'untrained':
        return args, build_model(args)
    if name == 'start':
        start_args, model = load_start_weights(args, checkpoint)
        if model is None:
            log('compare: no row start, because this checkpoint is not of a run that started from weights')
        return start_args, model
    networks = networks_of_file(args, name)
    for backbone in networks or ['']:
        try:
            other_args, other, _ = get_model_ckpt(row_args(args, name, backbone=backbone))
            break
        except (UserError, WorkError) as error:
            if not networks:
                raise
            if backbone == networks[-1]:
                raise UserError(f'{error}{BESIDE_HINT.format(name, args.image_path)}') from None
    if other_args.num_channels != args.num_channels:
        raise UserError(
            f'--beside={name} has --channels={other_args.channels}, and the checkpoint {args.channels}: leave it out'
        )
    return other_args, other


def networks_of_file(args, name):
    """Return the networks to try to read a file of another tool with: the checkpoint's, and '' for files that tell
    their architecture (ResNets); [] for other names."""
    path = None if is_off_the_shelf(name) else find_named(args, name)
    content = load_file(path) if path and path.is_file() else {}
    if not content or is_ours(content):
        return []
    tells = args.backbone in RESNET_BLOCKS or convert_state_dict(content)
    return [args.backbone] * (args.backbone not in RESNET_BLOCKS) + [''] * bool(tells)


def row_title(name, other_args, args):
    """Return the title of a row, with its network if that differs from the checkpoint's."""
    if name == 'start' and args.init_from:
        return f'start: {args.init_from}'
    return name if other_args.backbone == args.backbone else f'{name}, {other_args.backbone}'


def load_start_weights(args, checkpoint):
    """Load the weights that a run started from: those that the checkpoint keeps, else the run's epoch 0, else
    --init_from. Returns (args, model), or (args, None) if it started from random weights (see `untrained`)."""
    if checkpoint.get('start'):
        model = build_model(args)
        copy_weights(model.backbone, adapt_channels(model.backbone.state_dict(), checkpoint['start']))
        return args, model
    folder = checkpoint['run']
    first = [path for path in (checkpoints(folder) if folder.is_dir() else []) if finished_epoch(path) == 0]
    if first:
        start_args, model, _ = get_model_ckpt(row_args(args, str(first[0])))
        return start_args, model
    if not args.init_from:
        return args, None
    start_args, model, _ = get_model_ckpt(row_args(args, args.init_from, backbone=args.backbone))
    return start_args, model


def row_args(args, name, backbone=''):
    """Return options for loading the weights `name`: SHARED_OPTIONS and explicit preprocessing from args, and defaults
    for the others. backbone: the network of the weights, if the name does not tell."""
    given = {*SHARED_OPTIONS} | ({*PREPROCESSING} & args.explicit)
    foreign = are_foreign(args, name)
    adapted = args.num_channels != 3 and foreign
    given |= {'mean', 'std'} if adapted else set()  # theirs are for three channels
    given |= {'white_level'} if foreign else set()  # of the images; a run has its own, that of its mean and std
    shared = {option: getattr(args, option) for option in given}
    same_network = (
        is_off_the_shelf(name) and (not backbone) and not args.backbone.startswith('timm/') and args.backbone != 'small'
    )
    shared |= {
        'backbone': backbone or (args.backbone if same_network else 'resnet50'),
        'preset': 'imagenet',
        'init_from': '',
    }
    if args.num_channels == 3:
        shared = {'mean': 'imagenet', 'std': 'imagenet', **shared}
    loaded = replace_args(args, **shared, ckpt_name=name, stem='imagenet')
    loaded.fixed = frozenset()
    loaded.explicit = given - (set() if adapted else {'channels'}) | ({'backbone'} if backbone else set())
    return loaded


def measure_backbone(args, backbone, train, judged, labels, draws):
    """Measure one backbone. Returns {column: {'right': which images are classified correctly, D x N float64, of D draws
    of labels}}."""
    train, judged = train.with_options(args), judged.with_options(args)
    x, y = extract_features(args, backbone, eval_loader(args, train), 'features of train')
    queries, query_labels = extract_features(args, backbone, eval_loader(args, judged), 'features to classify')
    return compute_columns(args, (x, y), (queries, query_labels), len(train.classes), labels, draws)


def compute_columns(args, bank, judged, classes, labels, draws):
    """`measure_backbone` from features. bank, judged: (features, N x d, labels, N) of train and of the evaluation
    images."""
    (x, y), (queries, query_labels), k = bank, judged, clip_k(args.knn_k, bank[1])
    scores = knn_scores(queries, x, y, classes, k, args.knn_temperature)
    columns = {f'kNN {k}': {'right': (scores.argmax(1) == query_labels)[None].cpu().double()}}
    mean, std = mean_and_std(x)
    x, queries = (x - mean) / std, (queries - mean) / std
    columns[ALL_LABELS] = {'right': (classify(x, y, queries, classes) == query_labels)[None].cpu().double()}
    for count in labels:
        rows = draw_label_subsets(y.cpu(), count, draws)
        if len(rows) < draws:
            log(f'compare: {count} per class: {len(rows)} of {draws} draws, of {MAX_ROWS:,} images together at most')
        few_features = x[torch.cat(rows).unique().to(x.device)]
        right = score_few_labels(few_features, y.cpu(), rows, queries, query_labels, classes)
        columns[f'{count} per class'] = {'right': right}
    return columns


def format_cell(cell, name='top1', sign=''):
    """Format a number of a cell with its standard error, if that is known: 71.2 ± 1.0. name: top1 or gain."""
    error = cell['error' if name == 'top1' else 'gain_error']
    error_text = f' ± {error:.1f}' if is_number(error) and math.isfinite(error) else ''
    return f'{cell[name]:{sign}.1f}{error_text}'


def format_gain(cell):
    """Format the gain over a cell, with its sign; '' for the row of the checkpoint itself."""
    return format_cell(cell, 'gain', '+') if 'gain' in cell else ''


def format_table(rows):
    """Format rows as lines of text; below each row is the gain of the first row over it."""
    columns = [*rows[0]['columns']]
    lines = [['backbone', *columns]]
    before, found, epoch = rows[0]['name'].rpartition('_epoch_')
    gaining = f'epoch {epoch}' if found else rows[0]['name']
    for row in rows:
        cells = [row['columns'][column] for column in columns]
        lines.append([row['name'], *map(format_cell, cells)])
        if row is not rows[0]:
            lines.append([f'  gain of {gaining}', *map(format_gain, cells)])
    return format_columns(lines)


PROTOCOL = Protocol(
    compare_backbones,
    splits_to_compare,
    numbers={},
    smaller='--batch_size',
    several_ranks=True,
    unused=('knn_raw_pixels',),
)
