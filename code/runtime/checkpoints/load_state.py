"""Building a model and loading a state dict into it, strictly."""

import torch

from model.simsiam import SimSiam
from model.weights import adapt_channels, copy_weights
from runtime.console import join_first
from runtime.errors import UserError, WorkError
from runtime.messages import log

MAX_LISTED_KEYS = 8  # keys of each kind in an error message


def adapt_state_to_channels(model, state):
    """Adapt the first layer in `state`, for three channels, to the channels of the model, and log it. Returns the
    state."""
    valid = {name: value for name, value in state.items() if not unsupported_kind(value, value.is_floating_point())}
    adapted = {**state, **adapt_channels(model.state_dict(), valid)}
    if changed := [name for name, value in adapted.items() if value is not state[name]]:
        channels = adapted[changed[0]].shape[1]
        how = 'summed' if channels == 1 else f'repeated and multiplied by 3 / {channels}'
        log(f"{changed[0]} of 3 channels is adapted to {channels}: {how} (timm's rule)")
    return adapted


def load_state_strictly(model, state, path):
    """Load `state` into the model: all of its keys, or all of its backbone's. Raises UserError for missing, unexpected
    or differently shaped keys, WorkError for values that are no valid weights."""
    has_heads = any(not name.startswith('backbone.') for name in state)
    expected = {name: value for name, value in model.state_dict().items() if has_heads or name.startswith('backbone.')}
    sizes = [
        f'{name} is {tuple(state[name].shape)} in place of {tuple(value.shape)}'
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape
    ]
    kinds = {
        'missing': sorted(expected.keys() - state.keys()),
        'unexpected': sorted(state.keys() - expected.keys()),
        'size mismatch': sizes,
    }
    problems = [f'{kind}: {join_first(details, MAX_LISTED_KEYS)}' for kind, details in kinds.items() if details]
    for name, value in expected.items():
        if name in state and (kind := unsupported_kind(state[name], value.is_floating_point())):
            raise WorkError(f'{path}: {name} is {kind}, and a weight is plain floating-point numbers: convert it')
    # Some networks have buffers with infinite bounds from the start.
    if invalid := non_finite_names(state) - non_finite_names(expected):
        raise WorkError(
            f'{path} holds weights that are nan or infinite, such as {min(invalid)}: take another checkpoint'
        )
    if problems:
        raise UserError(f'{path} has weights that do not match its options; {"; ".join(problems)}')
    copy_weights(model, state)


def non_finite_names(state):
    """Return the names of the tensors that hold nan or infinite values."""
    return {name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()}


def unsupported_kind(value, real):
    """Return why a tensor is not a valid weight (quantized, sparse, ...), or None. real: whether floating point is
    required."""
    if value.is_quantized or value.is_complex() or value.layout != torch.strided or value.device.type == 'meta':
        kinds = ('quantized', value.is_quantized), ('complex', value.is_complex()), ('sparse', value.is_sparse)
        return next((kind for kind, holds in kinds if holds), 'without content')
    if real and (not value.is_floating_point() or value.itemsize == 1):
        return str(value.dtype).removeprefix('torch.')
    return None


def build_model(args):
    """Build a SimSiam with random weights from --random_seed. Raises UserError for an invalid backbone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.random_seed)
        try:
            return SimSiam(args)
        except ValueError as error:
            raise UserError(f'--backbone={args.backbone}: {error}') from None
