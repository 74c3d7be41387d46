"""Pretraining: SimSiam on the images of `train`, without their labels (paper section 3)."""

import math
import time

import torch
from tqdm import tqdm

from ckpt import get_model_ckpt, new_run, save_checkpoint
from config import AUGMENTATIONS, ROOT, UserError, WorkError, path_of
from dataloader import vision
from dataloader.load_dataset import get_iterator, in_order, labelled, prepared
from evaluate import evaluate_model, why_no_labels
from logger import Logger, duration, say
from loss.negative_cosine import simsiam_loss
from metric.collapse import spread
from optimizer.sgd import learning_rate, make_sgd, set_learning_rates
from protocols.knn import knn_accuracy
from utils import channels_last, get_device, later, random_from, use_bf16, use_compile

READ_EVERY = 10  # steps between two looks at the loss, which is then that many steps old


def train(args):
    """Pretrain as `args` (config.get_config) says, or go on from its --ckpt_name. Returns the last checkpoint's path.

    Raises UserError and WorkError of the data and the checkpoint, and WorkError where the loss is no longer finite.
    """
    started = time.time()
    device = get_device(args)
    args, model, checkpoint = get_model_ckpt(args)
    iterators = get_iterator(args)
    batches, val = iterators['train'], iterators['val']
    bank = in_order(args, labelled(batches.dataset))
    model = model.to(device, memory_format=torch.channels_last)
    if use_compile(args):
        model.compile()
    if device.type == 'cuda':
        torch.set_float32_matmul_precision('high')  # TF32 where it is not bfloat16
        torch.backends.cudnn.benchmark = True
    optimizer = make_sgd(model, args.momentum, args.weight_decay)
    done = 0
    if checkpoint and not checkpoint['optimizer']:
        raise UserError(f'{checkpoint["path"]} is no run of ours to go on with; start a new one from its weights: '
                        f'--init_from={args.ckpt_name}')  # fmt: skip
    if checkpoint:
        run, done, path = checkpoint['path'].parent, checkpoint['epoch'], checkpoint['path']
        restore(optimizer, checkpoint['optimizer'], args)
        if done >= args.max_epochs:
            say(f'{run.name} has its {done} epochs already; --max_epochs=<more> goes on')
        else:
            say(f'going on with {run.name} after epoch {done} of {args.max_epochs}')
    else:
        run = new_run(args)
    say(f'run {run.name}: {args.backbone}, {len(batches.dataset)} images, {args.image_size} px views, on {device}')
    logger = Logger(path_of(args.log_path) / run.name, first_step=done + 1 if done else 0)

    splits = {'train': batches.dataset, 'val': val and val.dataset}
    knn_off = '--knn_every=0' if args.knn_every == 0 else why_no_labels(splits)
    if knn_off:
        say(f'the kNN monitor is off: {knn_off}')
    elif done == 0:
        top1 = knn_accuracy(args, model.backbone, bank, val, use_bf16(args))
        logger.scalars(0, knn_top1=top1)
        say(f'epoch 0/{args.max_epochs}  kNN {top1:.2f} % (untrained)')
    first, loop_started = done, time.time()
    for epoch in range(first, args.max_epochs):
        values = train_epoch(args, model, optimizer, batches, epoch, run, logger)
        done = epoch + 1
        line = (
            f'epoch {done}/{args.max_epochs}  loss {values["train_loss"]:.4f}  std {values["train_std"]:.3f}  '
            f'{values["train_images_per_second"]:.0f} images/s'
        )
        stop = args.max_minutes and time.time() - started > 60 * args.max_minutes
        last = done == args.max_epochs or stop
        if not knn_off and (last or done % args.knn_every == 0):
            values['knn_top1'] = knn_accuracy(args, model.backbone, bank, val, use_bf16(args))
            line += f'  kNN {values["knn_top1"]:.2f} %'
        logger.scalars(done, **values)
        if last or done % args.save_every == 0:
            path = save_checkpoint(run, args, model, optimizer, done, values['train_loss'])
        left = (time.time() - loop_started) / (done - first) * (args.max_epochs - done)
        say(line if last else f'{line}  {duration(left)} left')
        if stop:
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


