"""Conversion of checkpoints of earlier versions to the current format (train_state.TrainState.state_dict).

Format 4 has the mean distillation loss beside loss and std. Format 3 introduced three parameter groups in the
optimizer: backbone, projector, predictor. Format 2 had backbone and projector in one group, and introduced positions in
images. Format 1 (without a number in the file) had positions in steps, and the loss and std of each step; its first
files had no step, scaler, random states or versions.
"""

import torch

from config import OPTIONS, PRESETS
from runtime.errors import WorkError
from runtime.options import parse, preset_options, rename_options

# The behavior of runs from before these options existed.
BEFORE = {'channels': 'rgb', 'exif': 'ignore', 'npy_axes': 'auto', 'jitter': 'image'}
FORMAT = 4


DAMAGED = 'the checkpoint is damaged: its {} is missing or invalid; use another one'
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
    """Whether the content of a file is a checkpoint of this project, of any format."""
    keys = ('model', 'optimizer', 'args', 'epoch', 'loss')  # other training scripts write these too
    if not isinstance(content, dict) or any(key not in content for key in keys):
        return False
    return isinstance(content['args'], dict) and ('format' in content or 'proj_dim' in content['args'])


def upgrade(content):
    """Convert a checkpoint to the current format. Returns (content, names of options that the file does not have). The
    options are parsed, and missing ones get the value of the file's preset. Raises UserError for a value that is no
    longer valid, WorkError for a damaged checkpoint."""
    if not isinstance(content.get('format', 1), int):
        raise WorkError(DAMAGED.format('format'))
    if content.get('format', 1) > FORMAT:
        raise WorkError(f'the checkpoint is of format {content["format"]}, newer than {FORMAT}: update this code')
    if content.get('format', 1) == 1:
        content = upgrade_v1(content)
    validate(content)
    if content['format'] == 2:
        content = split_param_groups(content)
    if content['format'] < FORMAT:
        content = add_distill_loss(content)
    saved = rename_options(content['args'])
    options = {name: parse(name, value) for name, value in saved.items() if name in OPTIONS}
    preset = (
        {'preset': options['preset'], **(preset_options(options['preset']) if options['preset'] in PRESETS else {})}
        if 'preset' in options
        else {}
    )
    for name, value in BEFORE.items():
        options.setdefault(name, value)
    missing_options = {
        name: preset.get(name, option.default) for name, option in OPTIONS.items() if name not in options
    }
    return {**content, 'args': {**missing_options, **options}}, sorted(missing_options)


def validate(content):
    """Raise WorkError if a part of a checkpoint is missing or has the wrong type."""
    for name, kind in REQUIRED_TYPES.items():
        if name not in content or not isinstance(content[name], kind):
            raise WorkError(DAMAGED.format(name))
    sizes = {'epoch': content['epoch'] >= 0, 'images': content['images'] >= 0}
    means = 2 if content['format'] < 4 else 3
    sizes |= {'last': len(content['last']) == means, 'sums': content['sums'].numel() == means}
    sizes['model'] = all(isinstance(value, torch.Tensor) for value in content['model'].values())
    groups = content['optimizer'].get('param_groups')
    sizes['optimizer'] = isinstance(groups, list) and len(groups) in (2, 3) and 'state' in content['optimizer']
    for name, good in sizes.items():
        if not good:
            raise WorkError(DAMAGED.format(name))


def split_param_groups(content):
    """Convert format 2 to 3: move the projector's parameters, the last of the first group, into a group of their
    own."""
    first, last = content['optimizer']['param_groups']
    statistics = ('running_mean', 'running_var', 'num_batches_tracked')
    ours = [name for name in content['model'] if name.startswith('projector.') and not name.endswith(statistics)]
    cut = len(first['params']) - len(ours)
    groups = [{**first, 'params': first['params'][:cut]}, {**first, 'params': first['params'][cut:]}, last]
    return {**content, 'format': 3, 'optimizer': {**content['optimizer'], 'param_groups': groups}}


def add_distill_loss(content):
    """Convert format 3 to 4, whose `sums` and `last` have a third number."""
    return {
        **content,
        'format': 4,
        'sums': torch.cat((content['sums'], content['sums'].new_zeros(1))),
        'last': (*content['last'], 0.0),
    }


def upgrade_v1(content):
    """Convert format 1 to 2."""
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
