"""How good a pretrained backbone is: kNN, and a linear classifier on its frozen features (paper section 4 and app. A).

The backbone is in eval mode throughout and the whole of `val` counts. What is reported is the last epoch of the
classifier, never the best one.
"""

import json
import math
import time

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from ckpt import get_model_ckpt, list_checkpoints, new_model
from config import UserError, path_of
from dataloader import vision
from dataloader.load_dataset import get_iterator, in_order, labelled, prepared
from logger import Logger, duration, say
from metric.accuracy import confusion, topk_accuracy
from metric.knn import knn_scores, neighbours
from model.backbone import extract_features
from optimizer.sgd import learning_rate
from utils import get_device, random_from, write_aside


def evaluate(args):
    """Evaluate the backbone of --ckpt_name. Returns the result as written to <run>/evaluate_linear.json.

    Without --ckpt_name it lists the checkpoints there are and raises UserError. Raises UserError where `train` or `val`
    has no labels.
    """
    if not args.ckpt_name:
        known = list_checkpoints(args)
        say('\n'.join(known) if known else f'no checkpoint in {path_of(args.ckpt_path)} yet: run python3 cli.py train')
        raise UserError('evaluate wants --ckpt_name=<run>/<checkpoint>, one of those listed')
    args, model, checkpoint = get_model_ckpt(args)
    iterators = get_iterator(args)
    val = iterators['val']
    bank = in_order(args, labelled(iterators['train'].dataset))
    model = model.to(get_device(args), memory_format=torch.channels_last)
    result = evaluate_checkpoint(args, checkpoint['path'], model, bank, val)
    say(f'result     {checkpoint["path"].parent / "evaluate_linear.json"}')
    say(f'next       python3 cli.py infer --ckpt_name={args.ckpt_name}')
    return result


def evaluate_checkpoint(args, path, model, bank, val):
    """Linear probe and kNN of `model`, which is the checkpoint `path`'s; writes result and classifier beside it.

    bank, val: batches in order, of the labelled training images and of the images that are judged. Returns the result.
    """
    started = time.time()
    reason = why_no_labels(bank, val)
    if reason:
        raise UserError(f'evaluate needs labels: {reason}')
    classes, device = val.dataset.classes, get_device(args)
    num_classes = len(classes)
    train_features, train_labels = features_of(args, model.backbone, bank, 'features of train')
    val_features, val_labels = features_of(args, model.backbone, val, 'features of val')

    weight, bias = linear_probe(args, train_features, train_labels, num_classes)
    scores = val_features @ weight.T + bias
    counts = confusion(scores, val_labels).double()
    per_class = (100 * counts.diag() / counts.sum(1)).tolist()  # nan for a class without images in val
    epoch = int(path.name.rsplit('_', 1)[1])
    result = {
        'protocol': 'linear',
        'checkpoint': path.name,
        'epoch': epoch,
        'top1': topk_accuracy(scores, val_labels, 1),
        'top5': topk_accuracy(scores, val_labels, 5),
        'knn_top1': knn_top1(args, train_features, train_labels, val_features, val_labels, num_classes),
    }
    untrained = new_model(args).backbone.to(device, memory_format=torch.channels_last)
    result['knn_top1_untrained'] = knn_accuracy(args, untrained, bank, val)
    if args.knn_pixels:
        result['knn_top1_pixels'] = knn_accuracy(args, torch.nn.Flatten(), bank, val)
    result |= {
        'num_train': len(train_labels),
        'num_val': len(val_labels),
        'per_class': {name: value for name, value in zip(classes, per_class, strict=True) if not math.isnan(value)},
        'seconds': round(time.time() - started, 2),
    }
    classifier = {'weight': weight.cpu(), 'bias': bias.cpu(), 'classes': classes, 'checkpoint': path.name}
    write_aside(path.parent / f'classifier_epoch_{epoch}', lambda aside: torch.save(classifier, aside))
    text = json.dumps(result, indent=2) + '\n'
    write_aside(path.parent / 'evaluate_linear.json', lambda aside: aside.write_text(text))
    logger = Logger(path_of(args.log_path) / path.parent.name)
    logger.scalars(epoch, **{f'linear_{key}': result[key] for key in ('top1', 'top5', 'knn_top1')})
    logger.close()
    say(table(result))
    return result


