"""Run folders: <ckpt_path>/model_name_<model_name>_ckpt_<number>. They hold the checkpoints of a run (ckpt.py),
run.json, log.txt and results."""

import contextlib
import json
import math
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from ckpt import save_checkpoint
from config import (
    ARCHITECTURE,
    EVAL_COMMANDS,
    INIT_FROM_DEFAULTS,
    NOT_RESTORED_OPTIONS,
    OPTIONS,
    PIXEL_OPTIONS,
    PREPROCESSING,
    RESUMED_OPTIONS,
)
from runtime.atomic_write import atomic_write_on_main
from runtime.checkpoints.best_epoch import START_FILE, find_best_epoch, find_best_epoch_in_metrics
from runtime.checkpoints.format import BEFORE, upgrade
from runtime.checkpoints.pretrained import starts_from_foreign_weights
from runtime.checkpoints.read_file import read_checkpoint, verify_crc
from runtime.checkpoints.run_folder import (
    CHECKPOINT_RE,
    WRITTEN,
    checkpoint_name,
    checkpoints,
    find_named,
    finished_epoch,
    record_checkpoint,
    was_written_by_run,
)
from runtime.checkpoints.saved_options import set_init_from_defaults
from runtime.console import printable
from runtime.distributed import broadcast_from_rank0, rank
from runtime.errors import UserError, WorkError, resolve_path
from runtime.files import atomic_write, clear_parts, newest_run, read_json, read_metrics, utc_timestamp
from runtime.messages import log, warn
from runtime.options import UNRESOLVED, parse, preset_options, rename_options, replace_args, same_value
from runtime.run_lock import LOCK_FILE, lock_content, running_pid
from runtime.signals import defer_signals
from runtime.versions import library_versions

# Values that a new run resolves by its images and network; the resolved ones are saved.
AUTOMATIC = {'heads_epochs': -1, 'distill_size': 0}


class NonFiniteLoss(WorkError):
    """The loss, or a weight, is nan or infinite. No checkpoint is saved."""


class RunDir:
    """The folder of a run in training. path, position, saved_at: the last checkpoint, its (epoch, images), and when it
    was written. resumed: whether the run started from a checkpoint. deadline: when --max_minutes end, 0 for none; times
    are those of time.monotonic(). oom_hint: what to suggest if a step runs out of memory."""

    def __init__(self, args, folder, path=None, position=(0, 0)):
        self.args, self.folder, self.path, self.position = args, folder, path, position
        self.resumed = path is not None
        self.saved_at, self.deadline, self.oom_hint = time.monotonic(), 0.0, 'try a smaller --batch_size'

    def lock(self):
        """Write the lock file of this process. Raises UserError if another process trains this run."""
        ensure_not_running(self.folder)
        if not rank():
            clear_parts(self.folder)
            text = json.dumps(lock_content())
            atomic_write_on_main(self.folder / LOCK_FILE, lambda aside: aside.write_text(text))

    def remove_if_empty(self):
        """Delete the folder if it has no checkpoint."""
        if not rank() and not self.path:
            shutil.rmtree(self.folder, ignore_errors=True)

    def unlock(self):
        """Remove the lock file."""
        if not rank():
            (self.folder / LOCK_FILE).unlink(missing_ok=True)

    def save(self, state, start=False):
        """Save a checkpoint, unless this state is saved already or nothing has been trained yet (start: save it
        anyway). Raises NonFiniteLoss, and OSError if it cannot be written; earlier checkpoints stay intact."""
        if state.position == self.position and not start:
            return
        self.check_finite(state, state.means()[0])
        self.check_weights(state)
        with defer_signals():
            self.path = save_checkpoint(self.folder, self.args, state)
            self.position, self.saved_at = state.position, time.monotonic()

    def prune(self):
        """In a run from pretrained weights, delete the checkpoints other than the start, the best, the last and those
        of --save_every_epochs."""
        if not self.args.init_from or rank():
            return
        best, paths = find_best_epoch(self.folder), checkpoints(self.folder)
        for path in [path for path in paths[:-1] if was_written_by_run(self.folder, path)]:
            epoch = finished_epoch(path)
            if epoch is None or epoch not in (0, best) and epoch % self.args.save_every_epochs:
                path.unlink(missing_ok=True)

    def should_save(self):
        """Whether --save_every_minutes have passed since the last checkpoint."""
        minutes = self.args.save_every_minutes
        return bool(minutes) and time.monotonic() - self.saved_at > 60 * minutes

    def check_finite(self, state, loss):
        """Raise NonFiniteLoss if `loss`, of the current epoch, is nan or infinite."""
        if not math.isfinite(loss):
            raise NonFiniteLoss(
                f'the loss is {loss} in epoch {state.epoch + (state.images > 0)}: try a lower --learning_rate (now '
                f'{self.args.learning_rate}); detected {self.describe_position(state)}; {self.describe_last_good()}'
            )

    def check_weights(self, state):
        """Raise NonFiniteLoss if a weight is nan or infinite: the last update can make it so after a finite loss."""
        weights = [weight.detach().isfinite().all() for weight in state.model.parameters()]
        if not torch.stack(weights).all():
            raise NonFiniteLoss(
                f'weights are nan or infinite {self.describe_position(state)}: try a lower --learning_rate (now '
                f'{self.args.learning_rate}); {self.describe_last_good()}'
            )

    def describe_last_good(self):
        """Name the last checkpoint for a message."""
        return f'the last good checkpoint is {self.path}' if self.path else 'there is no checkpoint yet'

    @staticmethod
    def describe_position(state):
        """Describe the position of a training in words."""
        if state.images:
            return f'in epoch {state.epoch + 1}, after {state.images} images'
        return f'after epoch {state.epoch}'


