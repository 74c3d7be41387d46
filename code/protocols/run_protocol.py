"""Run an evaluation protocol on a model: check what it needs, time it, and write, print and log its result."""

import math
import time

from errors import UserError, WorkError, path_of
from logger import Logger
from metric.accuracy import class_accuracies, confusion
from protocols import results
from protocols.collapse_verdict import MEASURES
from protocols.compare import table_of
from protocols.protocol import find_protocol
from runtime import distributed
from runtime.console import shown
from runtime.device import memory_for
from runtime.files import try_writing
from runtime.messages import duration, say
from runtime.trackers import tracker_of

DRAWN = 1000  # classes up to which a confusion matrix is drawn: it takes their square in memory
LOWER = 'a lower --probe_learning_rate or --finetune_learning_rate, or another checkpoint'


def evaluate_model(args, model, splits, checkpoint):
    """Run --protocol on `model`, and write, print and log what came out. Returns the result.

    splits: {'train', 'val', ...} of Images, for the protocols that use the checkpoint's own set. checkpoint: a dict of
    its path, run (the folder for the results) and epoch.
    """
    started, splits, protocol = time.monotonic(), splits_for(args, splits), find_protocol(args.protocol)
    run, epoch, name = checkpoint['run'], checkpoint['epoch'], results.name_of(args)
    logs = path_of(args.log_path) / run.name
    if not distributed.rank():
        try_writing(run / 'evaluate.json')
        try_writing(logs / f'{name}.png')
    tracker = tracker_of(args, run)  # one that does not start is heard of before the work
    with memory_for(f'--protocol={args.protocol}', f'try a smaller {protocol.smaller}'):
        outcome = protocol.run(args, model, splits, checkpoint)
    result, scores = outcome.result, outcome.scores
    if scores is not None:
        result |= accuracies_by_class(args, outcome)
    classifier = outcome.classifier and {**outcome.classifier, 'classes': outcome.classes}
    asked = results.question(args, splits, checkpoint)
    result['seconds'] = round(time.monotonic() - started, 2)
    say(table({**asked, **result}))  # before anything can fail
    result = results.write(run, name, asked, result, classifier)
    logger = Logger(logs, tracker=tracker)
    if scores is not None and scores.shape[1] <= DRAWN:
        import plots  # matplotlib takes half a second to import

        counts = confusion(scores, outcome.labels).cpu()
        logger.picture(f'{name}_confusion', plots.image_of(plots.confusion(counts, outcome.classes)), epoch)
    numbers = {
        **of_rows(result.get('rows', [])),
        **{key: result[key] for key in protocol.numbers if result.get(key) is not None},
        **result.get('measures', {}),
    }
    logger.scalars(epoch, {f'results/{name}_{key}': value for key, value in numbers.items()})
    logger.text(f'results/{name}', table(result).splitlines(), epoch)
    logger.close()
    return result


def accuracies_by_class(args, outcome):
    """{'mean_per_class', 'per_class'} in percent, of the classes that have images. Raises WorkError where scores are no
    numbers."""
    if not outcome.scores.isfinite().all():
        raise WorkError(f'the scores of --protocol={args.protocol} are no numbers (nan or infinite): try {LOWER}')
    rates = class_accuracies(outcome.scores, outcome.labels).tolist()  # nan for a class without images in val
    known = {name: rate for name, rate in zip(outcome.classes, rates, strict=True) if not math.isnan(rate)}
    # The mean is what Pets, Flowers, Caltech and Aircraft are judged by.
    return {'mean_per_class': sum(known.values()) / len(known), 'per_class': known}


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
    """{'train', 'val'} that --protocol works on; own: the checkpoint's. Raises UserError for what it will lack."""
    protocol = find_protocol(args.protocol)
    if distributed.world() > 1 and not protocol.several_ranks:
        raise UserError(f'--protocol={args.protocol} runs in one process: start it without torchrun')
    return protocol.splits(args, own)


def table(result):
    """The result as people read it."""
    side = result['settings'].get('image_size', result['settings'].get('detection_size'))
    lines = [
        f'{result["protocol"]} of {result["checkpoint"]}: {result["num_train"]} training and {result["num_val"]} '
        f'validation images, {duration(result["seconds"])}',
        f'images {result["images"]["path"]}, {side} px, preset {result["preset"]}'
        + ''.join(f', --{name}={result["settings"][name]}' for name in result['given']),
        *(
            f'{name:22}{result[key]:6.2f} %'
            for key, name in find_protocol(result['protocol']).numbers.items()
            if result.get(key) is not None
        ),
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
