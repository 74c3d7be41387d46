"""Results that say what they are of: a question, what came out, and a file that no other question shares.

A question is which images (path, number, a digest of their names and labels), which weights, at which size, with which
settings. <run>/evaluate_<protocol>_<digest of the question>.json; the classifier of a linear one is beside it.
"""

import hashlib
import json
import os
from pathlib import Path

import torch

from ckpt import library_versions, load_file, sanitize_name
from config import NOT_RESTORED_OPTIONS, OPTIONS, PROTOCOLS, RENAMED_VALUES
from protocols.protocol import find_protocol, has_effect
from runtime.atomic_write import atomic_write_on_main
from runtime.console import print_message
from runtime.distributed import rank
from runtime.errors import UserError, resolve_path, same_path
from runtime.files import dumps_nan_safe, is_number, read_in_order, utc_timestamp, written_time
from runtime.options import rename_options

NOT_IN_SPEC = (
    'image_path',
    'protocol',
    'preset',
    *NOT_RESTORED_OPTIONS,
)  # options that a question has in other entries, or not


def sanitize(name):
    """Any file's name as a short part of one that every system and TensorBoard takes."""
    return sanitize_name(name)[:40]


def eval_spec(args, splits, checkpoint):
    """What an evaluation asks, as plain values. splits: {'train': ..., 'val': ...} of ImageDataset or Boxes."""
    settings = {
        name: getattr(args, name)
        for name, option in OPTIONS.items()
        if name not in NOT_IN_SPEC and 'evaluate' in option.metadata['used_by'] and has_effect(args, name)
    }
    if args.subset_list:
        settings['subset_digest'] = digest([os.fsdecode(resolve_path(args.subset_list).read_bytes())])
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
        'settings': settings,
        'given': sorted(name for name in args.given if name in settings),
    }


def dataset_fingerprint(images):
    """How many images, of an ImageDataset or DetectionDataset, and which."""
    names = [*images.names]
    return {
        'number': len(images),
        'digest': digest(f'{name}\t{label}' for name, label in zip(names, images.labels.tolist(), strict=True)),
    }


def digest(lines):
    hashed = hashlib.blake2b(digest_size=6)
    for line in lines:
        hashed.update(line.encode(errors='surrogateescape') + b'\n')
    return hashed.hexdigest()


def result_name(args):
    """What TensorBoard and the file call an evaluation: the protocol and what it is about."""
    return '_'.join([args.protocol, *find_protocol(args.protocol).details(args)])


def write_result(run, name, spec, metrics, classifier=None):
    """Write the result of a question into the folder `run`; returns it, with what it says of itself."""
    spec_hash = digest([json.dumps({**spec, 'given': None}, sort_keys=True)])
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


def load_results(run, **wanted):
    """The results in a run's folder whose entries are as `wanted`, the oldest first; also those of before they said
    which images they were of."""
    results = []
    for path, result in read_in_order(run.glob('evaluate_*.json')):
        result['protocol'] = RENAMED_VALUES['protocol'].get(str(result.get('protocol')), result.get('protocol'))
        if isinstance(result.get('settings'), dict):
            result['settings'] = rename_options(result['settings'])
        if result['protocol'] in (*PROTOCOLS,) and is_number(result.get('epoch')):
            results.append(result)
        else:
            print_message('warning', f'{path} is damaged, or no result of evaluate: left out')
    return [result for result in results if all(result.get(key) == value for key, value in wanted.items())]


def find_classifier(args, checkpoint, where):
    """The classifier that evaluate trained on this checkpoint for the images at the path `where`, or None.

    That of --classifier (its file, or the folder of a set), else of the set in which the images lie, else of the
    checkpoint's own set, else the only one there is, but never another set's for images of the checkpoint's own. Of
    several of one set the one with the highest accuracy on val; of equals, or of early files, the last.
    Raises UserError where --classifier names none, WorkError for a damaged file.
    """
    by_folder = {}  # the folder of a set: the best of its classifiers
    named = None
    for path in checkpoint['run'].glob('classifier_*'):
        content = load_file(path)
        if not isinstance(content, dict) or content.get('question', {}).get('checkpoint') != checkpoint['path'].name:
            continue
        content = {**content, 'file': path.name, 'when': written_time(content, path)}
        if args.classifier and same_path(resolve_path(args.classifier), path) or args.classifier == path.name:
            named = content
        folder = Path(os.path.realpath(content['question']['images']['path']))
        if folder not in by_folder or classifier_sort_key(content) > classifier_sort_key(by_folder[folder]):
            by_folder[folder] = content
    chosen = named or pick_classifier(
        args, by_folder, Path(os.path.realpath(resolve_path(args.image_path))), where.resolve()
    )
    trained_at = chosen and chosen['question']['settings'].get('image_size', args.image_size)
    if chosen and trained_at != args.image_size:
        print_message('warning', f'--image_size={args.image_size}: the classifier was trained at {trained_at} px')
    return chosen


def classifier_sort_key(classifier):
    """The order of classifiers of one set: by accuracy, then by time."""
    top1 = classifier.get('top1')
    return (top1 if isinstance(top1, float) else -1.0), classifier['when']


def describe_classifier(classifier):
    """A classifier in words: of which set, how good, when, with which settings that were given."""
    spec = classifier['question']
    given = ''.join(f', --{name}={spec["settings"][name]}' for name in spec.get('given', ()))
    top1 = classifier.get('top1')
    accuracy = f', top-1 {top1:.2f} % on val' if isinstance(top1, float) else ''
    return f'{spec["images"]["path"]} ({classifier["when"][:19]}{accuracy}{given}; {classifier["file"]})'


def pick_classifier(args, by_folder, own, where):
    """The one of `by_folder`, {folder of a set: its classifier}, that find_classifier means."""
    if args.classifier:
        wanted = Path(os.path.realpath(resolve_path(args.classifier)))
        if wanted not in by_folder:
            known = ', '.join(f'{folder} ({content["file"]})' for folder, content in by_folder.items())
            known = known or 'none: run evaluate first'
            raise UserError(f'--classifier={args.classifier}: the sets that this checkpoint has one of are {known}')
        return by_folder[wanted]
    inside = [folder for folder in by_folder if where.is_relative_to(folder)]
    if inside:
        return by_folder[max(inside, key=lambda folder: len(folder.parts))]
    if own in by_folder:
        return by_folder[own]
    return next(iter(by_folder.values())) if len(by_folder) == 1 and not where.is_relative_to(own) else None
