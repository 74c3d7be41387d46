"""Pretraining: SimSiam on the images of `train`, without their labels (paper section 3)."""

import contextlib
import functools
import math
import signal
import time
from dataclasses import asdict

import torch

import distributed
from ckpt import get_model_ckpt, restore_rng, save_checkpoint
from config import AUGMENTATIONS, ROOT, UserError, WorkError, path_of
from dataloader import vision
from dataloader.batches import WorkerDied
from dataloader.load_dataset import get_iterator, in_order, labelled, prepared, views_of
from dataloader.ranges import warn_of_range
from evaluate import evaluate_model, why_no_labels
from interrupt import Interrupt, Stopped
from logger import Logger, duration, log_to, progress, say
from loss.negative_cosine import simsiam_loss
from metric.collapse import spread
from optimizer.sgd import learning_rate, make_sgd, set_learning_rates
from precision import described, kept, precision, settled
from protocols.knn import knn_accuracy
from runs import describe_run, new_run, of_run, resumed
from utils import channels_last, get_device, later, memory_for, random_from, use_compile

READ_EVERY = 10  # steps between two looks at the loss, which is then that many steps old


def train(args):
    """Pretrain as `args` (config.get_config) says, or go on with a run. Returns the last checkpoint's path.

    Raises UserError and WorkError of the data and the checkpoint, WorkError where the loss is no longer finite, and
    interrupt.Stopped after SIGTERM or Ctrl-C, with everything saved.
    """
    started = time.time()
    device = get_device(args)
    distributed.start(device)
    args = of_run(args) if args.from_run else args
    args = resumed(args) if args.resume else args
    args, model, checkpoint = get_model_ckpt(args)
    check_batch(args)
    args = settled(kept(args, checkpoint['args'].get('amp', 'off')) if checkpoint and 'args' in checkpoint else args)
    iterators = get_iterator(args)
    batches, val = iterators['train'], iterators['val']
    if not distributed.rank():
        warn_of_range(batches.dataset.store, args.pixel_max)
    bank = in_order(args, labelled(batches.dataset))
    model = model.to(device, memory_format=torch.channels_last)
    if use_compile(args):
        model.compile()
    if device.type == 'cuda':
        torch.set_float32_matmul_precision('high')  # TF32 where it is not bfloat16
        torch.backends.cudnn.benchmark = True
    optimizer = make_sgd(model, args.momentum, args.weight_decay)
    scaler = torch.amp.GradScaler('cuda') if precision(args) == torch.float16 else None
    done = step = 0
    seen = None
    if checkpoint and not checkpoint['optimizer']:
        raise UserError(f'{checkpoint["path"]} is no run of ours to go on with; start a new one from its weights: '
                        f'--init_from={args.ckpt_name}')  # fmt: skip
    if checkpoint:
        run, path, done, step = checkpoint['run'], checkpoint['path'], checkpoint['epoch'], checkpoint.get('step', 0)
        seen = checkpoint.get('seen')
        restore(args, checkpoint, optimizer, scaler)
        log_to(run / 'log.txt')
        if done >= args.max_epochs:
            say(f'{run.name} has its {done} epochs already; --max_epochs=<more> goes on')
        else:
            within = f', step {step}' if step else ''
            say(f'going on with {run.name} after epoch {done} of {args.max_epochs}{within}')
    else:
        name = new_run(args).name if not distributed.rank() else ''
        run, path = path_of(args.ckpt_path) / distributed.same_for_all(name), None
        describe_run(run, args)
        log_to(run / 'log.txt')
    where = f'{device}, {distributed.world()} processes' if distributed.world() > 1 else device
    say(
        f'run {run.name}: {args.backbone}, {len(batches.dataset)} images, {args.image_size} px views, on {where}, '
        f'{described(args)}'
    )
    logger = Logger(path_of(args.log_path) / run.name, first_step=done + 1 if checkpoint else 0)
    if not checkpoint:
        logger.text('options', [f'--{name}={value}' for name, value in asdict(args).items()])
    net = distributed.wrap(model, device)

    splits = {'train': batches.dataset, 'val': val and val.dataset}
    knn_off = '--knn_every=0' if args.knn_every == 0 else why_no_labels(splits)
    if knn_off:
        say(f'the kNN monitor is off: {knn_off}')
    elif not checkpoint:
        top1 = knn_accuracy(args, model.backbone, bank, val)
        logger.scalars(0, {'pretraining/knn_top1': top1})
        say(f'epoch 0/{args.max_epochs}  kNN {top1:.2f} % (untrained)')
    first, loop_started = done + step / len(batches), time.time()

    def save(epoch, loss, step=0, seen=None):
        if not math.isfinite(loss):
            raise WorkError(f'the loss is {loss} in epoch {epoch + (step > 0)}: try a lower --learning_rate (now '
                            f'{args.learning_rate}); the last good checkpoint is {path or "none"}')  # fmt: skip
        return save_checkpoint(run, args, model, optimizer, epoch, loss, step, seen, scaler)

    with Interrupt() as interrupt:
        while done < args.max_epochs:
            values, step, seen = train_epoch(args, net, optimizer, scaler, batches, done, step, seen, logger, interrupt,
                                             save, path)  # fmt: skip
            if step:
                save(done, seen[0].mean().item(), step, seen)
                raise stopped(interrupt, run, f'epoch {done + 1}, step {step}')
            done, seen = done + 1, None
            line = (
                f'epoch {done}/{args.max_epochs}  loss {values["pretraining/loss"]:.4f}  '
                f'std {values["pretraining/std"]:.3f}  {values["speed/images_per_second"]:.0f} images/s'
            )
            late = args.max_minutes and time.time() - started > 60 * args.max_minutes
            stop = distributed.agree(late or interrupt.signal, device)
            last = done == args.max_epochs or stop
            if not knn_off and (last or done % args.knn_every == 0):
                values['pretraining/knn_top1'] = knn_accuracy(args, model.backbone, bank, val)
                line += f'  kNN {values["pretraining/knn_top1"]:.2f} %'
            logger.scalars(done, values)
            if last or done % args.save_every == 0:
                path = save(done, values['pretraining/loss'])
            left = (time.time() - loop_started) / (done - first) * (args.max_epochs - done)
            say(line if last else f'{line}  {duration(left)} left')
            if stop and done < args.max_epochs:
                if interrupt.signal:
                    raise stopped(interrupt, run, f'epoch {done}')
                break
    logger.close()
    if done < args.max_epochs:
        say(f'--max_minutes={args.max_minutes:g} have passed: python3 cli.py train --ckpt_name={run.name} goes on')
    else:
        say(f'pretraining done in {duration(time.time() - started)}')
    where = {'path': path, 'run': run, 'epoch': done}
    result = evaluate_model(args, model, splits, where) if args.evaluate_after else None
    say(summary(args, path, result))
    return path


