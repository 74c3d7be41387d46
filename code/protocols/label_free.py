"""Label-free measures of a network (metric/representation.py): metrics during training, and a protocol.

They use evenly spaced images of train and fixed views with MoCo's augmentation, the same for every network, so that
runs on one dataset can be compared.
"""

import copy
import functools
from dataclasses import replace

import torch

from dataloader import vision
from dataloader.augment.augmentations import get_augmentation
from dataloader.load_dataset import eval_loader, make_loader, select
from dataloader.loading.sampler import EpochBatchSampler
from metric import representation as measures
from metric.accuracy import topk_accuracy
from metric.feature_std import feature_std
from metric.standardization import mean_and_std
from protocols.collapse_verdict import OF_FEATURES, judge_checkpoint, judge_collapse
from protocols.features import check_finite, concat_into_buffer, eval_mode, extract_features
from protocols.logistic import logistic_regression
from protocols.protocol import KNN_OPTIONS, Outcome, Protocol
from runtime.checkpoints.load_state import build_model
from runtime.console import printable
from runtime.device import explain_oom, get_device, move_network
from runtime.distributed import all_gather_rows, rank, rows_per_rank
from runtime.errors import UserError
from runtime.messages import log, progress
from runtime.precision import autocast
from runtime.seeding import generator_for
from runtime.tensors import channels_last, evenly_spaced
from utils import prefetch_to_device

MIN_IMAGES = 20  # with fewer images the measures mean nothing
RETRIEVAL_POOL = 1000  # images of the retrieval; chance and difficulty depend on this number
LIDAR_IMAGES_VIEWS = 100, 10  # images, and views of each (LiDAR, section 5)
SEED = 0  # of the fixed views


def monitor_metrics(args, model, images):
    """Compute the label-free metrics of training: view retrieval with features and z, and the spectrum of the features.
    Returns {name: number}."""
    with explain_oom('the label-free measures', 'try a smaller --batch_size'):
        features, z = view_features(args, model, evenly_spaced_subset(images, RETRIEVAL_POOL), 2)
        std = {'std_judged': feature_std(z[:, 0]).item()}  # in eval mode, as the thresholds of the verdict
        return {**pair_metrics(features, z), **std, **spectrum_metrics(args, model, images)}


def pair_metrics(features, z):
    """Compute the retrieval measures. features: N x 2 x d, of two views of each image; z: N x 2 x D."""
    values = {}
    for name, pair in (('', features.unbind(1)), ('_z', z.unbind(1))):
        values[f'rank{name}'] = measures.geometric_mean_rank(*pair)
        values[f'retrieval{name}'] = measures.view_retrieval_top1(*pair).item()
    return values


def spectrum_metrics(args, model, images):
    """Compute the measures of the spectrum of center-crop features: RankMe, area, alpha-ReQ."""
    some = evenly_spaced_subset(images, max(RETRIEVAL_POOL, 2 * model.projector[0].in_features))
    x, _ = extract_features(args, model.backbone, eval_loader(args, some), 'features of train')
    return {'rankme': measures.rankme(x), 'area': measures.cumulative_spectrum_auc(x), 'alpha': measures.alpha_req(x)}


def all_metrics(args, model, images):
    """Compute all measures: those of monitor_metrics, alignment and uniformity, LiDAR, rotation prediction. Returns
    {name: number}."""
    with explain_oom('the label-free measures', 'try a smaller --batch_size'):
        pairs, z = view_features(args, model, evenly_spaced_subset(images, RETRIEVAL_POOL), 2)
        with torch.no_grad(), eval_mode(model.predictor):
            p = model.predictor(z[:, 0])
        many, many_z = view_features(
            args, model, evenly_spaced_subset(images, LIDAR_IMAGES_VIEWS[0]), LIDAR_IMAGES_VIEWS[1]
        )
        rotated = rotated_features(args, model.backbone, evenly_spaced_subset(images, RETRIEVAL_POOL))
        return {
            **pair_metrics(pairs, z),
            **spectrum_metrics(args, model, images),
            'alignment': measures.alignment(*pairs.unbind(1)),
            'uniformity': measures.uniformity(pairs[:, 0]),
            'lidar': measures.lidar(many),
            'lidar_z': measures.lidar(many_z),
            'rotation': rotation_probe(rotated),
            'std': feature_std(z[:, 0]).item(),
            'std_batch': feature_std(projector_batch_stats(model.projector, pairs[:, 0])).item(),
            **measures.output_statistics(z[:, 0], p),
        }


def evaluate_label_free(args, model, splits, checkpoint):
    """Compute all measures of the network and of an untrained one. Returns an Outcome. checkpoint['untrained']:
    measures of the untrained network, if known."""
    images = splits['train']
    now, untrained_metrics = all_metrics(args, model, images), checkpoint.get('untrained')
    if untrained_metrics is None:
        untrained = move_network(args, build_model(args))
        untrained_metrics = all_metrics(args, untrained, images)
    if model.has_heads:
        result = {'measures': now, 'untrained': untrained_metrics}
        verdict = judge_collapse(now, untrained_metrics)
        if args.init_from and verdict[0] != 'collapsed':  # an untrained network says nothing of training from weights
            verdict = judge_checkpoint(checkpoint, args)
        result |= {'verdict': verdict} if verdict else {}
    else:
        log('the file has only a backbone: there is no z, and no verdict')
        result = {'measures': feature_metrics(now), 'untrained': feature_metrics(untrained_metrics)}
    return Outcome({**result, 'num_train': len(images), 'num_val': 0})


