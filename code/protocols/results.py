"""Result files of evaluations: <run>/evaluate_<protocol>_<digest of the spec>.json, and the linear classifier beside
it.

The spec of an evaluation has the checkpoint, the images (path, number, a digest of names and labels) and the settings,
so that different evaluations never share a file.
"""

import hashlib
import json
import os
from pathlib import Path

import torch

from config import NOT_RESTORED_OPTIONS, OPTIONS, PROTOCOLS, READING, RENAMED_VALUES
from protocols.protocol import find_protocol, has_effect
from runtime.atomic_write import atomic_write_on_main
from runtime.checkpoints.best_epoch import START_FILE, find_best_epoch, is_judged_by_labels
from runtime.checkpoints.read_file import load_file
from runtime.console import printable
from runtime.distributed import rank
from runtime.errors import UserError, resolve_path, same_path
from runtime.files import (
    dumps_nan_safe,
    is_number,
    read_in_order,
    read_json,
    read_metrics,
    sanitize_name,
    utc_timestamp,
    written_time,
)
from runtime.messages import log, warn
from runtime.options import rename_options, replace_args
from runtime.precision import NAMES, precision
from runtime.versions import library_versions

AMP_OPTIONS = {'bfloat16': 'bf16', 'float16': 'fp16'}  # {precision of a spec: value of --amp}
# Options that are not among the settings of a spec: they are separate entries, or do not matter.
NOT_IN_SPEC = ('image_path', 'protocol', 'preset', *NOT_RESTORED_OPTIONS)


def shorten_name(name):
    """Shorten and sanitize a name for file names and TensorBoard tags."""
    return sanitize_name(name)[:40]


def eval_spec(args, splits, checkpoint):
    """Return the spec of an evaluation as plain values. splits: {'train', 'val' or 'test'} of ImageDataset or
    DetectionDataset."""
    settings = {
        name: getattr(args, name)
        for name, option in OPTIONS.items()
        if name not in NOT_IN_SPEC and 'evaluate' in option.metadata['used_by'] and has_effect(args, name)
    }
    if args.knn_raw_pixels and has_effect(args, 'knn_raw_pixels'):
        settings['knn_raw_pixels'] = True  # a further number
    if args.subset_list:
        settings['subset_digest'] = hash_lines([os.fsdecode(resolve_path(args.subset_list).read_bytes())])
    path_of_images = find_protocol(args.protocol).path
    path = path_of_images(args) if path_of_images else args.image_path
    return {
        'protocol': args.protocol,
        'checkpoint': checkpoint['path'].name,
        'epoch': checkpoint['epoch'],
        'images': {
            'path': str(resolve_path(path)),
            **{name: dataset_fingerprint(images) for name, images in splits.items()},
        },
        'preset': args.preset,
        'precision': NAMES[precision(args)],
        'settings': settings,
        'given': sorted(name for name in args.explicit if name in settings),
    }


def dataset_fingerprint(images):
    """Return the number of images and a digest of their names and labels. images: ImageDataset or DetectionDataset."""
    names = [*images.names]
    return {
        'number': len(images),
        'digest': hash_lines(f'{name}\t{label}' for name, label in zip(names, images.labels.tolist(), strict=True)),
    }


def was_selected_on(val, checkpoint):
    """Whether the checkpoint is its run's best epoch, selected on these images of val, those with labels."""
    run, epoch = checkpoint['run'], checkpoint['epoch']
    digest = read_json(run / START_FILE).get('val')
    if not epoch or checkpoint.get('images') or epoch != find_best_epoch(run):  # images: of the next epoch
        return False
    if not is_judged_by_labels(read_metrics(run / 'metrics.jsonl')):
        return False
    return digest in (None, val.digest())


def selection_note(result):
    """Say that the images of a result also selected the checkpoint; '' if they did not."""
    if not result.get('selected_on_val'):
        return ''
    return ' (they also selected the epoch: accuracy is a little too high; --protocol=compare takes a test split)'


def hash_lines(lines):
    hashed = hashlib.blake2b(digest_size=6)
    for line in lines:
        hashed.update(line.encode(errors='surrogateescape') + b'\n')
    return hashed.hexdigest()


