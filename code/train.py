"""Pretraining: SimSiam on the images of `train`, without their labels (paper section 3).

A signal raises Stopped at once, but within a step or a save, which are finished first; of several ranks all stop after
the same step. What is done is saved on the way out (engine/conclude.py). runtime/signals.py tells the way from the
signal to the exit code.
"""

import contextlib
import functools
import time

import torch

from engine.conclude import evaluate_after, save_on_exit, summary
from engine.cuda_graph import Recorded, use_graph
from engine.set_up import set_up
from errors import UserError
from loss.negative_cosine import simsiam_loss
from metric.feature_std import spread
from optimizer.sgd import learning_rate, set_learning_rates
from protocols.monitor import Monitor, is_measured
from protocols.protocol import why_no_labels
from runtime import distributed, signals
from runtime.device import get_device, memory_for, use_compile, use_device
from runtime.messages import duration, say
from runtime.precision import precision
from runtime.seeding import random_from, seed_step
from runtime.tensors import channels_last
from utils import prepared


def train(args):
    """Pretrain as `args` (runtime.options.get_config) says, or resume a run. Returns the path of the last checkpoint.

    Raises UserError and WorkError for the data and the checkpoint, WorkError where the loss is no longer finite, and
    signals.Stopped after a signal, with everything saved.
    """
    started = time.monotonic()
    use_device(args)
    args, state, iterators, run = set_up(args)
    run.deadline = started + 60 * args.max_minutes if args.max_minutes else 0.0
    try:
        monitor = Monitor(args, run, iterators, state)
    except UserError:  # the tracker does not start
        run.forget()
        raise
    run.begin()
    try:
        if args.init_from and not run.resumed:
            run.save(state, start=True)  # what comes may be worse
        monitor.begin(state)
        train_epochs(args, state, iterators['train'], monitor, run)
    except BaseException as end:
        save_on_exit(run, state, end)  # raises `end` again, unless it was the time limit
    finally:
        run.end()
        monitor.close()  # last: a tracker may wait for its network
    if state.epoch == args.max_epochs:
        say(f'pretraining done in {duration(time.monotonic() - started)}')
    result = evaluate_after(args, state, monitor.splits, run)
    say(summary(args, run, result, ' --protocol=label_free' if why_no_labels(monitor.splits) else ''))
    return run.path


def train_epochs(args, state, loader, monitor, run):
    """Train the epochs that are left; save and measure after each."""
    step = None
    while state.epoch < args.max_epochs:
        if step is None or state.epoch == args.heads_epochs:  # another set of trained parameters is another step
            train_backbone(state.model, state.epoch >= args.heads_epochs, args.freeze_bn_affine)
            step = make_step(args, distributed.wrap(state.model, get_device(args)), state)
        train_epoch(args, step, state, loader, monitor, run)
        due = state.epoch == args.max_epochs or state.epoch % args.save_every == 0
        if due or (args.init_from and is_measured(args, state.epoch)):  # one of these may be the best
            run.save(state)
        monitor.after_epoch(state)
        run.prune()


def train_epoch(args, step, state, loader, monitor, run):
    """Train one epoch, from image state.images on. step: of make_step."""
    device, size = get_device(args), args.batch_size
    augmentation = args.warmup_augmentation if state.epoch < args.warmup_epochs else args.augmentation
    loader.batch_sampler.start_epoch(state.epoch, augmentation, state.images)
    total = state.images + len(loader) * size
    state.model.train()
    monitor.begin_epoch(state, total)
    # A signal ends the wait for a batch at once; with several ranks all stop at the same step, in signals.check.
    with signals.deferred(distributed.world() > 1):
        for images, _ in prepared(args, loader):
            # augmentation
            with memory_for('the views of a batch', 'try a smaller --batch_size'):
                views = random_views(args, images, augmentation, state, loader.dataset)
            if state.position == (0, 0):
                monitor.show_views(views)
            # learning rates
            rates = learning_rates(args, state.epoch + state.images / total)
            set_learning_rates(state.optimizer, *rates)
            # forward and loss, backward and update
            with signals.deferred(), memory_for('a training step', run.helps):
                seed_step(args.random_seed, 'step', state.epoch, state.images // size)
                loss, std, (p, z) = step(views)
                state.add(loss, std, size)
            # what is watched
            monitor.after_step(state, loss, std, rates, p, z)
            # when it stops and saves
            last = state.images >= total
            if signals.check(state.images // size, last, run.deadline, run.save_is_due(), device) and not last:
                state.agree()
                run.save(state)
        monitor.end_epoch(state)
        with signals.deferred():
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
    """Learning rates of backbone, projector and predictor. epochs: those done, with the part of this one.

    The predictor's is constant with fix_pred_lr (paper, section 4.2, table 1); the backbone's is 0 before
    heads_epochs.
    """
    top = args.learning_rate * args.batch_size / 256
    rate = learning_rate(epochs / args.max_epochs, args.warmup_epochs / args.max_epochs, top)
    of_backbone = rate * args.backbone_lr_scale if epochs >= args.heads_epochs else 0.0
    return of_backbone, rate, top if args.fix_pred_lr else rate


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


def train_backbone(model, trained, freeze_bn_affine):
    """Train the backbone from now on, or not; with freeze_bn_affine never the scale and shift of its BN."""
    model.backbone.requires_grad_(trained)
    if freeze_bn_affine:
        for norm in model.frozen:
            norm.requires_grad_(False)
