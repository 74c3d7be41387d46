"""infer: predict the class of every image of a folder with a checkpoint, and write a CSV file (a submission)."""

import csv
import io
from dataclasses import replace

import torch

from ckpt import get_model_ckpt
from dataloader import vision
from dataloader.load_dataset import eval_loader, labeled_subset, load_splits, load_unlabeled
from dataloader.sources.find import has_splits, is_tar
from dataloader.sources.torchvision_datasets import detect_dataset
from metric.knn import clip_k
from protocols.features import extract_features
from protocols.knn import knn_scores_from_loader, nearest_in_bank
from protocols.results import describe_classifier, find_classifier, read_as_classifier_was_trained, warn_outdated
from runtime import distributed
from runtime.atomic_write import save_png, write_csv
from runtime.checkpoints.run_folder import list_checkpoints
from runtime.console import printable
from runtime.device import init_device, move_network
from runtime.errors import UserError, resolve_path
from runtime.files import try_writing
from runtime.messages import log, warn
from runtime.options import repeat_ckpt_name, replace_args
from runtime.tensors import evenly_spaced
from utils import prepare_batch

GALLERY_ROWS = 12  # rows in the picture of neighbors


def infer(args):
    """Write --output, a row per image, sorted by file: file, prediction, confidence, top5. Returns its path.

    The images are those of --image_path (its test or val if it has splits), by default the test images of the
    checkpoint's dataset. Predictions are from the linear classifier that `evaluate` trained, with its softmax as
    confidence; without one from kNN on the training images, with the share of the votes. Raises UserError without a
    checkpoint or images, WorkError if an image or the classifier cannot be read.
    """
    if not args.ckpt_name:
        names = list_checkpoints(args)
        hint = f'the newest is --ckpt_name={names[-1]}' if names else 'train one first: python3 cli.py train'
        raise UserError(f'infer needs --ckpt_name=<run>/<checkpoint>; {hint}')
    requested_path = resolve_path(args.image_path) if 'image_path' in args.explicit else None
    output = resolve_path(args.output or 'data/submission.csv')
    args, backbone, checkpoint = load_backbone(args, output)
    classifier = find_classifier(args, checkpoint, requested_path or resolve_path(args.image_path))
    args = read_as_classifier_was_trained(args, classifier)
    images = images_to_predict(args, requested_path, classifier)
    train = load_splits(replace_dataset(args, checkpoint, classifier))['train'] if args.neighbors else None
    features, _ = extract_features(args, backbone, eval_loader(args, images), 'features')

    scores, classes, method_text = predict(args, checkpoint, classifier, backbone, images, features)
    best = scores.argsort(dim=1, descending=True, stable=True)[:, :5]  # of equal scores the first class, as in argmax
    voted = (scores > 0).sum(1) if classifier is None else torch.full((len(scores),), 5)  # kNN: classes with votes
    rows = [
        (name, classes[topk[0]], f'{share:.4f}', join_names(classes[i] for i in topk[:count]))
        for name, share, topk, count in zip(
            images.names, scores.amax(1).tolist(), best.tolist(), voted.tolist(), strict=True
        )
    ]
    if not distributed.rank():
        write_csv(output, [('file', 'prediction', 'confidence', 'top5'), *sorted(rows)])
    log(f'{len(rows)} images of {printable(images.folder)} predicted by {method_text}')
    log(f'written to {output}')
    if args.neighbors:
        rows = sample_rows(images)
        queries = features[rows.to(features.device)]
        near = nearest_in_bank(args, backbone, eval_loader(args, train), queries, args.neighbors)
        picture = neighbors_picture(args, images, rows, train, *near)
        path = output.with_name(f'{output.stem}_neighbors.png')
        if not distributed.rank():
            save_png(picture, path)
        log(f'their nearest training images: {path}')
    return output


def replace_dataset(args, checkpoint, classifier):
    """Return args for the training images to search for neighbors: the checkpoint's dataset, or the classifier's if
    that does not exist, or for weights of other origin."""
    has_own = args.preset == 'demo' or resolve_path(args.image_path).exists()
    if not classifier or has_own and checkpoint['layout'] == 'ours':
        return args
    return replace_args(args, image_path=classifier['question']['images']['path'])


def join_names(names):
    """Join names with ';', quoted if necessary; csv.reader([cell], delimiter=';') splits them."""
    cell = io.StringIO()
    csv.writer(cell, delimiter=';').writerow(names)
    return cell.getvalue().removesuffix('\r\n')


def predict(args, checkpoint, classifier, backbone, images, features):
    """Classify `images` by their features, N x d: by the classifier, or without one by kNN on train. Returns (scores,
    N x classes; class names; description of the method). Raises UserError if neither is possible."""
    if classifier:
        classes = classifier['classes']
        logits = features @ classifier['weight'].to(features).T + classifier['bias'].to(features)
        classifier_text = describe_classifier(classifier)
        scores, method_text = logits.softmax(1), f'the linear classifier that evaluate trained on {classifier_text}'
    else:
        train = load_bank(args, checkpoint)
        classes = train.classes
        check_not_in_bank(args, checkpoint, images, train)
        scores = knn_scores_from_loader(args, backbone, eval_loader(args, train), features, len(classes))
        k = clip_k(args.knn_k, train.labels)
        method_text = (
            f'kNN (k={k}) against {len(train)} training images, because this checkpoint has no classifier (run '
            'evaluate)'
        )
    return scores, classes, method_text


