"""One training step, ours beside the bare loop on fixed tensors: what augmentation and the health checks cost.

    python3 bench/step.py

Case step: the cifar10 preset's ResNet-18 (batch 64 on a CPU, 512 on a GPU); step_demo: the demo's network, so small
that everything else shows; step_imagenet, on a GPU of 70 GB and more: ResNet-50 at 224 px, batch 512. Ours takes whole
uint8 images on the device, makes its views anew at every step, and is what train does, on a GPU recorded where that
pays (engine/cuda_graph.py).
"""

import torch
from common import bare, flops_an_image, matmul_rate, prepare, run_in_turns, show

from dataloader import vision
from dataloader.augment.augmentations import get_augmentation
from engine.train_state import TrainState
from runtime.device import get_device, use_compile
from runtime.seeding import generator_for
from runtime.tensors import channels_last
from train import build_train_step


def measure(preset, batch_size, side, steps):
    args, model, optimizer, dtype = prepare(preset, batch_size)
    train = build_train_step(args, model, TrainState(model, optimizer))
    device, transform = get_device(args), get_augmentation(args, args.augmentation)
    steps = steps if device.type == 'cpu' else 50
    images = torch.randint(0, 256, (args.batch_size, 3, side, side), dtype=torch.uint8, device=device)

    def views(step):
        return vision.random_views(images, transform, generator_for(step), compiled=use_compile(args))

    def ours():
        for step in range(steps):
            train(views(step))
        return steps * args.batch_size

    fixed = [channels_last(view) for view in views(0)]
    model.train()
    measured = run_in_turns(ours, lambda: bare(model, optimizer, *fixed, steps, dtype))
    rate = matmul_rate(device, dtype or torch.float32)
    return *measured, rate / flops_an_image(model, *fixed)


def main():
    what = 'FLOPs of the network / the rate of a large matrix product'
    cases = {'step': measure('cifar10', 64, 32, 6), 'step_demo': measure('demo', 64, 48, 40)}
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[1] > 7e10:
        cases['step_imagenet'] = measure('imagenet', 512, 256, 50)
    show(cases, dict.fromkeys(cases, what))


if __name__ == '__main__':
    main()
