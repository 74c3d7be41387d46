"""SimSiam as lightly has it beside ours: images/s of training and of the loaders alone, by turns, in one run.

    pip3 install -r bench/requirements.txt
    python3 bench/peers.py

lightly's side is its own SimSiam example: SimSiamTransform, one image at a time in a worker per core, its projection
and prediction head, its loss, SGD in float32. Ours is an epoch of train as the options' defaults have it (on a CPU:
bfloat16 where the trial takes it). Both get the same JPEG files, backbone, widths (2048, 512), three projector layers,
and batch; neither blurs views of 32 px (paper, appendix D). Cases: resnet18_32 (3 x 3 stem, batch 128), small_32 (the
demo's network, batch 64), resnet50_224 (batch 16), loader_32 and loader_224: files to two ready views, no training.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from common import epoch_function, run_in_turns
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import SimSiamPredictionHead, SimSiamProjectionHead
from lightly.transforms import SimSiamTransform
from loader import draw, views
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from dataloader.load_dataset import get_iterator
from engine.train_state import TrainState
from model.backbone import make_backbone
from optimizer.sgd import make_sgd
from runtime.checkpoints.load_state import build_model
from runtime.device import get_device, use_compile
from runtime.environment import cpu_count
from runtime.options import get_config
from runtime.precision import describe_precision, precision

# Of each case: preset, backbone, batch, steps a turn on a CPU (a GPU takes ten times as many).
CASES = {
    'resnet18_32': ('cifar10', 'resnet18', 128, 4),
    'small_32': ('cifar10', 'small', 64, 64),
    'resnet50_224': ('imagenet', 'resnet50', 16, 3),
}


class Lightly(torch.nn.Module):
    """The model of lightly's example, on the backbone that ours has."""

    def __init__(self, name, stem, size):
        super().__init__()
        self.backbone, features = make_backbone(name, stem, size)
        self.projection_head = SimSiamProjectionHead(features, 2048, 2048)
        self.prediction_head = SimSiamPredictionHead(2048, 512, 2048)

    def forward(self, x):
        z = self.projection_head(self.backbone(x).flatten(start_dim=1))
        return z.detach(), self.prediction_head(z)


def lightly_loader(folder, size, batch):
    transform = SimSiamTransform(input_size=size, gaussian_blur=0.0 if size == 32 else 0.5)
    return DataLoader(
        ImageFolder(folder / 'train', transform),
        batch,
        shuffle=True,
        drop_last=True,
        num_workers=cpu_count(),
        persistent_workers=True,
    )


def lightly_epoch(model, optimizer, batches, device):
    """The loop of its example; returns the number of images."""
    loss_of, count = NegativeCosineSimilarity(), 0
    for (x0, x1), _ in batches:
        (z0, p0), (z1, p1) = model(x0.to(device)), model(x1.to(device))
        loss = 0.5 * (loss_of(z0, p1) + loss_of(z1, p0))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        count += len(x0)
    return count


def options(preset, folder, batch, **more):
    blur = {'proj_layers': 3} if preset == 'cifar10' else {}
    return get_config(
        preset=preset,
        image_path=str(folder),
        batch_size=batch,
        learning_rate=0.0,
        knn_every=0,
        cache_path=str(folder.parent / 'cache'),
        **blur,
        **more,
    )


def training(name, folder):
    """(ours, lightly, ratio) of a case."""
    preset, backbone, batch, steps = CASES[name]
    args = options(preset, folder, batch, backbone=backbone)
    device, train = get_device(args), get_iterator(args)['train']
    ours = build_model(args).to(device, memory_format=torch.channels_last)
    if use_compile(args):
        ours.compile()
    optimizer = make_sgd(ours, args.momentum, args.weight_decay)
    scaler = torch.amp.GradScaler('cuda') if precision(args) == torch.float16 else None
    print(f'{name}: batch {batch}, ours in {describe_precision(args)}', flush=True)
    lightly = Lightly(backbone, args.stem, args.image_size).to(device).train()
    its_optimizer = torch.optim.SGD(lightly.parameters(), lr=0.0, momentum=0.9, weight_decay=1e-4)
    its_batches = lightly_loader(folder, args.image_size, batch)
    return run_in_turns(
        epoch_function(args, TrainState(ours, optimizer, scaler), train),
        lambda: lightly_epoch(lightly, its_optimizer, its_batches, device),
    )


def loading(preset, folder, batch):
    """(ours, lightly, ratio) of the loaders alone."""
    args = options(preset, folder, batch)
    ours, lightly = get_iterator(args)['train'], lightly_loader(folder, args.image_size, batch)
    return run_in_turns(lambda: views(args, ours), lambda: sum(len(x) for (x, _), _ in lightly))


def main():
    generator, root, results = torch.Generator().manual_seed(0), Path(tempfile.mkdtemp()), {}
    print(f'{cpu_count()} CPU cores, torch {torch.__version__}, {torch.get_num_threads()} threads')
    times = 10 if torch.cuda.is_available() else 1
    for name, (preset, _, batch, steps) in CASES.items():
        height, width = (375, 500) if preset == 'imagenet' else (32, 32)
        draw(root / name / 'set', times * steps * batch, height, width, generator, 'train/one')
        results[name] = training(name, root / name / 'set')
    for name, case, batch in (('loader_32', 'small_32', 512), ('loader_224', 'resnet50_224', 16)):
        folder = root / case / 'set'
        if case == 'resnet50_224':
            draw(root / name / 'set', 384, 375, 500, generator, 'train/one')
            folder = root / name / 'set'
        results[name] = loading(CASES[case][0], folder, batch)
    print(f'{"case":16}{"ours":>10}{"lightly":>10}{"ratio":>8}   images/s')
    for name, (ours, lightly, ratio) in results.items():
        print(f'{name:16}{ours:10.1f}{lightly:10.1f}{ratio:8.2f}')
    names = ('ours', 'lightly', 'ratio')
    print(
        json.dumps(
            {name: dict(zip(names, (round(x, 2) for x in values), strict=True)) for name, values in results.items()}
        )
    )


if __name__ == '__main__':
    sys.exit(main())