def train_epoch(args, net, optimizer, scaler, batches, epoch, first, seen, logger, interrupt, save, path=None):
    """One pass over the training images, from step `first` on.

    seen: (losses, stds) of the steps before. save(epoch, loss, step, seen) is called every --save_minutes. path: the
    last checkpoint, to be named where the loss is no longer finite. Returns (the epoch's scalars by their TensorBoard
    tags, 0, None), or after a signal (None, steps that are done, their losses and stds).
    """
    device, steps, dtype = get_device(args), len(batches), precision(args)
    name = args.warmup_augmentation if epoch < args.warmup_epochs else args.augmentation
    batches.batch_sampler.start_epoch(epoch, name, first)
    top_rate = args.learning_rate * args.batch_size / 256
    losses, stds, read = torch.zeros(steps, device=device), torch.zeros(steps, device=device), None
    if first:
        losses[:first], stds[:first] = (values.to(device) for values in seen)
    loss_of = functools.partial(simsiam_loss, stop_gradient=args.stop_gradient, similarity=args.similarity,
                                symmetric=args.symmetric == 'true')  # fmt: skip
    net.train()
    title = f'epoch {epoch + 1}/{args.max_epochs}'
    bar = progress(prepared(args, alive(batches, interrupt)), title, total=steps, first=first)

    def report():
        """What an earlier step has to say. Sees to it that a bad run stops or is warned of."""
        loss, std = read()
        check_health(args, loss, std, epoch, f'step {step + 1}, learning rate {rate:.4g}', path, logger)
        bar.set_postfix_str(f'loss {loss:.4f}, std {std:.3f}, {speed:.0f} images/s, {waiting:.0%} waiting for data')

    started = before = saved = time.time()
    waited, step = 0.0, first - 1
    for step, (images, _) in enumerate(bar, first):
        waited += time.time() - before
        generator = random_from(args.random_seed, 'views', epoch, step)
        views = vision.random_views(
            images, args.image_size, AUGMENTATIONS[name], args.blur_prob, generator, count=views_of(args),
            distorted=not batches.dataset.crops_only, compiled=use_compile(args),
            part=(distributed.rank(), distributed.world()),
        )  # fmt: skip
        if epoch == step == 0:
            logger.views('two_views', [vision.denormalise(view[:16]) for view in views])

        rate = learning_rate((epoch + step / steps) / args.max_epochs, args.warmup_epochs / args.max_epochs, top_rate)
        predictor_rate = top_rate if args.fix_pred_lr else rate
        set_learning_rates(optimizer, rate, predictor_rate)

        with memory_for('a training step', 'try a smaller --batch_size, or --accumulate_steps=2'):
            losses[step], stds[step] = train_step(net, optimizer, views, loss_of, dtype, scaler, args.accumulate_steps)
        if (step + 1) % READ_EVERY == 0 or step + 1 == steps:
            elapsed = time.time() - started
            speed, waiting = (step + 1 - first) * args.batch_size / elapsed, waited / elapsed
            if read:
                report()
            read = later(torch.stack((losses[step], stds[step])))
        if step + 1 < steps:
            so_far = losses[: step + 1], stds[: step + 1]
            if args.save_minutes and time.time() - saved > 60 * args.save_minutes and not distributed.rank():
                path, saved = save(epoch, so_far[0].mean().item(), step + 1, so_far), time.time()
            # Several processes have to stop at the same step, and to ask costs time: now and then.
            if distributed.world() == 1 and interrupt.signal:
                break
            if distributed.world() > 1 and (step + 1) % READ_EVERY == 0 and distributed.agree(interrupt.signal, device):
                break
        before = time.time()
    if step + 1 < steps:
        bar.close()
        return None, step + 1, (losses[: step + 1], stds[: step + 1])
    report()
    memory = {'speed/memory_gigabytes': torch.cuda.max_memory_allocated() / 1e9} if device.type == 'cuda' else {}
    loss, std = distributed.mean(torch.stack((losses.mean(), stds.mean()))).tolist()
    return (
        {
            **memory,
            'pretraining/loss': loss,
            'pretraining/std': std,
            'speed/images_per_second': (steps - first) * args.batch_size / (time.time() - started),
            'speed/waiting_for_data': waiting,
            'schedule/learning_rate_encoder': rate,
            'schedule/learning_rate_predictor': predictor_rate,
        },
        0,
        None,
    )