def list_run_dirs(args):
    """List the run folders of --model_name, sorted by number."""
    root, prefix = resolve_path(args.ckpt_path), f'model_name_{args.model_name}_ckpt_'
    by_number = {
        entry.name.removeprefix(prefix): entry
        for entry in (root.iterdir() if root.is_dir() else ())
        if entry.name.startswith(prefix)
    }
    return [by_number[number] for number in sorted((n for n in by_number if n.isdecimal()), key=int)]


def find_run(args, name):
    """Return the folder of a run, from its name under --ckpt_path or its path. Raises UserError if it does not
    exist."""
    path = find_named(args, name)
    if path and path.is_dir():
        return path
    newest = newest_run([path.parent for path in resolve_path(args.ckpt_path).glob('*/run.json')])
    raise UserError(
        f'there is no run {name} in {resolve_path(args.ckpt_path)}; '
        + (f'the newest is {newest.name}' if newest else 'there is none yet')
    )


def new_run(args):
    """Create the run folder with the next free number, and return its path. Numbers of existing logs are not reused:
    the new run would continue their curves.
    """
    root, logs = resolve_path(args.ckpt_path), resolve_path(args.log_path)
    root.mkdir(parents=True, exist_ok=True)
    number = max((int(run.name.rsplit('_', 1)[1]) for run in list_run_dirs(args)), default=-1) + 1
    while True:
        run = root / f'model_name_{args.model_name}_ckpt_{number}'
        number += 1
        with contextlib.suppress(FileExistsError):  # another run started at the same moment
            if not (logs / run.name).exists():
                run.mkdir()
                return run


def continue_run(args, checkpoint, state):
    """Return the RunDir that continues from `checkpoint`. If its run has a newer checkpoint, that run is left
    unchanged, and a new run starts from a copy of the checkpoint, its metrics and its TensorBoard log."""
    folder, path = checkpoint['run'], checkpoint['path']
    is_own = was_written_by_run(folder, path)
    # Its process may have saved a newer checkpoint meanwhile.
    if is_own and (args.resume == 'auto' or find_named(args, args.ckpt_name).is_dir()):
        ensure_not_running(folder)
    has_newer_checkpoint = checkpoints(folder)[-1:] not in ([], [path]) and CHECKPOINT_RE.fullmatch(path.name)
    if is_own and (not has_newer_checkpoint or state.epoch >= args.max_epochs):
        ensure_not_running(folder)  # before anything is written into it
        if not rank() and not (folder / 'run.json').is_file():  # a run of an early version
            record_checkpoint(folder, path)
        return RunDir(args, folder, path, state.position)
    copy = Path(broadcast_from_rank0(lambda: str(copy_run_up_to(args, checkpoint, is_own))))
    new = copy.parent
    if not is_own and checkpoint.get('start') and state.epoch and not rank():
        write_start(new, checkpoint)
    why = f'{folder.name} has newer checkpoints than {path.name} and stays unchanged'
    if not is_own:
        why = f'{printable(path)} is not in the folder of its run, which stays unchanged'
    log(f'{why}: this continues as the new run {new.name}')
    return RunDir(args, new, copy, state.position)


