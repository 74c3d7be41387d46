"""How a training ends: what is saved after a signal or an error, the evaluation that follows, the last lines."""

import time

import torch

from ckpt import best_of_run, checkpoints, get_model_ckpt
from engine.run_dir import Diverged, name_of_run
from errors import ROOT, path_of
from protocols import collapse_verdict
from protocols.run_protocol import evaluate_model
from runtime import distributed, signals
from runtime.device import get_device
from runtime.messages import say
from runtime.options import changed, places


def save_on_exit(run, state, end):
    """Save what is done after `end`, an exception, stopped it, and raise what is to be heard of it; nothing where the
    time is up."""
    signals.heard()
    if isinstance(end, Diverged):
        raise end
    command = f'python3 cli.py train --resume={name_of_run(run.args, run.folder)}{places(run.args)}'
    try:
        if isinstance(end, signals.Stopped) and state.position != run.position:  # the same step in all processes
            state.agree()
        run.save(state)
    except Exception as error:  # the disk is full, too: that is heard where nothing else is
        raise (error if isinstance(end, signals.Stopped) else end) from None
    if not isinstance(end, signals.Stopped):
        if run.path:
            say(f'saved {run.where(state)}; {command} goes on')
        raise end
    if not end.number:
        say(f'--max_minutes={run.args.max_minutes:g} have passed: {command} goes on {run.where(state)}')
        return
    name = signals.name_of(end.number)
    say(f'stopped by {name} {run.where(state)}')
    if not run.path:
        raise signals.Stopped(end.number, f'{name}: stopped before the first step, there is nothing to save')
    raise signals.Stopped(end.number, f'{name}: saved {run.where(state)}; {command} goes on')


def evaluate_after(args, state, splits, run):
    """--evaluate_after: the result of --protocol for the last checkpoint; for the best one, beside the start, of a run
    that began with pretrained weights. None without the option, and where the time is up."""
    if not args.evaluate_after:
        return None
    if run.deadline and time.monotonic() > run.deadline:
        say(f'--max_minutes={args.max_minutes:g} have passed: --evaluate_after is left out')
        return None
    if not args.init_from:
        about = {'path': run.path, 'run': run.folder, 'epoch': state.epoch}
        return evaluate_model(args, state.model, splits, about)
    best = distributed.same_for_all(lambda: str(best_of_run(run.folder, checkpoints(run.folder))))
    own, model, checkpoint = get_model_ckpt(changed(args, ckpt_name=best))
    own = changed(own, protocol=args.protocol)
    model = model.to(get_device(args), memory_format=torch.channels_last)
    return evaluate_model(own, model, splits, checkpoint)


def summary(args, run, result, protocol):
    """The last lines of a run: what came out, where it is, what to do next. protocol: an option of evaluate, or ''."""
    called, logs = name_of_run(args, run.folder), path_of(args.log_path) / run.folder.name
    name = f'{called}/{run.path.name if run.path else ""}'
    lines = ['', f'checkpoint   {run.path}', f'TensorBoard  tensorboard --logdir {logs}']
    lines.append(f'two views    {logs / "two_views.png"}')
    if args.init_from and run.path:
        best = best_of_run(run.folder, checkpoints(run.folder))
        name = f'{called}/{best.name}'
        lines.append(f'best         {best}')
    if judged := collapse_verdict.of_run(run.folder, run.position[0], args):
        lines.append('verdict      {}: {}'.format(*judged))
    if result:
        lines.append(f'result       {run.folder / result["file"]}')
    name += places(args)
    if not result:
        lines.append(f'next         python3 cli.py evaluate --ckpt_name={name}{protocol}')
    elif args.preset != 'demo':
        lines.append(f'next         python3 cli.py infer --ckpt_name={name}')
    else:
        lines.append('next         your own images, laid out as FOLDER/train/<class>/ and FOLDER/val/<class>/:')
        lines.append(f'             cd {ROOT / "code"}')
        lines.append('             python3 cli.py train --image_path=FOLDER')
    return '\n'.join(lines)
