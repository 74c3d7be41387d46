"""--preset=auto and --preset=photos: settings that are taken from the images that are there and from the device.

The rule rests on the experiments of results/LOG.md (some 600 steps, the learning rate; three seeds) and, for what was
not measured here, on what others publish: HPT (arXiv 2103.12718) for few steps, lightly-train's documentation for the
number of images from which training from random weights can pay. The size of the views is a choice by time, unmeasured.
"""

import importlib.util
import statistics

import torch

from runtime.console import print_message, silence_stderr
from runtime.device import get_device
from runtime.errors import UserError
from runtime.messages import log
from runtime.options import preset_options, replace_args
from runtime.tensors import evenly_spaced

SAMPLE = 64  # images whose size is looked at
SMALL = 64  # px: images of one size up to this are CIFAR's kind
STEPS = 600  # of a run that begins with pretrained weights
FEWEST, MOST = 6, 100  # its epochs
FROM_SCRATCH = 1_000_000  # images from which training from random weights is tried
SCRATCH = {'backbone': 'resnet18', 'learning_rate': 0.05, 'proj_layers': 3}  # where there are no weights


def choose_preset(args, parts):
    """args with the preset that fits the images, where this call left it open (`undecided`). parts: of
    load_dataset.find_split_sources."""
    if not args.undecided:
        return args
    train, sizes = parts['train'], sample_image_sizes(parts['train'].store)
    small = len({*sizes}) == 1 and max(sizes[0]) <= SMALL
    if args.preset != 'photos' and small:
        log(f'preset=auto: {len(train.labels)} images of {sizes[0][0]} x {sizes[0][1]} px, so the preset is cifar10')
        return apply_options(args, {**preset_options('cifar10'), 'preset': 'cifar10'})
    found = choose_photo_options(args, train, sizes, 'val' in parts)
    args = apply_options(args, {**preset_options('photos'), **found, 'preset': 'photos'})
    log_choices(args, train, sizes)
    return args


def apply_options(args, options):
    """args with these options, but for those that were given; `chosen` names them, for --resume=auto."""
    options = {name: value for name, value in options.items() if name not in args.given}
    found = replace_args(args, **options)
    found.undecided, found.chosen = False, {*options}
    return found


def sample_image_sizes(store):
    """(width, height) of some images, evenly spaced; those that cannot be opened are left out."""
    rows, sizes = evenly_spaced(len(store.names), SAMPLE), []
    with silence_stderr():
        for row in rows.tolist():
            try:
                with store.opened(row) as image:
                    sizes.append(image.size)
            except Exception:  # whoever reads it says so
                continue
    if not sizes:
        raise UserError('none of the images that were looked at can be opened: check_dataloader names each')
    return sizes


def choose_photo_options(args, train, sizes, has_val):
    """What the number and the size of the photographs, the device and its memory decide. train: SplitSource."""
    count, device = len(train.labels), get_device(args)
    options = choose_network(args, count, device)
    short = statistics.median(min(size) for size in sizes)
    top = 224 if device.type == 'cuda' else 160
    options['image_size'] = int(max(64, min(top, short // 32 * 32)))
    batch = choose_batch_size(device, count)
    options['batch_size'] = batch
    batch = args.batch_size if 'batch_size' in args.given else batch
    if options['init_from'] or 'init_from' in args.given:
        epochs = max(FEWEST, min(MOST, round(STEPS * batch / count)))
    else:
        epochs = max(100, min(800, round(40_000 * batch / count)))
    options['max_epochs'] = epochs
    options['knn_every'] = max(1, epochs // 6)
    options['evaluate_after'] = bool(has_val and (train.labels >= 0).any())
    return options


def choose_network(args, count, device):
    """{'backbone', 'init_from'}: the network, and where its weights come from."""
    if 'init_from' in args.given:
        return {'init_from': args.init_from}
    if 'backbone' in args.given:
        own = args.backbone == 'small' or args.stem == 'cifar'
        return {'init_from': '' if own else 'timm' if args.backbone.startswith('timm/') else 'imagenet'}
    if count >= FROM_SCRATCH:
        return {'init_from': '', 'backbone': 'resnet50'}
    if device.type == 'cuda':
        return {'init_from': 'imagenet', 'backbone': 'resnet50'}
    if importlib.util.find_spec('timm'):
        return {'init_from': 'timm', 'backbone': 'timm/tf_efficientnet_lite0'}
    return {'init_from': 'imagenet', 'backbone': 'resnet18'}


def choose_batch_size(device, count):
    """Images a step: 64, on a GPU with much memory more where there are many images; at most a quarter of them."""
    batch = 64
    if device.type == 'cuda':
        gigabytes = torch.cuda.get_device_properties(device).total_memory / 2**30
        batch = 256 if count >= 20_000 and gigabytes >= 20 else 128 if count >= 5_000 and gigabytes >= 10 else 64
    while batch > 2 and batch > count / 4:
        batch //= 2
    return batch


def log_choices(args, train, sizes):
    """A line on each decision, with the option that changes it."""
    width, height = (round(statistics.median(size[side] for size in sizes)) for side in (0, 1))
    classes = f'{len(train.classes)} classes' if train.classes else 'no classes'
    steps = max(1, len(train.labels) // args.batch_size)
    start = {'': 'random weights', 'imagenet': "torchvision's ImageNet weights", 'timm': "timm's weights"}
    rows = [
        ('network', f'{args.backbone}, {start.get(args.init_from, args.init_from)}', '--backbone, --init_from'),
        ('views', f'{args.image_size} px', '--image_size'),
        ('batch', f'{args.batch_size} images', '--batch_size'),
        ('epochs', f'{args.max_epochs} of {steps} steps', '--max_epochs'),
        ('rate', f'{args.learning_rate:g} x batch / 256', '--learning_rate'),
    ]
    log(f'photos       {len(train.labels)} images of about {width} x {height} px, {classes}, on {get_device(args)}')
    for name, value, option in rows:
        log(f'  {name:11}{value:58}{option}')


def switch_to_random_weights(args, error):
    """args to train from random weights, where those that the preset chose cannot be had (error says why)."""
    print_message(
        'warning',
        f'{error}; training begins with random weights, which on fewer than {FROM_SCRATCH:,} images ends far below '
        "ImageNet's: results/LOG.md",
    )
    epochs = max(100, min(800, 40_000 * args.batch_size // 3000))
    options = {**SCRATCH, 'init_from': '', 'max_epochs': epochs}
    return replace_args(args, **{name: value for name, value in options.items() if name not in args.given})
