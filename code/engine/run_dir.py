"""Run folders: <ckpt_path>/model_name_<model_name>_ckpt_<number>, with a run's checkpoints (ckpt.py), run.json, log.txt
and results."""

import contextlib
import json
import math
import shlex
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path

from ckpt import (
    ARCHITECTURE,
    CHECKPOINT_RE,
    OF_START,
    PREPROCESSING,
    WRITTEN,
    checkpoints,
    find_best_epoch,
    library_versions,
    read_checkpoint,
    record_checkpoint,
    save_checkpoint,
    was_written_by_run,
)
from config import EVAL_COMMANDS, GOING_ON, NOT_RESTORED_OPTIONS, OPTIONS
from runtime.atomic_write import atomic_write_on_main
from runtime.checkpoint_format import BEFORE, upgrade
from runtime.console import print_message, printable
from runtime.distributed import broadcast_from_rank0, rank
from runtime.errors import UserError, WorkError, resolve_path, same_path
from runtime.files import clear_parts, newest_run, read_json, utc_timestamp
from runtime.messages import log
from runtime.options import UNRESOLVED, parse, rename_options, replace_args, same_value
from runtime.run_lock import LOCK_FILE, lock_content, running_pid
from runtime.signals import defer_signals


class NonFiniteLoss(WorkError):
    """The loss is no longer a number: nothing of such a state is worth to be kept."""


class RunDir:
    """A run that trains: its folder, what of it is saved (the last checkpoint's path, where in the training it is, when
    it was written), whether it goes on from one (resolve_resume), when its time is up (deadline; 0: never), both by
    time.monotonic(), and what helps, in words, where a step takes more memory than there is."""

    def __init__(self, args, folder, path=None, position=(0, 0)):
        self.args, self.folder, self.path, self.position = args, folder, path, position
        self.resumed = path is not None
        self.saved_at, self.deadline, self.oom_hint = time.monotonic(), 0.0, 'try a smaller --batch_size'

    def begin(self):
        """Say in the folder that this process trains it. Raises UserError where another one does."""
        ensure_not_running(self.folder)
        if not rank():
            clear_parts(self.folder)
            text = json.dumps(lock_content())
            atomic_write_on_main(self.folder / LOCK_FILE, lambda aside: aside.write_text(text))

    def remove_if_empty(self):
        """Leave no folder of a run that has not begun."""
        if not rank() and not self.path:
            shutil.rmtree(self.folder, ignore_errors=True)

    def end(self):
        """Say no more that it trains."""
        if not rank():
            (self.folder / LOCK_FILE).unlink(missing_ok=True)

    def save(self, state, start=False):
        """Write a checkpoint, unless this very state is saved, or nothing is trained yet (start: that, too). Raises
        NonFiniteLoss, and OSError where it cannot be written: what was there is whole then."""
        if state.position == self.position and not start:
            return
        self.check_finite(state, state.means()[0])
        with defer_signals():
            self.path = save_checkpoint(self.folder, self.args, state)
            self.position, self.saved_at = state.position, time.monotonic()

    def prune(self):
        """Of a run that began with pretrained weights, delete the checkpoints that were kept to be measured alone: all
        that are neither the start, the best, the last nor those of --save_every_epochs."""
        if not self.args.init_from or rank():
            return
        best, found = find_best_epoch(self.folder), checkpoints(self.folder)
        for path in [path for path in found[:-1] if was_written_by_run(self.folder, path)]:
            epoch = int(CHECKPOINT_RE.fullmatch(path.name)[2])
            if epoch not in (0, best) and epoch % self.args.save_every_epochs:
                path.unlink(missing_ok=True)

    def should_save(self):
        """Whether --save_every_minutes have passed."""
        minutes = self.args.save_every_minutes
        return bool(minutes) and time.monotonic() - self.saved_at > 60 * minutes

    def check_finite(self, state, loss):
        """Raise NonFiniteLoss where `loss`, one of the epoch under way, is not a number."""
        if not math.isfinite(loss):
            raise NonFiniteLoss(
                f'the loss is {loss} in epoch {state.epoch + (state.images > 0)}: try a lower --learning_rate (now '
                f'{self.args.learning_rate}); noticed {self.where(state)}; the last good checkpoint is '
                f'{self.path or "none"}'
            )

    @staticmethod
    def where(state):
        """A position in words."""
        if state.images:
            return f'in epoch {state.epoch + 1}, after {state.images} images'
        return f'after epoch {state.epoch}'


