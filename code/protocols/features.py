"""Features of a frozen backbone, BN in eval mode: of the centre crops, or of one augmented pass."""

import torch

from dataloader import vision
from dataloader.load_dataset import prepared
from distributed import gather, rank, world
from logger import progress
from model.backbone import extract_features
from precision import autocast
from utils import channels_last, get_device, random_from


def features_of(args, backbone, batches, title):
    """(N x d float, N int64 labels) of the centre crops of `batches`, on the device. title: of the progress bar."""
    views = (
        (channels_last(vision.plain_view(images, args.image_size, args.crop_ratio)), labels)
        for images, labels in prepared(args, progress(batches, title))
    )
    if not len(batches):  # this process's share, where there are more processes than images
        device, side = get_device(args), args.image_size
        views = [(torch.zeros(0, 3, side, side, device=device), torch.zeros(0, dtype=torch.int64, device=device))]
    with autocast(args):
        features, labels = extract_features(backbone, views)
    count = len(batches.dataset)
    return gather(features, count), gather(labels, count)


def labelled_crops(args, batches, epoch):
    """One epoch of load_dataset.shuffled_crops: pairs of normalised views, N x 3 x S x S, and labels, on the device."""
    batches.batch_sampler.start_epoch(epoch, 'crop')
    for step, (images, labels) in enumerate(prepared(args, batches)):
        generator = random_from(args.random_seed, 'crops', epoch, step)
        (view,) = batches.dataset.random_views(images, 'crop', generator, (rank(), world()))
        yield channels_last(view), labels


def augmented_features(args, backbone, batches, epoch):
    """One epoch of labelled_crops as pairs of features, N x d float, and labels. The backbone is in eval mode."""
    for view, labels in labelled_crops(args, batches, epoch):
        with torch.no_grad(), autocast(args):
            features = backbone(view)
        yield gather(features.float()), gather(labels)
