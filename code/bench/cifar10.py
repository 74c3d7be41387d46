"""The paper's CIFAR-10 experiment (appendix D) on one GPU, in pieces: time, throughput, kNN curve, linear accuracy.

    python3 bench/cifar10.py --image_path=data/cifar10 --output=data/cifar10-run [--minutes=9] [--epochs=800]

Works for at most --minutes, and goes on where it was when it is started again with the same --output; says `done` when
all is there: pretraining, linear evaluation, and a supervised ResNet-18 on the same images for reference (its val
accuracy after --supervised_epochs). Writes --output/cifar10.json and cifar10.png (kNN over epochs). Other options go to
`cli.py train`, such as --backbone=small for a try on a CPU.
"""

import argparse
import json
import subprocess
import sys
import time

import torch
from common import CODE, flops_an_image, matmul_rate
from torch.nn.functional import cross_entropy

from ckpt import save_checkpoint
from dataloader import vision
from dataloader.augment.augmentations import get_augmentation
from dataloader.load_dataset import eval_loader, get_iterator
from engine.train_state import TrainState
from logger import read_scalars
from optimizer.sgd import lr_schedule, make_sgd, set_learning_rates
from plots import LineChart, draw_curves, figure_to_pil
from protocols.features import extract_features
from protocols.results import load_results
from runtime.atomic_write import atomic_write_on_main, save_png
from runtime.checkpoints.load_state import build_model
from runtime.checkpoints.read_file import read_checkpoint
from runtime.checkpoints.run_folder import checkpoints
from runtime.device import get_device
from runtime.errors import resolve_path
from runtime.options import get_config
from runtime.precision import autocast, precision
from runtime.seeding import generator_for
from utils import prefetch_to_device


def cli(command, *options):
    subprocess.run([sys.executable, 'cli.py', command, *options], cwd=CODE, check=True)


def pretrain(options, given, output, minutes):
    """Train until done or out of time. Returns the run folder and its last epoch."""
    run = output / 'ckpt/model_name_cifar10_ckpt_0'
    known = [f'--ckpt_name={run.name}'] if run.is_dir() and checkpoints(run) else ['--model_name=cifar10', *given]
    cli('train', '--preset=cifar10', *known, *options, f'--max_minutes={minutes}', '--save_every_epochs=100')
    return run, read_checkpoint(checkpoints(run)[-1])['epoch']


def supervised(args, epochs, output, deadline):
    """The same backbone trained with labels: crop and flip, SGD. Returns val top-1 in percent, or None: out of time."""
    iterators, device = get_iterator(args), get_device(args)
    batches, val = iterators['train'], iterators['val']
    model = build_model(args).to(device, memory_format=torch.channels_last)
    features = model.projector[0].in_features
    model.predictor = torch.nn.Linear(features, len(val.dataset.classes)).to(device)
    optimizer, run = make_sgd(model, 0.9, 5e-4), output / 'supervised'
    state = TrainState(model, optimizer)
    run.mkdir(exist_ok=True)
    if known := checkpoints(run):
        saved = torch.load(known[-1], map_location='cpu', weights_only=True)
        model.load_state_dict(saved['model'])
        state.load_state_dict(saved)
    started = time.time()
    done = state.epoch
    for epoch in range(done, epochs):
        batches.batch_sampler.start_epoch(epoch, 'moco')
        model.train()
        for step, (images, labels) in enumerate(prefetch_to_device(args, batches)):
            generator = generator_for('supervised', epoch, step)
            (view,) = vision.random_views(images, get_augmentation(args, 'crop'), generator, count=1)
            rate = lr_schedule((epoch + step / len(batches)) / epochs, 5 / epochs, 0.1 * args.batch_size / 128)
            set_learning_rates(optimizer, rate, rate, rate)
            with autocast(args, uses_grad_scaler=False):
                scores = model.predictor(model.backbone(view.contiguous(memory_format=torch.channels_last)))
            loss = cross_entropy(scores.float(), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        a_epoch = (time.time() - started) / (epoch + 1 - done)
        out_of_time = time.time() + 2 * a_epoch > deadline
        if out_of_time or epoch + 1 == epochs:
            state.finish_epoch((loss.item(), 0.0, 0.0))
            save_checkpoint(run, args, state)
        if out_of_time and epoch + 1 < epochs:
            print(f'supervised: {epoch + 1} of {epochs} epochs', flush=True)
            return None
    features, labels = extract_features(args, model.backbone, eval_loader(args, val.dataset), 'features of val')
    model.eval()
    with torch.inference_mode():
        return 100 * (model.predictor(features).argmax(1) == labels).double().mean().item()


def measured(args, log):
    """What the logs of the run say: seconds per epoch, images/s, share of the peak, memory, the kNN curve."""
    logged = read_scalars(log)
    speeds = sorted(value for _, value in logged['speed/images_per_second'])
    device, speed = get_device(args), speeds[len(speeds) // 2]
    dtype = precision(args)
    views = torch.randn(2, 2, 3, args.image_size, args.image_size, device=device)
    flops = flops_an_image(build_model(args).to(device), *views)
    result = {
        'device': torch.cuda.get_device_name() if device.type == 'cuda' else 'cpu',
        'images_per_second': speed,
        'seconds_per_epoch': len(get_iterator(args)['train'].dataset) / speed,
        'share_of_matmul_rate': speed * flops / matmul_rate(device, dtype or torch.float32),
        'waiting_for_data': logged['speed/waiting_for_data'][-1][1],
        'knn': logged['pretraining/knn_top1'],
    }
    if 'speed/memory_gigabytes' in logged:
        result['peak_memory_gigabytes'] = max(value for _, value in logged['speed/memory_gigabytes'])
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--image_path', required=True)
    parser.add_argument('--output', required=True)
    parser.add_argument('--minutes', type=float, default=9)
    parser.add_argument('--epochs', type=int, default=800)
    parser.add_argument('--supervised_epochs', type=int, default=100)
    mine, given = parser.parse_known_args()
    deadline, output = time.time() + 60 * mine.minutes, resolve_path(mine.output)
    paths = [f'--{name}_path={output}/{name}' for name in ('ckpt', 'log', 'cache')]
    given = [f'--image_path={mine.image_path}', f'--max_epochs={mine.epochs}', *given]
    options = dict(option.removeprefix('--').split('=', 1) for option in given)
    args = get_config(preset='cifar10', cache_path=f'{output}/cache', **options)

    run, epoch = pretrain(paths, given, output, max(0.01, (deadline - time.time()) / 60 - 0.5))
    result = {'epochs': epoch, **measured(args, output / 'log' / run.name)}
    if epoch == mine.epochs:
        if not load_results(run, protocol='linear'):
            cli('evaluate', f'--ckpt_name={run.name}', *paths)
        result['linear'] = load_results(run, protocol='linear')[-1]
        result['supervised_top1'] = supervised(args, mine.supervised_epochs, output, deadline)
    atomic_write_on_main(output / 'cifar10.json', lambda aside: aside.write_text(json.dumps(result, indent=1)))
    picture = draw_curves([LineChart('kNN top-1 on val, %', [('SimSiam', result['knn'])])], (720, 420))
    save_png(figure_to_pil(picture), output / 'cifar10.png')
    print(json.dumps(result))
    print('done' if result.get('supervised_top1') is not None else 'not done yet: start the same command again')


if __name__ == '__main__':
    main()