@torch.no_grad()
def projector_batch_stats(projector, features):
    """Return z, N x D, of features, N x d, with the batch statistics of BN instead of the running ones."""
    return copy.deepcopy(projector).train()(features)


def feature_metrics(values):
    """Return the measures that need features only, no z and p."""
    return {name: values[name] for name in OF_FEATURES}


def evenly_spaced_subset(images, count):
    """Return up to `count` evenly spaced images."""
    return select(images, evenly_spaced(len(images), count))


@torch.no_grad()
def view_features(args, model, images, views):
    """Compute features, N x views x d, and z, N x views x D, of fixed views of each image, in eval mode. The views do
    not depend on where images are stored or augmented."""
    args = replace(args, augmentation='moco', random_seed=SEED, augment_backend='device')
    loader = make_loader(args, replace(images, args=args, views=views, workers_only_crop=True), shuffled=False)
    transform = get_augmentation(args, 'moco')
    count = len(images)
    first = rank() * rows_per_rank(count)  # this rank's first image

    def parts():
        row = first
        for pixels, _ in prefetch_to_device(args, progress(loader, 'two views')):
            draws = fixed_view_params(count, views, transform, pixels.shape[2:] if pixels.ndim == 4 else None)
            yield encode_views(
                vision.apply_params(pixels, draws[:, row : row + len(pixels)].flatten(0, 1), transform, views)
            )
            row += len(pixels)
        side = torch.zeros(1, args.num_channels, args.image_size, args.image_size, device=get_device(args))
        yield tuple(x[:0] for x in encode_views([side] * views))  # there may be more ranks than images

    def encode_views(pictures):
        with autocast(args):
            features = [model.backbone(channels_last(view)) for view in pictures]
            z = [model.projector(x) for x in features]
        return torch.stack(features, 1).float(), torch.stack(z, 1).float()

    with eval_mode(model):
        features, z = concat_into_buffer(parts(), rows_per_rank(count))
    return all_gather_rows(check_finite(features), count), all_gather_rows(z, count)


@functools.cache
def fixed_view_params(count, views, augmentation, sides):
    """Sample the parameters of the fixed views of `count` images: views x count x columns (vision.sample). sides:
    (height, width) of whole images, whose crops are sampled as workers sample those of files (crops.random_crops)."""
    table = vision.sample(views * count, augmentation, generator_for(SEED, 'fixed views')).view(views, count, -1)
    if sides:
        sampler = EpochBatchSampler(count, count, SEED, 'moco', shuffled=False, drop_last=False)
        for index, seed in enumerate(sampler.seeds.tolist()):
            crops = augmentation.crop.sample(views, *sides, torch.Generator().manual_seed(seed))
            table[:, index, : augmentation.crop.columns] = crops
    return table


@torch.no_grad()
def rotated_features(args, backbone, images):
    """Compute features of the center crops rotated by 0, 90, 180 and 270 degrees, N x 4 x d."""
    features = []
    with eval_mode(backbone):
        for pixels, _ in prefetch_to_device(args, eval_loader(args, images)):
            views = vision.eval_view(pixels, args)
            with autocast(args):
                rotated = [backbone(channels_last(views.rot90(quarter, (2, 3)))) for quarter in range(4)]
            features.append(torch.stack(rotated, 1).float())
    return torch.cat(features)


def rotation_probe(rotated):
    """Return the accuracy, in percent, of a linear classifier that predicts the rotation, trained on four of five
    images and tested on the fifth. rotated: N x 4 x d. Reed et al., arXiv 2009.07724."""
    held_out = torch.arange(len(rotated), device=rotated.device) % 5 == 0
    x, y = (rotated[part].flatten(0, 1) for part in (~held_out, held_out))
    mean, std = mean_and_std(x)
    rotations = torch.arange(4, device=x.device)
    weight, bias = logistic_regression((x - mean) / std, rotations.repeat(len(x) // 4), 4, 1.0)
    scores = ((y - mean) / std) @ weight.T + bias
    return topk_accuracy(scores, rotations.repeat(len(y) // 4), 1)


def enough_images(args, own_splits):
    """Return {'train'} of the checkpoint's dataset. Raises UserError if it is too small."""
    if len(own_splits['train']) < MIN_IMAGES:
        raise UserError(
            f'--protocol=label_free compares images with one another: {printable(own_splits["train"].folder)} has '
            f'{len(own_splits["train"])}, and it needs {MIN_IMAGES}'
        )
    return {'train': own_splits['train']}


PROTOCOL = Protocol(evaluate_label_free, enough_images, numbers={}, smaller='--batch_size', unused=KNN_OPTIONS)
