"""A batch on the device: `prepare_batch`, and `prefetch_to_device`, which copies the next one meanwhile."""

import functools

import torch

from runtime.device import get_device
from runtime.tensors import to_device


def prepare_batch(args, batch):
    """A batch of load_dataset.get_iterator on the device, and its target.

    batch: (images, labels). images: uint8, N x 3 x H x W whole or N x V x 3 x S x S cropped. Returns (images, target)
    with target N, int64: the class numbers, -1 where there is none. SimSiam itself needs no target: its loss compares
    two views.
    """
    images, labels = batch
    device = get_device(args)
    return to_device(images, device), to_device(labels.to(torch.int64), device)


def prefetch_to_device(args, batches):
    """utils.prepare_batch over `batches`; to a GPU the next batch is copied while this one is worked on."""
    if get_device(args).type != 'cuda':
        yield from (prepare_batch(args, batch) for batch in batches)
        return
    stream, ahead = copy_stream(get_device(args)), None
    for batch in batches:
        with torch.cuda.stream(stream):
            following = prepare_batch(args, batch), stream.record_event()
        if ahead:
            yield wait_for_copy(*ahead)
        ahead = following
    if ahead:
        yield wait_for_copy(*ahead)


@functools.cache
def copy_stream(device):
    """The stream on which batches come to a GPU: one, for torch keeps memory for each."""
    return torch.cuda.Stream(device)


def wait_for_copy(tensors, copied):
    """Tensors that another stream made, safe to use on this one: after the event `copied`, and not freed before."""
    stream = torch.cuda.current_stream(tensors[0].device)
    stream.wait_event(copied)
    for tensor in tensors:
        tensor.record_stream(stream)
    return tensors