def result_name(args):
    """Return the name of an evaluation for files and TensorBoard: the protocol and its details."""
    return '_'.join([args.protocol, *find_protocol(args.protocol).details(args)])


def write_result(run, name, spec, metrics, classifier=None):
    """Write the result of an evaluation, and its classifier, into the folder `run`. Returns the result with spec,
    versions, file name and time."""
    spec_hash = hash_lines([json.dumps({**spec, 'given': None}, sort_keys=True)])
    result = {
        **spec,
        **metrics,
        'versions': library_versions(),
        'file': f'evaluate_{name}_{spec_hash}.json',
        'when': utc_timestamp(),
    }
    if rank():
        return result
    if classifier:
        content = {**classifier, 'question': spec, 'top1': metrics.get('top1'), 'when': result['when']}
        atomic_write_on_main(run / f'classifier_{spec_hash}', lambda aside: torch.save(content, aside))
    text = dumps_nan_safe(result, indent=2) + '\n'
    atomic_write_on_main(run / result['file'], lambda aside: aside.write_text(text))
    return result


def load_results(run, **entries):
    """Load the results in a run's folder that have these entries, the oldest first; including results of early
    versions, which do not name their images."""
    results = []
    for path, result in read_in_order(run.glob('evaluate_*.json')):
        result['protocol'] = RENAMED_VALUES['protocol'].get(str(result.get('protocol')), result.get('protocol'))
        if isinstance(result.get('settings'), dict):
            result['settings'] = rename_options(result['settings'])
        if result['protocol'] in (*PROTOCOLS,) and is_number(result.get('epoch')):
            results.append(result)
        else:
            warn(f'{path} is damaged, or no result of evaluate: left out')
    return [result for result in results if all(result.get(key) == value for key, value in entries.items())]


def find_classifier(args, checkpoint, images_path):
    """Find the classifier of this checkpoint for the images at `images_path`. Returns its content, or None.

    In order: the one of --classifier (its file, or the folder of its dataset); of the dataset that contains the images;
    of the checkpoint's dataset; the only one there is, unless the images belong to the checkpoint's dataset. Of several
    for one dataset: best_classifier. Raises UserError if --classifier names none, or
    nothing tells which of several is meant, WorkError for a damaged file.
    """
    by_folder, named = {}, None  # {folder of a dataset: its classifiers}
    for path in checkpoint['run'].glob('classifier_*'):
        content = load_file(path)
        if not isinstance(content, dict) or content.get('question', {}).get('checkpoint') != checkpoint['path'].name:
            continue
        if not is_of_weights(content['question'], args, checkpoint):
            continue
        content = {**content, 'file': path.name, 'when': written_time(content, path)}
        if args.classifier and same_path(resolve_path(args.classifier), path) or args.classifier == path.name:
            named = content
        folder = Path(os.path.realpath(content['question']['images']['path']))
        by_folder.setdefault(folder, []).append(content)
    own_folder = Path(os.path.realpath(resolve_path(args.image_path))) if checkpoint['layout'] == 'ours' else None
    folder = None if named else pick_folder(args, by_folder, own_folder, images_path.resolve())
    chosen = best_classifier(args, by_folder[folder]) if folder else named
    if chosen and chosen.get('outdated'):
        where = chosen['question']['images']['path']
        log(f'{where}: {chosen["outdated"]} older classifiers of other images or classes of it are not used')
    return chosen


def warn_outdated(args, classifier, root, train):
    """Warn if the images or classes of the dataset at `root` are not those that the classifier was trained on. train:
    its labeled images."""
    then, settings = classifier['question']['images'], classifier['question']['settings']
    as_then = all(settings.get(name) in (None, getattr(args, name)) for name in ('val_fraction', 'on_unreadable'))
    if not as_then or not same_path(Path(then['path']), root):
        return
    if 'train' in then and then['train'] != dataset_fingerprint(train):
        warn(
            f'{printable(root)} has other images or classes than when the classifier was trained '
            f'({classifier["when"][:19]}): evaluate trains one on those that are there now'
        )


