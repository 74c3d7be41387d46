"""Pretraining: SimSiam on the images of `train`, without their labels (paper section 3).

Whatever ends a run (a signal, the time, an error) ends it between two steps, where its state is whole, and on the way
out the state is saved: see `train`, and signals.py.
"""

import contextlib
import functools
import time

import torch

from ckpt import best_of_run, checkpoints, get_model_ckpt
from config import ROOT, WORTH_COMPILING, UserError, WorkError, changed, idle, path_of, places
from dataloader.cache.bit_depth import warn_of_range
from dataloader.load_dataset import get_iterator, parts_of
from engine import memory_estimate
from engine.auto_preset import choose_preset, without_weights
from engine.cuda_graph import Recorded, use_graph
from engine.run_dir import Diverged, Run, describe_run, gone_on_with, name_of_run, new_run, of_run, resumed
from engine.train_state import State
from loss.negative_cosine import simsiam_loss
from metric.feature_std import spread
from model.backbone import last_norms
from optimizer.sgd import learning_rate, make_adamw, make_sgd, set_learning_rates
from protocols import collapse_verdict
from protocols.monitor import Watch, is_measured
from protocols.run_protocol import evaluate_model, splits_for, why_no_labels
from runtime import distributed, signals
from runtime.console import complain
from runtime.device import get_device, memory_for, use_compile, use_device, why_not_compiled
from runtime.messages import duration, log_to, say
from runtime.precision import described, kept, precision, settled
from runtime.seeding import random_from, seed_step
from runtime.tensors import channels_last
from runtime.trackers import package_of
from utils import prepared


def train(args):
    """Pretrain as `args` (config.get_config) says, or go on with a run. Returns the last checkpoint's path.

    Raises UserError and WorkError of the data and the checkpoint, WorkError where the loss is no longer finite, and
    signals.Stopped after a signal, with everything saved.
    """
    started = time.monotonic()
    use_device(args)
    args, state, iterators, run = set_up(args)
    run.deadline = started + 60 * args.max_minutes if args.max_minutes else 0.0
    try:
        watch = Watch(args, run, iterators, state)
    except UserError:  # the tracker does not start
        run.forget()
        raise
    run.begin()
    try:
        if args.init_from and not run.resumed:
            run.save(state, start=True)  # what comes may be worse
        watch.begin(state)
        train_epochs(args, state, iterators['train'], watch, run)
    except BaseException as end:
        save_on_the_way_out(run, state, end)  # raises `end` again, but where it was the time that is up
    finally:
        run.end()
        watch.close()  # last: a tracker may wait for its network
    if state.epoch == args.max_epochs:
        say(f'pretraining done in {duration(time.monotonic() - started)}')
    about = {'path': run.path, 'run': run.folder, 'epoch': state.epoch}
    late = bool(run.deadline) and time.monotonic() > run.deadline
    if args.evaluate_after and late:
        say(f'--max_minutes={args.max_minutes:g} have passed: --evaluate_after is left out')
    result = evaluate_after(args, state, watch.splits, about) if args.evaluate_after and not late else None
    say(summary(args, run, result, ' --protocol=spectrum' if why_no_labels(watch.splits) else ''))
    return run.path


def evaluate_after(args, state, splits, about):
    """--evaluate_after: the result of --protocol for the last checkpoint; of a run that began with pretrained weights
    for its best one, beside the start."""
    if not args.init_from:
        return evaluate_model(args, state.model, splits, about)
    best = distributed.same_for_all(lambda: str(best_of_run(about['run'], checkpoints(about['run']))))
    own, model, checkpoint = get_model_ckpt(changed(args, ckpt_name=best))
    own = changed(own, protocol=args.protocol)
    model = model.to(get_device(args), memory_format=torch.channels_last)
    return evaluate_model(own, model, splits, checkpoint)


