"""Run an evaluation protocol on a model: check what it needs, time it, and write, print and log its result."""

import functools
import math
import time

from config import UserError, WorkError, path_of
from dataloader.load_dataset import labelled
from logger import Logger
from metric.accuracy import class_accuracies, confusion
from protocols import results
from protocols.collapse_verdict import MEASURES
from protocols.compare import compare, labels_of, splits_to_compare, table_of
from protocols.finetune import few_of, semi
from protocols.knn import knn
from protocols.label_free import LEAST, spectrum
from protocols.linear import linear
from protocols.transfer import target_splits, transfer
from runtime import distributed
from runtime.console import shown
from runtime.device import memory_for
from runtime.files import try_writing
from runtime.messages import duration, say
from runtime.trackers import tracker_of

OF_OWN_SET = (
    'linear',
    'knn',
    'compare',
    'semi',
    'spectrum',
)  # protocols on the images that the checkpoint was trained on
DRAWN = 1000  # classes up to which a confusion matrix is drawn: it takes their square in memory
LOWER = 'a lower --probe_learning_rate or --finetune_learning_rate, or another checkpoint'
# What takes less memory.
SMALLER = {
    'spectrum': '--batch_size',
    'linear': '--batch_size, or --cache_passes',
    'knn': '--batch_size',
    'compare': '--batch_size',
    'semi': '--finetune_batch_size',
    'transfer': '--batch_size, or --finetune_batch_size',
}
# What the numbers of a result are called in front of people, in this order.
NAMES = {
    'top1': 'top-1',
    'top5': 'top-5',
    'top1_from_scratch': 'top-1 from scratch',
    'top5_from_scratch': 'top-5 from scratch',
    'mean_per_class': 'mean over classes',
    'held_out_top1': 'top-1 held out',
    'knn_top1': 'kNN top-1',
    'knn_top1_untrained': 'kNN top-1 untrained',
    'knn_top1_pixels': 'kNN top-1 raw pixels',
    'AP': 'AP',
    'AP50': 'AP50',
    'AP75': 'AP75',
    'mask_AP': 'mask AP',
    'mask_AP50': 'mask AP50',
    'mask_AP75': 'mask AP75',
}


def evaluate_model(args, model, splits, checkpoint, untrained=None):
    """Run --protocol on `model`, and write, print and log what came out. Returns the result.

    splits: {'train', 'val', ...} of Images, for the protocols that use the checkpoint's own set. checkpoint: a dict of
    its path, run (the folder for the results) and epoch. untrained: the measures of the untrained network of
    --protocol=spectrum, where they are known.
    """
    started, splits = time.monotonic(), splits_for(args, splits)
    run, epoch, name = checkpoint['run'], checkpoint['epoch'], results.name_of(args)
    logs = path_of(args.log_path) / run.name
    if not distributed.rank():
        try_writing(run / 'evaluate.json')
        try_writing(logs / f'{name}.png')
    tracker = tracker_of(args, run)  # one that does not start is heard of before the work
    if args.protocol == 'detection':
        from protocols.detection import detection  # torchvision's detectors take a second to import

        with memory_for('a detector', 'try a smaller --detection_batch_size or --detection_size'):
            result, scores, labels, classifier = detection(args, model, splits)
        classes = []
    else:
        protocol = {'linear': linear, 'knn': knn, 'semi': semi, 'transfer': transfer}
        protocol['spectrum'] = functools.partial(spectrum, before=untrained)
        protocol['compare'] = functools.partial(compare, checkpoint=checkpoint)
        with memory_for(f'--protocol={args.protocol}', f'try a smaller {SMALLER[args.protocol]}'):
            result, scores, labels, classifier, classes = protocol[args.protocol](args, model, splits)
    if scores is not None and not scores.isfinite().all():
        raise WorkError(f'the scores of --protocol={args.protocol} are no numbers (nan or infinite): try {LOWER}')
    if scores is not None:
        rates = class_accuracies(scores, labels).tolist()  # nan for a class without images in val
        known = [rate for rate in rates if not math.isnan(rate)]
        result['mean_per_class'] = sum(known) / len(known)  # what Pets, Flowers, Caltech and Aircraft are judged by
        result['per_class'] = {name: rate for name, rate in zip(classes, rates, strict=True) if not math.isnan(rate)}
    if classifier:
        classifier = {**classifier, 'classes': classes}
    asked = results.question(args, splits, checkpoint)
    result['seconds'] = round(time.monotonic() - started, 2)
    say(table({**asked, **result}))  # before anything can fail
    result = results.write(run, name, asked, result, classifier)
    logger = Logger(logs, tracker=tracker)
    if scores is not None and scores.shape[1] <= DRAWN:
        import plots  # matplotlib takes half a second to import

        counts = confusion(scores, labels).cpu()
        logger.picture(f'{name}_confusion', plots.image_of(plots.confusion(counts, classes)), epoch)
    numbers = {
        **of_rows(result.get('rows', [])),
        **{key: result[key] for key in NAMES if result.get(key) is not None},
        **result.get('measures', {}),
    }
    logger.scalars(epoch, {f'results/{name}_{key}': value for key, value in numbers.items()})
    logger.text(f'results/{name}', table(result).splitlines(), epoch)
    logger.close()
    return result


