"""Run an evaluation protocol on a model, and write, print and log the result."""

import math
import time

from logger import Logger
from metric.accuracy import class_accuracies, confusion_matrix
from protocols import results
from protocols.collapse_verdict import MEASURES
from protocols.compare import format_table
from protocols.protocol import find_protocol
from runtime import distributed
from runtime.console import printable
from runtime.device import explain_oom
from runtime.errors import UserError, WorkError, resolve_path
from runtime.files import try_writing
from runtime.messages import format_duration, log
from runtime.trackers import make_tracker

MAX_CONFUSION_CLASSES = 1000  # with more classes no confusion matrix is drawn
NAN_HINT = 'a lower --probe_learning_rate or --finetune_learning_rate, or another checkpoint'


def run_protocol(args, model, splits, checkpoint):
    """Run --protocol on `model`, and write, print and log the result. Returns the result.

    splits: {'train', 'val', ...} of ImageDataset, for protocols on the checkpoint's dataset. checkpoint: a dict with
    path, run (the folder for results) and epoch.
    """
    started, splits, protocol = time.monotonic(), protocol_splits(args, splits), find_protocol(args.protocol)
    run, epoch, name = checkpoint['run'], checkpoint['epoch'], results.result_name(args)
    logs = resolve_path(args.log_path) / run.name
    if not distributed.rank():
        try_writing(run / 'evaluate.json')
        try_writing(logs / f'{name}.png')
    tracker = make_tracker(args, run)  # raises before the work if it does not start
    with explain_oom(f'--protocol={args.protocol}', f'try a smaller {protocol.smaller}'):
        outcome = protocol.run(args, model, splits, checkpoint)
    result, scores = outcome.result, outcome.scores
    if scores is not None:
        result |= accuracies_by_class(args, outcome)
    classifier = outcome.classifier and {**outcome.classifier, 'classes': outcome.classes}
    if protocol.path is None and 'val' in splits:
        result['selected_on_val'] = results.was_selected_on(splits['val'], checkpoint)
    eval_spec = results.eval_spec(args, splits, checkpoint)
    result['seconds'] = round(time.monotonic() - started, 2)
    log(format_result({**eval_spec, **result}))  # before anything can fail
    result = results.write_result(run, name, eval_spec, result, classifier)
    logger = Logger(logs, tracker=tracker)
    if scores is not None and scores.shape[1] <= MAX_CONFUSION_CLASSES:
        import plots  # matplotlib takes half a second to import

        counts = confusion_matrix(scores, outcome.labels).cpu()
        logger.picture(f'{name}_confusion', plots.figure_to_pil(plots.draw_confusion(counts, outcome.classes)), epoch)
    numbers = {
        **compare_scalars(result.get('rows', [])),
        **{key: result[key] for key in protocol.numbers if result.get(key) is not None},
        **result.get('measures', {}),
    }
    logger.scalars(epoch, {f'results/{name}_{key}': value for key, value in numbers.items()})
    logger.text(f'results/{name}', format_result(result).splitlines(), epoch)
    logger.close()
    return result


def accuracies_by_class(args, outcome):
    """Return {'mean_per_class', 'per_class'} in percent, of the classes with images. Raises WorkError if scores are not
    finite."""
    if not outcome.scores.isfinite().all():
        raise WorkError(f'the scores of --protocol={args.protocol} are nan or infinite: try {NAN_HINT}')
    rates = class_accuracies(outcome.scores, outcome.labels).tolist()  # nan for a class without images in val
    accuracies = {name: rate for name, rate in zip(outcome.classes, rates, strict=True) if not math.isnan(rate)}
    # The mean over classes is the usual metric of Pets, Flowers, Caltech and Aircraft.
    return {'mean_per_class': sum(accuracies.values()) / len(accuracies), 'per_class': accuracies}


def compare_scalars(rows):
    """Return the TensorBoard scalars of --protocol=compare: accuracies of the checkpoint, and its gains."""
    scalars = {}
    names = [results.shorten_name(row['name'].split(':')[0]) for row in rows]
    for i, row in enumerate(rows):
        name = names[i] if names.count(names[i]) == 1 else f'{names[i]}_{i}'
        for column, numbers in row['columns'].items():
            key = 'gain' if i else 'top1'
            scalars[f'{column.replace(" ", "_")}_{key}' + f'_over_{name}' * bool(i)] = numbers[key]
    return scalars


def protocol_splits(args, pretraining_splits):
    """Return {'train', 'val'} or {'train', 'test'} for --protocol. pretraining_splits: those of the checkpoint's
    dataset. Raises UserError if the protocol cannot run."""
    protocol = find_protocol(args.protocol)
    if distributed.world_size() > 1 and not protocol.several_ranks:
        raise UserError(f'--protocol={args.protocol} runs in one process: start it without torchrun')
    return protocol.splits(args, pretraining_splits)


def format_result(result):
    """Format a result as text."""
    side = result['settings'].get('image_size', result['settings'].get('detection_size'))
    held_out = 'test' if result.get('judged_on') == 'test' else 'validation'
    lines = [
        f'{result["protocol"]} of {result["checkpoint"]}: {result["num_train"]} training and {result["num_val"]} '
        f'{held_out} images{results.selection_note(result)}, {format_duration(result["seconds"])}',
        f'images {result["images"]["path"]}, {side} px, preset {result["preset"]}'
        + ''.join(f', {option}' for option in results.list_options(result)),
        *(
            f'{name:22}{result[key]:6.2f} %'
            for key, name in find_protocol(result['protocol']).numbers.items()
            if result.get(key) is not None
        ),
    ]
    for name, value in result.get('measures', {}).items():
        lines.append(f'{MEASURES[name]:44}{value:8.2f}   untrained{result["untrained"][name]:8.2f}')
    lines += format_table(result['rows']) if 'rows' in result else []
    if 'verdict' in result:
        lines.append('verdict    {}: {}'.format(*result['verdict']))
    if result.get('per_class'):
        worst = sorted(result['per_class'].items(), key=lambda item: item[1])
        named = ', '.join(f'{printable(name)} {value:.1f}' for name, value in worst[:10])
        more = f' ... {printable(worst[-1][0])} {worst[-1][1]:.1f}' if len(worst) > 10 else ''
        lines.append(f'{"per class, worst first":22} {named}{more}')
    return '\n'.join(lines)
