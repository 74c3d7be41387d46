"""Features of a frozen backbone, BN in eval mode: of the centre crops, or of one augmented pass."""

import contextlib

import torch

from dataloader import vision
from dataloader.load_dataset import at_most
from errors import WorkError
from runtime.device import get_device
from runtime.distributed import gather, place_of, world
from runtime.messages import progress
from runtime.precision import autocast
from runtime.seeding import random_from
from runtime.tensors import channels_last
from utils import prepared


def features_of(args, backbone, batches, title):
    """(N x d float, N int64 labels) of the centre crops of `batches`, on the device. title: of the progress bar."""
    count = len(batches.dataset)
    features, labels = filled(in_parts(args, backbone, batches, title), -(-count // world()))
    return gather(numbers(features), count), gather(labels, count)


def numbers(features):
    """The features, if all of them are numbers. Raises WorkError."""
    if not features.isfinite().all():
        raise WorkError('the backbone gives features that are no numbers (nan or infinite): take another checkpoint')
    return features


def filled(pairs, count):
    """`count` rows of pairs of tensors, in two tensors made at once: to join them at the end would take both twice."""
    rows = 0
    for x, labels in pairs:
        if not rows:
            whole = x.new_empty(count, *x.shape[1:]), labels.new_empty(count, *labels.shape[1:])
        whole[0][rows : rows + len(x)], whole[1][rows : rows + len(x)] = x, labels
        rows += len(x)
    return whole[0][:rows], whole[1][:rows]


@contextlib.contextmanager
def judged(module):
    """The module in eval mode, and as it was before afterwards."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


@torch.no_grad()
def in_parts(args, backbone, batches, title):
    """Pairs of features, n x d float, and labels, n, of the centre crops of this process's part of `batches`, in order.
    The backbone is in eval mode the while; at least one pair comes, perhaps without rows."""
    came = False
    with judged(backbone):
        for images, labels in prepared(args, progress(batches, title)):
            views, came = vision.plain_view(images, args), True
            for view, part in zip(views.split(at_most(args)), labels.split(at_most(args)), strict=True):
                with autocast(args):
                    features = backbone(channels_last(view))
                yield features.float(), part
        if not came:  # there are more processes than images
            side, device = args.image_size, get_device(args)
            none = torch.zeros(1, 3, side, side, device=device)
            yield backbone(none)[:0].float(), torch.zeros(0, device=device).long()


def labelled_crops(args, batches, epoch):
    """One epoch of load_dataset.shuffled_crops: pairs of normalised views, N x 3 x S x S, and labels, on the device;
    this process's part of each batch."""
    batches.batch_sampler.start_epoch(epoch, 'crop')
    whole = batches.batch_sampler.sizes()
    for step, (images, labels) in enumerate(prepared(args, batches)):
        generator = random_from(args.random_seed, 'crops', epoch, step)
        place = place_of(len(images), whole[step])
        (view,) = batches.dataset.random_views(images, 'crop', generator, place)
        yield channels_last(view), labels


def augmented_features(args, backbone, batches, epoch):
    """One epoch of labelled_crops as pairs of features, N x d float, and labels, of all processes. The backbone is in
    eval mode."""
    crops = labelled_crops(args, batches, epoch)
    for (view, labels), count in zip(crops, batches.batch_sampler.sizes(), strict=True):
        with torch.no_grad(), autocast(args):
            features = torch.cat([backbone(part) for part in view.split(at_most(args))])
        yield gather(features.float(), count), gather(labels, count)
