"""Pretraining: SimSiam on the images of `train`, without their labels (paper section 3).

A signal raises Interrupted at once, but within a step or a save, which are finished first; of several ranks all stop
after the same step. What is done is saved on the way out (engine/conclude.py). runtime/signals.py tells the way from
the signal to the exit code.
"""

import contextlib
import functools
import time

import torch

from engine.conclude import evaluate_after, format_summary, save_on_exit
from engine.cuda_graph import CudaGraphStep, should_use_graph
from engine.set_up import setup_run
from loss.negative_cosine import simsiam_loss
from metric.feature_std import feature_std
from optimizer.sgd import lr_schedule, set_learning_rates
from protocols.monitor import Monitor, is_measured
from protocols.protocol import missing_labels_reason
from runtime import distributed, signals
from runtime.device import explain_oom, get_device, init_device, use_compile
from runtime.errors import UserError
from runtime.messages import format_duration, log
from runtime.precision import precision
from runtime.seeding import generator_for, seed_step
from runtime.tensors import channels_last
from utils import prefetch_to_device


def train(args):
    """Pretrain as `args` (runtime.options.get_config) says, or resume a run. Returns the path of the last checkpoint.

    Raises UserError and WorkError for the data and the checkpoint, WorkError where the loss is no longer finite, and
    signals.Interrupted after a signal, with everything saved.
    """
    started = time.monotonic()
    init_device(args)
    args, state, iterators, run = setup_run(args)
    run.deadline = started + 60 * args.max_minutes if args.max_minutes else 0.0
    try:
        monitor = Monitor(args, run, iterators, state)
    except UserError:  # the tracker does not start
        run.remove_if_empty()
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
        log(f'pretraining done in {format_duration(time.monotonic() - started)}')
    result = evaluate_after(args, state, monitor.splits, run)
    log(format_summary(args, run, result, ' --protocol=label_free' if missing_labels_reason(monitor.splits) else ''))
    return run.path


def train_epochs(args, state, loader, monitor, run):
    """Train the epochs that are left; save and measure after each."""
    step = None
    while state.epoch < args.max_epochs:
        if step is None or state.epoch == args.heads_epochs:  # another set of trained parameters is another step
            set_backbone_trainable(state.model, state.epoch >= args.heads_epochs, args.freeze_bn_affine)
            step = build_train_step(args, distributed.wrap_ddp(state.model, get_device(args)), state)
        train_epoch(args, step, state, loader, monitor, run)
        due = state.epoch == args.max_epochs or state.epoch % args.save_every_epochs == 0
        if due or (args.init_from and is_measured(args, state.epoch)):  # one of these may be the best
            run.save(state)
        monitor.after_epoch(state)
        run.prune()


