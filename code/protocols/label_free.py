"""What a network is worth, told without a label, by metric/representation.py: the monitor of training, and a protocol.

The same images with the same views for every network, so that runs on one set can be compared: some of train, evenly
spaced, with MoCo's distortion, whatever the network was trained with.
"""

import copy
import functools
from dataclasses import replace

import torch

from ckpt import new_model
from dataloader import vision
from dataloader.augment.recipes import get_augmentation
from dataloader.load_dataset import batches, in_order, select
from dataloader.loading.sampler import Keys
from errors import UserError
from metric import representation as measures
from metric.accuracy import topk_accuracy
from metric.feature_std import spread
from protocols.collapse_verdict import OF_FEATURES, verdict
from protocols.features import features_of, filled, judged, numbers
from protocols.protocol import KNN_OPTIONS, Outcome, Protocol
from protocols.transfer import logistic_regression
from runtime.console import shown
from runtime.device import get_device, memory_for
from runtime.distributed import gather, rank, world
from runtime.messages import progress, say
from runtime.precision import autocast
from runtime.seeding import random_from
from runtime.tensors import channels_last, evenly_spaced
from utils import prepared

LEAST = 20  # images of a set for which there is anything to say
FOUND_AMONG = 1000  # images of the retrieval: chance and difficulty depend on how many
MANY_VIEWS = 100, 10  # images, and views of each (LiDAR, section 5)
SEED = 0  # of the views: the same in every run


def quick(args, model, images):
    """What training looks at: retrieval by features and by z, and the spectrum of plain views. {name: number}."""
    with memory_for('the measures without labels', 'try a smaller --batch_size'):
        features, z = of_views(args, model, spaced(images, FOUND_AMONG), 2)
        std = {'std_judged': spread(z[:, 0]).item()}  # of a network in eval mode: what the verdict's thresholds are of
        return {**of_pairs(features, z), **std, **of_plain(args, model, images)}


def of_pairs(features, z):
    """features: N x 2 x d, of two views of each image; z: N x 2 x D."""
    found = {}
    for name, pair in (('', features.unbind(1)), ('_z', z.unbind(1))):
        found[f'rank{name}'] = measures.mean_rank(*pair)
        found[f'retrieval{name}'] = measures.retrieval(*pair).item()
    return found


def of_plain(args, model, images):
    some = spaced(images, max(FOUND_AMONG, 2 * model.projector[0].in_features))
    x, _ = features_of(args, model.backbone, in_order(args, some), 'features of train')
    return {'rankme': measures.rankme(x), 'area': measures.cumulative_area(x), 'alpha': measures.alpha_req(x)}


def measured(args, model, images):
    """All measures, {name: number}: those of `quick`, of the sphere, LiDAR, and a probe that tells rotations apart."""
    with memory_for('the measures without labels', 'try a smaller --batch_size'):
        pairs, z = of_views(args, model, spaced(images, FOUND_AMONG), 2)
        with torch.no_grad(), judged(model.predictor):
            p = model.predictor(z[:, 0])
        many, many_z = of_views(args, model, spaced(images, MANY_VIEWS[0]), MANY_VIEWS[1])
        turned = turned_features(args, model.backbone, spaced(images, FOUND_AMONG))
        return {
            **of_pairs(pairs, z),
            **of_plain(args, model, images),
            'alignment': measures.alignment(*pairs.unbind(1)),
            'uniformity': measures.uniformity(pairs[:, 0]),
            'lidar': measures.lidar(many),
            'lidar_z': measures.lidar(many_z),
            'rotation': rotation_probe(turned),
            'std': spread(z[:, 0]).item(),
            'std_batch': spread(by_own_statistics(model.projector, pairs[:, 0])).item(),
            **measures.of_outputs(z[:, 0], p),
        }


def label_free(args, model, splits, checkpoint):
    """Every measure of the network, and of an untrained one beside it: checkpoint['untrained'], where that is known."""
    images = splits['train']
    now, before = measured(args, model, images), checkpoint.get('untrained')
    if before is None:
        untrained = new_model(args).to(get_device(args), memory_format=torch.channels_last)
        before = measured(args, untrained, images)
    if model.has_heads:
        result = {'measures': now, 'untrained': before, 'verdict': verdict(now, before)}
    else:
        say('the file has a backbone alone: there is no z to be measured, and no verdict')
        result = {'measures': of_features(now), 'untrained': of_features(before)}
    return Outcome({**result, 'num_train': len(images), 'num_val': 0})


