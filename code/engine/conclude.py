"""The end of a training: the checkpoint after a signal or an error, --evaluate_after, the summary."""

import time

from ckpt import get_model_ckpt
from dataloader.load_dataset import load_splits
from engine.run_dir import NonFiniteLoss
from protocols import collapse_verdict
from protocols.label_free import MIN_IMAGES
from protocols.protocol import missing_labels_reason
from protocols.run_protocol import run_protocol
from runtime import distributed, signals
from runtime.checkpoints.best_epoch import find_best_epoch
from runtime.checkpoints.run_folder import best_checkpoint, checkpoints, pick_checkpoint, run_display_name
from runtime.device import move_network
from runtime.errors import ROOT, resolve_path
from runtime.messages import log
from runtime.options import repeat_options, replace_args


def save_on_exit(run, state, end):
    """Save a checkpoint after the exception `end`, and raise it again. After the time limit (Interrupted with number 0)
    it returns."""
    signals.mark_handled()
    if isinstance(end, NonFiniteLoss):
        raise end
    command = resume_command(run)
    try:
        if isinstance(end, signals.Interrupted) and state.position != run.position:  # the same step in all processes
            state.all_reduce_sums()
        run.save(state)
    except Exception as error:  # saving failed as well, for example on a full disk
        raise (error if isinstance(end, signals.Interrupted) else end) from None
    if not isinstance(end, signals.Interrupted):
        if run.path:
            log(f'saved {run.describe_position(state)}; {command} resumes it')
        raise end
    if not end.number:
        log(f'--max_minutes={run.args.max_minutes:g} have passed: {command} resumes it {run.describe_position(state)}')
        return
    name = signals.signal_name(end.number)
    log(f'stopped by {name} {run.describe_position(state)}')
    if not run.path:
        raise signals.Interrupted(end.number, f'{name}: stopped before the first step, there is nothing to save')
    raise signals.Interrupted(end.number, f'{name}: saved {run.describe_position(state)}; {command} resumes it')


def resume_command(run):
    """Return the command that resumes a run."""
    return f'python3 cli.py train --resume={run_display_name(run.args, run.folder)}{repeat_options(run.args)}'


def evaluate_after(args, state, splits, run):
    """Run --evaluate_after. Returns the result of --protocol on the last checkpoint, or on the best one of a run that
    started from pretrained weights; None without the option or after --max_minutes."""
    if not args.evaluate_after:
        return None
    # All ranks take the same branch: their clocks started at different times.
    if distributed.broadcast_from_rank0(lambda: bool(run.deadline) and time.monotonic() > run.deadline):
        log(f'--max_minutes={args.max_minutes:g} have passed: --evaluate_after is skipped')
        return None
    try:
        if not args.init_from:
            checkpoint_info = {'path': run.path, 'run': run.folder, 'epoch': state.epoch}
            return run_protocol(args, state.model, splits, checkpoint_info)
        best = distributed.broadcast_from_rank0(lambda: str(pick_checkpoint(args, run.folder)))
        return evaluate_checkpoint(args, best, splits)
    except signals.Interrupted as end:
        name = signals.signal_name(end.number)
        text = f'{name}: the training is finished and saved; {resume_command(run)} evaluates it'
        raise signals.Interrupted(end.number, text) from None


def evaluate_checkpoint(args, path, splits=None):
    """Run --protocol on the checkpoint at `path`. splits: of its dataset, loaded if None. Returns the result."""
    saved_args, model, checkpoint = get_model_ckpt(replace_args(args, ckpt_name=str(path)))
    model = move_network(args, model)
    return run_protocol(saved_args, model, splits or load_splits(saved_args), checkpoint)


def format_summary(args, run, result, splits):
    """Format the summary of a run: its files, the verdict, the next command."""
    called, logs = run_display_name(args, run.folder), resolve_path(args.log_path) / run.folder.name
    name = f'{called}/{run.path.name if run.path else ""}'
    lines = ['', f'checkpoint   {run.path}', f'TensorBoard  tensorboard --logdir {logs}']
    lines.append(f'two views    {logs / "two_views.png"}')
    if find_best_epoch(run.folder) is not None and run.path:
        best = best_checkpoint(run.folder, checkpoints(run.folder))
        name = f'{called}/{best.name}'
        lines.append(f'best         {best}')
    if judged := collapse_verdict.judge_run(run.folder, run.position[0], args):
        lines.append('verdict      {}: {}'.format(*judged))
    if result:
        lines.append(f'result       {run.folder / result["file"]}')
    if not result and not missing_labels_reason(splits):
        lines.append(f'next         python3 cli.py evaluate --ckpt_name={name}{repeat_options(args)}')
    elif not result and len(splits['train']) >= MIN_IMAGES:
        label_free = '--protocol=label_free'
        lines.append(f'next         python3 cli.py evaluate --ckpt_name={name}{repeat_options(args)} {label_free}')
    elif not result:
        lines.append(f'next         python3 cli.py embed --ckpt_name={name}{repeat_options(args, command="embed")}')
    elif args.preset != 'demo':
        lines.append(f'next         python3 cli.py infer --ckpt_name={name}{repeat_options(args, command="infer")}')
    else:
        lines.append('next         your own images, laid out as FOLDER/train/<class>/ and FOLDER/val/<class>/:')
        lines.append(f'             cd {ROOT / "code"}')
        lines.append('             python3 cli.py train --image_path=FOLDER')
    return '\n'.join(lines)
