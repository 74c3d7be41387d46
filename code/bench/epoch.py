"""A whole epoch of train, ours beside the bare loop on fixed tensors: loader, augmentation, checks, bar and logs.

    python3 bench/epoch.py

Case epoch: the cifar10 preset's ResNet-18 (batch 64 on a CPU, 512 on a GPU); epoch_demo: the demo's network. Also says
what the kNN monitor takes at its default interval, with a val a fifth as large as train.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from common import bare, epoch_function, flops_an_image, matmul_rate, prepare, run_in_turns, show, speed

from dataloader.load_dataset import eval_loader, make_loader, place_on_device, select
from dataloader.readers.memory import Memory
from dataloader.sources.path_array import PathArray
from engine.train_state import TrainState
from protocols.knn import knn_accuracy
from runtime.device import get_device
from runtime.tensors import channels_last


def measure(preset, batch_size, side, steps, rounds=3):
    args, model, optimizer, dtype = prepare(preset, batch_size)
    device, folder = get_device(args), Path(tempfile.mkdtemp())
    steps = steps if device.type == 'cpu' else 97
    count = steps * args.batch_size
    args.learning_rate = 0.0  # the images are noise: nothing is to be learned
    pixels = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)
    labels, store = torch.arange(count) % 10, Memory(PathArray(str(i) for i in range(count)), pixels)
    images = place_on_device(args, folder, store, labels, [str(i) for i in range(10)])
    train = make_loader(args, replace(images, views=2), shuffled=True)
    ours = epoch_function(args, TrainState(model, optimizer), train)
    fixed = torch.randn(2, args.batch_size, 3, args.image_size, args.image_size, device=device)
    fixed = [channels_last(view) for view in fixed]
    measured = run_in_turns(ours, lambda: bare(model, optimizer, *fixed, steps, dtype), rounds)

    few = count // 5
    val = select(images, torch.arange(few))

    def monitor():
        knn_accuracy(args, model.backbone, eval_loader(args, images), eval_loader(args, val))
        return count

    share = measured[0] / max(speed(monitor) for _ in range(3)) / args.knn_every
    print(f'{preset}: the kNN monitor every {args.knn_every} epochs takes {share:.1%} of the time of the epochs')
    rate = matmul_rate(device, dtype or torch.float32)
    return *measured, rate / flops_an_image(model, *fixed)


def main():
    what = 'FLOPs of the network / the rate of a large matrix product'
    cases = {'epoch': measure('cifar10', 64, 32, 6), 'epoch_demo': measure('demo', 64, 48, 40, rounds=9)}
    show(cases, dict.fromkeys(cases, what))


if __name__ == '__main__':
    main()
