"""Compare backbones on the same images, one row each: kNN, and linear classifiers on all labels and on few labels.

Two rows differ only in the backbone and the preprocessing of its weights. Images, label subsets and classifier are the
same, so differences are paired by image.
"""

from dataclasses import replace

import torch

from ckpt import get_model_ckpt
from dataloader.load_dataset import eval_loader, labeled_subset
from metric.knn import clip_k, knn_scores
from model.foreign_checkpoints import RESNET_BLOCKS
from model.weights import is_off_the_shelf
from protocols.features import extract_features
from protocols.few_labels import classify, draw_label_subsets, score_few_labels
from protocols.protocol import Outcome, Protocol, labeled_splits
from runtime.checkpoints.format import is_ours
from runtime.checkpoints.load_state import build_model
from runtime.checkpoints.read_file import load_file
from runtime.checkpoints.run_folder import checkpoints
from runtime.console import format_columns
from runtime.device import get_device
from runtime.errors import UserError, resolve_path
from runtime.messages import log
from runtime.options import replace_args

ALL_LABELS = 'all labels'  # the column of the classifier on all of train
# Options that all rows take from the call; the others come with the weights.
SHARED_OPTIONS = ('image_path', 'val_fraction', 'channels', 'white_level', 'exif', 'npy_axes', 'on_unreadable')
SHARED_OPTIONS += ('batch_size', 'image_size', 'knn_k')


def compare_backbones(args, model, splits, checkpoint):
    """Measure the checkpoint and each backbone of --beside. Returns an Outcome.

    result['rows'] is a list of {'name', 'columns': {column: {'top1': percent, 'error': its standard error, 'spread':
    standard deviation over draws of labels, if there are several; in all rows but the first 'gain' and 'gain_error': of
    the checkpoint over this row, paired by image}}}.
    """
    train, judged = labeled_subset(splits['train']), splits['val']
    rows, counts = [], parse_label_counts(args.labels)
    log_missing_labels(train, counts)
    for name, backbone_args, backbone in iter_backbones(args, model, checkpoint):
        log(f'compare: {name}')
        columns = measure_backbone(backbone_args, backbone, train, judged, counts, args.draws)
        rows.append({'name': name, 'columns': columns})
    for row in rows:
        for column, cell in row['columns'].items():
            right, first = cell['right'], rows[0]['columns'][column]['right']
            cell['top1'], cell['error'] = mean_and_error(right)
            if row is not rows[0]:
                cell['gain'], cell['gain_error'] = mean_and_error(first - right)
    for row in rows:
        for cell in row['columns'].values():
            del cell['right']
    log(f'compare: evaluated on the {len(judged)} images of {judged.folder.name}')
    result = {'rows': rows, 'judged_on': judged.folder.name, 'num_train': len(train), 'num_val': len(judged)}
    return Outcome(result)


def log_missing_labels(train, counts):
    """Log which numbers of labels per class are more than some classes have."""
    sizes = train.labels.unique(return_counts=True)[1]
    for count in counts:
        if short := int((sizes < count).sum()):
            log(f'compare: {short} of {len(sizes)} classes have fewer than {count} labeled images: all are used')


def mean_and_error(values):
    """Return the mean of per-image values and its standard error, in percent; the error of one value is nan. values: N
    float64."""
    error = 100 * (values.std() / len(values) ** 0.5).item() if len(values) > 1 else float('nan')
    return 100 * values.mean().item(), error


def splits_to_compare(args, own_splits):
    """Return {'train', 'val'} for compare. 'val' is the test split if it is labeled, because training selects its
    checkpoint on val."""
    parse_label_counts(args.labels)
    parse_beside(args.beside)
    splits, test = labeled_splits(args, own_splits), own_splits.get('test')
    if test is not None and len(test) and (test.labels >= 0).all():
        return {'train': own_splits['train'], 'val': test}
    return splits


def parse_label_counts(text):
    """Parse --labels to numbers, the largest first. Raises UserError."""
    try:
        numbers = sorted({int(part) for part in text.split(',')}, reverse=True)
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise UserError(f'--labels has numbers of labels per class, such as 1,5,10,30, not {text!r}')
    return numbers


def iter_backbones(args, model, checkpoint):
    """Yield (name, args, backbone on the device) of the checkpoint and of each backbone of --beside."""
    device = get_device(args)
    others = [(name, *load_row(args, name, checkpoint)) for name in parse_beside(args.beside)]  # errors come first
    yield f'{checkpoint["path"].name}', args, model.backbone
    for name, other_args, other in others:
        if other is not None:
            backbone = other.backbone.to(device, memory_format=torch.channels_last)
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
    other_args, other, _ = get_model_ckpt(row_args(args, name, backbone=network_of_file(args, name)))
    if other_args.num_channels != args.num_channels:
        raise UserError(
            f'--beside={name} has --channels={other_args.channels}, and the checkpoint {args.channels}: leave it out'
        )
    return other_args, other


