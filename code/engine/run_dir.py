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
    NAME,
    OF_START,
    PREPROCESSING,
    WRITTEN,
    best_epoch,
    checkpoints,
    is_own,
    note_written,
    read,
    save_checkpoint,
    versions,
)
from config import EVALUATE, GOING_ON, OF_THE_CALL, OPTIONS
from errors import UserError, WorkError, path_of, same_path
from runtime.atomic_write import write_aside
from runtime.checkpoint_format import upgraded
from runtime.console import complain, shown
from runtime.distributed import rank, same_for_all
from runtime.files import clear_parts, newest_run, now, read_json
from runtime.messages import say
from runtime.options import changed, parse, same_value
from runtime.run_lock import MARK, mark_of_this_process, trained_by
from runtime.signals import deferred


class Diverged(WorkError):
    """The loss is no longer a number: nothing of such a state is worth to be kept."""


class Run:
    """A run that trains: its folder, what of it is saved (the last checkpoint's path, where in the training it is, when
    it was written), whether it goes on from one (resumed), when its time is up (deadline; 0: never), both by
    time.monotonic(), and what helps, in words, where a step takes more memory than there is."""

    def __init__(self, args, folder, path=None, position=(0, 0)):
        self.args, self.folder, self.path, self.position = args, folder, path, position
        self.resumed = path is not None
        self.saved_at, self.deadline, self.helps = time.monotonic(), 0.0, 'try a smaller --batch_size'

    def begin(self):
        """Say in the folder that this process trains it. Raises UserError where another one does."""
        refuse_if_trained(self.folder)
        if not rank():
            clear_parts(self.folder)
            text = json.dumps(mark_of_this_process())
            write_aside(self.folder / MARK, lambda aside: aside.write_text(text))

    def forget(self):
        """Leave no folder of a run that has not begun."""
        if not rank() and not self.path:
            shutil.rmtree(self.folder, ignore_errors=True)

    def end(self):
        """Say no more that it trains."""
        if not rank():
            (self.folder / MARK).unlink(missing_ok=True)

    def save(self, state, start=False):
        """Write a checkpoint, unless this very state is saved, or nothing is trained yet (start: that, too). Raises
        Diverged, and OSError where it cannot be written: what was there is whole then."""
        if state.position == self.position and not start:
            return
        self.check_finite(state, state.means()[0])
        with deferred():
            self.path = save_checkpoint(self.folder, self.args, state)
            self.position, self.saved_at = state.position, time.monotonic()

    def prune(self):
        """Of a run that began with pretrained weights, delete the checkpoints that were kept to be measured alone: all
        that are neither the start, the best, the last nor those of --save_every."""
        if not self.args.init_from or rank():
            return
        best, found = best_epoch(self.folder), checkpoints(self.folder)
        for path in [path for path in found[:-1] if is_own(self.folder, path)]:
            epoch = int(NAME.fullmatch(path.name)[2])
            if epoch not in (0, best) and epoch % self.args.save_every:
                path.unlink(missing_ok=True)

    def save_is_due(self):
        """Whether --save_minutes have passed."""
        minutes = self.args.save_minutes
        return bool(minutes) and time.monotonic() - self.saved_at > 60 * minutes

    def check_finite(self, state, loss):
        """Raise Diverged where `loss`, one of the epoch under way, is not a number."""
        if not math.isfinite(loss):
            raise Diverged(
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


def runs(args):
    """The run folders of --model_name, in the order of their numbers."""
    root, prefix = path_of(args.ckpt_path), f'model_name_{args.model_name}_ckpt_'
    found = {
        entry.name.removeprefix(prefix): entry
        for entry in (root.iterdir() if root.is_dir() else ())
        if entry.name.startswith(prefix)
    }
    return [found[number] for number in sorted((n for n in found if n.isdecimal()), key=int)]


def find_run(args, name):
    """The folder of a run, by its name under --ckpt_path or by its path. Raises UserError."""
    for path in (path_of(args.ckpt_path) / name, path_of(name)):
        if path.is_dir():
            return path
    newest = newest_run([path.parent for path in path_of(args.ckpt_path).glob('*/run.json')])
    raise UserError(
        f'there is no run {name} in {path_of(args.ckpt_path)}; '
        + (f'the newest is {newest.name}' if newest else 'there is none yet')
    )


def name_of_run(args, folder):
    """What a printed command calls a run: its name under --ckpt_path, or its path where it lies elsewhere."""
    return folder.name if same_path(folder.parent, path_of(args.ckpt_path)) else shlex.quote(str(folder))


def new_run(args):
    """Make the next free run folder and return its path. A log of that name takes the number, too, that of a run which
    was deleted or lies elsewhere: its curves would be the new one's.
    """
    root, logs = path_of(args.ckpt_path), path_of(args.log_path)
    root.mkdir(parents=True, exist_ok=True)
    number = max((int(run.name.rsplit('_', 1)[1]) for run in runs(args)), default=-1) + 1
    while True:
        run = root / f'model_name_{args.model_name}_ckpt_{number}'
        number += 1
        with contextlib.suppress(FileExistsError):  # another run started at the same moment
            if not (logs / run.name).exists():
                run.mkdir()
                return run


def gone_on_with(args, checkpoint, state):
    """The Run that goes on from `checkpoint`. Where its own run has gone further, that stays as it is, and a new one
    begins with a copy of the checkpoint, of its metrics and of its TensorBoard log."""
    folder, path = checkpoint['run'], checkpoint['path']
    own = is_own(folder, path)
    later = checkpoints(folder)[-1:] not in ([], [path]) and NAME.fullmatch(path.name)
    if own and (not later or state.epoch >= args.max_epochs):
        refuse_if_trained(folder)  # before anything is written into it
        if not rank() and not (folder / 'run.json').is_file():  # nothing says of the others whose they are
            note_written(folder, path)
        return Run(args, folder, path, state.position)
    new = Path(same_for_all(lambda: str(branch_of(args, path, own))))
    why = f'{folder.name} has gone further than {path.name}, and stays as it is'
    if not own:
        why = f'{shown(path)} does not lie in the folder of its run, where nothing is touched'
    say(f'{why}: this goes on as the new run {new.name}')
    return Run(args, new, new / path.name, state.position)


def branch_of(args, path, own):
    """A new run folder with a copy of the checkpoint at `path`; of one in the folder of its own run also of the start,
    the metrics and the TensorBoard log."""
    new, folder = new_run(args), path.parent
    start = [other.name for other in checkpoints(folder) if other.name.endswith('_epoch_0') and other != path]
    for name in (path.name, *(*start, 'metrics.jsonl', OF_START) * own):
        if (folder / name).is_file():
            if NAME.fullmatch(name):
                note_written(new, new / name)
            shutil.copy2(folder / name, new)
    logs = path_of(args.log_path)
    if own and (logs / folder.name).is_dir():
        shutil.copytree(logs / folder.name, logs / new.name, dirs_exist_ok=True)
    return new


def refuse_if_trained(folder):
    """Raise UserError where another process of this machine trains the run of a folder."""
    if not rank() and (who := trained_by(folder)):
        raise UserError(f'{folder.name} is being trained, by process {who}: wait for its end, or stop it (kill {who})')


def describe_run(run, args, images):
    """Write run.json into the folder of a run: its options, the command, versions, the time, which images; of one that
    is gone on with the present ones, and when it first began. Warn where it began with other images."""
    date, before = time.strftime('%Y-%m-%d %H:%M:%S'), read_json(run / 'run.json')
    about = {'args': asdict(args), 'command': sys.argv, 'versions': versions(), 'started': before.get('started', date)}
    about['when'] = now()
    about['images'] = {'number': len(images), 'digest': images.names.digest(images.labels.numpy().tobytes())}
    if before:
        about['resumed'] = date
        if not rank() and not (run / WRITTEN).is_file():  # of before this was kept: all that is there is the run's
            for path in checkpoints(run):
                note_written(run, path)
    earlier = before.get('images')
    if not rank() and isinstance(earlier, dict) and earlier != about['images']:
        complain(
            'warning',
            f'{shown(images.folder)} has {len(images)} images to train on, with other names or classes than the '
            f'{earlier.get("number")} that {run.name} has seen: it goes on with them',
        )
    if not rank():
        write_aside(run / 'run.json', lambda aside: aside.write_text(json.dumps(about, indent=2) + '\n'))


def of_run(args):
    """args with the options of --from_run in place of the defaults; what this call gave explicitly stays."""
    path = find_run(args, args.from_run) / 'run.json'
    try:
        saved = {**json.loads(path.read_text(encoding='utf-8'))['args']}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f'--from_run: {path} is not there or damaged') from None
    saved = {name: parse(name, value) for name, value in saved.items() if name in OPTIONS}
    if 'preset' in args.given and args.preset != saved.get('preset', args.preset):
        raise UserError(
            f'--preset={args.preset}: the options of --from_run={args.from_run} are those of '
            f'--preset={saved["preset"]} and more: leave one out'
        )
    kept = {name: getattr(args, name) for name in (*args.given, *OF_THE_CALL)}
    return changed(args, **{**saved, **kept})


def resumed(args):
    """args with the --ckpt_name that --resume means.

    auto: the newest run of this --model_name with args' options, if there is one: finished, only what comes after the
    training is left to do. Raises UserError where a newer one is unfinished and has other options.
    """
    if args.resume != 'auto':
        return changed(args, ckpt_name=args.resume)
    brought = {*ARCHITECTURE, *PREPROCESSING, *GOING_ON}  # by the weights, not by the defaults
    from_weights = (brought - args.given if args.init_from else set()) | {*args.chosen}
    from_weights |= {'heads_epochs'} if args.heads_epochs == -1 else set()  # a run's has become a number
    for run in reversed(runs(args)):
        found = checkpoints(run)
        if not found:
            continue
        content, _ = upgraded(read(found[-1]))
        saved = content['args']
        other = [
            f
            for f in OPTIONS.values()
            if f.name not in (*OF_THE_CALL, *from_weights)
            and f.metadata['used_by'] != EVALUATE
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
        return changed(args, ckpt_name=run.name)
    return args
