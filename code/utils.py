"""Moving batches to the device: `prepare_batch` and `prefetch_to_device`."""

import functools

import torch

from runtime.device import get_device
from runtime.tensors import to_device


def prepare_batch(args, batch):
    """Move a batch of load_dataset.get_iterator to the device. Returns (images, target).

    batch: (images, labels); images: N x 3 x H x W uint8, whole, or N x V x C x S x S, cropped. target: N, int64, class
    numbers, -1 for no label; SimSiam itself does not use it.
    """
    images, labels = batch
    device = get_device(args)
    return to_device(images, device), to_device(labels.to(torch.int64), device)


def prefetch_to_device(args, batches):
    """Yield prepare_batch of each batch; to a GPU the next batch is copied during the work on the current one."""
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
    """Return the CUDA stream for copies; only one, because torch caches memory per stream."""
    return torch.cuda.Stream(device)


def wait_for_copy(tensors, copied):
    """Let the current stream wait for the event `copied`, and return the tensors, which another stream has made."""
    stream = torch.cuda.current_stream(tensors[0].device)
    stream.wait_event(copied)
    for tensor in tensors:
        tensor.record_stream(stream)
    return tensors