def list_run_dirs(args):
    """The run folders of --model_name, in the order of their numbers."""
    root, prefix = resolve_path(args.ckpt_path), f'model_name_{args.model_name}_ckpt_'
    found = {
        entry.name.removeprefix(prefix): entry
        for entry in (root.iterdir() if root.is_dir() else ())
        if entry.name.startswith(prefix)
    }
    return [found[number] for number in sorted((n for n in found if n.isdecimal()), key=int)]


def find_run(args, name):
    """The folder of a run, by its name under --ckpt_path or by its path. Raises UserError."""
    for path in (resolve_path(args.ckpt_path) / name, resolve_path(name)):
        if path.is_dir():
            return path
    newest = newest_run([path.parent for path in resolve_path(args.ckpt_path).glob('*/run.json')])
    raise UserError(
        f'there is no run {name} in {resolve_path(args.ckpt_path)}; '
        + (f'the newest is {newest.name}' if newest else 'there is none yet')
    )


def run_display_name(args, folder):
    """What a printed command calls a run: its name under --ckpt_path, or its path where it lies elsewhere."""
    return folder.name if same_path(folder.parent, resolve_path(args.ckpt_path)) else shlex.quote(str(folder))


def new_run(args):
    """Make the next free run folder and return its path. A log of that name takes the number, too, that of a run which
    was deleted or lies elsewhere: its curves would be the new one's.
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
    """The RunDir that goes on from `checkpoint`. Where its own run has gone further, that stays as it is, and a new one
    begins with a copy of the checkpoint, of its metrics and of its TensorBoard log."""
    folder, path = checkpoint['run'], checkpoint['path']
    own = was_written_by_run(folder, path)
    has_newer_checkpoint = checkpoints(folder)[-1:] not in ([], [path]) and CHECKPOINT_RE.fullmatch(path.name)
    if own and (not has_newer_checkpoint or state.epoch >= args.max_epochs):
        ensure_not_running(folder)  # before anything is written into it
        if not rank() and not (folder / 'run.json').is_file():  # nothing says of the others whose they are
            record_checkpoint(folder, path)
        return RunDir(args, folder, path, state.position)
    new = Path(broadcast_from_rank0(lambda: str(copy_run_up_to(args, path, own))))
    why = f'{folder.name} has gone further than {path.name}, and stays as it is'
    if not own:
        why = f'{printable(path)} does not lie in the folder of its run, where nothing is touched'
    log(f'{why}: this goes on as the new run {new.name}')
    return RunDir(args, new, new / path.name, state.position)


def copy_run_up_to(args, path, own):
    """A new run folder with a copy of the checkpoint at `path`; of one in the folder of its own run also of the start,
    the metrics and the TensorBoard log."""
    new, folder = new_run(args), path.parent
    start = [other.name for other in checkpoints(folder) if other.name.endswith('_epoch_0') and other != path]
    for name in (path.name, *(*start, 'metrics.jsonl', OF_START) * own):
        if (folder / name).is_file():
            if CHECKPOINT_RE.fullmatch(name):
                record_checkpoint(new, new / name)
            shutil.copy2(folder / name, new)
    logs = resolve_path(args.log_path)
    if own and (logs / folder.name).is_dir():
        shutil.copytree(logs / folder.name, logs / new.name, dirs_exist_ok=True)
    return new


def ensure_not_running(folder):
    """Raise UserError where another process of this machine trains the run of a folder."""
    if not rank() and (who := running_pid(folder)):
        raise UserError(f'{folder.name} is being trained, by process {who}: wait for its end, or stop it (kill {who})')


def write_run_json(run, args, images):
    """Write run.json into the folder of a run: its options, the command, versions, the time, which images; of one that
    is gone on with the present ones, and when it first began. Warn where it began with other images."""
    date, before = time.strftime('%Y-%m-%d %H:%M:%S'), read_json(run / 'run.json')
    about = {
        'args': asdict(args),
        'command': sys.argv,
        'versions': library_versions(),
        'started': before.get('started', date),
    }
    about['when'] = utc_timestamp()
    about['images'] = {'number': len(images), 'digest': images.names.digest(images.labels.numpy().tobytes())}
    if before:
        about['resumed'] = date
        if not rank() and not (run / WRITTEN).is_file():  # of before this was kept: all that is there is the run's
            for path in checkpoints(run):
                record_checkpoint(run, path)
    earlier = before.get('images')
    if not rank() and isinstance(earlier, dict) and earlier != about['images']:
        print_message(
            'warning',
            f'{printable(images.folder)} has {len(images)} images to train on, with other names or classes than the '
            f'{earlier.get("number")} that {run.name} has seen: it goes on with them',
        )
    if not rank():
        atomic_write_on_main(run / 'run.json', lambda aside: aside.write_text(json.dumps(about, indent=2) + '\n'))


def args_from_run(args):
    """args with the options of --from_run in place of the defaults; what this call gave explicitly stays."""
    path = find_run(args, args.from_run) / 'run.json'
    try:
        saved = {**json.loads(path.read_text(encoding='utf-8'))['args']}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f'--from_run: {path} is not there or damaged') from None
    saved = {name: parse(name, value) for name, value in rename_options(saved).items() if name in OPTIONS}
    if 'preset' in args.given and args.preset != saved.get('preset', args.preset):
        raise UserError(
            f'--preset={args.preset}: the options of --from_run={args.from_run} are those of '
            f'--preset={saved["preset"]} and more: leave one out'
        )
    kept = {name: getattr(args, name) for name in (*args.given, *NOT_RESTORED_OPTIONS)}
    return replace_args(args, **{**saved, **kept})


def is_unresolved(args, name):
    """Whether an option of the pixels is a word that only the images, or the weights, turn into numbers."""
    return getattr(args, name) in UNRESOLVED


def resolve_resume(args):
    """args with the --ckpt_name that --resume means.

    auto: the newest run of this --model_name with args' options, if there is one: finished, only what comes after the
    training is left to do. Raises UserError where a newer one is unfinished and has other options.
    """
    if args.resume != 'auto':
        return replace_args(args, ckpt_name=args.resume)
    brought = {*ARCHITECTURE, *PREPROCESSING, *GOING_ON}  # by the weights, not by the defaults
    from_weights = (brought - args.given if args.init_from else set()) | {*args.chosen}
    from_weights |= {name for name in ('channels', 'white_level', 'mean', 'std') if is_unresolved(args, name)}
    from_weights |= {'heads_epochs'} if args.heads_epochs == -1 else set()  # a run's has become a number
    for run in reversed(list_run_dirs(args)):
        found = checkpoints(run)
        if not found:
            continue
        raw = read_checkpoint(found[-1])
        content, _ = upgrade(raw)
        saved, unsaid = content['args'], {*BEFORE} - {*rename_options(raw['args'])} - args.given
        other = [
            f
            for f in OPTIONS.values()
            if f.name not in (*NOT_RESTORED_OPTIONS, *from_weights, *unsaid)
            and f.metadata['used_by'] != EVAL_COMMANDS
            and not same_value(f.name, saved[f.name], getattr(args, f.name))
        ]
        if other and content['epoch'] >= saved['max_epochs']:
            continue  # that one is finished
        if other:
            said = ', '.join(f'{f.name}={saved[f.name]} (not {getattr(args, f.name)})' for f in other)
            raise UserError(
                f'--resume=auto: the unfinished run {run.name} has {said}; --resume={run.name} goes on '
                'with it, without --resume a new run starts'
            )
        return replace_args(args, ckpt_name=run.name)
    return args
