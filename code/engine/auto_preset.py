"""--preset=auto and --preset=photos: options chosen from the images and the device.

The rule follows the experiments in results/LOG.md (the learning rate: three seeds; the steps: one). What was not
measured here follows publications: HPT (arXiv 2103.12718) for the small number of steps, lightly-train's documentation
for the number of images from which training from random weights can pay. The view size was chosen for its time alone.
"""

import importlib.util
import statistics

import torch

from config import OPTIONS
from dataloader.load_dataset import num_labeled_classes
from model.weights import find_preprocessing, timm_config
from runtime.checkpoints.pretrained import starts_from_foreign_weights
from runtime.console import silence_stderr
from runtime.device import get_device, main_memory
from runtime.distributed import broadcast_from_rank0
from runtime.errors import UserError
from runtime.messages import log, warn
from runtime.options import preset_options, replace_args
from runtime.tensors import evenly_spaced

SIZE_SAMPLE = 64  # images whose size is read
MAX_SMALL_SIDE = 64  # px: images of one size up to this get --preset=cifar10
# Training steps of a run from pretrained weights. 2.5 times as many gained two to three points more (results/LOG.md).
STEPS, STEPS_ON_GPU = 600, 1200
MEMORY_FOR_64 = 11 * 2**30  # bytes: 64 images of 160 px take 6.5 GiB of main memory, measured on a CPU
MIN_EPOCHS, MAX_EPOCHS = 6, 100  # of such a run
FROM_SCRATCH = 1_000_000  # images from which a run starts from random weights
LARS_FROM = 100_000  # images from which linear evaluation takes the paper's LARS: fewer give it too few steps
CPU_NETWORK = 'timm/tf_efficientnet_lite0'
SCRATCH = {'learning_rate': 0.05, 'proj_layers': 3}  # of runs from random weights: the paper's


def choose_preset(args, sources):
    """Choose the preset for the images if the call did not (`args.preset_from_images`). Returns new args.
    sources: the result of load_dataset.find_split_sources."""
    if not args.preset_from_images:
        return args
    train, sizes = sources['train'], sample_image_sizes(sources['train'].store)
    small = len({*sizes}) == 1 and max(sizes[0]) <= MAX_SMALL_SIDE
    if args.preset != 'photos' and small and not starts_from_foreign_weights(args):  # which are for larger images
        log(f'preset=auto: {len(train.labels)} images of {sizes[0][0]} x {sizes[0][1]} px, so the preset is cifar10')
        usual = OPTIONS['batch_size'].default
        batch = limit_batch_size(usual, len(train.labels))
        if batch < usual and 'batch_size' not in args.explicit:
            log(f'for so few images the batch size is {batch} in place of {usual} (--batch_size)')
        return apply_options(args, {**preset_options('cifar10'), 'preset': 'cifar10', 'batch_size': batch})
    return choose_photos_preset(args, sources, sizes, choose_network(args, len(train.labels), get_device(args)))


def choose_photos_preset(args, sources, sizes, network):
    """Choose the preset photos with the given network (choose_network), and log the choices. Returns new args."""
    train = sources['train']
    photo_options = choose_photo_options(args, train, sizes, sources.get('val'), network)
    args = apply_options(args, {**preset_options('photos'), **photo_options, 'preset': 'photos'})
    log_choices(args, train, sizes)
    return args


def apply_options(args, options):
    """Set the options that were not given explicitly. Returns new args, whose `set_from_images` has their names, for
    --resume=auto. The memory of other machines may be another: all ranks take the options of rank 0."""
    options = broadcast_from_rank0(lambda: {name: options[name] for name in options if name not in args.explicit})
    new_args = replace_args(args, **options)
    new_args.preset_from_images, new_args.set_from_images = False, {*options}
    return new_args


def sample_image_sizes(store):
    """Return (width, height) of up to SIZE_SAMPLE evenly spaced images. Unreadable images are skipped. Raises UserError
    if none can be opened."""
    rows, sizes, reason = evenly_spaced(len(store.names), SIZE_SAMPLE), [], ''
    with silence_stderr():
        for row in rows.tolist():
            try:
                with store.open(row) as image:
                    sizes.append(image.size)
            except Exception as error:  # reported when the images are read
                reason = reason or str(error)
    if not sizes:
        raise UserError(f'none of {len(rows)} images, spread over train, can be opened; the first: {reason}')
    return sizes


