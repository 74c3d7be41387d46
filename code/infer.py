"""Predict the class of every image of a folder with a checkpoint, as a CSV file: a submission."""

import csv
import io
from dataclasses import replace

import torch

from ckpt import get_model_ckpt, list_checkpoints
from dataloader import vision
from dataloader.load_dataset import in_order, labelled, load_splits, load_whole
from dataloader.sources.find import has_splits, is_tar
from dataloader.sources.torchvision_datasets import torchvision_kind
from errors import UserError, path_of
from metric.knn import neighbours
from protocols.features import features_of
from protocols.knn import nearest_images, vote
from protocols.results import classifier_for, described_classifier
from runtime import distributed
from runtime.atomic_write import save_picture, write_csv
from runtime.console import shown
from runtime.device import get_device, use_device
from runtime.files import try_writing
from runtime.messages import say
from runtime.options import changed, places
from runtime.tensors import evenly_spaced
from utils import prepare_batch

ROWS = 12  # of the picture of neighbours


def infer(args):
    """Write --output: one row per image, sorted by file: file, prediction, confidence, top5. Returns its path.

    The images are those of --image_path (its test or val folder where it is laid out for training), by default the
    test images of the checkpoint's own set. The classifier that `evaluate` left beside the checkpoint predicts, with
    its softmax as confidence; where there is none, kNN against the training images, with the share of the votes.
    Raises UserError without a checkpoint or images, WorkError where an image or the classifier cannot be read.
    """
    if not args.ckpt_name:
        known = list_checkpoints(args)
        hint = f'the newest is --ckpt_name={known[-1]}' if known else 'train one first: python3 cli.py train'
        raise UserError(f'infer wants --ckpt_name=<run>/<checkpoint>; {hint}')
    wanted = path_of(args.image_path) if 'image_path' in args.given else None
    output = path_of(args.output or 'data/submission.csv')
    args, backbone, checkpoint, images = load_to_predict(args, wanted, output)
    classifier = classifier_for(args, checkpoint, wanted or path_of(args.image_path))
    train = load_splits(with_set(args, classifier))['train'] if args.neighbours else None
    features, _ = features_of(args, backbone, in_order(args, images), 'features')

    scores, classes, how = predicted(args, checkpoint, classifier, backbone, features)
    best = scores.topk(min(5, len(classes)), dim=1)
    rows = [
        (name, classes[top[0]], f'{share[0]:.4f}', in_one_cell(classes[i] for i in top))
        for name, share, top in zip(images.names, best.values.tolist(), best.indices.tolist(), strict=True)
    ]
    if not distributed.rank():
        write_csv(output, [('file', 'prediction', 'confidence', 'top5'), *sorted(rows)])
    say(f'{len(rows)} images of {shown(images.folder)} predicted by {how}')
    say(f'written to {output}')
    if args.neighbours:
        rows = shown_of(images)
        queries = features[rows.to(features.device)]
        near = nearest_images(args, backbone, in_order(args, train), queries, args.neighbours)
        picture = neighbours_picture(args, images, rows, train, *near)
        path = output.with_name(f'{output.stem}_neighbours.png')
        if not distributed.rank():
            save_picture(picture, path)
        say(f'their nearest training images: {path}')
    return output


def with_set(args, classifier):
    """args of the images to look for neighbours in: the checkpoint's own set, or where that is not there (another
    tool's file has none) the classifier's."""
    if not classifier or args.preset == 'demo' or path_of(args.image_path).exists():
        return args
    return changed(args, image_path=classifier['question']['images']['path'])


def in_one_cell(names):
    """Names with ; between them; one that has such a letter itself stands in quotes: csv.reader([cell], delimiter=';')
    gives them back."""
    cell = io.StringIO()
    csv.writer(cell, delimiter=';').writerow(names)
    return cell.getvalue().removesuffix('\r\n')