def train_epochs(args, state, batches, watch, run):
    """All that are left. What a step keeps on the device between two is given back at the end."""
    step = None
    while state.epoch < args.max_epochs:
        if step is None or state.epoch == args.heads_epochs:  # another set of parameters is another step
            train_backbone(state.model, state.epoch >= args.heads_epochs, args.freeze_bn_affine)
            step = make_step(args, distributed.wrap(state.model, get_device(args)), state)
        train_epoch(args, step, state, batches, watch, run)
        due = state.epoch == args.max_epochs or state.epoch % args.save_every == 0
        if due or (args.init_from and is_measured(args, state.epoch)):  # one of these may be the best
            run.save(state)
        watch.epoch(state)
        run.prune()


def train_backbone(model, trained, freeze_bn_affine):
    """Whether the backbone is trained, from now on; of BN that is frozen perhaps without scale and shift."""
    model.backbone.requires_grad_(trained)
    if freeze_bn_affine:
        for norm in model.frozen:
            norm.requires_grad_(False)


def make_step(args, net, state):
    """A function of a batch's views (train_step) that trains on them and returns (loss, std of z, (p, z)), on the
    device."""
    loss_of = functools.partial(
        simsiam_loss, stop_gradient=args.stop_gradient, similarity=args.similarity, symmetric=args.symmetric == 'true'
    )
    dtype, parts = precision(args), args.accumulate_steps * (2 if args.symmetric == '2x' else 1)

    def step(views):
        loss, (p, z) = train_step(net, state.optimizer, views, loss_of, dtype, state.scaler, parts)
        return loss, spread(z[0]), (p, z)

    return Recorded(step, state.model, state.optimizer, args.cuda_graph == 'True') if use_graph(args) else step


