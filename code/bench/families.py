"""Every family of timm's networks, by its smallest: its own layout read from a file, and a training step done with it.

    python3 bench/families.py --output=results/timm_families.json

Weights are random ones: what is tried is the reading (ckpt.get_model_ckpt with --backbone) and the step, at the size
that the network asks for, or LARGEST_SIDE.
"""

import json
import sys
import tempfile
from pathlib import Path

import fire
import timm
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ckpt import get_model_ckpt
from optimizer.sgd import make_sgd, set_learning_rates
from runtime.errors import resolve_path
from runtime.options import get_config
from train import train_step

TRIED = 12  # networks of a family whose size is looked at, of small names first
HINTS = ('atto', 'femto', 'pico', 'nano', 'xx', 'tiny', '_t', '18', '050', '_s', 'small', 'b0', '0')
LARGEST_SIDE = 384  # pixels, of networks that take several sizes
LARGEST = 400  # millions of parameters: a family without a smaller one is left out, and said


def smallest(module):
    """(name, millions of parameters) of a family's smallest network among those whose names sound small."""
    names = timm.list_models(module=module)
    hinted = sorted(names, key=lambda name: min([HINTS.index(hint) for hint in HINTS if hint in name], default=99))
    sizes = {}
    for name in hinted[:TRIED]:
        try:
            with torch.device('meta'):
                sizes[name] = sum(value.numel() for value in timm.create_model(name).parameters()) / 1e6
        except Exception:  # some do not build on this device
            continue
    if not sizes:
        return names[0], float('nan')
    name = min(sizes, key=sizes.get)
    return name, round(sizes[name], 1)


def load_and_step(name, folder):
    """'' where a file of the network is read and a step is done, else the error."""
    config = timm.get_pretrained_cfg(name) or timm.create_model(name).pretrained_cfg
    size = config.input_size[-1] if config.fixed_input_size else min(config.input_size[-1], LARGEST_SIDE)
    network = timm.create_model(name)
    torch.save(
        {'state_dict': {f'module.{key}': value for key, value in network.state_dict().items()}}, folder / 'file.pth'
    )
    small_heads = {'image_size': size, 'proj_layers': 1, 'proj_dim': 64, 'pred_dim': 16}
    args = get_config(
        preset='imagenet', backbone=f'timm/{name}', ckpt_name=str(folder / 'file.pth'), device='cpu', **small_heads
    )
    _, model, _ = get_model_ckpt(args)
    expected, ours = network.state_dict(), model.backbone.state_dict()
    if not all(torch.equal(value, expected[key]) for key, value in ours.items() if key in expected):
        return 'other weights than the file has'
    optimizer = make_sgd(model.train(), 0.9, 1e-4)
    set_learning_rates(optimizer, 0.01, 0.01, 0.01)
    loss, *_ = train_step(model, optimizer, [torch.randn(2, 3, size, size) for _ in range(2)])
    return '' if loss.isfinite() else f'the loss is {loss.item()}'


def main(output, modules=()):
    families, modules = {}, (modules,) if isinstance(modules, str) else modules  # Fire makes a tuple of a,b
    for module in [name for name in timm.list_modules() if name in modules or not modules]:
        if not timm.list_models(module=module):
            continue
        name, millions = smallest(module)
        if millions > LARGEST:
            families[module] = {'network': name, 'millions': millions, 'error': 'too large for this trial'}
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                error = load_and_step(name, Path(folder))
            except Exception as problem:
                error = (str(problem).strip() or type(problem).__name__).splitlines()[0][:200]
        families[module] = {'network': name, 'millions': millions, 'error': error}
        print(f'{module:28}{name:40}{millions:7.1f} M  {error or "read, and a step"}', flush=True)
        resolve_path(output).write_text(json.dumps(families, indent=1) + '\n')
    good = sum(not row['error'] for row in families.values())
    print(f'{good} of {len(families)} families')


if __name__ == '__main__':
    fire.Fire(main)