def predicted(args, checkpoint, classifier, backbone, features):
    """(scores, N x classes; the classes; how in words) of images of which these are the features: by the classifier
    that evaluate trained, or where there is none by their neighbours in train."""
    if classifier:
        classes = classifier['classes']
        logits = features @ classifier['weight'].to(features).T + classifier['bias'].to(features)
        about = described_classifier(classifier)
        scores, how = logits.softmax(1), f'the linear classifier that evaluate trained on {about}'
    else:
        own = path_of(args.image_path)
        if not own.exists() and args.preset != 'demo':
            raise UserError(
                f'{checkpoint["path"].name} has no classifier, and what kNN would ask, {shown(own)}, is not there:'
                f' python3 cli.py evaluate --ckpt_name={args.ckpt_name}{places(args)} --image_path=<labelled images> '
                'trains one'
            )
        train = labelled(load_splits(args)['train'])
        if not len(train):
            raise UserError(
                f'{checkpoint["path"].name} has no classifier, and {train.folder} no labels for kNN: python3 cli.py '
                f'evaluate --ckpt_name={args.ckpt_name}{places(args)} --image_path=<labelled images> trains one'
            )
        classes = train.classes
        scores = vote(args, backbone, in_order(args, train), features, len(classes))
        k = neighbours(args.knn_k, train.labels)
        how = f'kNN (k={k}) against {len(train)} training images, for this checkpoint has no classifier (run evaluate)'
    return scores, classes, how


def shown_of(images):
    """Row numbers of up to ROWS of the images."""
    return evenly_spaced(len(images), ROWS)


def neighbours_picture(args, images, rows, train, cosine, found):
    """A picture of these rows of `images`, each beside those of `train` that are nearest to it. cosine, found: rows x
    k, how near, and which rows of train."""
    queries = pixels_of(args, images, rows)
    grid = [[query, *pixels_of(args, train, near.cpu())] for query, near in zip(queries, found, strict=True)]
    captions = [
        f'{shown(images.names[row])}: cosine {values[0]:.3f} to {values[-1]:.3f}'
        for row, values in zip(rows.tolist(), cosine.tolist(), strict=True)
    ]
    right = [
        [same_class(images, row, train, other) for other in others]
        for row, others in zip(rows.tolist(), found.tolist(), strict=True)
    ]
    import plots  # matplotlib takes half a second to import

    return plots.beside(grid, captions, right)


def same_class(images, row, others, other):
    """Whether image `row` of `images` and image `other` of `others` are of one class; None where one has no class."""
    label, theirs = int(images.labels[row]), int(others.labels[other])
    return None if label < 0 or theirs < 0 else images.classes[label] == others.classes[theirs]


def pixels_of(args, images, rows):
    """The centre crops of these images, n x 3 x S x S in [0, 1], on the CPU."""
    whole, found = replace(images, views=0), []
    for part in rows.split(256):
        pixels, _ = prepare_batch(args, whole.batch([(row, 0, '') for row in part.tolist()]))
        found.append(vision.denormalise(vision.plain_view(pixels, args), args).cpu())
    return torch.cat(found)


def load_to_predict(args, wanted, output):
    """(args, backbone, checkpoint, images): of --ckpt_name, the backbone on the device, and the images to predict.

    wanted: the given --image_path, or None. Raises what get_model_ckpt and images_to_predict do, and OSError where
    `output` cannot be written, before any image is read.
    """
    args.given -= {'image_path'}  # the checkpoint's image_path is where its training images are
    use_device(args)
    args, model, checkpoint = get_model_ckpt(args)
    if not distributed.rank():
        try_writing(output)
    backbone = model.backbone.to(get_device(args), memory_format=torch.channels_last)
    return args, backbone, checkpoint, images_to_predict(args, wanted)


def images_to_predict(args, wanted):
    """The Images that --image_path means, or those of the checkpoint's own set (`wanted` None).

    Where it is laid out for training, they are its test images, or else its val's; with neither, all.
    """
    root = wanted or path_of(args.image_path)
    if not root.exists():
        raise UserError(f'--image_path: there is no {shown(root)}')
    archive = root.is_file() and is_tar(root)
    if wanted is None or torchvision_kind(root) or archive or (root.is_dir() and has_splits(root)):
        fraction = 0.0 if archive and wanted else args.val_fraction  # of an archive without val all is meant
        splits = load_splits(changed(args, image_path=str(root), val_fraction=fraction))
        if images := splits['test'] or splits['val']:
            return images
    return load_whole(args, root)
