"""Checkpoints: <ckpt_path>/<run>/loss_<loss>_epoch_<n>, where <run> is model_name_<model_name>_ckpt_<number>.

A checkpoint is a dict of tensors and plain values (torch.load with weights_only=True reads it):
    model, optimizer   state dicts
    args               every option of the run
    epoch              epochs finished
    loss               mean loss of the last of them
"""

import re
from dataclasses import asdict

import torch

from config import OPTIONS, Config, UserError, WorkError, parse, path_of
from model.simsiam import SimSiam
from utils import write_aside

NAME = re.compile(r'loss_(-?\d+\.\d{4})_epoch_(\d+)')
ARCHITECTURE = ('backbone', 'stem', 'proj_layers', 'proj_dim', 'pred_dim')
# What belongs to this call and this machine, and never comes from a checkpoint.
OF_THE_CALL = ('ckpt_name', 'ckpt_path', 'log_path', 'cache_path', 'output', 'device', 'num_workers', 'download',
               'evaluate_after', 'knn_pixels', 'max_minutes', 'amp', 'compile')  # fmt: skip


def get_model_ckpt(args):
    """(args, model, checkpoint) for `args`, the model on the CPU.

    Without --ckpt_name: args as they are, a new model whose weights --random_seed fixes, and None. With it: the
    checkpoint's options take the place of args' (but for what this call gave explicitly, and what belongs to this
    machine), and its weights those of the model; `checkpoint` is the dict above with its `path` added. Raises UserError
    where there is no such checkpoint or an option contradicts its architecture, WorkError where the file is damaged.
    """
    if not args.ckpt_name:
        return args, new_model(args), None
    path = find_checkpoint(args)
    checkpoint = read(path, 'model', 'optimizer', 'args', 'epoch', 'loss')
    saved = {name: parse(name, value) for name, value in checkpoint['args'].items() if name in OPTIONS}
    for name in (*ARCHITECTURE, 'preset'):
        if name in args.given and getattr(args, name) != saved.get(name):
            raise UserError(
                f'--{name}={getattr(args, name)} contradicts the checkpoint {path.parent.name}/{path.name}, '
                f'which has {name}={saved.get(name)}: leave the option out, or name another checkpoint'
            )
    kept = {name: getattr(args, name) for name in (*args.given, *OF_THE_CALL)}
    merged = Config(**{**saved, **kept})
    merged.given = args.given
    model = SimSiam(merged)
    try:
        model.load_state_dict(checkpoint['model'])
    except RuntimeError as error:
        reason = ' '.join(str(error).split()[:30])
        raise UserError(f'{path} holds the weights of another architecture than its options say: {reason}') from None
    return merged, model, {**checkpoint, 'path': path}


def new_model(args):
    """An untrained SimSiam; --random_seed fixes its weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.random_seed)
        return SimSiam(args)


def new_run(args):
    """Make the next free run folder and return its path."""
    root, prefix = path_of(args.ckpt_path), f'model_name_{args.model_name}_ckpt_'
    root.mkdir(parents=True, exist_ok=True)
    numbers = [entry.name.removeprefix(prefix) for entry in root.iterdir() if entry.name.startswith(prefix)]
    number = max((int(n) for n in numbers if n.isdecimal()), default=-1) + 1
    while True:
        try:
            (root / f'{prefix}{number}').mkdir()
            return root / f'{prefix}{number}'
        except FileExistsError:  # another run started at the same moment
            number += 1


def save_checkpoint(run, args, model, optimizer, epoch, loss):
    """Write the checkpoint of `epoch` finished epochs into the folder `run`, whole or not at all; return its path."""
    path = run / f'loss_{loss:.4f}_epoch_{epoch}'
    content = {
        'model': model.state_dict(),
        'optimizer': optimizer.state_dict(),
        'args': asdict(args),
        'epoch': epoch,
        'loss': loss,
    }
    write_aside(path, lambda aside: torch.save(content, aside))
    return path


def read(path, *keys):
    """These entries of a file that torch.save wrote, on the CPU. No file can run code. Raises WorkError."""
    try:
        content = torch.load(path, map_location='cpu', weights_only=True)
        return {key: content[key] for key in keys}
    except Exception:  # what the unpickler raises on damaged bytes has no common base
        raise WorkError(f'{path} is damaged or was not written by this project; take another checkpoint') from None


def checkpoints(folder):
    """The checkpoints of a run folder, the newest (highest epoch, then latest written) last."""
    found = [(int(match[2]), path.stat().st_mtime, path)
             for path in folder.iterdir() if (match := NAME.fullmatch(path.name))]  # fmt: skip
    return [path for *_, path in sorted(found)]


def list_checkpoints(args):
    """All checkpoints under --ckpt_path, as --ckpt_name wants them."""
    root = path_of(args.ckpt_path)
    runs = sorted(entry for entry in root.iterdir() if entry.is_dir()) if root.is_dir() else []
    return [f'{run.name}/{path.name}' for run in runs for path in checkpoints(run)]


def find_checkpoint(args):
    """The file that --ckpt_name means: below --ckpt_path, or a path; a run folder means its newest. Or UserError."""
    for path in (path_of(args.ckpt_path) / args.ckpt_name, path_of(args.ckpt_name)):
        if path.is_file():
            return path
        if path.is_dir():
            if found := checkpoints(path):
                return found[-1]
            raise UserError(f'the run {path} holds no checkpoint yet (they are named loss_<loss>_epoch_<n>)')
    known = list_checkpoints(args)
    hint = f'the newest there is --ckpt_name={known[-1]}' if known else 'there is none yet: run python3 cli.py train'
    raise UserError(f'no checkpoint {args.ckpt_name} in {path_of(args.ckpt_path)}; {hint}')
