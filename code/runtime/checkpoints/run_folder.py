"""The checkpoints in a run folder: names, order, which the run wrote."""

import contextlib
import json
import re
import shlex

from runtime.atomic_write import atomic_write_on_main
from runtime.checkpoints.best_epoch import SIMILARITY, find_best_epoch, is_judged_by_labels
from runtime.errors import UserError, resolve_path, same_path
from runtime.files import newest_run, read_json, read_metrics
from runtime.messages import log, warn

CHECKPOINT_RE = re.compile(r'loss_(-?\d+\.\d{4})_epoch_(\d+)(?:_(?:images|step)_(\d+))?')
WRITTEN = 'checkpoints.json'  # file in a run folder: names of the checkpoints that the run wrote, in order


def record_checkpoint(run, path):
    """Add a checkpoint to the run's list of written checkpoints."""
    before = [name for name in read_json(run / WRITTEN).get('written', []) if (run / name).is_file()]
    names = [*(name for name in before if name != path.name), path.name]
    atomic_write_on_main(run / WRITTEN, lambda aside: aside.write_text(json.dumps({'written': names}) + '\n'))


def was_written_by_run(folder, path):
    """Whether the run of a folder wrote this checkpoint: others, copied there, are neither deleted nor continued in
    that folder. Runs of early versions have no list and count as the writer of all."""
    if not (folder / 'run.json').is_file() and not re.fullmatch(r'model_name_.+_ckpt_\d+', folder.name):
        return False
    written = read_json(folder / WRITTEN).get('written')
    return written is None or path.name in written


def checkpoints(folder):
    """List the checkpoints of a run folder, sorted by epoch, position and order of writing: the newest is last. The
    order of writing is that of checkpoints.json, which copying preserves, else of the mtimes.
    """
    entries, written = [], read_json(folder / WRITTEN).get('written', [])
    for path in folder.iterdir():
        if match := CHECKPOINT_RE.fullmatch(path.name):
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile by its run
                later = written.index(path.name) if path.name in written else -1
                entries.append((int(match[2]), int(match[3] or 0), later, path.stat().st_mtime, path))
    return [path for *_, path in sorted(entries)]


def checkpoint_name(loss, epoch, images):
    """Return the file name of a checkpoint after `epoch` epochs and `images` images of the next."""
    return f'loss_{loss:.4f}_epoch_{epoch}' + (f'_images_{images}' if images else '')


def finished_epoch(path):
    """Return the number of finished epochs of a checkpoint after an epoch, None for one within an epoch."""
    found = CHECKPOINT_RE.fullmatch(path.name)
    return None if found[3] else int(found[2])


def best_checkpoint(folder, paths):
    """Return the best checkpoint of a measured run from pretrained weights (find_best_epoch), else the newest. paths:
    the run's checkpoints."""
    by_epoch = {finished_epoch(path): path for path in paths if finished_epoch(path) is not None}
    return by_epoch.get(find_best_epoch(folder), paths[-1])


def name_run(args, folder):
    """Return the name of a run for --ckpt_name: its name if it is in --ckpt_path, else its path."""
    return folder.name if same_path(folder.parent, resolve_path(args.ckpt_path)) else str(folder)


def run_display_name(args, folder):
    """Return name_run, quoted for printed commands."""
    return shlex.quote(name_run(args, folder))


def pick_checkpoint(args, folder):
    """Return best_checkpoint of a run. Logs why it is not the newest; warns if that of the best epoch is missing."""
    paths = checkpoints(folder)
    best, picked = find_best_epoch(folder), best_checkpoint(folder, paths)
    if best is not None and finished_epoch(picked) != best:
        warn(f'{folder.name}: the checkpoint of its best epoch, {best}, is missing: the newest is used')
    if best is None or picked == paths[-1]:
        return picked
    lines = read_metrics(folder / 'metrics.jsonl')
    labeled = is_judged_by_labels(lines)
    reason = f'epoch {best} is its best {"on val" if labeled else "by similarity to the targets: no labels tell"}'
    if not best:
        why = 'neither labels nor a similarity to the targets tell whether training helped'
        if not any(line['epoch'] for line in lines):
            why = 'no later epoch was measured'
        elif labeled:
            why = 'no epoch was better on val by more than its standard error'
        elif any(SIMILARITY.gain in line for line in lines):
            why = 'no labels tell whether training helped, and the similarity to the targets did not rise'
        reason = f'epoch 0, the start, is used: {why}'
    log(f'{folder.name}: {reason}; --ckpt_name={run_display_name(args, folder)}/<checkpoint> selects another')
    return picked


def find_named(args, name):
    """Return the path of a run, checkpoint or file that an option names: under --ckpt_path, else as a path; None if
    there is neither."""
    places = (resolve_path(args.ckpt_path) / name, resolve_path(name))
    return next((path for path in places if path.exists()), None)


def list_checkpoints(args):
    """List all checkpoints under --ckpt_path as values for --ckpt_name, sorted by run, with the newest run last."""
    root = resolve_path(args.ckpt_path)
    runs = sorted(entry for entry in root.iterdir() if entry.is_dir()) if root.is_dir() else []
    by_run = {run: paths for run in runs if (paths := checkpoints(run))}
    newest = newest_run(by_run)
    ordered = sorted(by_run, key=lambda run: run == newest)
    return [f'{run.name}/{path.name}' for run in ordered for path in by_run[run]]


def find_checkpoint(args, training=False):
    """Return the file of --ckpt_name: relative to --ckpt_path, or a path. For a run folder it is the newest checkpoint,
    or, unless `training`, the best one of a run from pretrained weights (find_best_epoch). Raises UserError."""
    if path := find_named(args, args.ckpt_name):
        path = path.resolve()  # results are written beside the checkpoint, not beside a link to it
        if path.is_file():
            return path
        if paths := checkpoints(path):
            return paths[-1] if training else pick_checkpoint(args, path)
        if (path / 'config.json').is_file():
            return path
        files = sorted(file.name for file in path.iterdir() if file.suffix in ('.bin', '.safetensors', '.pth', '.pt'))
        if any('-of-' in name for name in files):
            raise UserError(f'{path} holds weights in several files: merge their tensors into one file, and name it')
        if files:
            raise UserError(f'{path} is not a run; name the file: --ckpt_name={path / files[0]}')
        raise UserError(f'the run {path} holds no checkpoint yet (they are named loss_<loss>_epoch_<n>)')
    names = list_checkpoints(args)
    option = next((name for name in ('resume', 'init_from') if getattr(args, name) == args.ckpt_name), 'ckpt_name')
    option = 'beside' if args.ckpt_name in args.beside.split(',') else option
    hint = f'the newest there is --{option}={names[-1]}' if names else 'there is none yet: run python3 cli.py train'
    if '/' in args.ckpt_name or '.' in args.ckpt_name:
        hint = f'nor a file {resolve_path(args.ckpt_name)}; {hint}'
    if option == 'beside':
        hint += '; --beside has untrained, start, imagenet, timm/<name>, runs and files'
    raise UserError(f'no checkpoint {args.ckpt_name} in {resolve_path(args.ckpt_path)}; {hint}')