def load_bank(args, checkpoint):
    """Load the labeled training images for kNN. Raises UserError if there are none."""
    train_path, name = resolve_path(args.image_path), checkpoint['path'].name
    evaluate = f'python3 cli.py evaluate {repeat_ckpt_name(args, "evaluate")} --image_path=<labeled images> trains one'
    if not train_path.exists() and args.preset != 'demo':
        raise UserError(
            f'{name} has no classifier, and the training images for kNN, {printable(train_path)}, do not exist: '
            f'{evaluate}'
        )
    train = labeled_subset(load_splits(args)['train'])
    if not len(train):
        raise UserError(f'{name} has no classifier, and {train.folder} no labels for kNN: {evaluate}')
    return train


def check_not_in_bank(args, checkpoint, images, train):
    """Warn of images to predict that are labeled training images: each is its own nearest neighbor. Raises UserError if
    all are, or for weights of other origin, which have no training images."""
    if not (images.folder.is_relative_to(train.folder) or train.folder.is_relative_to(images.folder)):
        return
    bank = {f'{train.folder}/{name}' for name in train.names}
    known = sum(f'{images.folder}/{name}' in bank for name in images.names)
    text = (
        f'{known} of the {len(images)} images are labeled images that kNN predicts from, each its own nearest neighbor'
    )
    if known and (known == len(images) or checkpoint['layout'] != 'ours') and not args.neighbors:
        raise UserError(f'{text}: python3 cli.py evaluate {repeat_ckpt_name(args, "evaluate")} measures the accuracy')
    if known:
        warn(text)


def sample_rows(images):
    """Return up to GALLERY_ROWS evenly spaced row numbers."""
    return evenly_spaced(len(images), GALLERY_ROWS)


def neighbors_picture(args, images, rows, train, cosine, neighbor_rows):
    """Return a picture of rows of `images`, each with its nearest images in `train`. cosine, neighbor_rows: len(rows) x
    k."""
    queries = load_crops(args, images, rows)
    grid = [[query, *load_crops(args, train, near.cpu())] for query, near in zip(queries, neighbor_rows, strict=True)]
    captions = [
        f'{printable(images.names[row])}: cosine {values[0]:.3f} to {values[-1]:.3f}'
        for row, values in zip(rows.tolist(), cosine.tolist(), strict=True)
    ]
    right = [
        [same_class(images, row, train, other) for other in near_rows]
        for row, near_rows in zip(rows.tolist(), neighbor_rows.tolist(), strict=True)
    ]
    import plots  # matplotlib takes half a second to import

    return plots.neighbor_grid(grid, captions, right)


def same_class(images, row, other_images, other_row):
    """Whether image `row` of `images` and `other_row` of `other_images` have one class; None if one has no label."""
    label, other_label = int(images.labels[row]), int(other_images.labels[other_row])
    return None if label < 0 or other_label < 0 else images.classes[label] == other_images.classes[other_label]


def load_crops(args, images, rows):
    """Return the center crops of images, n x 3 x S x S in [0, 1], on the CPU."""
    whole, crops = replace(images, views=0), []
    for part in rows.split(256):
        pixels, _ = prepare_batch(args, whole.load_batch([(row, 0, '') for row in part.tolist()]))
        crops.append(vision.to_picture(vision.eval_view(pixels, args), args).cpu())
    return torch.cat(crops)


def load_backbone(args, output):
    """Load the checkpoint. Returns (args, backbone on the device, checkpoint). Raises the errors of get_model_ckpt, and
    OSError if `output` cannot be written."""
    args.explicit -= {'image_path'}  # keep the checkpoint's image_path, which has the training images
    init_device(args)
    args, model, checkpoint = get_model_ckpt(args)
    if not distributed.rank():
        try_writing(output)
    backbone = move_network(args, model.backbone)
    return args, backbone, checkpoint


def images_to_predict(args, requested_path, classifier=None):
    """Return the ImageDataset to predict: of `requested_path`, or of the checkpoint's dataset if it is None.

    If the folder has splits, these are its test images, else those of val; without splits all images. Warns if train is
    not as it was when `classifier` (results.find_classifier) was trained on it.
    """
    root = requested_path or resolve_path(args.image_path)
    if not root.exists():
        raise UserError(f'--image_path: there is no {printable(root)}')
    archive = root.is_file() and is_tar(root)
    if requested_path is None or detect_dataset(root) or archive or (root.is_dir() and has_splits(root)):
        fraction = 0.0 if archive and requested_path else args.val_fraction  # all of an archive without val
        splits = load_splits(replace_args(args, image_path=str(root), val_fraction=fraction))
        if classifier and fraction == args.val_fraction:
            warn_outdated(args, classifier, root, labeled_subset(splits['train']))
        if images := splits['test'] or splits['val']:
            return images
    return load_unlabeled(args, root)
