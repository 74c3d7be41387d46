"""Checkpoints of earlier commits, as the present one would have written them (train_state.TrainState.state_dict).

Format 3 has a group of parameters for each of backbone, projector and predictor in the optimizer; format 2 had backbone
and projector in one. Format 2 counts a position in images. Format 1 (no number in the file) counted it in steps, and
kept the loss and std of each of them; its first files had no step, scaler, random states or versions.
"""

import torch

from config import OPTIONS, PRESETS
from runtime.errors import WorkError
from runtime.options import parse, preset_options, rename_options

# What a run did before there were options for it.
BEFORE = {'channels': 'rgb', 'exif': 'ignore', 'npy_axes': 'auto', 'jitter': 'image'}
FORMAT = 3  # of `content`; runtime/checkpoint_format.py reads the earlier ones


DAMAGED = 'the checkpoint is damaged: its {} is missing, or is none; take another'
REQUIRED_TYPES = {
    'model': dict,
    'optimizer': dict,
    'epoch': int,
    'images': int,
    'loss': float,
    'last': (tuple, list),
    'sums': torch.Tensor,
    'rng': (dict, type(None)),
    'scaler': (dict, type(None)),
}


def is_ours(content):
    """Whether a file holds a run of ours, of any format."""
    keys = ('model', 'optimizer', 'args', 'epoch', 'loss')
    return isinstance(content, dict) and all(key in content for key in keys) and isinstance(content['args'], dict)


def upgrade(content):
    """(content in the present format, the options that the file does not say). The options are checked values, and what
    is missing among them is what the file's preset has. Raises UserError for a value that is no longer possible."""
    if not isinstance(content.get('format', 1), int):
        raise WorkError(DAMAGED.format('format'))
    if content.get('format', 1) > FORMAT:
        raise WorkError(f'the checkpoint is of format {content["format"]}, a later one than {FORMAT}: update this code')
    if content.get('format', 1) == 1:
        content = upgrade_v1(content)
    validate(content)
    if content['format'] == 2:
        content = split_param_groups(content)
    saved = rename_options(content['args'])
    said = {name: parse(name, value) for name, value in saved.items() if name in OPTIONS}
    preset = (
        {'preset': said['preset'], **(preset_options(said['preset']) if said['preset'] in PRESETS else {})}
        if 'preset' in said
        else {}
    )
    for name, value in BEFORE.items():
        said.setdefault(name, value)
    missing_options = {name: preset.get(name, option.default) for name, option in OPTIONS.items() if name not in said}
    return {**content, 'args': {**missing_options, **said}}, sorted(missing_options)


def validate(content):
    """Raise WorkError where a part of a checkpoint in the present format is missing, or is something else."""
    for name, kind in REQUIRED_TYPES.items():
        if name not in content or not isinstance(content[name], kind):
            raise WorkError(DAMAGED.format(name))
    sizes = {'epoch': content['epoch'] >= 0, 'images': content['images'] >= 0, 'last': len(content['last']) == 2}
    sizes['model'] = all(isinstance(value, torch.Tensor) for value in content['model'].values())
    groups = content['optimizer'].get('param_groups')
    sizes['optimizer'] = isinstance(groups, list) and len(groups) in (2, 3) and 'state' in content['optimizer']
    for name, good in sizes.items():
        if not good:
            raise WorkError(DAMAGED.format(name))


def split_param_groups(content):
    """Format 2 to 3. The projector has the last parameters of the first group, as many as its entries that are no
    running statistics."""
    first, last = content['optimizer']['param_groups']
    statistics = ('running_mean', 'running_var', 'num_batches_tracked')
    ours = [name for name in content['model'] if name.startswith('projector.') and not name.endswith(statistics)]
    cut = len(first['params']) - len(ours)
    groups = [{**first, 'params': first['params'][:cut]}, {**first, 'params': first['params'][cut:]}, last]
    return {**content, 'format': 3, 'optimizer': {**content['optimizer'], 'param_groups': groups}}


def upgrade_v1(content):
    """Format 1 to 2."""
    step, loss = content.get('step', 0), content['loss']
    losses, stds = content.get('seen') or (torch.zeros(0), torch.zeros(0))
    batch = content['args'].get('batch_size', OPTIONS['batch_size'].default)
    sums = torch.stack((losses.double().sum(), stds.double().sum())) * batch
    return {
        **{name: value for name, value in content.items() if name not in ('step', 'seen')},
        'format': 2,
        'scaler': content.get('scaler'),
        'images': step * batch,
        'sums': sums,
        'last': (0.0, 0.0) if step else (loss, float('nan')),
        'rng': content.get('rng'),
        'versions': content.get('versions', {}),
    }