def copy_run_up_to(args, checkpoint, is_own):
    """Create a run folder with a copy of the checkpoint; with is_own also of the start checkpoint, the best one before
    it, run.json, the metrics and the TensorBoard log of its run. Returns the path of the copy, whose name is a
    checkpoint's if the file was renamed."""
    path, epoch = checkpoint['path'], checkpoint['epoch']
    new, folder = new_run(args), path.parent
    name = (
        path.name
        if CHECKPOINT_RE.fullmatch(path.name)
        else checkpoint_name(checkpoint['loss'], epoch, checkpoint['images'])
    )
    lines = [line for line in read_metrics(folder / 'metrics.jsonl') if line['epoch'] <= epoch]
    kept = {0, find_best_epoch_in_metrics(lines)} - {None}
    earlier = [one.name for one in checkpoints(folder) if one != path and finished_epoch(one) in kept]
    for file in (*(folder / one for one in (*earlier, 'metrics.jsonl', START_FILE, 'run.json') if is_own), path):
        target = new / (name if file == path else file.name)
        if file.is_file():
            if CHECKPOINT_RE.fullmatch(target.name):
                record_checkpoint(new, target)
            atomic_write(target, lambda aside, file=file: shutil.copyfile(file, aside))
    logs = resolve_path(args.log_path)
    if is_own and (logs / folder.name).is_dir():
        shutil.copytree(logs / folder.name, logs / new.name, dirs_exist_ok=True)
    return new / name


def write_start(run, checkpoint):
    """Write the initial weights that a checkpoint keeps as epoch 0 of a run, so that it cannot end below them.
    Projector and predictor are those of the checkpoint: its first ones are lost."""
    content = {name: value for name, value in checkpoint.items() if name not in ('layout', 'run', 'path')}
    backbone = {f'backbone.{name}': value for name, value in checkpoint['start'].items()}
    content |= {'model': {**checkpoint['model'], **backbone}, 'epoch': 0, 'images': 0, 'loss': 0.0}
    content |= {'sums': torch.zeros_like(content['sums']), 'last': (0.0, 0.0, 0.0)}
    path = run / checkpoint_name(0.0, 0, 0)
    record_checkpoint(run, path)
    atomic_write(path, lambda aside: torch.save(content, aside))


def ensure_not_running(folder):
    """Raise UserError if another process on this machine trains the run."""
    if not rank() and (who := running_pid(folder)):
        raise UserError(
            f'{folder.name} is being trained, by process {who}: wait for its end, or stop it '
            f'(kill {who}); if that process is another, delete {folder / LOCK_FILE}'
        )


def write_run_json(run, args, images):
    """Write run.json: the options, the command that started the run, versions, times, and the number and digest of the
    images. Warn if a resumed run was started with other images."""
    date, before = time.strftime('%Y-%m-%d %H:%M:%S'), read_json(run / 'run.json')
    record = {
        'args': asdict(args),
        'command': before.get('command', sys.argv),
        'versions': library_versions(),
        'started': before.get('started', date),
    }
    repeated = {} if before or not args.from_run else read_json(find_run(args, args.from_run) / 'run.json')
    chosen = (*before.get('explicit', ()), *repeated.get('explicit', ()), *args.explicit)
    record['explicit'] = sorted({*chosen} & {*OPTIONS} - {'from_run'})
    record['when'] = utc_timestamp()
    record['images'] = {'number': len(images), 'digest': images.digest()}
    if before:
        record |= {'resumed': date, 'resume_command': sys.argv}
        if not rank() and not (run / WRITTEN).is_file():  # a run of an early version: all checkpoints are its own
            for path in checkpoints(run):
                record_checkpoint(run, path)
    earlier = before.get('images')
    if isinstance(earlier, dict) and earlier != record['images']:
        warn(
            f'the {len(images)} training images of {printable(images.folder)} differ in names or classes from the '
            f'{earlier.get("number")} of {run.name}: it continues with the new ones'
        )
    if not rank():
        atomic_write_on_main(run / 'run.json', lambda aside: aside.write_text(json.dumps(record, indent=2) + '\n'))


def args_from_run(args):
    """Return args with the options of the run --from_run instead of the defaults; explicit options take precedence.

    Of a run from pretrained weights, network, preprocessing and config.INIT_FROM_DEFAULTS are fixed, because the
    weights would set them anew. With other weights than the run's, these bring their own preprocessing. AUTOMATIC
    values are resolved anew.
    """
    path = find_run(args, args.from_run) / 'run.json'
    try:
        saved = {**json.loads(path.read_text(encoding='utf-8'))['args']}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f'--from_run: {path} is not there or damaged') from None
    saved = {name: parse(name, value) for name, value in rename_options(saved).items() if name in OPTIONS}
    if 'preset' in args.explicit and args.preset != saved.get('preset', args.preset):
        raise UserError(
            f'--preset={args.preset} contradicts --from_run={args.from_run}, which has --preset={saved["preset"]}: '
            'leave one out'
        )
    of_call = {*NOT_RESTORED_OPTIONS} - {*RESUMED_OPTIONS} | args.explicit
    explicit = {name: getattr(args, name) for name in of_call}
    chosen = read_json(path).get('explicit')  # not in runs of early versions
    resolved = {name for name in AUTOMATIC if chosen is not None and name not in chosen and saved.get(name)}
    args = replace_args(args, **{**saved, **{name: AUTOMATIC[name] for name in resolved}, **explicit})
    if saved.get('init_from') and not args.init_from:
        args = reset_init_from_defaults(args, chosen or ())
    elif weights := saved.get('init_from'):
        preprocessing = PREPROCESSING if args.init_from == weights else ()
        args.fixed = args.fixed | {*ARCHITECTURE, *INIT_FROM_DEFAULTS, *preprocessing}
    return args


