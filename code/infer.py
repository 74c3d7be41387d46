"""Predict the class of every image of a folder with a checkpoint, as a CSV file: a submission."""

import csv
from dataclasses import replace

import torch

from ckpt import get_model_ckpt, list_checkpoints, read
from config import UserError, path_of
from dataloader.load_dataset import in_order, labelled, load_folder, load_splits, torchvision_kind
from evaluate import features_of
from logger import say
from metric.knn import knn_scores, neighbours
from utils import get_device, write_aside


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
    args.given -= {'image_path'}  # the checkpoint's image_path is where its training images are
    args, model, checkpoint = get_model_ckpt(args)
    backbone = model.backbone.to(get_device(args), memory_format=torch.channels_last)
    images = images_to_predict(args, wanted)
    features, _ = features_of(args, backbone, in_order(args, images), 'features')

    classifier = load_classifier(checkpoint['path'], checkpoint['epoch'])
    if classifier:
        classes = classifier['classes']
        logits = features @ classifier['weight'].to(features).T + classifier['bias'].to(features)
        scores, how = logits.softmax(1), 'the linear classifier of evaluate'
    else:
        train = labelled(load_splits(args)['train'])
        if not len(train):
            raise UserError(
                f'{checkpoint["path"].name} has no classifier, and {train.folder} no labels for kNN: run evaluate first'
            )
        classes = train.classes
        bank, labels = features_of(args, backbone, in_order(args, train), 'features of train')
        k = neighbours(args.knn_k, labels)
        scores = knn_scores(features, bank, labels, len(classes), k, args.knn_temperature)
        how = f'kNN (k={k}) against {len(labels)} training images, for this checkpoint has no classifier (run evaluate)'
    best = scores.topk(min(5, len(classes)), dim=1)
    rows = [
        (name, classes[top[0]], f'{share[0]:.4f}', ';'.join(classes[i] for i in top))
        for name, share, top in zip(images.names, best.values.tolist(), best.indices.tolist(), strict=True)
    ]
    output = path_of(args.output)

    def write(aside):
        with open(aside, 'w', newline='', encoding='utf-8') as file:
            csv.writer(file).writerows([('file', 'prediction', 'confidence', 'top5'), *sorted(rows)])

    write_aside(output, write)
    say(f'{len(rows)} images of {images.folder} predicted by {how}')
    say(f'written to {output}')
    return output


def images_to_predict(args, wanted):
    """The Images that --image_path means, or those of the checkpoint's own set (`wanted` None)."""
    root = wanted or path_of(args.image_path)
    if not root.is_dir():
        raise UserError(f'--image_path: there is no folder {root}')
    if (root / 'train').is_dir():
        for name in ('test', 'val'):
            if (root / name).is_dir():
                return load_folder(args, root / name)
    if torchvision_kind(root):
        return load_splits(replace(args, image_path=str(root)))['val']
    return load_folder(args, root)


def load_classifier(path, epoch):
    """The classifier that evaluate trained on the checkpoint `path`, or None. Raises WorkError for a damaged file."""
    file = path.parent / f'classifier_epoch_{epoch}'
    if not file.is_file():
        return None
    classifier = read(file, 'weight', 'bias', 'classes', 'checkpoint')
    return classifier if classifier['checkpoint'] == path.name else None
