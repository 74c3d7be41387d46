"""Pretraining: SimSiam on the images of `train`, without their labels (paper section 3). From pretrained weights a
distillation loss is added (engine/teacher.py).

On a signal the run finishes the step or checkpoint in progress, saves a checkpoint (engine/conclude.py) and exits. All
ranks stop after the same step. runtime/signals.py documents the path from the signal to the exit code.
"""

import contextlib
import functools
import time

import torch

from engine.conclude import evaluate_after, format_summary, save_on_exit
from engine.cuda_graph import CudaGraphStep, should_use_graph
from engine.set_up import setup_run
from engine.teacher import TARGETS_FILE, Teacher
from loss.negative_cosine import simsiam_loss
from metric.feature_std import feature_std
from optimizer.sgd import lr_schedule, set_learning_rates
from protocols.monitor import Monitor, is_measured
from runtime import distributed, signals
from runtime.device import explain_oom, get_device, init_device, use_compile
from runtime.messages import format_duration, log
from runtime.precision import FLOAT32, MixedPrecision, precision
from runtime.seeding import generator_for, seed_step
from runtime.tensors import channels_last
from utils import prefetch_to_device


def train(args):
    """Pretrain with the options `args` (runtime.options.get_config), or resume a run. Returns the path of the last
    checkpoint.

    Raises UserError or WorkError for invalid data or an invalid checkpoint, WorkError when the loss is not finite, and
    signals.Interrupted after a signal, when the checkpoint is saved.
    """
    started, teacher = time.monotonic(), None
    init_device(args)
    args, state, iterators, run = setup_run(args)
    run.deadline = started + 60 * args.max_minutes if args.max_minutes else 0.0
    try:
        monitor = Monitor(args, run, iterators, state)
    except BaseException:  # the tracker does not start, or --log_path cannot be written
        run.unlock()
        run.remove_if_empty()
        raise
    try:
        with signals.defer_signals(distributed.world_size() > 1):  # all ranks stop together: signals.sync_should_save
            if args.init_from and not run.resumed:
                run.save(state, start=True)  # training may make the weights worse
            trains_backbone = max(state.epoch, args.heads_epochs) < args.max_epochs
            if args.distill_weight and state.start and (trains_backbone or monitor.lacks_metrics(state)):
                teacher = Teacher(args, state.model.backbone, state.start, iterators['train'].dataset, run.folder)
            monitor.start(state, teacher)
            train_epochs(args, state, iterators['train'], monitor, run, teacher)
    except BaseException as end:
        save_on_exit(run, state, end)  # raises `end` again, unless it was the time limit
    finally:
        run.unlock()
        monitor.close()  # last: a tracker may wait for its network
    if state.epoch == args.max_epochs:
        if not distributed.rank():
            (run.folder / TARGETS_FILE).unlink(missing_ok=True)
        log(f'pretraining done in {format_duration(time.monotonic() - started)}')
    result = evaluate_after(args, state, monitor.splits, run)
    if not distributed.rank():  # other machines may not have the files
        log(format_summary(args, run, result, monitor.splits))
    return run.path


def train_epochs(args, state, loader, monitor, run, teacher):
    """Train the remaining epochs. After an epoch, a checkpoint is saved and metrics are computed if they are due."""
    step = None
    while state.epoch < args.max_epochs:
        if step is None or state.epoch == args.heads_epochs:  # the set of trained parameters changes
            trained = state.epoch >= args.heads_epochs
            set_backbone_trainable(args, state.model, trained)
            net = distributed.wrap_ddp(state.model, get_device(args))
            step = build_train_step(args, net, state, teacher if trained else None)
        train_epoch(args, step, state, loader, monitor, run)
        due = state.epoch == args.max_epochs or state.epoch % args.save_every_epochs == 0
        if due or (args.init_from and is_measured(args, state.epoch)):  # any measured epoch may be the best
            run.save(state)
        monitor.after_epoch(state, teacher)
        run.prune()
        if distributed.world_size() > 1:  # a signal during the metrics
            deadline = run.deadline if state.epoch < args.max_epochs else 0.0
            signals.sync_should_save(1, True, deadline, False, get_device(args))