def train_epoch(args, step, state, loader, monitor, run):
    """Train one epoch, from image state.images on. step: of build_train_step."""
    device, batch_size = get_device(args), args.batch_size
    augmentation = args.warmup_augmentation if state.epoch < args.warmup_epochs else args.augmentation
    loader.batch_sampler.start_epoch(state.epoch, augmentation, state.images)
    total = state.images + len(loader) * batch_size
    state.model.train()
    monitor.begin_epoch(state, total)
    # A signal ends the wait for a batch at once; with several ranks all stop at the same step, in
    # signals.sync_should_save.
    with signals.defer_signals(distributed.world_size() > 1):
        for images, _ in prefetch_to_device(args, loader):
            # augmentation
            with explain_oom('the views of a batch', 'try a smaller --batch_size'):
                views = draw_views(args, images, augmentation, state, loader.dataset)
            if state.position == (0, 0):
                monitor.show_views(views)
            # learning rates
            learning_rates = get_learning_rates(args, state.epoch + state.images / total)
            set_learning_rates(state.optimizer, *learning_rates)
            # forward and loss, backward and update
            with signals.defer_signals(), explain_oom('a training step', run.oom_hint):
                seed_step(args.random_seed, 'step', state.epoch, state.images // batch_size)
                loss, std, (p, z) = step(views)
                state.add(loss, std, batch_size)
            # what is watched
            monitor.after_step(state, loss, std, learning_rates, p, z)
            # when it stops and saves
            is_last_step = state.images >= total
            steps = state.images // batch_size
            save_now = signals.sync_should_save(steps, is_last_step, run.deadline, run.should_save(), device)
            if save_now and not is_last_step:
                state.all_reduce_sums()
                run.save(state)
        monitor.end_epoch(state)
        with signals.defer_signals():
            state.finish_epoch(distributed.all_reduce_mean(state.means(), device))


def draw_views(args, images, augmentation, state, dataset):
    """The views of a batch, N x 3 x S x S each, from what the loader gave of it. What is drawn depends on the seed, the
    epoch and the step alone."""
    generator = generator_for(args.random_seed, 'views', state.epoch, state.images // args.batch_size)
    place = distributed.shard_range(len(images))
    views = dataset.make_views(images, augmentation, generator, place, use_compile(args))
    if args.loss_symmetry == '2x':  # two pairs are two parts of a batch
        return torch.cat(views[::2]), torch.cat(views[1::2])
    return views


def get_learning_rates(args, epochs):
    """Learning rates of backbone, projector and predictor. epochs: those done, with the part of this one.

    The predictor's is constant with fix_pred_lr (paper, section 4.2, table 1); the backbone's is 0 before
    heads_epochs.
    """
    peak_lr = args.learning_rate * args.batch_size / 256
    rate = lr_schedule(epochs / args.max_epochs, args.warmup_epochs / args.max_epochs, peak_lr)
    of_backbone = rate * args.backbone_lr_scale if epochs >= args.heads_epochs else 0.0
    return of_backbone, rate, peak_lr if args.fix_pred_lr else rate


def build_train_step(args, net, state):
    """A function of a batch's views (train_step) that trains on them and returns (loss, std of z, (p, z)), on the
    device."""
    criterion = functools.partial(
        simsiam_loss,
        stop_gradient=args.stop_gradient,
        similarity=args.similarity,
        symmetric=args.loss_symmetry == 'true',
    )
    dtype, micro_batches = precision(args), args.grad_accum_steps * (2 if args.loss_symmetry == '2x' else 1)

    def step(views):
        loss, (p, z) = train_step(net, state.optimizer, views, criterion, dtype, state.scaler, micro_batches)
        return loss, feature_std(z[0]), (p, z)

    return (
        CudaGraphStep(step, state.model, state.optimizer, args.cuda_graph == 'True') if should_use_graph(args) else step
    )


def train_step(net, optimizer, views, criterion=simsiam_loss, dtype=None, scaler=None, micro_batches=1):
    """Forward, loss, backward, update on a batch's views, N x 3 x S x S each. Returns (loss, (p, z)), on the device: p
    and z are those of each view, of the last part.

    criterion: simsiam_loss, perhaps with options. dtype: that the network computes in, None for float32; scaler: of the
    gradients, for float16. micro_batches: this many equal parts of the batch go through one after the other. The
    gradient is the mean over the parts.
    """
    optimizer.zero_grad(set_to_none=True)
    total = 0.0
    for i, part in enumerate(zip(*(view.chunk(micro_batches) for view in views), strict=True)):
        skip_grad_sync = i + 1 < micro_batches and hasattr(net, 'no_sync')  # processes exchange gradients once a step
        with net.no_sync() if skip_grad_sync else contextlib.nullcontext():
            with torch.autocast(part[0].device.type, dtype or torch.bfloat16, enabled=dtype is not None):
                outputs = net(*map(channels_last, part))
            outputs = [x.float() if dtype else x for x in outputs]
            loss = criterion(*outputs) / micro_batches
            (scaler.scale(loss) if scaler else loss).backward()
        total = total + loss.detach()
    if scaler:
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.step()
    outputs = [x.detach() for x in outputs]
    return total, (outputs[: len(views)], outputs[len(views) :])


def set_backbone_trainable(model, trained, freeze_bn_affine):
    """Train the backbone from now on, or not; with freeze_bn_affine never the scale and shift of its BN."""
    model.backbone.requires_grad_(trained)
    if freeze_bn_affine:
        for norm in model.frozen:
            norm.requires_grad_(False)
