"""The setup of a training: options, data, model, optimizer, run folder, and the first lines it prints."""

import math

import torch

from ckpt import get_model_ckpt
from config import NOT_RESTORED_OPTIONS, OPTIONS, READING, RESUMED_OPTIONS
from dataloader.load_dataset import find_split_sources, get_iterator, splits_of_loaders
from dataloader.loading.pixel_settings import resolve_mean_std, resolve_pixels, warn_pixel_range
from engine import memory_estimate
from engine.auto_preset import choose_preset, switch_to_random_weights
from engine.cuda_graph import should_use_graph
from engine.run_dir import AUTOMATIC, RunDir, args_from_run, continue_run, new_run, resolve_resume, write_run_json
from engine.teacher import set_distill_size
from engine.train_state import TrainState
from model.backbone import find_last_bn_layers
from model.weights import is_off_the_shelf
from optimizer.sgd import make_adamw, make_sgd
from protocols.run_protocol import protocol_splits
from runtime import distributed
from runtime.checkpoints.pretrained import check_off_the_shelf
from runtime.checkpoints.run_folder import checkpoints
from runtime.device import compile_unavailable_reason, get_device, move_network, use_compile
from runtime.errors import UserError, WorkError, resolve_path
from runtime.messages import log, set_log_file, warn
from runtime.options import ignored_in_train, replace_args, same_value
from runtime.precision import describe_precision, inherit_amp, precision, resolve_amp
from runtime.trackers import import_tracker

HEADS_STEPS = 80  # --heads_epochs=-1: steps that train projector and predictor only (two epochs in results/LOG.md)
MIN_STEPS_TO_COMPILE = 5000  # on an H200, compiling ResNet-18 took 35 s and saved 2.6 ms per step


def setup_run(args):
    """Prepare a training. Returns (args, state, iterators, run); the run is locked. Raises UserError or WorkError for
    anything that cannot work, before anything is written and before the first batch.
    """
    args, sources = choose_options(args)
    if not args.ckpt_name:
        if is_off_the_shelf(args.init_from):
            check_off_the_shelf(args, args.init_from)
        sources = sources or find_split_sources(args)
        args = resolve_pixels(args, sources['train'].store)
    args, model, checkpoint = load_start(args, sources)
    if not checkpoint:
        args = resolve_mean_std(args, sources['train'].store)
    check_batch_and_warmup(args)
    args = set_distill_size(args, model)
    args = resolve_amp(inherit_amp(args, checkpoint['args']['amp']) if checkpoint else args)
    if not checkpoint and (args.init_from or args.preset == 'photos') and 'protocol' not in args.settled:
        args = replace_args(args, protocol='compare')  # compares the run with its start
    import_tracker(args)  # raises before anything is written, like the following checks
    should_use_graph(args)
    iterators = get_iterator(args, sources)
    args = set_heads_epochs(args, len(iterators['train']))
    if args.evaluate_after:
        protocol_splits(args, splits_of_loaders(iterators))
    warn_pixel_range(args, iterators['train'].dataset.store, iterators['train'].dataset.pixel_format)
    warn_ignored_options(args, model)
    compile_skip_reason = why_not_compile(args, args.max_epochs * len(iterators['train']))
    args = replace_args(args, compile='False') if compile_skip_reason else args
    state = make_train_state(args, model)
    if checkpoint:
        state.load_state_dict(checkpoint)
        for name in ('start_share', 'distill_weight') if not state.start else ():
            if name in args.explicit and getattr(args, name):
                warn(f'--{name} has no effect: this run does not keep its initial weights')
        run = continue_run(args, checkpoint, state)
    else:
        run = RunDir(args, resolve_path(args.ckpt_path) / distributed.broadcast_from_rank0(lambda: new_run(args).name))
    run.lock()
    is_copy = bool(checkpoint) and run.folder != checkpoint['run']
    if state.epoch < args.max_epochs or is_copy:  # a finished run is not changed
        write_run_json(run.folder, args, iterators['train'].dataset)
    set_log_file(run.folder / 'log.txt')
    print_run_header(args, state, run, iterators['train'], compile_skip_reason)
    return args, state, iterators, run