def train_epoch(args, step, state, loader, monitor, run):
    """Train one epoch, starting at image state.images. step: the function from build_train_step."""
    device, batch_size = get_device(args), args.batch_size
    augmentation = args.warmup_augmentation if state.epoch < args.warmup_epochs else args.augmentation
    loader.batch_sampler.start_epoch(state.epoch, augmentation, state.images)
    total = state.images + len(loader) * batch_size
    state.model.train()
    monitor.begin_epoch(state, total)
    # With one rank a signal interrupts the wait for a batch. With several, `train` defers it, and all ranks stop at the
    # same step in signals.sync_should_save.
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
            rows = loader.batch_sampler.rank_part(loader.batch_sampler.order, state.images)
            scalars, (p, z) = step(views, rows)
            state.add(scalars, batch_size)
        # metrics
        monitor.after_step(state, scalars, learning_rates, p, z)
        # stop or save a checkpoint
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
    """Make the views of a batch from the images of the loader. Returns a tuple of N x C x S x S tensors. The random
    numbers depend on the seed, the epoch and the step only; on a CPU dataloader workers draw them, by the batch."""
    generator = generator_for(args.random_seed, 'views', state.epoch, state.images // args.batch_size)
    shard = distributed.shard_range(len(images))
    views = dataset.make_views(images, augmentation, generator, shard, use_compile(args))
    if args.loss_symmetry == '2x':  # four views are two pairs, concatenated along the batch
        return torch.cat(views[::2]), torch.cat(views[1::2])
    return views


def get_learning_rates(args, epochs):
    """Compute the learning rates of backbone, projector and predictor. epochs: finished epochs, as a float.

    With fix_pred_lr the predictor's rate is constant (paper, section 4.2, table 1). The backbone's rate is 0 for the
    first heads_epochs epochs.
    """
    peak_lr = args.learning_rate * args.batch_size / 256
    rate = lr_schedule(epochs / args.max_epochs, args.warmup_epochs / args.max_epochs, peak_lr)
    backbone_lr = rate * args.backbone_lr_scale if epochs >= args.heads_epochs else 0.0
    return backbone_lr, rate, peak_lr if args.fix_pred_lr else rate


def build_train_step(args, net, state, teacher=None):
    """Build the function that trains on one batch: step(views, rows) returns ((loss, std of z), (p, z)), on the device;
    with a teacher (engine.teacher.Teacher) the distillation loss follows std. rows: row numbers of the images in the
    training set, for its targets."""
    criterion = functools.partial(
        simsiam_loss,
        stop_gradient=args.stop_gradient,
        similarity=args.similarity,
        symmetric=args.loss_symmetry == 'true',
    )
    amp, pairs = MixedPrecision(precision(args), state.scaler), 2 if args.loss_symmetry == '2x' else 1

    def step(inputs):
        micro_batches = args.grad_accum_steps * pairs
        loss, (p, z), distill_loss = train_step(net, state.optimizer, inputs, criterion, amp, micro_batches, teacher)
        return (loss, feature_std(z[0]), *([distill_loss] if teacher else [])), (p, z)

    if should_use_graph(args):
        step = CudaGraphStep(step, state.model, state.optimizer, args.cuda_graph == 'True')
    if teacher is None:
        return lambda views, rows=None: step(views)
    return lambda views, rows: step([*views, teacher.targets(rows).repeat(pairs, 1)])


def train_step(net, optimizer, inputs, criterion=simsiam_loss, amp=FLOAT32, micro_batches=1, teacher=None):
    """One optimizer step: forward, loss, backward, update. Returns (loss, (p, z), distillation loss), on the device.

    inputs: views, N x C x S x S each, and with a teacher the targets, N x d. With a teacher the sum of the SimSiam loss
    and of teacher.weight times the distillation loss is minimized; both are returned without the weight, None without
    a teacher. p and z: lists with one N x proj_dim tensor per view, of the last micro-batch.
    criterion: simsiam_loss, perhaps with options bound. micro_batches: the batch is split into this many equal parts,
    and the gradient is the mean over them.
    """
    optimizer.zero_grad(set_to_none=True)
    mean_loss, mean_distill_loss, n = 0.0, 0.0 if teacher else None, len(inputs) - bool(teacher)
    for i, part in enumerate(zip(*(each.chunk(micro_batches) for each in inputs), strict=True)):
        skip_grad_sync = i + 1 < micro_batches and hasattr(net, 'no_sync')  # ranks exchange gradients once per step
        with net.no_sync() if skip_grad_sync else contextlib.nullcontext():
            with torch.autocast(part[0].device.type, amp.dtype or torch.bfloat16, enabled=amp.dtype is not None):
                outputs = net(*map(channels_last, part[:n]), with_features=bool(teacher))
            outputs = [x.float() if amp.dtype else x for x in outputs]
            minimized = loss = criterion(*outputs[: 2 * n]) / micro_batches
            if teacher:
                distill_loss = teacher.loss(outputs[2 * n :], part[n]) / micro_batches
                minimized = loss + teacher.weight * distill_loss
                mean_distill_loss = mean_distill_loss + distill_loss.detach()
            (amp.scaler.scale(minimized) if amp.scaler else minimized).backward()
        mean_loss = mean_loss + loss.detach()
    if amp.scaler:
        amp.scaler.step(optimizer)
        amp.scaler.update()
    else:
        optimizer.step()
    outputs = [x.detach() for x in outputs]
    return mean_loss, (outputs[:n], outputs[n : 2 * n]), mean_distill_loss


def set_backbone_trainable(args, model, trained):
    """Set requires_grad of the backbone's parameters: none if not `trained`, else the last ones, with --trained_share
    of the weights, and with --freeze_bn_affine not the scale and shift of its BN."""
    parameters = [*model.backbone.parameters()]
    total, after = sum(weight.numel() for weight in parameters), 0
    for weight in reversed(parameters):
        weight.requires_grad_(trained and after < args.trained_share * total)
        after += weight.numel() * weight.requires_grad
    if trained and args.trained_share < 1:
        share = f'{after / total:.1%}'
        log(f'--trained_share={args.trained_share:g}: the last layers, with {share} of the weights, are trained')
    if args.freeze_bn_affine:
        for norm in model.frozen:
            norm.requires_grad_(False)
