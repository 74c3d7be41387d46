"""The precision of the network: bfloat16, float16 or float32, from --amp and the capabilities of the machine.

On CPUs the speed of bfloat16 varies: several times that of float32 with AMX, twice with AVX-512 BF16, less if it is
emulated, an illegal instruction on some virtual machines. A short benchmark in a subprocess decides, once for each
machine, network and batch size.

    python3 -m runtime.precision '{"options": {...}, "threads": 2}'    the benchmark; prints a line of JSON
"""

import contextlib
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
from dataclasses import dataclass
from pathlib import Path

import torch

from runtime import distributed
from runtime.atomic_write import atomic_write_on_main
from runtime.device import get_device
from runtime.errors import ROOT, UserError, resolve_path
from runtime.messages import log
from runtime.options import get_config, replace_args
from runtime.tensors import channels_last

TRIAL = [sys.executable, '-m', 'runtime.precision']  # run in code/
MIN_SPEEDUP = 1.3  # of bfloat16 over float32 on a CPU, for --amp=auto
SECONDS = 1.0  # target time of a float32 step in the benchmark, which determines its number of images
REPEATS, TIMEOUT_S = 3, 180  # steps of each precision, alternating; time limit in seconds
MAX_LOSS_DIFF = 0.02  # allowed difference of the two losses (in [-1, 1])
NAMES = {torch.bfloat16: 'bfloat16', torch.float16: 'float16', None: 'float32'}
# Options that the speed of a step depends on.
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


@dataclass(frozen=True)
class MixedPrecision:
    """The precision of a training step. dtype: of autocast, None for float32. scaler: the GradScaler of float16, or
    None."""

    dtype: torch.dtype | None = None
    scaler: torch.amp.GradScaler | None = None


FLOAT32 = MixedPrecision()


def precision(args):
    """Return the dtype for autocast: torch.bfloat16, torch.float16, or None for float32. Raises UserError if the device
    does not support --amp."""
    device = get_device(args)
    if args.amp == 'off':
        return None
    if args.amp == 'fp16':
        if device.type != 'cuda':
            raise UserError(f'--amp=fp16 needs a CUDA GPU, not {device}; try --amp=off')
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
            raise UserError(f'--amp=bf16 needs a CUDA GPU or a CPU, not {device}; try --amp=off')
        return None
    benchmark = bf16_benchmark(args)
    if args.amp == 'bf16' and benchmark['failed']:
        raise UserError(f'--amp=bf16: {benchmark["failed"]}; try --amp=off')
    return torch.bfloat16 if args.amp == 'bf16' or benchmark['ratio'] >= MIN_SPEEDUP else None


def autocast(args, uses_grad_scaler=True):
    """Return the torch.autocast context for precision(args).

    uses_grad_scaler: False for a training without GradScaler; float16 then becomes float32.
    """
    dtype = precision(args)
    dtype = dtype if uses_grad_scaler or dtype != torch.float16 else None
    return torch.autocast(get_device(args).type, dtype or torch.bfloat16, enabled=dtype is not None)


def describe_precision(args):
    """Describe precision(args), with the result of the benchmark if there was one."""
    name = NAMES[precision(args)]
    if get_device(args).type != 'cpu' or args.amp == 'off':
        return name
    benchmark = bf16_benchmark(args)
    if benchmark['failed']:
        return f'{name} ({benchmark["failed"]})'
    faster = f'{benchmark["ratio"]:.1f} times as fast'
    return f'{name} ({faster} as float32 here)' if name == 'bfloat16' else f'{name} (bfloat16 would be {faster} here)'


def inherit_amp(args, checkpoint_amp):
    """Set --amp to that of the resumed run, unless it is given explicitly. Returns args.

    checkpoint_amp: --amp of the checkpoint; auto, in early checkpoints, was float32 on a CPU. If this machine does not
    support it, the run continues in float32, with a message.
    """
    if 'amp' in args.explicit:
        return args
    args = replace_args(
        args, amp='off' if checkpoint_amp == 'auto' and get_device(args).type == 'cpu' else checkpoint_amp
    )
    try:
        precision(args)
    except UserError as error:
        log(f'the run began with --amp={checkpoint_amp} and continues in float32: {error}')
        args = replace_args(args, amp='off')
    return args


def resolve_amp(args):
    """Resolve --amp=auto, so that the run keeps its precision. Returns args."""
    return replace_args(args, amp={torch.bfloat16: 'bf16', torch.float16: 'fp16', None: 'off'}[precision(args)])