def network_of_file(args, name):
    """Return the network to read a file of another tool with: the checkpoint's; '' for other names, and for ResNets,
    whose architecture is in the file."""
    path = resolve_path(name)
    if is_off_the_shelf(name) or args.backbone in RESNET_BLOCKS or not path.is_file():
        return ''
    return '' if is_ours(load_file(path)) else args.backbone


def row_title(name, other_args, args):
    """Return the title of a row, with its network if that differs from the checkpoint's."""
    if name == 'start' and args.init_from:
        return f'start: {args.init_from}'
    return name if other_args.backbone == args.backbone else f'{name}, {other_args.backbone}'


def load_start_weights(args, checkpoint):
    """Load the weights that a run started from: its checkpoint of epoch 0, else --init_from. Returns (args, model), or
    (args, None) if it started from random weights (see `untrained`)."""
    folder = checkpoint['run']
    first = [path for path in (checkpoints(folder) if folder.is_dir() else []) if path.name.endswith('_epoch_0')]
    if first:
        start_args, model, _ = get_model_ckpt(row_args(args, str(first[0])))
        return start_args, model
    if not args.init_from:
        return args, None
    start_args, model, _ = get_model_ckpt(row_args(args, args.init_from, backbone=args.backbone))
    return start_args, model


def row_args(args, name, backbone=''):
    """Return options for loading the weights `name`: SHARED_OPTIONS from args, and defaults for the others. backbone:
    the network of the weights, if the name does not tell."""
    shared = {option: getattr(args, option) for option in SHARED_OPTIONS}
    same_network = (
        is_off_the_shelf(name) and (not backbone) and not args.backbone.startswith('timm/') and args.backbone != 'small'
    )
    shared |= {
        'backbone': backbone or (args.backbone if same_network else 'resnet50'),
        'preset': 'imagenet',
        'init_from': '',
    }
    if args.num_channels == 3:
        shared |= {'mean': 'imagenet', 'std': 'imagenet'}
    loaded = replace_args(args, **shared, ckpt_name=name, stem='imagenet')
    loaded.explicit = {*SHARED_OPTIONS} - {'channels'} | ({'backbone'} if backbone else set())
    return loaded


def measure_backbone(args, backbone, train, judged, labels, draws):
    """Measure one backbone. Returns {column: {'right': share of draws in which each image is classified correctly, N
    float64, perhaps 'spread'}}."""
    train, judged = replace(train, args=args), replace(judged, args=args)
    x, y = extract_features(args, backbone, eval_loader(args, train), 'features of train')
    queries, query_labels = extract_features(
        args, backbone, eval_loader(args, judged), f'features of {judged.folder.name}'
    )
    return compute_columns(args, (x, y), (queries, query_labels), len(train.classes), labels, draws)


def compute_columns(args, bank, judged, classes, labels, draws):
    """`measure_backbone` from features. bank, judged: (features, N x d, labels, N) of train and of the evaluation
    images."""
    (x, y), (queries, query_labels), k = bank, judged, clip_k(args.knn_k, bank[1])
    scores = knn_scores(queries, x, y, classes, k, args.knn_temperature)
    columns = {f'kNN {k}': {'right': (scores.argmax(1) == query_labels).cpu().double()}}
    mean, deviation = x.mean(0), x.std(0).clamp(min=1e-6)
    x, queries = (x - mean) / deviation, (queries - mean) / deviation
    columns[ALL_LABELS] = {'right': (classify(x, y, queries, classes) == query_labels).cpu().double()}
    for count in labels:
        rows = draw_label_subsets(y.cpu(), count, draws)
        few_features = x[torch.cat(rows).unique().to(x.device)]
        right, accuracies = score_few_labels(few_features, y.cpu(), rows, queries, query_labels, classes)
        spread = torch.tensor(accuracies).std().item() if len(accuracies) > 1 else None
        columns[f'{count} per class'] = {'right': right, 'spread': spread}
    return columns


def format_table(rows):
    """Format rows as lines of text; below each row is the gain of the first row over it."""
    columns = [*rows[0]['columns']]
    lines = [['backbone', *columns]]
    before, found, epoch = rows[0]['name'].rpartition('_epoch_')
    gaining = f'epoch {epoch}' if found else rows[0]['name']
    for row in rows:
        cells = [row['columns'][column] for column in columns]
        lines.append([row['name'], *(f'{cell["top1"]:.1f} ± {cell["error"]:.1f}' for cell in cells)])
        if 'gain' in cells[0]:
            gains = [f'{cell["gain"]:+.1f} ± {cell["gain_error"]:.1f}' for cell in cells]
            lines.append([f'  gain of {gaining}', *gains])
    return format_columns(lines)


PROTOCOL = Protocol(
    compare_backbones,
    splits_to_compare,
    numbers={},
    smaller='--batch_size',
    several_ranks=True,
    unused=('knn_raw_pixels',),
)