def of_rows(rows):
    """The numbers of the rows of --protocol=compare, for TensorBoard: of the checkpoint, and its gains."""
    found = {}
    for i, row in enumerate(rows):
        name = results.plain(row['name'].split(':')[0])
        for column, numbers in row['columns'].items():
            key = 'gain' if i else 'top1'
            found[f'{column.replace(" ", "_")}_{key}' + f'_over_{name}' * bool(i)] = numbers[key]
    return found


def splits_for(args, own):
    """{'train', 'val'} that --protocol works on; own: the checkpoint's. Raises UserError for what it will lack: labels,
    a list, a folder, a package; `train` asks before it begins."""
    if distributed.world() > 1 and args.protocol not in ('linear', 'knn', 'compare'):
        raise UserError(f'--protocol={args.protocol} runs in one process: start it without torchrun')
    if args.protocol == 'detection':
        from protocols.detection import splits_of

        return splits_of(args)
    if args.protocol == 'transfer':
        return said_of_unlabelled(target_splits(args))
    if args.protocol == 'spectrum':
        if len(own['train']) < LEAST:
            raise UserError(
                f'--protocol=spectrum compares images with one another: {shown(own["train"].folder)} has '
                f'{len(own["train"])}, and it wants {LEAST}'
            )
        return {'train': own['train']}
    if reason := why_no_labels(own):
        raise UserError(f'evaluate needs labels: {reason}')
    if args.protocol == 'compare':
        labels_of(args.labels)
        return said_of_unlabelled(splits_to_compare(args, own))
    if args.protocol == 'semi':
        few_of(args, labelled(own['train']))
    return said_of_unlabelled({name: own[name] for name in ('train', 'val')})


def said_of_unlabelled(splits):
    """`splits`, after saying how many of train are of no use without a label."""
    none, count = int((splits['train'].labels < 0).sum()), len(splits['train'])
    if none:
        say(f'{none} of the {count} images of train have no class, and are left out')
    return splits


def why_no_labels(splits):
    """Why accuracies cannot be measured on these splits, or None."""
    train, val = splits['train'], splits['val']
    if not len(labelled(train)):
        return f'{shown(train.folder)} has no classes'
    if val is None:
        fraction = f'--val_fraction={train.args.val_fraction:g} holds none out'
        why = 'no class has two images, one of which could be held out' if train.args.val_fraction else fraction
        return f'{shown(train.folder)} has no val: {why}'
    if not (val.labels >= 0).any():
        return f'{shown(val.folder)} has no classes'
    if not (val.labels >= 0).all():
        return f'{int((val.labels < 0).sum())} of the {len(val)} images of {shown(val.folder)} have no class'
    return None


def table(result):
    """The result as people read it."""
    side = result['settings'].get('image_size', result['settings'].get('detection_size'))
    lines = [
        f'{result["protocol"]} of {result["checkpoint"]}: {result["num_train"]} training and {result["num_val"]} '
        f'validation images, {duration(result["seconds"])}',
        f'images {result["images"]["path"]}, {side} px, preset {result["preset"]}'
        + ''.join(f', --{name}={result["settings"][name]}' for name in result['given']),
        *(f'{name:22}{result[key]:6.2f} %' for key, name in NAMES.items() if result.get(key) is not None),
    ]
    for name, value in result.get('measures', {}).items():
        lines.append(f'{MEASURES[name]:44}{value:8.2f}   untrained{result["untrained"][name]:8.2f}')
    lines += table_of(result['rows']) if 'rows' in result else []
    if 'verdict' in result:
        lines.append('verdict    {}: {}'.format(*result['verdict']))
    if result.get('per_class'):
        worst = sorted(result['per_class'].items(), key=lambda item: item[1])
        named = ', '.join(f'{shown(name)} {value:.1f}' for name, value in worst[:10])
        more = f' ... {shown(worst[-1][0])} {worst[-1][1]:.1f}' if len(worst) > 10 else ''
        lines.append(f'{"per class, worst first":22} {named}{more}')
    return '\n'.join(lines)