def reset_init_from_defaults(args, chosen):
    """Set what the weights of --from_run had set to the preset's values, for random weights. chosen: the options that
    were explicit in that run. Returns args."""
    preset = preset_options(args.preset)
    names = INIT_FROM_DEFAULTS.keys() - args.explicit - {*chosen}
    values = {name: preset.get(name, OPTIONS[name].default) for name in INIT_FROM_DEFAULTS if name in names}
    log('random weights: ' + ' '.join(f'--{name}={value}' for name, value in values.items()))
    return replace_args(args, **values)


def is_unresolved(args, name):
    """Whether a pixel option is a word (auto, weights, dataset) that is not resolved to numbers yet."""
    return getattr(args, name) in UNRESOLVED


def resolve_resume(args):
    """Set --ckpt_name to the run that --resume means. Returns new args. Raises the errors of find_run_to_resume."""
    found = args.resume if args.resume != 'auto' else broadcast_from_rank0(lambda: find_run_to_resume(args))
    return replace_args(args, ckpt_name=found) if found else args


def find_run_to_resume(args):
    """Find the run that --resume=auto means: the newest of this --model_name with the same options, finished or not.
    Returns its name, or that of its newest undamaged checkpoint; '' if a new run begins. Raises UserError if a newer
    run is unfinished and has other options.
    """
    now = set_init_from_defaults(args)[0] if starts_from_foreign_weights(args) else args
    # Set by the weights, not by the defaults; warmup_augmentation follows augmentation.
    weight_options = {*ARCHITECTURE, *PREPROCESSING, *INIT_FROM_DEFAULTS, 'warmup_augmentation'}
    resolved_later = (weight_options - args.settled if args.init_from else set()) | {*args.set_from_images}
    resolved_later |= {name for name in PIXEL_OPTIONS if is_unresolved(args, name)}
    resolved_later |= {name for name, value in AUTOMATIC.items() if getattr(now, name) == value}
    finished = None
    for run in reversed(list_run_dirs(args)):
        paths = checkpoints(run)
        if not paths:
            continue
        raw, path = read_newest(paths)
        content, _ = upgrade(raw)
        saved, unknown = content['args'], {*BEFORE} - {*rename_options(raw['args'])} - args.explicit
        # A run saves resolved values. They are compared if an earlier command gave them and this one leaves them out.
        left_out = {*read_json(run / 'run.json').get('explicit', ())} - args.explicit
        not_compared = resolved_later - left_out | unknown | {'on_unreadable'}  # skip: what the error advises
        differing = [
            f
            for f in OPTIONS.values()
            if f.name not in (*NOT_RESTORED_OPTIONS, *not_compared)
            and f.metadata['used_by'] != EVAL_COMMANDS
            and not same_value(f.name, saved[f.name], getattr(now, f.name))
        ]
        differences = ', '.join(f'{f.name}={saved[f.name]} (not {getattr(now, f.name)})' for f in differing)
        if differing and content['epoch'] >= saved['max_epochs']:
            finished = finished or (run.name, differences)
            continue
        if differing:
            raise UserError(
                f'--resume=auto: the unfinished run {run.name} has {differences}; --resume={run.name} resumes it, '
                'without --resume a new run starts'
            )
        if args.init_from and not saved['init_from']:
            warn(
                f'{run.name} began with random weights, because the pretrained ones could not be had then; a new run '
                f'tries again: --model_name=<another name>, or without --resume'
            )
        return run.name if path == paths[-1] else f'{run.name}/{path.name}'
    if finished:
        name, differences = finished
        log(
            f'--resume=auto: {name} is finished and has {differences}: a new run begins; --resume={name} '
            '--max_epochs=<more> continues that one'
        )
    return ''


def read_newest(paths):
    """Read the newest checkpoint of a run that is not damaged, as a power cut can leave it. Returns (content, path).
    Raises WorkError if all are damaged."""
    *earlier, newest = paths
    try:
        verify_crc(newest)
        return read_checkpoint(newest), newest
    except WorkError as error:
        if not earlier:
            raise
        warn(f'{error}: the one before it is resumed')
        return read_newest(earlier)
