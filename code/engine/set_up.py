"""What a training needs before its first step: options, data, model, optimizer, run folder; a run's first lines."""

import math

import torch

from ckpt import get_model_ckpt
from dataloader.cache.bit_depth import warn_of_range
from dataloader.load_dataset import get_iterator, parts_of
from engine import memory_estimate
from engine.auto_preset import choose_preset, without_weights
from engine.cuda_graph import use_graph
from engine.run_dir import Run, describe_run, gone_on_with, new_run, of_run, resumed
from engine.train_state import State
from errors import UserError, WorkError, path_of
from model.backbone import last_norms
from optimizer.sgd import make_adamw, make_sgd
from protocols.run_protocol import splits_for
from runtime import distributed
from runtime.console import complain
from runtime.device import get_device, use_compile, why_not_compiled
from runtime.messages import log_to, say
from runtime.options import changed, idle
from runtime.precision import described, kept, precision, settled
from runtime.trackers import package_of

HEADS_STEPS = 80  # of projector and predictor alone, for --heads_epochs=-1: 14 steps cost 24 points (results/LOG.md)
# Steps of a run. On an H200 to compile ResNet-18 took 35 s, and saved 2.6 ms a step.
WORTH_COMPILING = 5000


def set_up(args):
    """All that a training needs: (args, state, iterators, run). Raises UserError and WorkError for what cannot work,
    before anything is written and before the first batch.
    """
    args, parts = choose_options(args)
    args, model, checkpoint = load_start(args)
    check_schedule(args)
    args = settled(kept(args, checkpoint['args']['amp']) if checkpoint else args)
    if (args.init_from or args.preset == 'photos') and 'protocol' not in args.given:
        args = changed(args, protocol='compare')  # what the pretraining was worth
    package_of(args)  # refused before anything is written, as is what follows
    use_graph(args)
    iterators = get_iterator(args, parts)
    args = set_heads_epochs(args, len(iterators['train']))
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


def choose_options(args):
    """(args, parts): the options after --from_run, --preset=auto and --resume; parts: of load_dataset.parts_of, where
    the images had to be looked at. A run begins anew, perhaps from weights (--init_from), or goes on (--resume)."""
    ways = ('resume', 'ckpt_name', 'from_run', 'init_from')
    starts = [name for name in ways if getattr(args, name) not in ('', 'auto')]
    if len(starts) > 1 and starts != ['from_run', 'init_from']:  # options of one, weights of another
        raise UserError(f'--{starts[0]} and --{starts[1]} say two starts of one run: leave one out')
    if args.ckpt_name:
        say(f'train --ckpt_name={args.ckpt_name} is called --resume={args.ckpt_name} now')
        args = changed(args, resume=args.ckpt_name)
    args = of_run(args) if args.from_run else args
    parts = parts_of(args) if args.undecided else None
    args = choose_preset(args, parts) if parts else args
    return (resumed(args) if args.resume else args), parts


def load_start(args):
    """(args, model, checkpoint) of get_model_ckpt. Raises UserError for a checkpoint that cannot be resumed so."""
    try:
        args, model, checkpoint = get_model_ckpt(args, training=True)
    except WorkError as error:
        if 'init_from' not in args.chosen or args.ckpt_name:
            raise
        args, model, checkpoint = get_model_ckpt(without_weights(args, error))
    if not checkpoint:
        return args, model, checkpoint
    if checkpoint['layout'] != 'ours':
        raise UserError(
            f'{checkpoint["path"]} is no run of ours to go on with; start a new one from its weights: '
            f'--init_from={args.ckpt_name}'
        )
    before = checkpoint['args']
    if before['model_name'] != args.model_name:
        raise UserError(
            f'--model_name={args.model_name}: the run that goes on is called {before["model_name"]}; leave the option '
            'out'
        )
    if before['optimizer'] != args.optimizer:
        raise UserError(
            f'--optimizer={args.optimizer}: the run goes on with {before["optimizer"]}; a new one from its weights is '
            f'--init_from={args.ckpt_name}'
        )
    return args, model, checkpoint


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


def set_heads_epochs(args, steps):
    """args with the number of epochs that --heads_epochs=-1 comes to, where an epoch has so many steps; warns where no
    epoch is left for the backbone."""
    if args.heads_epochs == -1:
        args = changed(args, heads_epochs=math.ceil(HEADS_STEPS / steps))
        say(f'projector and predictor alone are trained for {args.heads_epochs} epochs of {steps} steps')
    if args.heads_epochs >= args.max_epochs and not distributed.rank():
        complain(
            'warning',
            f'--max_epochs={args.max_epochs} is not more than --heads_epochs={args.heads_epochs}, in which projector '
            'and predictor alone are trained: the backbone stays as it is; try a larger --max_epochs',
        )
    return args


def warn_of_idle(args, model):
    """Say which given options have no effect beside others, or on this network."""
    found = idle(args)
    if 'zero_init' in args.given and not any(last_norms(model.backbone)):
        found.append(('zero_init', f'--backbone={args.backbone}'))
    for name, beside in found if not distributed.rank() else ():
        complain('warning', f'--{name} has no effect with {beside}')


def reason_not_to_compile(args, steps):
    """Why --compile=auto does not compile on this GPU a run of so many steps, in a few words; '' where it does, or on
    no GPU."""
    device = get_device(args)
    if args.compile != 'auto' or device.type != 'cuda':
        return ''
    return f'{steps} steps would not pay for it' if steps < WORTH_COMPILING else why_not_compiled(device)


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
