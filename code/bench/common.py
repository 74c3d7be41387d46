"""What the benchmarks share: two ways timed in turns, what the machine can do at most, and the last line they print."""

import json
import sys
import tempfile
import time
from pathlib import Path

import torch

CODE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CODE))
from runtime.environment import tune_malloc  # noqa: E402

tune_malloc()


def run_in_turns(ours, reference, rounds=3):
    """Images/s of two functions (each returns how many images it worked through), by turns, after one turn unmeasured.

    Returns (ours, reference, ratio): medians, the ratio's of the ratios within a turn, as machines slow down and speed
    up.
    """
    speeds = []
    for turn in range(rounds + 1):
        pair = [speed(function) for function in (ours, reference)]
        if turn:
            speeds.append((*pair, pair[0] / pair[1]))
    return torch.tensor(speeds).median(0).values.tolist()


def speed(function):
    synchronize()
    started = time.perf_counter()
    images = function()
    synchronize()
    return images / (time.perf_counter() - started)


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def bare(model, optimizer, view1, view2, steps, dtype):
    """The reference of step.py and epoch.py: nothing but forward, backward and update, on the same views every time."""
    from loss.negative_cosine import simsiam_loss

    for _ in range(steps):
        with torch.autocast(view1.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            outputs = model(view1, view2)
        loss = simsiam_loss(*(output.float() for output in outputs))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return steps * len(view1)


def epoch_function(args, state, train):
    """A function that trains an epoch of `train`, as the command does, and returns the number of its images."""
    from engine.run_dir import RunDir
    from protocols.monitor import Monitor
    from train import build_train_step, train_epoch

    folder = Path(tempfile.mkdtemp())
    args.log_path, args.save_every_minutes = str(folder), 0.0
    run = RunDir(args, folder)
    monitor = Monitor(args, run, {'train': train, 'val': None}, state)
    step = build_train_step(args, state.model, state)

    def epoch():
        train_epoch(args, step, state, train, monitor, run)
        return len(train) * args.batch_size

    return epoch


def prepare(preset, batch_size):
    """(args, model, optimizer, dtype) of a preset as train makes them, with smaller batches on a CPU."""
    from optimizer.sgd import make_sgd
    from runtime.checkpoints.load_state import build_model
    from runtime.device import init_device, use_compile
    from runtime.options import get_config
    from runtime.precision import precision

    args = get_config(preset=preset, knn_every=5)
    device = init_device(args)
    if device.type == 'cpu':
        args.batch_size = batch_size
    model = build_model(args).to(device, memory_format=torch.channels_last)
    if use_compile(args):
        torch._dynamo.reset()  # else the networks before this one make its shapes symbols: slow to compile, and to run
        model.compile()
    optimizer = make_sgd(model, args.momentum, args.weight_decay)
    return args, model, optimizer, precision(args)


def flops_an_image(model, view1, view2):
    """Floating point operations of forward and backward for one image (two views)."""
    from torch.utils.flop_counter import FlopCounterMode

    # Two images would compile it anew.
    with torch.compiler.set_stance('force_eager'), FlopCounterMode(display=False) as counter:
        p1, p2, _, _ = model(view1[:2], view2[:2])
        (p1.sum() + p2.sum()).backward()
    return counter.get_total_flops() / 2


def matmul_rate(device, dtype):
    """FLOP/s of a large matrix product: what the network's arithmetic can reach at most."""
    side = 8192 if device.type == 'cuda' else 2048
    a, b, out = torch.randn(3, side, side, device=device).to(dtype)
    return max(speed(lambda: len(torch.mm(a, b, out=out))) * 2 * side * side for _ in range(10))


def bandwidth():
    """Bytes/s of a copy in memory, read and written counted."""
    a = torch.empty(2**26, dtype=torch.uint8)
    b = torch.empty_like(a)
    return max(speed(lambda: b.copy_(a).numel()) * 2 for _ in range(5))


def show(cases, bounds):
    """Print what was measured: a table for people, then one JSON object.

    cases: name to (ours, reference, ratio, bound); bounds: name to what the bound is, in words.
    """
    print(f'{"case":16}{"ours":>12}{"reference":>12}{"ratio":>8}{"bound":>12}   images/s; bound: what')
    rounded = {}
    for name, values in cases.items():
        ours, reference, ratio, bound = values
        print(f'{name:16}{ours:12.0f}{reference:12.0f}{ratio:8.2f}{bound:12.0f}   {bounds[name]}')
        rounded[name] = {
            'ours': round(ours, 1),
            'reference': round(reference, 1),
            'ratio': round(ratio, 3),
            'bound': round(bound, 1),
        }
    print(json.dumps(rounded))