@torch.no_grad()
def by_own_statistics(projector, features):
    """z, N x D, with BN as in training: by the statistics of these features, N x d, and not by its averages."""
    return copy.deepcopy(projector).train()(features)


def of_features(found):
    """Those of the measures that are not of z and p."""
    return {name: found[name] for name in OF_FEATURES}


def spaced(images, count):
    """Up to `count` of the images, evenly spaced."""
    return select(images, evenly_spaced(len(images), count))


@torch.no_grad()
def of_views(args, model, images, views):
    """Features, N x views x d, and z, N x views x D, of random views of each image; the network in eval mode. The views
    are the same wherever the images are held, and whoever distorts them."""
    args = replace(args, augmentation='moco', random_seed=SEED, augment_on='device')
    found = batches(args, replace(images, args=args, views=views, crops_only=True), shuffled=False)
    recipe = get_augmentation(args, 'moco')
    count = len(images)
    first = rank() * -(-count // world())  # whatever the batch, and however many processes share it

    def parts():
        done = first
        for pixels, _ in prepared(args, progress(found, 'two views')):
            draws = fixed_draws(count, views, recipe, pixels.shape[2:] if pixels.ndim == 4 else None)
            yield seen(vision.views_by(pixels, draws[:, done : done + len(pixels)].flatten(0, 1), recipe, views))
            done += len(pixels)
        side = torch.zeros(1, 3, args.image_size, args.image_size, device=get_device(args))
        yield tuple(x[:0] for x in seen([side] * views))  # there may be more processes than images

    def seen(pictures):
        with autocast(args):
            features = [model.backbone(channels_last(view)) for view in pictures]
            z = [model.projector(x) for x in features]
        return torch.stack(features, 1).float(), torch.stack(z, 1).float()

    with judged(model):
        features, z = filled(parts(), -(-count // world()))
    return gather(numbers(features), count), gather(z, count)


@functools.cache
def fixed_draws(count, views, augmentation, sides):
    """What is random in the views of each of `count` images: views x count x columns (vision.sample). sides: height and
    width of whole images, whose crops are drawn as the workers draw those of files (crops.random_crops)."""
    table = vision.sample(views * count, augmentation, random_from(SEED, 'fixed views')).view(views, count, -1)
    if sides:
        _, seeds = Keys(count, count, SEED, 'moco', shuffled=False, drop_last=False).drawn()
        for index, seed in enumerate(seeds.tolist()):
            crops = augmentation.crop.sample(views, *sides, torch.Generator().manual_seed(seed))
            table[:, index, : augmentation.crop.columns] = crops
    return table


@torch.no_grad()
def turned_features(args, backbone, images):
    """N x 4 x d: of the centre crops turned by 0, 90, 180 and 270 degrees."""
    found = []
    with judged(backbone):
        for pixels, _ in prepared(args, in_order(args, images)):
            views = vision.plain_view(pixels, args)
            with autocast(args):
                turned = [backbone(channels_last(views.rot90(quarter, (2, 3)))) for quarter in range(4)]
            found.append(torch.stack(turned, 1).float())
    return torch.cat(found)


def rotation_probe(turned):
    """Percent of turned images whose rotation a linear classifier names: trained on four of five images, judged on the
    fifth. turned: N x 4 x d. Reed et al., arXiv 2009.07724."""
    held = torch.arange(len(turned), device=turned.device) % 5 == 0
    x, y = (turned[part].flatten(0, 1) for part in (~held, held))
    mean, deviation = x.mean(0), x.std(0).clamp(min=1e-6)
    rotations = torch.arange(4, device=x.device)
    weight, bias = logistic_regression((x - mean) / deviation, rotations.repeat(len(x) // 4), 4, 1.0)
    scores = ((y - mean) / deviation) @ weight.T + bias
    return topk_accuracy(scores, rotations.repeat(len(y) // 4), 1)


def enough_images(args, own):
    """{'train'} of the checkpoint's own set. Raises UserError where it is too small."""
    if len(own['train']) < LEAST:
        raise UserError(
            f'--protocol=label_free compares images with one another: {shown(own["train"].folder)} has '
            f'{len(own["train"])}, and it wants {LEAST}'
        )
    return {'train': own['train']}


PROTOCOL = Protocol(label_free, enough_images, numbers={}, smaller='--batch_size', unused=KNN_OPTIONS)