def bf16_benchmark(args):
    """Return the result of the benchmark for this machine, network and batch: {'ratio': speed-up of bfloat16, 'failed':
    reason or ''}. It is cached in <cache_path>/precision.json; rank 0 runs it.
    """
    options = {name: getattr(args, name) for name in BENCHMARK_KEYS}
    options |= {'batch_size': max(2, args.batch_size // (distributed.world_size() * args.grad_accum_steps))}
    return bf16_benchmark_shared(resolve_path(args.cache_path) / 'precision.json', json.dumps(options))


@functools.cache
def bf16_benchmark_shared(path, options):
    """cached_benchmark on rank 0, for all ranks."""
    return distributed.broadcast_from_rank0(lambda: cached_benchmark(path, options))


def cached_benchmark(path, options):
    """Return the benchmark's result for `options` (JSON) from the file `path`, or run it."""
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return {'ratio': 0.0, 'failed': 'this CPU has no bfloat16'}
    key = f'{cpu_fingerprint()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {options}'
    try:
        saved = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError):
        saved = {}
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return {'ratio': float(saved[key]['ratio']), 'failed': str(saved[key]['failed'])}
    log('benchmarking bfloat16 on this CPU, once for this network and batch')
    result = run_in_subprocess(options)
    with_it = {**saved, key: result} if isinstance(saved, dict) else {key: result}
    if result.pop('sure'):
        try:
            atomic_write_on_main(path, lambda aside: aside.write_text(json.dumps(with_it, indent=1) + '\n'))
        except OSError as error:
            log(f'the result of the benchmark is not cached: {error}')
    return result


def run_in_subprocess(options):
    """Run the benchmark in a subprocess. Returns {'ratio', 'failed', 'sure': whether to cache the result}."""
    job = json.dumps({'options': json.loads(options), 'threads': torch.get_num_threads()})
    alone = {name: value for name, value in os.environ.items() if name not in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')}
    try:
        process = subprocess.run(
            [*TRIAL, job],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
            cwd=ROOT / 'code',
            env={**alone, 'CUDA_VISIBLE_DEVICES': ''},
        )
    except subprocess.TimeoutExpired:
        return {'ratio': 0.0, 'failed': f'the benchmark of bfloat16 took longer than {TIMEOUT_S} s', 'sure': False}
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        why = 'an illegal instruction' if name == 'SIGILL' else name
        return {'ratio': 0.0, 'failed': f'bfloat16 ends in {why} on this CPU', 'sure': name == 'SIGILL'}
    try:
        result = json.loads(process.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        last_line = (process.stderr.strip() or 'no output').splitlines()[-1]
        return {'ratio': 0.0, 'failed': f'the benchmark of bfloat16 failed: {last_line}', 'sure': False}
    if not result['difference'] <= MAX_LOSS_DIFF:  # nan too
        return {
            'ratio': 0.0,
            'failed': f'bfloat16 computes another loss here (by {result["difference"]:.2g})',
            'sure': True,
        }
    return {'ratio': result['ratio'], 'failed': '', 'sure': True}


def cpu_fingerprint():
    """Return the name of the processor and a digest of its feature flags."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return f'{platform.machine()} {platform.processor()}'
    info = dict(line.split(':', 1) for line in lines if line.startswith(('model name', 'flags', 'Features')))
    info = {name.strip(): value.strip() for name, value in info.items()}
    flags = info.get('flags', info.get('Features', ''))
    return f'{info.get("model name", platform.machine())} {hashlib.blake2b(flags.encode(), digest_size=4).hexdigest()}'


def benchmark_step(options, threads):
    """Time alternating training steps in float32 and bfloat16. Returns {'ratio': of the times, 'difference': of the
    first losses}."""
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

    few_views = views(min(4, args.batch_size))
    difference = abs(step(None, few_views)[1] - step(torch.bfloat16, few_views)[1])
    each = min(step(None, few_views)[0] for _ in range(2)) / len(few_views[0])
    many_views = views(max(2, min(args.batch_size, round(SECONDS / each))))
    times = {dtype: [step(dtype, many_views)[0] for _ in range(2)][-1:] for dtype in models}
    for _ in range(REPEATS):
        for dtype in models:
            times[dtype].append(step(dtype, many_views)[0])
    ratio = statistics.median(a / b for a, b in zip(times[None], times[torch.bfloat16], strict=True))
    return {'ratio': round(ratio, 2), 'difference': round(difference, 5)}


if __name__ == '__main__':
    print(json.dumps(benchmark_step(**json.loads(sys.argv[1]))))