def train_epoch(args, step, state, batches, watch, run):
    """One pass over the training images, from image state.images on. step: of make_step."""
    device, size = get_device(args), args.batch_size
    name = args.warmup_augmentation if state.epoch < args.warmup_epochs else args.augmentation
    batches.batch_sampler.start_epoch(state.epoch, name, state.images)
    total = state.images + len(batches) * size
    state.model.train()
    with signals.together():  # a signal ends the wait for a batch at once, unless other processes go on with the step
        for images, _ in watch.steps(state, prepared(args, watch.waits(batches)), total):
            with memory_for('the views of a batch', 'try a smaller --batch_size'):
                views = random_views(args, images, name, state, batches.dataset)
            if state.position == (0, 0):
                watch.first_views(views)
            rates = learning_rates(args, state.epoch + state.images / total)
            set_learning_rates(state.optimizer, *rates)
            with signals.held(), memory_for('a training step', run.helps):
                seed_step(args.random_seed, 'step', state.epoch, state.images // size)
                loss, std, (p, z) = step(views)
                state.add(loss, std, size)
            watch.step(state, loss, std, rates, p, z)
            last = state.images >= total
            if signals.check(state.images // size, last, run.deadline, run.save_is_due(), device) and not last:
                state.agree()
                run.save(state)
        watch.look(state)
        with signals.held():
            state.finish_epoch(distributed.means(state.means(), device))


def random_views(args, images, augmentation, state, dataset):
    """The views of a batch, N x 3 x S x S each, from what the loader gave of it. What is drawn depends on the seed, the
    epoch and the step alone."""
    generator = random_from(args.random_seed, 'views', state.epoch, state.images // args.batch_size)
    place = distributed.place_of(len(images))
    views = dataset.random_views(images, augmentation, generator, place, use_compile(args))
    if args.symmetric == '2x':  # two pairs are two parts of a batch
        return torch.cat(views[::2]), torch.cat(views[1::2])
    return views


def learning_rates(args, epochs):
    """Of backbone, projector and predictor (constant, paper table 1 of section 4.2), after so many epochs and parts."""
    top = args.learning_rate * args.batch_size / 256
    rate = learning_rate(epochs / args.max_epochs, args.warmup_epochs / args.max_epochs, top)
    of_backbone = rate * args.backbone_lr_scale if epochs >= args.heads_epochs else 0.0
    return of_backbone, rate, top if args.fix_pred_lr else rate


def train_step(net, optimizer, views, loss_of=simsiam_loss, dtype=None, scaler=None, parts=1):
    """Forward, loss, backward, update on a batch's views, N x 3 x S x S each. Returns (loss, (p, z)), on the device: p
    and z are those of each view, of the last part.

    loss_of: simsiam_loss, perhaps with options. dtype: that the network computes in, None for float32; scaler: of the
    gradients, for float16. parts: this many equal parts of the batch go through one after the other. The gradient is
    the mean over the parts.
    """
    optimizer.zero_grad(set_to_none=True)
    total = 0.0
    for i, part in enumerate(zip(*(view.chunk(parts) for view in views), strict=True)):
        wait = i + 1 < parts and hasattr(net, 'no_sync')  # processes exchange gradients once a step
        with net.no_sync() if wait else contextlib.nullcontext():
            with torch.autocast(part[0].device.type, dtype or torch.bfloat16, enabled=dtype is not None):
                outputs = net(*map(channels_last, part))
            outputs = [x.float() if dtype else x for x in outputs]
            loss = loss_of(*outputs) / parts
            (scaler.scale(loss) if scaler else loss).backward()
        total = total + loss.detach()
    if scaler:
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.step()
    outputs = [x.detach() for x in outputs]
    return total, (outputs[: len(views)], outputs[len(views) :])


def set_up(args):
    """(args, state, iterators, run): all that a training needs. What cannot work is said here, before the first batch:
    UserError and WorkError."""
    ways = ('resume', 'ckpt_name', 'from_run', 'init_from')
    starts = [name for name in ways if getattr(args, name) not in ('', 'auto')]
    if len(starts) > 1 and starts != ['from_run', 'init_from']:  # options of one, weights of another
        raise UserError(f'--{starts[0]} and --{starts[1]} say two starts of one run: leave one out')
    args = of_run(args) if args.from_run else args
    parts = parts_of(args) if args.undecided else None
    args = choose_preset(args, parts) if parts else args
    args = resumed(args) if args.resume else args
    try:
        args, model, checkpoint = get_model_ckpt(args, training=True)
    except WorkError as error:
        if 'init_from' not in args.chosen or args.ckpt_name:
            raise
        args, model, checkpoint = get_model_ckpt(without_weights(args, error))
    if checkpoint and checkpoint['layout'] != 'ours':
        raise UserError(
            f'{checkpoint["path"]} is no run of ours to go on with; start a new one from its weights: '
            f'--init_from={args.ckpt_name}'
        )
    check_schedule(args)
    if checkpoint and checkpoint['args']['model_name'] != args.model_name:
        raise UserError(
            f'--model_name={args.model_name}: the run that goes on is called {checkpoint["args"]["model_name"]}; leave '
            'the option out'
        )
    if checkpoint and checkpoint['args']['optimizer'] != args.optimizer:
        raise UserError(
            f'--optimizer={args.optimizer}: the run goes on with {checkpoint["args"]["optimizer"]}; a new '
            f'one from its weights is --init_from={args.ckpt_name}'
        )
    args = settled(kept(args, checkpoint['args']['amp']) if checkpoint else args)
    if (args.init_from or args.preset == 'photos') and 'protocol' not in args.given:
        args = changed(args, protocol='compare')  # what the pretraining was worth
    package_of(args)  # refused before anything is written, as is what follows
    use_graph(args)
    iterators = get_iterator(args, parts)
    if args.evaluate_after:
        splits_for(args, {name: None if found is None else found.dataset for name, found in iterators.items()})
    if not distributed.rank():
        warn_of_range(iterators['train'].dataset.store, args.pixel_max)
    warn_of_idle(args, model)
    reason = reason_not_to_compile(args, args.max_epochs * len(iterators['train']))
    args = changed(args, compile='False') if reason else args
    state = new_state(args, model)
    if checkpoint:
        state.restore(checkpoint)
        run = gone_on_with(args, checkpoint, state)
    else:
        run = Run(args, path_of(args.ckpt_path) / distributed.same_for_all(lambda: new_run(args).name))
    if state.epoch < args.max_epochs:  # of a finished one nothing changes
        describe_run(run.folder, args, iterators['train'].dataset)
    log_to(run.folder / 'log.txt')
    introduce(args, state, run, iterators['train'], reason)
    return args, state, iterators, run


def warn_of_idle(args, model):
    """Say which given options have no effect beside others, or on this network."""
    found = idle(args)
    if 'zero_init' in args.given and not any(last_norms(model.backbone)):
        found.append(('zero_init', f'--backbone={args.backbone}'))
    for name, beside in found if not distributed.rank() else ():
        complain('warning', f'--{name} has no effect with {beside}')


def new_state(args, model):
    """`model` on the device, with what trains it."""
    device = get_device(args)
    model = model.to(device, memory_format=torch.channels_last)
    if args.freeze_bn:
        model.freeze_bn()
    if use_compile(args):
        model.compile()
    scaler = torch.amp.GradScaler('cuda') if precision(args) == torch.float16 else None
    start = None
    if args.init_from and args.start_share:
        start = {name: value.cpu().clone() for name, value in model.backbone.state_dict().items()}
    if args.optimizer == 'adamw':
        return State(model, make_adamw(model, args.weight_decay), scaler, start)
    return State(model, make_sgd(model, args.momentum, args.weight_decay), scaler, start)


def introduce(args, state, run, batches, reason):
    """The first lines of a run, and of one that goes on: what is done where, and in how much memory. reason: of
    reason_not_to_compile."""
    if run.path and state.epoch >= args.max_epochs:
        say(f'{run.folder.name} has its {state.epoch} epochs already; --max_epochs=<more> goes on')
    elif run.path:
        say(f'going on with {run.folder.name} {run.where(state)} (of {args.max_epochs} epochs)')
    device, world = get_device(args), distributed.world()
    together = f', {world} processes' if world > 1 else ''
    words = 'compiled in the first step, which takes a while' if use_compile(args) else 'not compiled'
    words += f': {reason}' if reason else ''
    say(
        f'run {run.folder.name}: {args.backbone}, {len(batches.dataset)} images {batches.place()}, '
        f'{args.image_size} px views, on {named(device)}{together}, {described(args)}, {words}'
    )
    if device.type == 'cuda' and state.epoch < args.max_epochs:
        free, _ = torch.cuda.mem_get_info(device)
        line, run.helps = memory_estimate.of_a_step(args, state.model, precision(args), free)
        say(line)


def named(device):
    return f'{device} ({torch.cuda.get_device_name(device)})' if device.type == 'cuda' else str(device)


def reason_not_to_compile(args, steps):
    """Why --compile=auto does not compile on this GPU a run of so many steps, in a few words; '' where it does, or on
    no GPU."""
    device = get_device(args)
    if args.compile != 'auto' or device.type != 'cuda':
        return ''
    return f'{steps} steps would not pay for it' if steps < WORTH_COMPILING else why_not_compiled(device)


def check_schedule(args):
    """Raise UserError where the batch cannot be cut into equal parts for processes and --accumulate_steps; warn where
    the schedule is all warm-up."""
    parts = distributed.world() * args.accumulate_steps
    if args.batch_size % parts or args.batch_size // parts < 2:
        raise UserError(
            f'--batch_size={args.batch_size} cannot be shared by {distributed.world()} processes with '
            f'--accumulate_steps={args.accumulate_steps}: take a multiple of {parts}, at least {2 * parts}'
        )
    if args.warmup_epochs >= args.max_epochs and not distributed.rank():
        complain(
            'warning',
            f'--warmup_epochs={args.warmup_epochs} of --max_epochs={args.max_epochs}: the learning rate rises to the '
            'end and never falls, and --augmentation is never used',
        )


def save_on_the_way_out(run, state, end):
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
