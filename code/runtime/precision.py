"""What the network computes in: bfloat16, float16 or float32, as --amp says and as this machine can.

On a CPU nobody can tell from its name what bfloat16 is worth: several times the speed where there are matrix units
(AMX), twice with AVX-512's BF16, a fraction where it is emulated, an illegal instruction where a machine says that it
has what it has not. So a short trial in a process of its own tells, once for each machine, network and batch.

    python3 -m runtime.precision '{"options": {...}, "threads": 2}'    the trial: a line of JSON
"""

import copy
import functools
import hashlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from runtime import distributed
from runtime.atomic_write import atomic_write_on_main
from runtime.device import get_device
from runtime.errors import ROOT, UserError, resolve_path
from runtime.messages import log
from runtime.options import get_config, replace_args
from runtime.tensors import channels_last

TRIAL = [sys.executable, '-m', 'runtime.precision']  # in a process of its own, in code/
MIN_SPEEDUP = 1.3  # times as fast: what a trial has to show before auto takes bfloat16 on a CPU
SECONDS = 1.0  # that a step of the trial in float32 should take: so many images are taken, at most the batch
REPEATS, TIMEOUT_S = 3, 180  # steps of each kind, by turns; seconds after which a trial is given up
MAX_LOSS_DIFF = 0.02  # by which the two losses (in [-1, 1]) may differ
NAMES = {torch.bfloat16: 'bfloat16', torch.float16: 'float16', None: 'float32'}
# What the speed of a step depends on.
BENCHMARK_KEYS = (
    'backbone',
    'stem',
    'image_size',
    'channels',
    'proj_layers',
    'proj_dim',
    'pred_dim',
    'predictor',
    'proj_bn',
)


def precision(args):
    """The dtype for autocast: torch.bfloat16, torch.float16, or None for float32. Raises UserError where this device
    has not what --amp names."""
    device = get_device(args)
    if args.amp == 'off':
        return None
    if args.amp == 'fp16':
        if device.type != 'cuda':
            raise UserError(f'--amp=fp16 wants a CUDA GPU, not {device}; try --amp=off')
        return torch.float16
    if device.type == 'cuda':
        has_it = torch.cuda.is_bf16_supported(including_emulation=False)
        if args.amp == 'bf16' and not has_it:
            raise UserError(
                f'--amp=bf16: this GPU has no bfloat16 ({torch.cuda.get_device_name(device)}); try --amp=fp16'
            )
        if args.amp == 'bf16' or has_it:
            return torch.bfloat16
        return torch.float16 if torch.cuda.get_device_capability(device) >= (7, 0) else None  # tensor cores
    if device.type != 'cpu':
        if args.amp == 'bf16':
            raise UserError(f'--amp=bf16 wants a CUDA GPU or a CPU, not {device}; try --amp=off')
        return None
    found = bf16_benchmark(args)
    if args.amp == 'bf16' and found['failed']:
        raise UserError(f'--amp=bf16: {found["failed"]}; try --amp=off')
    return torch.bfloat16 if args.amp == 'bf16' or found['ratio'] >= MIN_SPEEDUP else None


def autocast(args, uses_grad_scaler=True):
    """The context in which the network runs: torch.autocast to precision(args).

    scaled=False: of a training whose gradients no scaler looks after; float16 is then float32.
    """
    dtype = precision(args)
    dtype = dtype if uses_grad_scaler or dtype != torch.float16 else None
    return torch.autocast(get_device(args).type, dtype or torch.bfloat16, enabled=dtype is not None)


def describe_precision(args):
    """precision(args) in words, with the trial's outcome where there was one."""
    name = NAMES[precision(args)]
    if get_device(args).type != 'cpu' or args.amp == 'off':
        return name
    found = bf16_benchmark(args)
    if found['failed']:
        return f'{name} ({found["failed"]})'
    faster = f'{found["ratio"]:.1f} times as fast'
    return f'{name} ({faster} as float32 here)' if name == 'bfloat16' else f'{name} (bfloat16 would be {faster} here)'


def inherit_amp(args, checkpoint_amp):
    """args whose --amp is that of the run that goes on, unless this call gave another.

    checkpoint_amp: --amp in the options of the checkpoint; auto, in those of before this was settled at a run's start,
    was float32 on a CPU. Where this machine has not what the run began with, it is said, and float32 goes on.
    """
    if 'amp' in args.given:
        return args
    args = replace_args(
        args, amp='off' if checkpoint_amp == 'auto' and get_device(args).type == 'cpu' else checkpoint_amp
    )
    try:
        precision(args)
    except UserError as error:
        log(f'the run began with --amp={checkpoint_amp}, and goes on in float32: {error}')
        args = replace_args(args, amp='off')
    return args


def resolve_amp(args):
    """args with --amp other than auto: what a run is begun with, and keeps."""
    return replace_args(args, amp={torch.bfloat16: 'bf16', torch.float16: 'fp16', None: 'off'}[precision(args)])


