"""Estimate the memory of a training step before the first one, by a forward pass on fake tensors."""

import torch
from torch.func import functional_call

from runtime import distributed

AUGMENT_MEMORY_FACTOR = 7  # memory of the augmentation, in sizes of the views (measured; less if compiled)


def estimate_step_bytes(model, images, views, size, dtype, channels=3):
    """Estimate the bytes of a training step on `model`'s device: weights, gradients, momentum, the views of `images`
    images of size x size pixels, and the activations saved for the backward pass, under autocast to dtype (None:
    float32).

    For a network that is not compiled; torch.compile saves less. Buffers of cuDNN are not included.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # a second to import

    storages = {}

    def record(tensor):
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage  # a reference, so that its address is not reused
        return tensor

    mode, (first, *_) = FakeTensorMode(), model.parameters()
    weights = {name: mode.from_tensor(value) for name, value in (*model.named_parameters(), *model.named_buffers())}
    with mode, torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        shape = images, channels, size, size
        inputs = [
            torch.empty(shape, device=first.device).contiguous(memory_format=torch.channels_last) for _ in range(views)
        ]
        autocast = torch.autocast(first.device.type, dtype or torch.bfloat16, enabled=dtype is not None)
        with autocast, torch.compiler.set_stance('force_eager'):
            outputs = functional_call(model, weights, tuple(inputs))
        for value in (*weights.values(), *inputs):
            record(value)
        del outputs
    saved_bytes = sum(storage.nbytes() for storage in storages.values())
    return saved_bytes + sum(2 * value.nbytes for value in model.parameters() if value.requires_grad)


def describe_step_memory(args, model, dtype, free):
    """Describe the memory of a training step. Returns (line to log, hint for an out-of-memory error).

    If the step needs more than `free` bytes, the line names the --grad_accum_steps that would fit. 10 % are added for
    buffers of cuDNN. The views of a batch are made before the step, all at once.
    """
    share = args.batch_size // distributed.world_size()
    adamw_second_moment_bytes = sum(value.nbytes for value in model.parameters()) if args.optimizer == 'adamw' else 0
    channels = args.num_channels
    two, four = (
        estimate_step_bytes(model, images, args.num_views, args.image_size, dtype, channels) for images in (2, 4)
    )
    each = (four - two) / 2  # bytes per image; the rest is the network's
    views = 4 * channels * args.image_size**2 * share * (4 if args.loss_symmetry == '2x' else args.num_views)
    making = AUGMENT_MEMORY_FACTOR * views if args.augment_backend == 'device' else views
    augment_bytes = adamw_second_moment_bytes + two + making

    def bytes_for(parts):
        return max(
            augment_bytes,
            adamw_second_moment_bytes + 1.1 * (two + each * (share // parts - 2)) + views * (1 - 1 / parts),
        )

    steps = [parts for parts in range(args.grad_accum_steps + 1, share // 2 + 1) if share % parts == 0]
    line = f'a step takes about {gigabytes(bytes_for(args.grad_accum_steps))}, {gigabytes(free)} are free'
    if bytes_for(args.grad_accum_steps) < free:
        more = f', or --grad_accum_steps={steps[0]}' if steps else ''
        return line, f'try a smaller --batch_size{more}'
    for parts in steps:
        if bytes_for(parts) < 0.9 * free:
            helps = f'--grad_accum_steps={parts} takes {gigabytes(bytes_for(parts))}'
            return f'{line}: {helps}', helps
    smaller = '--batch_size: the views alone are too large' if making > free / 2 else '--image_size or --backbone'
    return f'{line}: try a smaller {smaller}', f'try a smaller {smaller}'


def gigabytes(count):
    return f'{count / 1e9:.1f} GB'