def choose_photo_options(args, train, sizes, val, network):
    """Choose options from the number and size of the photographs, the device and its memory. train, val:
    SplitSource, val perhaps None; network: of choose_network."""
    count, device = len(train.labels), get_device(args)
    options = {**network, **({} if network['init_from'] else SCRATCH)}
    short = statistics.median(min(size) for size in sizes)
    top, steps = (224, STEPS_ON_GPU) if device.type == 'cuda' else (160, STEPS)
    options['image_size'] = int(max(64, min(top, short // 32 * 32)))
    batch = choose_batch_size(device, count)
    options['batch_size'] = batch
    batch = args.batch_size if 'batch_size' in args.explicit else batch
    options['finetune_batch_size'] = min(256, batch)  # 256 views of 160 px need 15 GB
    if options['init_from']:
        epochs = max(MIN_EPOCHS, min(MAX_EPOCHS, round(steps * batch / count)))
    else:
        epochs = max(100, min(800, round(40_000 * batch / count)))
    options['max_epochs'] = epochs
    options['knn_every'] = max(1, (args.max_epochs if 'max_epochs' in args.explicit else epochs) // 6)
    options['probe_optimizer'] = 'lbfgs' if count < LARS_FROM else 'lars'
    options['evaluate_after'] = bool(val and num_labeled_classes(train.labels) > 1 and num_labeled_classes(val.labels))
    return options


def choose_network(args, count, device):
    """Choose the network and its weights. Returns {'backbone', 'init_from'}."""
    if args.init_from == 'timm' and 'backbone' not in args.explicit:
        return {'init_from': 'timm', 'backbone': 'timm/resnet50' if device.type == 'cuda' else CPU_NETWORK}
    if args.init_from:
        return {'init_from': args.init_from}
    if 'backbone' in args.explicit:
        return {'init_from': usual_weights(args)}
    if 'init_from' in args.explicit:  # none
        return {'init_from': '', 'backbone': 'resnet18'}
    if count >= FROM_SCRATCH:
        return {'init_from': '', 'backbone': 'resnet50'}
    if device.type == 'cuda':
        return {'init_from': 'imagenet', 'backbone': 'resnet50'}
    if importlib.util.find_spec('timm'):
        return {'init_from': 'timm', 'backbone': CPU_NETWORK}
    return {'init_from': 'imagenet', 'backbone': 'resnet18'}


def usual_weights(args):
    """Return the --init_from of --backbone, '' if there are no weights of this network."""
    if 'init_from' in args.explicit or args.backbone == 'small' or args.stem == 'cifar':
        return ''
    is_timm = args.backbone.startswith('timm/')
    try:
        known = timm_config(args.backbone.removeprefix('timm/')) if is_timm else find_preprocessing(args.backbone)
    except ValueError:  # timm is not installed, or has no such network: an error of --backbone
        return ''
    if not known or (is_timm and not known.has_weights):
        log(f'there are no pretrained weights of {args.backbone}: training begins with random ones')
        return ''
    return 'timm' if is_timm else 'imagenet'


def choose_batch_size(device, count):
    """Choose the batch size: 64, more for many images on a GPU with enough memory, 32 in a small main memory; at most a
    quarter of the images."""
    batch = 32 if has_little_memory(device) else 64
    if device.type == 'cuda':
        gigabytes = torch.cuda.get_device_properties(device).total_memory / 2**30
        batch = 256 if count >= 20_000 and gigabytes >= 20 else 128 if count >= 5_000 and gigabytes >= 10 else 64
    return limit_batch_size(batch, count)


def has_little_memory(device):
    """Whether the device is a CPU whose main memory is too small for a batch of 64 images."""
    return device.type == 'cpu' and main_memory() < MEMORY_FOR_64


def limit_batch_size(batch, count):
    """Halve a batch size until it is at most a quarter of `count` images, or 2."""
    while batch > 2 and batch > count / 4:
        batch //= 2
    return batch


def log_choices(args, train, sizes):
    """Log each choice, with the option that changes it."""
    width, height = (round(statistics.median(size[side] for size in sizes)) for side in (0, 1))
    classes = f'{len(train.classes)} classes' if train.classes else 'no classes'
    steps = max(1, len(train.labels) // args.batch_size)
    start = {'': 'random weights', 'imagenet': "torchvision's ImageNet weights", 'timm': "timm's weights"}
    backbone = f'{args.backbone}, {start.get(args.init_from, args.init_from)}'
    if args.init_from not in start and 'backbone' not in args.explicit:
        backbone = f'that of {args.init_from}'
    size = f'{args.image_size} px'
    if args.init_from and not starts_from_foreign_weights(args) and 'image_size' not in args.explicit:
        size = f'that of {args.init_from}'
    halved = 'batch_size' not in args.explicit and args.batch_size == 32 and has_little_memory(get_device(args))
    little_memory = f', for {main_memory() / 2**30:.0f} GiB of memory' if halved else ''
    rows = [
        ('backbone', backbone, '--backbone, --init_from (none: random weights)'),
        ('view size', size, '--image_size'),
        ('batch size', f'{args.batch_size} images{little_memory}', '--batch_size'),
        ('epochs', f'{args.max_epochs} of {steps} steps', '--max_epochs'),
        ('learning rate', f'{args.learning_rate:g} x batch / 256', '--learning_rate'),
    ]
    log(f'photos           {len(train.labels)} images of about {width} x {height} px, {classes}, on {get_device(args)}')
    for name, value, option in rows:
        log(f'  {name:15}{value:55} {option}')


def switch_to_random_weights(args, sources, error):
    """Warn that the preset's pretrained weights are not available (`error`), and choose the options for random weights.
    Returns new args."""
    warn(
        f'{error}; training begins with random weights, which on fewer than {FROM_SCRATCH:,} images ends far below '
        "ImageNet's: results/LOG.md"
    )
    network = {'init_from': '', 'backbone': 'resnet18'}
    return choose_photos_preset(args, sources, sample_image_sizes(sources['train'].store), network)