def bf16_benchmark(args):
    """What the trial for this machine, network and batch has shown: {'ratio': times as fast, 'failed': why or ''}.

    Kept in <cache_path>/precision.json. Of several processes the first one tries.
    """
    options = {name: getattr(args, name) for name in BENCHMARK_KEYS}
    options |= {'batch_size': max(2, args.batch_size // (distributed.world_size() * args.grad_accum_steps))}
    return bf16_benchmark_shared(resolve_path(args.cache_path) / 'precision.json', json.dumps(options))


@functools.cache
def bf16_benchmark_shared(path, options):
    """trial, by the first process for all of them."""
    return distributed.broadcast_from_rank0(lambda: cached_benchmark(path, options))


def cached_benchmark(path, options):
    """tried, of these options (JSON), from the file `path` or anew."""
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return {'ratio': 0.0, 'failed': 'this CPU has no bfloat16'}
    key = f'{cpu_fingerprint()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {options}'
    try:
        known = json.loads(path.read_text(encoding='utf-8'))
        return {'ratio': float(known[key]['ratio']), 'failed': str(known[key]['failed'])}
    except (OSError, ValueError, KeyError, TypeError):
        known = {}
    log('trying bfloat16 on this CPU, once for this network and batch')
    found = run_in_subprocess(options)
    with_it = {**known, key: found} if isinstance(known, dict) else {key: found}
    if found.pop('sure'):
        try:
            atomic_write_on_main(path, lambda aside: aside.write_text(json.dumps(with_it, indent=1) + '\n'))
        except OSError as error:
            log(f'what the trial showed is not kept for the next run: {error}')
    return found


def run_in_subprocess(options):
    """The trial as a process: {'ratio', 'failed', 'sure': whether it would end so again}."""
    job = json.dumps({'options': json.loads(options), 'threads': torch.get_num_threads()})
    alone = {name: value for name, value in os.environ.items() if name not in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')}
    try:
        done = subprocess.run(
            [*TRIAL, job],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
            cwd=ROOT / 'code',
            env={**alone, 'CUDA_VISIBLE_DEVICES': ''},
        )
    except subprocess.TimeoutExpired:
        return {'ratio': 0.0, 'failed': f'the trial of bfloat16 took longer than {TIMEOUT_S} s', 'sure': False}
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        why = 'an illegal instruction' if name == 'SIGILL' else name
        return {'ratio': 0.0, 'failed': f'bfloat16 ends in {why} on this CPU', 'sure': name == 'SIGILL'}
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        said = (done.stderr.strip() or 'nothing was said').splitlines()[-1]
        return {'ratio': 0.0, 'failed': f'the trial of bfloat16 failed: {said}', 'sure': False}
    if not found['difference'] <= MAX_LOSS_DIFF:  # nan too
        return {
            'ratio': 0.0,
            'failed': f'bfloat16 computes another loss here (by {found["difference"]:.2g})',
            'sure': True,
        }
    return {'ratio': found['ratio'], 'failed': '', 'sure': True}


def cpu_fingerprint():
    """The processor, by its name and a digest of what it says that it can."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return f'{platform.machine()} {platform.processor()}'
    about = dict(line.split(':', 1) for line in lines if line.startswith(('model name', 'flags', 'Features')))
    about = {name.strip(): value.strip() for name, value in about.items()}
    flags = about.get('flags', about.get('Features', ''))
    return f'{about.get("model name", platform.machine())} {hashlib.blake2b(flags.encode(), digest_size=4).hexdigest()}'


def measure(options, threads):
    """Training steps in float32 and bfloat16 by turns: {'ratio': of the times, 'difference': of the first losses}."""
    from loss.negative_cosine import simsiam_loss
    from model.simsiam import SimSiam
    from optimizer.sgd import make_sgd, set_learning_rates
    from runtime.environment import tune_malloc

    tune_malloc()
    torch.set_num_threads(threads)
    args = get_config(preset='imagenet', device='cpu', amp='off', **options)
    torch.manual_seed(args.random_seed)
    first = SimSiam(args)
    models = {None: first, torch.bfloat16: copy.deepcopy(first)}
    models = {dtype: model.to(memory_format=torch.channels_last).train() for dtype, model in models.items()}
    optimizers = {dtype: make_sgd(model, 0.9, 0.0) for dtype, model in models.items()}
    for optimizer in optimizers.values():
        set_learning_rates(optimizer, 0.01, 0.01, 0.01)
    generator = torch.Generator().manual_seed(0)

    def step(dtype, views):
        started = time.perf_counter()
        optimizers[dtype].zero_grad(set_to_none=True)
        with torch.autocast('cpu', torch.bfloat16, enabled=dtype is not None):
            outputs = models[dtype](*views)
        loss = simsiam_loss(*(x.float() for x in outputs))
        loss.backward()
        optimizers[dtype].step()
        return time.perf_counter() - started, loss.item()

    def views(count):
        side = args.image_size
        shape = count, args.num_channels, side, side
        return [channels_last(torch.randn(shape, generator=generator)) for _ in range(2)]

    few = views(min(4, args.batch_size))
    difference = abs(step(None, few)[1] - step(torch.bfloat16, few)[1])
    each = min(step(None, few)[0] for _ in range(2)) / len(few[0])
    many = views(max(2, min(args.batch_size, round(SECONDS / each))))
    times = {dtype: [step(dtype, many)[0] for _ in range(2)][-1:] for dtype in models}
    for _ in range(REPEATS):
        for dtype in models:
            times[dtype].append(step(dtype, many)[0])
    ratio = statistics.median(a / b for a, b in zip(times[None], times[torch.bfloat16], strict=True))
    return {'ratio': round(ratio, 2), 'difference': round(difference, 5)}


if __name__ == '__main__':
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