def train_step(net, optimizer, views, loss_of=simsiam_loss, dtype=None, scaler=None, parts=1):
    """Forward, loss, backward, update on a batch's views, N x 3 x S x S each: one pair, or two. Returns (loss, std), on
    the device.

    loss_of: simsiam_loss, perhaps with options. dtype: that the network computes in, None for float32; scaler: of the
    gradients, for float16. parts: this many equal parts of the batch go through one after the other. The gradient is
    the mean over parts and pairs.
    """
    optimizer.zero_grad(set_to_none=True)
    pairs = [pair for first in range(0, len(views), 2)
             for pair in zip(views[first].chunk(parts), views[first + 1].chunk(parts), strict=True)]  # fmt: skip
    total = 0.0
    for i, (view1, view2) in enumerate(pairs):
        wait = i + 1 < len(pairs) and hasattr(net, 'no_sync')  # processes exchange gradients once a step
        with net.no_sync() if wait else contextlib.nullcontext():
            with torch.autocast(view1.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
                outputs = net(channels_last(view1), channels_last(view2))
            p1, p2, z1, z2 = (x.float() if dtype else x for x in outputs)
            loss = loss_of(p1, p2, z1, z2) / len(pairs)
            (scaler.scale(loss) if scaler else loss).backward()
        total = total + loss.detach()
    if scaler:
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.step()
    return total, spread(z1.detach())


def check_batch(args):
    """Raise UserError where the batch cannot be cut into equal parts for processes and --accumulate_steps."""
    parts = distributed.world() * args.accumulate_steps
    if args.batch_size % parts or args.batch_size // parts < 2:
        raise UserError(f'--batch_size={args.batch_size} cannot be shared by {distributed.world()} processes with '
                        f'--accumulate_steps={args.accumulate_steps}: take a multiple of {parts}, at least {2 * parts}'
                        )  # fmt: skip


def alive(batches, interrupt):
    """`batches`, ended early where workers have died of the signal that has come here too."""
    try:
        yield from batches
    except WorkerDied:
        if not interrupt.signal:
            raise


def stopped(interrupt, run, where):
    """The exception that ends a run after a signal."""
    name = signal.Signals(interrupt.signal or signal.SIGTERM).name
    line = f'{name}: saved after {where}; python3 cli.py train --resume={run.name} goes on'
    log = f'stopped by {name} after {where}'
    say(log)
    return Stopped(interrupt.signal or signal.SIGTERM, line)


def check_health(args, loss, std, epoch, where, path, logger):
    """The guard: raise WorkError where the loss is not a number, warn once where the representation collapses."""
    if not math.isfinite(loss):
        raise WorkError(
            f'the loss is {loss} in epoch {epoch + 1}: try a lower --learning_rate (now {args.learning_rate}); noticed '
            f'at {where}; the last good checkpoint is {path or "none"}'
        )
    if std < args.collapse_threshold:
        logger.warn_once(
            'collapse',
            f'the model collapses: std {std:.3f} (healthy near 1, threshold {args.collapse_threshold}) at loss '
            f'{loss:.4f} in epoch {epoch + 1}: all images get nearly the same z, so the loss falls and nothing is '
            'learned. Try --augmentation=moco, or --warmup_epochs=10 with --warmup_augmentation=moco, or a lower '
            '--learning_rate; README.md, When it collapses, has more',
        )


def restore(args, checkpoint, optimizer, scaler):
    """The states of the optimizer, with this call's momentum and weight decay (the rates are set at every step), of the
    scaler and of the random generators."""
    optimizer.load_state_dict(checkpoint['optimizer'])
    for group in optimizer.param_groups:
        group.update(momentum=args.momentum, weight_decay=args.weight_decay)
    if scaler and checkpoint.get('scaler'):
        scaler.load_state_dict(checkpoint['scaler'])
    if checkpoint.get('rng'):
        restore_rng(checkpoint['rng'])


def summary(args, path, result):
    """The last lines of a run: what came out, where it is, what to do next."""
    run, logs = path.parent, path_of(args.log_path) / path.parent.name
    lines = ['', f'checkpoint   {path}', f'TensorBoard  tensorboard --logdir {logs}']
    lines.append(f'two views    {logs / "two_views.png"}')
    if result:
        lines.append(f'result       {run / result["file"]}')
    if not result:
        lines.append(f'next         python3 cli.py evaluate --ckpt_name={run.name}/{path.name}')
    elif args.preset != 'demo':
        lines.append(f'next         python3 cli.py infer --ckpt_name={run.name}/{path.name}')
    else:
        lines.append('next         your own images, laid out as FOLDER/train/<class>/ and FOLDER/val/<class>/:')
        lines.append(f'             cd {ROOT / "code"}')
        lines.append('             python3 cli.py train --preset=imagenet --image_path=FOLDER --batch_size=128')
    return '\n'.join(lines)
