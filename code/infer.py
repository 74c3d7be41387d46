"""Predict the class of every image of a folder with a checkpoint, as a CSV file: a submission."""

import csv
import io
from dataclasses import replace

import torch

from ckpt import get_model_ckpt, list_checkpoints
from dataloader import vision
from dataloader.load_dataset import eval_loader, labeled_subset, load_splits, load_unlabeled
from dataloader.sources.find import has_splits, is_tar
from dataloader.sources.torchvision_datasets import detect_dataset
from metric.knn import clip_k
from protocols.features import extract_features
from protocols.knn import knn_scores_from_loader, nearest_in_bank
from protocols.results import describe_classifier, find_classifier
from runtime import distributed
from runtime.atomic_write import save_png, write_csv
from runtime.console import printable
from runtime.device import get_device, init_device
from runtime.errors import UserError, resolve_path
from runtime.files import try_writing
from runtime.messages import log
from runtime.options import repeat_options, replace_args
from runtime.tensors import evenly_spaced
from utils import prepare_batch

GALLERY_ROWS = 12  # of the picture of neighbours


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
    requested_path = resolve_path(args.image_path) if 'image_path' in args.given else None
    output = resolve_path(args.output or 'data/submission.csv')
    args, backbone, checkpoint, images = load_to_predict(args, requested_path, output)
    classifier = find_classifier(args, checkpoint, requested_path or resolve_path(args.image_path))
    train = load_splits(replace_dataset(args, classifier))['train'] if args.neighbours else None
    features, _ = extract_features(args, backbone, eval_loader(args, images), 'features')

    scores, classes, method_text = predict(args, checkpoint, classifier, backbone, features)
    best = scores.topk(min(5, len(classes)), dim=1)
    rows = [
        (name, classes[topk[0]], f'{share[0]:.4f}', join_names(classes[i] for i in topk))
        for name, share, topk in zip(images.names, best.values.tolist(), best.indices.tolist(), strict=True)
    ]
    if not distributed.rank():
        write_csv(output, [('file', 'prediction', 'confidence', 'top5'), *sorted(rows)])
    log(f'{len(rows)} images of {printable(images.folder)} predicted by {method_text}')
    log(f'written to {output}')
    if args.neighbours:
        rows = sample_rows(images)
        queries = features[rows.to(features.device)]
        near = nearest_in_bank(args, backbone, eval_loader(args, train), queries, args.neighbours)
        picture = neighbors_picture(args, images, rows, train, *near)
        path = output.with_name(f'{output.stem}_neighbours.png')
        if not distributed.rank():
            save_png(picture, path)
        log(f'their nearest training images: {path}')
    return output


def replace_dataset(args, classifier):
    """args of the images to look for neighbours in: the checkpoint's own set, or where that is not there (another
    tool's file has none) the classifier's."""
    if not classifier or args.preset == 'demo' or resolve_path(args.image_path).exists():
        return args
    return replace_args(args, image_path=classifier['question']['images']['path'])


def join_names(names):
    """Names with ; between them; one that has such a letter itself stands in quotes: csv.reader([cell], delimiter=';')
    gives them back."""
    cell = io.StringIO()
    csv.writer(cell, delimiter=';').writerow(names)
    return cell.getvalue().removesuffix('\r\n')