def train_epoch(args, model, optimizer, batches, epoch, run, logger):
    """One pass over the training images. Returns the scalars of the epoch, by their TensorBoard names."""
    device, steps, bf16 = get_device(args), len(batches), use_bf16(args)
    name = args.warmup_augmentation if epoch < args.warmup_epochs else args.augmentation
    batches.batch_sampler.start_epoch(epoch, name)
    top_rate = args.learning_rate * args.batch_size / 256
    losses, stds, read = torch.zeros(steps, device=device), torch.zeros(steps, device=device), None
    model.train()
    title = f'epoch {epoch + 1}/{args.max_epochs}'
    bar = tqdm(prepared(args, batches), desc=title, total=steps, leave=False, disable=None, unit='batches')

    def report():
        """What step `step` or an earlier one has to say. Sees to it that a bad run stops or is warned of."""
        loss, std = read()
        check_health(args, loss, std, epoch, run, logger)
        bar.set_postfix_str(f'loss {loss:.4f}, std {std:.3f}, {speed:.0f} images/s, {waiting:.0%} waiting for data')

    started = before = time.time()
    waited = 0.0
    for step, (images, _) in enumerate(bar):
        waited += time.time() - before
        generator = random_from(args.random_seed, 'views', epoch, step)
        view1, view2 = vision.random_views(
            images, args.image_size, AUGMENTATIONS[name], args.blur_prob, generator,
            distorted=not batches.dataset.crops_only, compiled=use_compile(args),
        )  # fmt: skip
        if epoch == step == 0:
            rows = [vision.denormalise(view[:16]) for view in (view1, view2)]
            logger.image('two_views', vision.picture(rows, logger.folder / 'two_views.png'), 0)

        rate = learning_rate((epoch + step / steps) / args.max_epochs, args.warmup_epochs / args.max_epochs, top_rate)
        predictor_rate = top_rate if args.fix_pred_lr else rate
        set_learning_rates(optimizer, rate, predictor_rate)

        losses[step], stds[step] = train_step(model, optimizer, view1, view2, bf16)
        if (step + 1) % READ_EVERY == 0 or step + 1 == steps:
            elapsed = time.time() - started
            speed, waiting = (step + 1) * args.batch_size / elapsed, waited / elapsed
            if read:
                report()
            read = later(torch.stack((losses[step], stds[step])))
        before = time.time()
    report()
    memory = {'train_memory_gigabytes': torch.cuda.max_memory_allocated() / 1e9} if device.type == 'cuda' else {}
    return {
        **memory,
        'train_loss': losses.mean().item(),
        'train_std': stds.mean().item(),
        'train_images_per_second': steps * args.batch_size / (time.time() - started),
        'train_waiting_for_data': waiting,
        'learning_rate_encoder': rate,
        'learning_rate_predictor': predictor_rate,
    }


def train_step(model, optimizer, view1, view2, bf16=False):
    """Forward, loss, backward, update on one batch's views, N x 3 x S x S each. Returns (loss, std), on the device."""
    with torch.autocast(view1.device.type, torch.bfloat16, enabled=bf16):
        p1, p2, z1, z2 = model(channels_last(view1), channels_last(view2))
    loss = simsiam_loss(p1.float(), p2.float(), z1.float(), z2.float())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach(), spread(z1.detach().float())


def check_health(args, loss, std, epoch, run, logger):
    """The guard: raise WorkError where the loss is not a number, warn once where the representation collapses."""
    if not math.isfinite(loss):
        raise WorkError(
            f'the loss is {loss} in epoch {epoch + 1}: try a lower --learning_rate (now {args.learning_rate}); '
            f'the checkpoints so far are in {run}'
        )
    if std < args.collapse_threshold:
        logger.warn_once(
            'collapse',
            f'the model collapses: std {std:.3f} (healthy near 1, threshold {args.collapse_threshold}) at loss '
            f'{loss:.4f} in epoch {epoch + 1}: all images get nearly the same z, so the loss falls and nothing is '
            'learned. Try --augmentation=moco, or --warmup_epochs=10 with --warmup_augmentation=moco, a lower '
            '--learning_rate, or a larger --batch_size',
        )


def restore(optimizer, state, args):
    """Load the optimizer's state, with this call's momentum and weight decay (the rates are set at every step)."""
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        group.update(momentum=args.momentum, weight_decay=args.weight_decay)


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
