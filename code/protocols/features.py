"""Features of a frozen backbone in eval mode: of center crops, or of augmented views."""

import contextlib

import torch

from dataloader import vision
from dataloader.load_dataset import max_eval_batch
from runtime.device import get_device
from runtime.distributed import all_gather_rows, rows_per_rank, shard_range
from runtime.errors import WorkError
from runtime.messages import progress
from runtime.precision import autocast
from runtime.seeding import generator_for
from runtime.tensors import channels_last
from utils import prefetch_to_device


def extract_features(args, backbone, batches, title):
    """Compute the features of the center crops of a loader. Returns (N x d float, N int64 labels) on the device, of all
    ranks. title: of the progress bar. Raises WorkError if features are not finite."""
    count = len(batches.dataset)
    features, labels = concat_into_buffer(iter_features(args, backbone, batches, title), rows_per_rank(count))
    return all_gather_rows(check_finite(features), count), all_gather_rows(labels, count)


def check_finite(features):
    """Return the features. Raises WorkError if any is nan or infinite."""
    if not features.isfinite().all():
        raise WorkError('the backbone gives features that are nan or infinite: take another checkpoint')
    return features


def concat_into_buffer(pairs, count):
    """Concatenate pairs of tensors with `count` rows in all into two preallocated tensors: torch.cat would need twice
    the memory."""
    rows = 0
    for x, labels in pairs:
        if not rows:
            whole = x.new_empty(count, *x.shape[1:]), labels.new_empty(count, *labels.shape[1:])
        whole[0][rows : rows + len(x)], whole[1][rows : rows + len(x)] = x, labels
        rows += len(x)
    return whole[0][:rows], whole[1][:rows]


@contextlib.contextmanager
def eval_mode(module):
    """Context manager: the module in eval mode, then in its previous mode."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


@torch.no_grad()
def iter_features(args, backbone, batches, title):
    """Yield (features, n x d float, labels, n) of the center crops of this rank's part of a loader, in order. It yields
    at least one pair, perhaps without rows."""
    any_batch = False
    with eval_mode(backbone):
        for images, labels in prefetch_to_device(args, progress(batches, title)):
            views, any_batch = vision.eval_view(images, args), True
            for view, part in zip(views.split(max_eval_batch(args)), labels.split(max_eval_batch(args)), strict=True):
                with autocast(args):
                    features = backbone(channels_last(view))
                yield features.float(), part
        if not any_batch:  # more ranks than images
            side, device = args.image_size, get_device(args)
            empty = torch.zeros(1, args.num_channels, side, side, device=device)
            yield backbone(empty)[:0].float(), torch.zeros(0, device=device).long()


def augmented_batches(args, batches, epoch):
    """Yield one epoch of load_dataset.supervised_loader on the device: (normalized views, N x C x S x S, labels), this
    rank's part of each batch."""
    batches.batch_sampler.start_epoch(epoch, 'crop')
    whole = batches.batch_sampler.sizes()
    for step, (images, labels) in enumerate(prefetch_to_device(args, batches)):
        generator = generator_for(args.random_seed, 'crops', epoch, step)
        shard = shard_range(len(images), whole[step])
        (view,) = batches.dataset.make_views(images, 'crop', generator, shard)
        yield channels_last(view), labels


def augmented_features(args, backbone, batches, epoch):
    """Yield one epoch of augmented_batches as (features, N x d float, labels) of all ranks. The backbone must be in
    eval mode."""
    crops = augmented_batches(args, batches, epoch)
    for (view, labels), count in zip(crops, batches.batch_sampler.sizes(), strict=True):
        with torch.no_grad(), autocast(args):
            features = torch.cat([backbone(part) for part in view.split(max_eval_batch(args))])
        yield all_gather_rows(features.float(), count), all_gather_rows(labels, count)