def predict(args, checkpoint, classifier, backbone, features):
    """(scores, N x classes; the classes; how in words) of images of which these are the features: by the classifier
    that evaluate trained, or where there is none by their neighbours in train."""
    if classifier:
        classes = classifier['classes']
        logits = features @ classifier['weight'].to(features).T + classifier['bias'].to(features)
        about = describe_classifier(classifier)
        scores, method_text = logits.softmax(1), f'the linear classifier that evaluate trained on {about}'
    else:
        own = resolve_path(args.image_path)
        if not own.exists() and args.preset != 'demo':
            raise UserError(
                f'{checkpoint["path"].name} has no classifier, and what kNN would ask, {printable(own)}, is not there:'
                f' python3 cli.py evaluate --ckpt_name={args.ckpt_name}{repeat_options(args)} --image_path=<labelled '
                'images> '
                'trains one'
            )
        train = labeled_subset(load_splits(args)['train'])
        if not len(train):
            raise UserError(
                f'{checkpoint["path"].name} has no classifier, and {train.folder} no labels for kNN: python3 cli.py '
                f'evaluate --ckpt_name={args.ckpt_name}{repeat_options(args)} --image_path=<labelled images> trains one'
            )
        classes = train.classes
        scores = knn_scores_from_loader(args, backbone, eval_loader(args, train), features, len(classes))
        k = clip_k(args.knn_k, train.labels)
        method_text = (
            f'kNN (k={k}) against {len(train)} training images, for this checkpoint has no classifier (run evaluate)'
        )
    return scores, classes, method_text


def sample_rows(images):
    """Row numbers of up to ROWS of the images."""
    return evenly_spaced(len(images), GALLERY_ROWS)


def neighbors_picture(args, images, rows, train, cosine, found):
    """A picture of these rows of `images`, each beside those of `train` that are nearest to it. cosine, found: rows x
    k, how near, and which rows of train."""
    queries = load_crops(args, images, rows)
    grid = [[query, *load_crops(args, train, near.cpu())] for query, near in zip(queries, found, strict=True)]
    captions = [
        f'{printable(images.names[row])}: cosine {values[0]:.3f} to {values[-1]:.3f}'
        for row, values in zip(rows.tolist(), cosine.tolist(), strict=True)
    ]
    right = [
        [same_class(images, row, train, other) for other in others]
        for row, others in zip(rows.tolist(), found.tolist(), strict=True)
    ]
    import plots  # matplotlib takes half a second to import

    return plots.neighbor_grid(grid, captions, right)


def same_class(images, row, others, other):
    """Whether image `row` of `images` and image `other` of `others` are of one class; None where one has no class."""
    label, theirs = int(images.labels[row]), int(others.labels[other])
    return None if label < 0 or theirs < 0 else images.classes[label] == others.classes[theirs]


def load_crops(args, images, rows):
    """The centre crops of these images, n x 3 x S x S in [0, 1], on the CPU."""
    whole, found = replace(images, views=0), []
    for part in rows.split(256):
        pixels, _ = prepare_batch(args, whole.load_batch([(row, 0, '') for row in part.tolist()]))
        found.append(vision.to_picture(vision.eval_view(pixels, args), args).cpu())
    return torch.cat(found)


def load_to_predict(args, requested_path, output):
    """(args, backbone, checkpoint, images): of --ckpt_name, the backbone on the device, and the images to predict.

    requested_path: the given --image_path, or None. Raises what get_model_ckpt and images_to_predict do, and OSError
    where `output` cannot be written, before any image is read.
    """
    args.given -= {'image_path'}  # the checkpoint's image_path is where its training images are
    init_device(args)
    args, model, checkpoint = get_model_ckpt(args)
    if not distributed.rank():
        try_writing(output)
    backbone = model.backbone.to(get_device(args), memory_format=torch.channels_last)
    return args, backbone, checkpoint, images_to_predict(args, requested_path)


def images_to_predict(args, requested_path):
    """The ImageDataset that --image_path means, or those of the checkpoint's own set (`requested_path` None).

    Where it is laid out for training, they are its test images, or else its val's; with neither, all.
    """
    root = requested_path or resolve_path(args.image_path)
    if not root.exists():
        raise UserError(f'--image_path: there is no {printable(root)}')
    archive = root.is_file() and is_tar(root)
    if requested_path is None or detect_dataset(root) or archive or (root.is_dir() and has_splits(root)):
        fraction = 0.0 if archive and requested_path else args.val_fraction  # of an archive without val all is meant
        splits = load_splits(replace_args(args, image_path=str(root), val_fraction=fraction))
        if images := splits['test'] or splits['val']:
            return images
    return load_unlabeled(args, root)
