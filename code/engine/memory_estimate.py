"""How much memory a training step takes, reckoned before the first one: the network runs on tensors without content."""

import torch
from torch.func import functional_call

from runtime import distributed

AUGMENT_MEMORY_FACTOR = (
    7  # times the views, that making them takes (counted by torch's allocator; fewer where that is compiled)
)


def estimate_step_bytes(model, images, views, size, dtype, channels=3):
    """Bytes that training steps need on `model`'s device: weights, gradients, momentum, the views of `images` images of
    size x size pixels, and what the forward pass keeps for the backward pass under autocast to dtype (None: float32).

    An estimate for a network that is not compiled: torch.compile keeps less. Buffers of cuDNN come on top.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # a second to import

    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # alive until the end, so that no other takes its number
        return tensor

    mode, (first, *_) = FakeTensorMode(), model.parameters()
    weights = {name: mode.from_tensor(value) for name, value in (*model.named_parameters(), *model.named_buffers())}
    with mode, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        shape = images, channels, size, size
        inputs = [
            torch.empty(shape, device=first.device).contiguous(memory_format=torch.channels_last) for _ in range(views)
        ]
        autocast = torch.autocast(first.device.type, dtype or torch.bfloat16, enabled=dtype is not None)
        with autocast, torch.compiler.set_stance('force_eager'):
            outputs = functional_call(model, weights, tuple(inputs))
        for value in (*weights.values(), *inputs):
            keep(value)
        del outputs
    held = sum(storage.nbytes() for storage in kept.values())
    return held + sum(2 * value.nbytes for value in model.parameters() if value.requires_grad)


def describe_step_memory(args, model, dtype, free):
    """(a line on what a training step takes, what to do where that turns out to be too much), in words.

    Where it is more than `free` bytes the line has the --grad_accum_steps that would fit. Buffers of cuDNN and what
    lies between the blocks are taken as a tenth. The views of a batch are made before the step, all at once.
    """
    share = args.batch_size // distributed.world_size()
    adamw_second_moment_bytes = (
        sum(value.nbytes for value in model.parameters()) if args.optimizer == 'adamw' else 0
    )  # its other moment
    channels = args.num_channels
    two, four = (
        estimate_step_bytes(model, images, args.num_views, args.image_size, dtype, channels) for images in (2, 4)
    )
    each = (four - two) / 2  # of an image; all else is the network's
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