def choose_options(args):
    """Resolve --from_run, --preset=auto and --resume. Returns (args, sources); sources: the result of
    load_dataset.find_split_sources, or None if the preset did not depend on the images. Raises UserError if two options
    name different starts of the run."""
    start_options = ('resume', 'ckpt_name', 'from_run', 'init_from')
    given_starts = [name for name in start_options if getattr(args, name) not in ('', 'auto')]
    if len(given_starts) > 1 and given_starts != ['from_run', 'init_from']:  # these two combine: options and weights
        raise UserError(f'--{given_starts[0]} and --{given_starts[1]} name two starts of one run: leave one out')
    if args.ckpt_name:
        log(f'train --ckpt_name={args.ckpt_name} is called --resume={args.ckpt_name} now')
        args = replace_args(args, resume=args.ckpt_name)
    args = args_from_run(args) if args.from_run else args
    sources = find_split_sources(args) if args.preset_from_images else None
    args = choose_preset(args, sources) if sources else args
    return (resolve_resume(args) if args.resume else args), sources


def load_start(args, sources):
    """Load the model of a run: get_model_ckpt's (args, model, checkpoint). sources: of choose_options. Raises UserError
    for a checkpoint that cannot be resumed with these options.

    If a rank cannot download the weights that the preset chose, all ranks begin with random ones.
    """
    chosen_weights = bool(args.init_from) and 'init_from' in args.set_from_images and not args.ckpt_name
    failure, loaded = '', None
    try:
        loaded = get_model_ckpt(args, training=True)
    except WorkError as error:
        if not chosen_weights:
            raise
        failure = str(error)
    if chosen_weights and (failure := distributed.first_failure(failure)):
        loaded = get_model_ckpt(switch_to_random_weights(args, sources, failure))
    args, model, checkpoint = loaded
    if not checkpoint:
        return args, model, checkpoint
    if checkpoint['layout'] != 'ours':
        raise UserError(
            f'{checkpoint["path"]} is not a run of this project and cannot be resumed; start a new run from its '
            f'weights: --init_from={args.ckpt_name}'
        )
    before = checkpoint['args']
    kept = {name: before[name] for name in RESUMED_OPTIONS if name not in args.explicit}
    kept |= {name: before[name] for name, value in AUTOMATIC.items() if getattr(args, name) == value}
    args = replace_args(args, **kept)
    check_resumed_options(args, checkpoint)
    return args, model, checkpoint


def check_resumed_options(args, checkpoint):
    """Raise UserError for an option that a resumed run cannot change; warn of those without effect on a finished
    run."""
    before, epochs, begun = checkpoint['args'], checkpoint['epoch'], bool(checkpoint['images'])
    new_run = f'--init_from={args.ckpt_name}' + ('' if args.preset == 'demo' else f' --image_path={args.image_path}')
    changed = [name for name in OPTIONS if name in args.explicit]
    changed = [name for name in changed if not same_value(name, getattr(args, name), before[name])]
    if 'model_name' in changed:
        raise UserError(
            f'--model_name={args.model_name}: the resumed run is called {before["model_name"]}; leave the option out'
        )
    if 'optimizer' in changed:
        raise UserError(
            f'--optimizer={args.optimizer}: the resumed run uses {before["optimizer"]}; for a new run from its '
            f'weights use {new_run}'
        )
    if args.max_epochs < epochs + begun:
        raise UserError(
            f'--max_epochs={args.max_epochs}: {checkpoint["path"].name} is of epoch {epochs + begun}; give more, or '
            'leave the option out'
        )
    if args.init_from and (fixed := [name for name in changed if name in (*READING, 'start_share')]):
        name = fixed[0]
        raise UserError(
            f'--{name}={getattr(args, name)}: the epochs of this run from pretrained weights were measured with '
            f'{before[name]}, to find the best of them; leave the option out, or begin a new run from its weights: '
            f'{new_run} --{name}={getattr(args, name)}'
        )
    of_training = [name for name in changed if 'evaluate' not in OPTIONS[name].metadata['used_by']]
    for name in of_training if epochs == args.max_epochs else ():
        if name not in (*NOT_RESTORED_OPTIONS, 'max_epochs'):
            warn(f'--{name} has no effect: all {epochs} epochs are finished')


def check_batch_and_warmup(args):
    """Raise UserError if the batch cannot be split evenly over ranks and --grad_accum_steps; warn if the whole schedule
    is warm-up."""
    micro_batches = distributed.world_size() * args.grad_accum_steps
    if args.batch_size % micro_batches or args.batch_size // micro_batches < 2:
        raise UserError(
            f'--batch_size={args.batch_size} cannot be split over {distributed.world_size()} processes with '
            f'--grad_accum_steps={args.grad_accum_steps}: take a multiple of {micro_batches}, at least '
            f'{2 * micro_batches}'
        )
    if args.warmup_epochs >= args.max_epochs:
        warn(
            f'--warmup_epochs={args.warmup_epochs} of --max_epochs={args.max_epochs}: the learning rate rises to the '
            'end and never falls, and --augmentation is never used'
        )