def read_as_classifier_was_trained(args, classifier):
    """Return args with the options that the classifier's images were read with. Warns of explicit ones that differ."""
    settings = classifier['question']['settings'] if classifier else {}
    changed = {
        name: settings[name] for name in READING if settings.get(name, getattr(args, name)) != getattr(args, name)
    }
    for name in sorted(changed.keys() & args.explicit):
        warn(
            f'--{name}={getattr(args, name)}: the classifier was trained with {changed.pop(name)}; evaluate with this '
            'option trains another, and --classifier selects it'
        )
    if changed:
        options = ' '.join(f'--{name}={value}' for name, value in changed.items())
        log(f'the images are read as those of the classifier: {options}')
    return replace_args(args, **changed)


def is_of_weights(spec, args, checkpoint):
    """Whether a result, or a classifier's spec, of a checkpoint is of the average with the start that `args` has. That
    of the start itself is always the same."""
    if not checkpoint.get('start') or not (checkpoint['epoch'] or checkpoint['images']):
        return True
    return spec.get('settings', {}).get('start_share', args.start_share) == args.start_share


def select_by_reading(args, classifiers):
    """Of the classifiers for one dataset, return those whose images were read with the options of args, else those with
    the explicit ones, else all."""
    for names in (READING, args.explicit & {*READING}):
        options = {name: getattr(args, name) for name in names}
        if same := [
            one for one in classifiers if {**options, **one['question']['settings']}.items() >= options.items()
        ]:
            return same
    return classifiers


def best_classifier(args, classifiers):
    """Return the classifier of a dataset to use, of those for one folder: of the ones for the newest state of its
    images (number, names and labels) those of select_by_reading, of them the most accurate, then the newest. `outdated`
    is the number of those for other states."""

    def state(content):
        return {name: value for name, value in content['question']['images'].items() if name != 'path'}

    def sort_key(content):
        top1 = content.get('top1')
        return (top1 if isinstance(top1, float) else -1.0), content['when']

    newest = state(max(classifiers, key=lambda content: content['when']))
    current = [content for content in classifiers if state(content) == newest]
    return {**max(select_by_reading(args, current), key=sort_key), 'outdated': len(classifiers) - len(current)}


def list_options(spec):
    """Return the explicit settings of an evaluation as options, such as --knn_k=20, and --amp of another precision than
    float32."""
    settings, amp = spec.get('settings', {}), AMP_OPTIONS.get(spec.get('precision'))  # early versions have neither
    given = [f'--{name}={settings[name]}' for name in spec.get('given', ()) if name in settings]
    return given + ([f'--amp={amp}'] if amp else [])


def describe_classifier(classifier):
    """Describe a classifier: its dataset, accuracy, time and explicit settings."""
    spec = classifier['question']
    options_text = ''.join(f', {option}' for option in list_options(spec))
    top1 = classifier.get('top1')
    accuracy = f', top-1 {top1:.2f} % on val' if isinstance(top1, float) else ''
    return f'{spec["images"]["path"]} ({classifier["when"][:19]}{accuracy}{options_text}; {classifier["file"]})'


def pick_folder(args, by_folder, own_folder, images_path):
    """Pick the dataset whose classifier find_classifier takes, from `by_folder`, {folder: its classifiers}. own_folder:
    the checkpoint's dataset, None for weights of other origin. Returns a folder, or None."""
    listed = ', '.join(f'{folder} ({one["file"]})' for folder, group in by_folder.items() for one in group)
    if args.classifier:
        folder_given = Path(os.path.realpath(resolve_path(args.classifier)))
        if folder_given not in by_folder:
            listed = listed or 'none: run evaluate first'
            raise UserError(f'--classifier={args.classifier}: this checkpoint has classifiers for {listed}')
        return folder_given
    inside = [folder for folder in by_folder if images_path.is_relative_to(folder)]
    if inside:
        return max(inside, key=lambda folder: len(folder.parts))
    if own_folder in by_folder:
        return own_folder
    if not own_folder and len(by_folder) > 1:
        raise UserError(f'--classifier=FOLDER selects one of these classifiers: {listed}')
    is_elsewhere = not (own_folder and images_path.is_relative_to(own_folder))
    return next(iter(by_folder)) if len(by_folder) == 1 and is_elsewhere else None