def linear_probe(args, features, labels, num_classes):
    """A linear classifier on frozen features, by SGD with momentum and a cosine to zero.

    The features are extracted once, from unaugmented images, and standardised per dimension (each gets the same say,
    whatever the backbone's scale); the result has that folded in. features: N x d; labels: N. Returns (weight,
    num_classes x d; bias, num_classes) for the features as they are.
    """
    mean, scale = features.mean(0), features.std(0, correction=0).clamp(min=1e-6)
    x = (features - mean) / scale
    weight = torch.zeros(num_classes, x.shape[1], device=x.device, requires_grad=True)
    bias = torch.zeros(num_classes, device=x.device, requires_grad=True)
    optimizer = torch.optim.SGD([weight, bias], lr=0.0, momentum=0.9)
    size = min(args.probe_batch_size, len(x))
    top, steps = args.probe_learning_rate * size / 256, len(x) // size
    for epoch in tqdm(range(args.probe_epochs), desc='linear probe', unit='epochs', leave=False, disable=None):
        order = torch.randperm(len(x), generator=random_from(args.random_seed, 'probe', epoch)).to(x.device)
        for step in range(steps):
            rows = order[step * size : (step + 1) * size]
            rate = learning_rate((epoch + step / steps) / args.probe_epochs, 0, top)
            optimizer.param_groups[0]['lr'] = rate
            loss = cross_entropy(x[rows] @ weight.T + bias, labels[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    weight = weight.detach() / scale
    return weight, bias.detach() - weight @ mean


def features_of(args, backbone, batches, title=None, bf16=False):
    """(N x d float, N int64 labels) of `batches`, on the device.

    title: of the progress bar; without one, no bar. bf16: compute in bfloat16, exact enough to watch a run by.
    """

    shown = tqdm(batches, desc=title, unit='batches', leave=False, disable=None if title else True)
    views = (
        (vision.plain_view(images, args.image_size, args.crop_ratio), labels)
        for images, labels in prepared(args, shown)
    )
    with torch.autocast(get_device(args).type, torch.bfloat16, enabled=bf16):
        return extract_features(backbone, views)


def knn_accuracy(args, backbone, bank, val, bf16=False):
    """Top-1 in percent of kNN on the backbone's features: the neighbours are `bank`'s, `val` is judged."""
    train_features, train_labels = features_of(args, backbone, bank, bf16=bf16)
    val_features, val_labels = features_of(args, backbone, val, bf16=bf16)
    return knn_top1(args, train_features, train_labels, val_features, val_labels, len(val.dataset.classes))


def knn_top1(args, train_features, train_labels, val_features, val_labels, num_classes):
    k = neighbours(args.knn_k, train_labels)
    scores = knn_scores(val_features, train_features, train_labels, num_classes, k, args.knn_temperature)
    return topk_accuracy(scores, val_labels, 1)


def why_no_labels(bank, val):
    """Why accuracies cannot be measured on these batches, or None."""
    if not len(bank.dataset):
        return f'{bank.dataset.folder} has no class folders'
    if val is None:
        return f'{bank.dataset.folder.parent}/val is not there'
    if not (val.dataset.labels >= 0).any():
        return f'{val.dataset.folder} has no class folders'
    return None


def why_no_knn(args, bank, val):
    """Why training goes without the kNN monitor, or None."""
    return '--knn_every=0' if args.knn_every == 0 else why_no_labels(bank, val)


def table(result):
    """The result as people read it."""
    lines = [
        f'checkpoint {result["checkpoint"]}: {result["num_train"]} training and {result["num_val"]} validation images, '
        f'{duration(result["seconds"])}',
        f'linear     top-1 {result["top1"]:.2f} %   top-5 {result["top5"]:.2f} %',
        f'kNN        top-1 {result["knn_top1"]:.2f} %   untrained backbone {result["knn_top1_untrained"]:.2f} %',
    ]
    if 'knn_top1_pixels' in result:
        lines[-1] += f'   raw pixels {result["knn_top1_pixels"]:.2f} %'
    worst = sorted(result['per_class'].items(), key=lambda item: item[1])
    named = ', '.join(f'{name} {value:.1f}' for name, value in worst[:10])
    lines.append(f'per class  {named}' + (f' ... {worst[-1][0]} {worst[-1][1]:.1f}' if len(worst) > 10 else ''))
    return '\n'.join(lines)