def set_heads_epochs(args, steps):
    """Resolve --heads_epochs=-1 for epochs of `steps` steps; warn if no epoch is left for the backbone. Returns
    args."""
    if args.heads_epochs == -1:
        args = replace_args(args, heads_epochs=math.ceil(HEADS_STEPS / steps))
        log(f'only projector and predictor are trained for {args.heads_epochs} epochs of {steps} steps')
    if args.heads_epochs >= args.max_epochs:
        warn(
            f'--max_epochs={args.max_epochs} is not more than --heads_epochs={args.heads_epochs}, in which only '
            'projector and predictor are trained: the backbone stays as it is; try a larger --max_epochs'
        )
    return args


def warn_ignored_options(args, model):
    """Warn of explicit options that have no effect with the others, or on this network."""
    if args.init_from and args.start_share == 1:
        warn('--start_share=1: what is measured and exported stays the initial weights')
    ignored = ignored_in_train(args)
    if 'zero_init' in args.explicit and not any(find_last_bn_layers(model.backbone)):
        ignored.append(('zero_init', f'--backbone={args.backbone}'))
    for name, beside in ignored:
        warn(f'--{name} has no effect with {beside}')


def why_not_compile(args, steps):
    """Return why --compile=auto does not compile a run of this many steps on this GPU; '' if it does, or without
    GPU."""
    device = get_device(args)
    if args.compile != 'auto' or device.type != 'cuda':
        return ''
    return f'{steps} steps are too few for it' if steps < MIN_STEPS_TO_COMPILE else compile_unavailable_reason(device)


def make_train_state(args, model):
    """Move the model to the device and build its optimizer and GradScaler. Returns a TrainState."""
    model = move_network(args, model)
    if args.freeze_bn:
        model.freeze_bn()
        if 'freeze_bn' in args.explicit and not model.frozen:
            warn(f'--freeze_bn has no effect with --backbone={args.backbone}, which has no BN')
    if use_compile(args):
        model.compile()
    scaler = torch.amp.GradScaler('cuda') if precision(args) == torch.float16 else None
    start = None
    if args.init_from and (args.start_share or args.distill_weight):
        start = {name: value.cpu().clone() for name, value in model.backbone.state_dict().items()}
    if args.optimizer == 'adamw':
        return TrainState(model, make_adamw(model, args.weight_decay), scaler, start)
    return TrainState(model, make_sgd(model, args.momentum, args.weight_decay), scaler, start)


def print_run_header(args, state, run, batches, compile_skip_reason):
    """Log the first lines of a run: device, precision, images, memory. compile_skip_reason: from why_not_compile."""
    if run.path and state.epoch >= args.max_epochs and checkpoints(run.folder)[-1] != run.path:
        log(f'{run.path.name} has all of --max_epochs={args.max_epochs}: nothing is trained')
    elif run.path and state.epoch >= args.max_epochs:
        log(
            f'{run.folder.name} has all of its {state.epoch} epochs; --resume={run.folder.name} --max_epochs=<more> '
            'continues it'
        )
    elif run.path:
        log(f'resuming {run.folder.name} {run.describe_position(state)} (of {args.max_epochs} epochs)')
    device, world = get_device(args), distributed.world_size()
    together = f', {world} processes' if world > 1 else ''
    words = 'compiled in the first step, which takes a while' if use_compile(args) else 'not compiled'
    words += f': {compile_skip_reason}' if compile_skip_reason else ''
    log(
        f'run {run.folder.name}: {args.backbone}, {len(batches.dataset)} images {batches.storage_description()}, '
        f'{args.image_size} px views, on {device_name(device)}{together}, {describe_precision(args)}, {words}'
    )
    if device.type == 'cuda' and state.epoch < args.max_epochs:
        free, _ = torch.cuda.mem_get_info(device)
        line, run.oom_hint = memory_estimate.describe_step_memory(args, state.model, precision(args), free)
        log(line)


def device_name(device):
    return f'{device} ({torch.cuda.get_device_name(device)})' if device.type == 'cuda' else str(device)
