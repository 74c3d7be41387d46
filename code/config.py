"""Every option of the project, once: its name, default, unit and meaning. Standard library only.

The defaults are the paper's ImageNet baseline (arXiv 2011.10566, section 3 and appendix A). A preset is a plain
table of overrides; what the user gives on the command line overrides both.
"""

import difflib
import math
import os
import shlex
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

# What belongs to this call and this machine, and never comes from a checkpoint.
OF_THE_CALL = (
    'ckpt_name',
    'ckpt_path',
    'log_path',
    'cache_path',
    'output',
    'device',
    'num_workers',
    'download',
    'evaluate_after',
    'protocol',
    'knn_pixels',
    'max_minutes',
    'amp',
    'compile',
    'cuda_graph',
    'save_minutes',
    'keep_last',
    'resume',
    'from_run',
    'quiet',
    'tracker',
    'classifier',
    'count',
    'method',
    'duplicates',
    'sort',
    'diff',
)


ROOT = Path(__file__).resolve().parent.parent  # the repository: relative paths in options start here


class UserError(Exception):
    """Bad use: an option, a path or a folder layout that cannot work. One line, exit code 2."""


class WorkError(Exception):
    """The work itself failed: an unreadable image or checkpoint, a loss that is not finite. One line, exit code 1."""


ALL = ('check_dataloader', 'train', 'evaluate', 'infer', 'embed', 'export', 'ablate', 'report', 'select')
READING = tuple(command for command in ALL if command != 'export')  # of images, with a network
DATA = (*READING, 'pack')
SPLIT = tuple(command for command in DATA if command != 'embed')  # in train and val
TRAIN = ('train', 'ablate')
VIEWS = ('check_dataloader', *TRAIN)
VOTING = ('train', 'evaluate', 'ablate', 'infer', 'report')  # that ask the neighbours
EVALUATE = ('train', 'evaluate', 'ablate')
# The protocols of evaluate: each is the file protocols/<name>.py, and its entry there.
PROTOCOLS = {
    'linear': 'a linear classifier on frozen features',
    'knn': 'nearest neighbours among frozen features',
    'compare': 'beside other backbones, also with few labels',
    'semi': 'fine-tuned on few labels',
    'transfer': 'on the images of --transfer_path',
    'detection': 'object detection on --detection_path',
    'label_free': 'measures that need no labels',
}
OLD_PROTOCOLS = {'spectrum': 'label_free'}  # as they were called
LINEAR, TUNED = ('linear',), ('semi', 'finetune')
# Steps of a run. On an H200 to compile ResNet-18 took 35 s, and saved 2.6 ms a step.
WORTH_COMPILING = 5000


def option(default, meaning, choices=None, low=None, high=None, used_by=READING, only=()):
    """One option: its default, its meaning with the unit, what values it admits (both bounds included), which commands
    it matters to, and which of evaluate's protocols alone."""
    if only:
        meaning, used_by = f'{", ".join(only)}: {meaning}', EVALUATE
    return field(
        default=default,
        metadata={'meaning': meaning, 'choices': choices, 'low': low, 'high': high, 'used_by': used_by, 'only': only},
    )


@dataclass
class Config:
    given, undecided, chosen = frozenset(), False, frozenset()  # of get_config; these are no options

    # What to work on
    preset: str = option(
        'auto',
        'set of defaults; auto: for the images of --image_path photos, or cifar10 where they are small; without it '
        'imagenet if data/imagenet/train is there, else demo',
        ('auto', 'photos', 'imagenet', 'cifar10', 'demo'),
        used_by=(*ALL, 'pack'),
    )
    image_path: str = option(
        'data/imagenet',
        'folder with train/, val/ and perhaps test/, or of class folders, or of images; .tar '
        'archives; a list of paths; for infer: the images',
        used_by=DATA,
    )
    val_fraction: float = option(
        0.1,
        'share of the labelled images of every class that becomes val where there is none; 0: none',
        low=0.0,
        high=0.9,
        used_by=SPLIT,
    )
    pixel_max: float = option(
        0.0,
        'pixels of more than 8 bits: the value that is white; 0: 65535 for integers, 1 for floats',
        low=0.0,
        high=3e38,
        used_by=DATA,
    )
    download: bool = option(
        False, 'fetch the set named by the last part of image_path: cifar10, cifar100 or stl10', used_by=SPLIT
    )
    image_size: int = option(224, 'side of a view, in pixels', low=8, high=1024, used_by=ALL)
    mean: str = option(
        'imagenet',
        "mean of each channel, subtracted from pixels in [0, 1]: ImageNet's, or numbers: 0.5,0.5,0.5; pretrained "
        'weights bring their own',
        used_by=ALL,
    )
    std: str = option(
        'imagenet', 'standard deviation of each channel, by which pixels are divided: as --mean', used_by=ALL
    )
    interpolation: str = option(
        'bilinear',
        'of resized crops, antialiased; pretrained weights bring their own',
        ('bilinear', 'bicubic'),
        used_by=ALL,
    )
    crop_ratio: float = option(0.875, 'evaluation: share of the shorter side in the centre crop', low=0.1, high=1.0)
    num_workers: int = option(
        -1,
        'processes that decode images; -1 is one per CPU core, shared by the processes of a machine',
        low=-1,
        high=1024,
    )
    device: str = option('auto', 'auto (CUDA if there is one, else the CPU), cpu, cuda, cuda:1, mps')
    cache_images: str = option(
        'auto',
        'hold decoded images in memory: auto (one size, up to 96 px and 4 GiB), on (one size), off',
        ('auto', 'on', 'off'),
    )
    resize_cache: int = option(
        0,
        'keep larger images on disk, decoded, with this shorter side in pixels: finer detail is lost; 0: no',
        low=0,
        high=4096,
    )
    cache_path: str = option(
        'data/cache', 'folder of what is kept for the next run: decoded images, indexes, trials', used_by=DATA
    )
    jpeg_shrink: bool = option(
        True, 'let the JPEG decoder halve photos whose crops stay at least twice the view', used_by=VIEWS
    )
    bad_images: str = option(
        'error',
        'unreadable images: error stops, skip leaves them out and names them in a file (reads all, once)',
        ('error', 'skip'),
        used_by=DATA,
    )
    quiet: bool = option(
        False,
        'say nothing but warnings and errors, show no bars; the log file of a run has it all',
        used_by=(*ALL, 'pack'),
    )
    random_seed: int = option(0, 'seed of the weights, the data order and the augmentation', low=0, high=2**31 - 1)

    # Augmentation (paper section 3; MoCo v2)
    augmentation: str = option(
        'moco', "distortion of the views: moco, or SimCLR's stronger one", ('moco', 'simclr'), used_by=VIEWS
    )
    warmup_augmentation: str = option('moco', 'distortion during the warmup_epochs', ('moco', 'simclr'), used_by=TRAIN)
    augment_on: str = option(
        'device',
        "device: a batch at a time; worker: torchvision's transforms, the slow reference",
        ('device', 'worker'),
        used_by=VIEWS,
    )
    views: int = option(
        2,
        'views of an image a step; above 2 each is compared with the mean z of the others (FastSiam)',
        low=2,
        high=16,
        used_by=VIEWS,
    )
    blur_prob: float = option(0.5, 'share of views that are blurred', low=0.0, high=1.0, used_by=VIEWS)

    # Model (paper section 3)
    model_name: str = option('simsiam', 'names the run folder: model_name_<this>_ckpt_<number>', used_by=TRAIN)
    backbone: str = option(
        'resnet50', 'the encoder: small, timm/<name>, or a classification network of torchvision', used_by=ALL[1:]
    )
    freeze_bn: bool = option(
        False,
        "keep the statistics of the backbone's BN as they are (eval mode); --init_from sets it for weights that are "
        'not of a run of this code',
        used_by=TRAIN,
    )
    freeze_bn_affine: bool = option(
        False, "with --freeze_bn: do not train the scale and shift of the backbone's BN either", used_by=TRAIN
    )
    heads_epochs: int = option(
        0,
        'first epochs, in which projector and predictor alone are trained; --init_from sets it, as --freeze_bn',
        low=0,
        high=1000,
        used_by=TRAIN,
    )
    backbone_lr_scale: float = option(
        1.0,
        "the backbone's learning rate is this times the projector's; --init_from sets it, as --freeze_bn",
        low=0.0,
        high=10.0,
        used_by=TRAIN,
    )
    start_share: float = option(
        0.0,
        'share of the pretrained weights in the backbone that is measured, evaluated and exported, the rest is the '
        'trained one (WiSE-FT, arXiv 2109.01903); --init_from sets it, as --freeze_bn',
        low=0.0,
        high=1.0,
        used_by=TRAIN,
    )
    stem: str = option(
        'imagenet', 'imagenet: 7x7 stride 2 and max-pool; cifar: 3x3 stride 1', ('imagenet', 'cifar'), used_by=ALL[1:]
    )
    zero_init: bool = option(
        True, 'the last BN of each residual block starts at zero, as in the official release; or at one', used_by=TRAIN
    )
    proj_layers: int = option(3, 'fully connected layers of the projector', low=1, high=10, used_by=ALL[1:])
    proj_dim: int = option(2048, 'width of the projector, and dimension of z and p', low=2, high=65536, used_by=ALL[1:])
    pred_dim: int = option(512, "width of the predictor's hidden layer", low=1, high=65536, used_by=ALL[1:])

    # What the paper takes away or changes to see what it is for (section 4); `ablate` runs these
    stop_gradient: bool = option(True, 'hold z constant in the loss (figure 2)', used_by=TRAIN)
    predictor: str = option(
        'mlp', 'mlp; none: p is z; fixed: never trained (table 1)', ('mlp', 'none', 'fixed'), used_by=ALL[1:]
    )
    proj_bn: str = option(
        'default',
        'BN in projector and predictor (table 3): none; hidden layers; default: and the output of the '
        'projector; all: and of the predictor',
        ('none', 'hidden', 'default', 'all'),
        used_by=ALL[1:],
    )
    similarity: str = option(
        'cosine',
        'in the loss (section 4.5): cosine, or cross-entropy of softmaxes',
        ('cosine', 'softmax'),
        used_by=TRAIN,
    )
    symmetric: str = option(
        'true',
        'each view predicts the other (true), the first the second (false), or two such pairs of views (2x)',
        ('true', 'false', '2x'),
        used_by=VIEWS,
    )

    # Optimisation (paper section 3)
    batch_size: int = option(512, 'images a step, of all processes together', low=2, high=65536)
    accumulate_steps: int = option(
        1,
        'parts of a step that go through the network one after the other, for small memories; BN sees a part alone',
        low=1,
        high=1024,
        used_by=TRAIN,
    )
    max_epochs: int = option(100, 'passes over the training images', low=1, high=100000, used_by=TRAIN)
    learning_rate: float = option(
        0.05, 'base learning rate: a step uses this x batch_size / 256', low=0.0, high=100.0, used_by=TRAIN
    )
    fix_pred_lr: bool = option(
        True, "keep the predictor's learning rate constant (the paper's best row)", used_by=TRAIN
    )
    optimizer: str = option(
        'sgd',
        "sgd, the paper's; adamw for networks without BN (ViT, ConvNeXt), with a --learning_rate near 0.002",
        ('sgd', 'adamw'),
        used_by=TRAIN,
    )
    momentum: float = option(0.9, 'momentum of SGD', low=0.0, high=0.9999, used_by=TRAIN)
    weight_decay: float = option(
        1e-4, 'L2 penalty on all parameters, biases and BN too', low=0.0, high=1.0, used_by=TRAIN
    )
    warmup_epochs: int = option(
        0,
        'first epochs: learning rate rises linearly, warmup_augmentation is used',
        low=0,
        high=1000,
        used_by=TRAIN,
    )

    max_minutes: float = option(
        0.0,
        'stop between two steps when this many minutes have passed, with a checkpoint; 0: no limit',
        low=0.0,
        high=1e6,
        used_by=TRAIN,
    )
    amp: str = option(
        'auto',
        'precision of the network: bf16 (CUDA, CPU), fp16 (CUDA), off (float32); auto: bf16 where the GPU has '
        'it (else fp16, with tensor cores), or a short trial on this CPU shows that it is at least 1.3 times as fast',
        ('auto', 'bf16', 'fp16', 'off'),
        used_by=('train', 'ablate', 'evaluate', 'infer', 'embed', 'report', 'select'),
    )
    compile: str = option(
        'auto',
        f'torch.compile: True, False, auto: on CUDA, where it works, for a run of {WORTH_COMPILING:,} steps or more',
        ('auto', 'True', 'False'),
        used_by=TRAIN,
    )
    cuda_graph: str = option(
        'auto',
        'record a step and replay it at one launch, on one GPU, not with fp16: True, False, auto: where launching it '
        'takes more than half of its time',
        ('auto', 'True', 'False'),
        used_by=TRAIN,
    )

    # Watching a run
    knn_every: int = option(5, 'epochs between two kNN tests on val; 0: never', low=0, high=100000, used_by=TRAIN)
    knn_k: int = option(
        200, 'neighbours that vote; fewer where a class has fewer images', low=1, high=100000, used_by=VOTING
    )
    knn_temperature: float = option(0.1, 'a vote weighs exp(cosine / this)', low=0.001, high=100.0, used_by=VOTING)
    collapse_threshold: float = option(
        0.25,
        'warn when std(z / |z|) x sqrt(proj_dim) falls under this; healthy is near 1',
        low=0.0,
        high=1.0,
        used_by=TRAIN,
    )
    tracker: str = option(
        'none',
        'where the scalars also go; offline, project, server: by its own variables (WANDB_MODE=offline)',
        ('none', 'wandb', 'trackio', 'mlflow'),
        used_by=EVALUATE,
    )
    save_every: int = option(
        10, 'epochs between two checkpoints; the last is always kept', low=1, high=100000, used_by=TRAIN
    )
    save_minutes: float = option(
        15.0,
        'minutes after which a checkpoint is saved within an epoch too; 0: never',
        low=0.0,
        high=1e6,
        used_by=TRAIN,
    )
    keep_last: int = option(
        0, 'checkpoints of a run that are kept, the older ones are deleted; 0: all', low=0, high=100000, used_by=TRAIN
    )
    resume: str = option(
        '', 'auto: go on with the newest run of these options, or start it; or the name of a run', used_by=TRAIN
    )
    from_run: str = option('', 'a run whose options are taken, to repeat it as a new run', used_by=TRAIN)

    # Evaluation
    evaluate_after: bool = option(False, 'evaluate the last checkpoint when training ends', used_by=TRAIN)
    protocol: str = option(
        'linear', '; '.join(f'{name}: {what}' for name, what in PROTOCOLS.items()), (*PROTOCOLS,), used_by=EVALUATE
    )
    beside: str = option(
        'untrained,start',
        'backbones in rows of their own, with commas between: untrained, start (of the run), imagenet, timm/<name>, a '
        'run, a file; given alone it means --protocol=compare',
        only=('compare',),
    )
    labels: str = option('1,5,10,30', 'numbers of labelled images a class, with commas between', only=('compare',))
    draws: int = option(
        5, 'draws of the labelled images, the same for every backbone', low=1, high=1000, only=('compare',)
    )
    knn_pixels: bool = option(False, 'also report the kNN accuracy of raw pixels', used_by=EVALUATE)
    crop_scale: float = option(
        0.08,
        'smallest share of the area in a training crop',
        low=0.01,
        high=1.0,
        only=(*LINEAR, *TUNED),
    )
    probe_optimizer: str = option('lars', 'LARS (paper, appendix A) or SGD', ('lars', 'sgd'), only=LINEAR)
    probe_epochs: int = option(90, 'epochs of the classifier', low=1, high=10000, only=LINEAR)
    probe_batch_size: int = option(
        0,
        'images a step, whatever the memory holds at once; 0: 4096 (lars), 256 (sgd)',
        low=0,
        high=65536,
        only=LINEAR,
    )
    probe_learning_rate: float = option(
        0.0,
        'base learning rate, x batch / 256; 0: 0.02 (lars), 30 (sgd)',
        low=0.0,
        high=1000.0,
        only=LINEAR,
    )
    cache_features: bool = option(
        False,
        'extract the features of some augmented passes once, and train on them: many times faster',
        only=LINEAR,
    )
    cache_passes: int = option(4, 'augmented passes that --cache_features keeps', low=1, high=1000, only=LINEAR)
    label_fraction: float = option(
        0.1, 'share of the labels, the same number of every class', low=0.0001, high=1.0, only=('semi',)
    )
    subset_list: str = option(
        '', 'a file with the names of the labelled images, one a line, in its place', only=('semi',)
    )
    baseline: bool = option(False, 'also train from scratch on the same labels', only=TUNED)
    finetune_epochs: int = option(50, 'epochs', low=1, high=100000, only=TUNED)
    finetune_batch_size: int = option(256, 'images a step', low=2, high=65536, only=TUNED)
    finetune_learning_rate: float = option(
        0.05,
        'base learning rate of the backbone, x batch / 256',
        low=0.0,
        high=100.0,
        only=TUNED,
    )
    head_learning_rate: float = option(
        1.0,
        'base learning rate of the new linear head, x batch / 256',
        low=0.0,
        high=1000.0,
        only=TUNED,
    )
    baseline_learning_rate: float = option(
        0.1,
        'of the --baseline: base learning rate of the whole network, x batch / 256',
        low=0.0,
        high=100.0,
        only=TUNED,
    )
    finetune_warmup: float = option(0.1, 'share of the epochs in which the rates rise', low=0.0, high=0.9, only=TUNED)
    finetune_weight_decay: float = option(1e-4, 'L2 penalty', low=0.0, high=1.0, only=TUNED)
    transfer_path: str = option('', 'folder with train/<class>/ and val/<class>/', only=('transfer',))
    transfer: str = option(
        'linear',
        'logistic regression on frozen features (linear), l2 chosen on a held-out fifth of train; or finetune',
        ('linear', 'finetune'),
        only=('transfer',),
    )
    detection_path: str = option('', 'folder in the format of VOC or COCO', only=('detection',))
    detector: str = option(
        'faster_rcnn',
        'torchvision detector, with a feature pyramid',
        ('faster_rcnn', 'mask_rcnn'),
        only=('detection',),
    )
    init: str = option(
        'checkpoint',
        'start from the checkpoint, or random: the baseline',
        ('checkpoint', 'random'),
        only=('detection',),
    )
    detection_epochs: int = option(12, 'epochs', low=1, high=1000, only=('detection',))
    detection_batch_size: int = option(16, 'images a step', low=1, high=1024, only=('detection',))
    detection_learning_rate: float = option(
        0.02, 'learning rate, x batch / 16', low=0.0, high=10.0, only=('detection',)
    )
    detection_size: int = option(
        800,
        'shorter side of an image, in pixels; the longer is at most 5/3 of it',
        low=32,
        high=4096,
        only=('detection',),
    )

    # Files
    ckpt_path: str = option(
        'data/checkpoints', 'folder of the run folders with checkpoints', used_by=(*ALL[1:], 'runs')
    )
    ckpt_name: str = option(
        '',
        'checkpoint under ckpt_path: <run>/loss_<loss>_epoch_<n>, or <run> for its newest; or weights as --init_from '
        'has them',
        used_by=ALL[1:],
    )
    log_path: str = option(
        'data/logs',
        'folder of TensorBoard logs and pictures',
        used_by=('check_dataloader', 'train', 'evaluate', 'embed', 'ablate', 'report'),
    )
    init_from: str = option(
        '',
        "start a new run from these weights: imagenet (torchvision's), timm or timm/<name>.<tag> (timm's), a run, or a "
        'file of another tool',
        used_by=TRAIN,
    )
    table: str = option(
        'stopgrad',
        "which of the paper's tables, or collapse: what goes wrong, and what helps",
        ('stopgrad', 'predictor', 'batch_size', 'bn', 'similarity', 'symmetric', 'collapse'),
        used_by=('ablate',),
    )
    output: str = option(
        '',
        'the file to write; in data/: infer submission.csv, embed features.npz (.csv, .parquet), export backbone.pth, '
        'or a folder, select selected.csv; report: a page; runs: a CSV file; pack: a folder',
        used_by=('infer', 'embed', 'export', 'pack', 'select', 'report', 'runs'),
    )
    sort: str = option(
        'run',
        'runs: the column that they are sorted by, the best first',
        ('run', 'state', 'epoch', 'loss', 'std', 'knn', 'rank', 'linear'),
        used_by=('runs',),
    )
    diff: str = option('', 'runs: two runs whose options are compared, RUN1,RUN2', used_by=('runs',))
    count: int = option(100, 'select: images to label first', low=1, high=10**6, used_by=('select',))
    method: str = option(
        'typical',
        'select: the most typical of as many clusters, or each the farthest from all before',
        ('typical', 'kcentre'),
        used_by=('select',),
    )
    duplicates: float = option(
        0.99, 'cosine above which two images count as double', low=-1.0, high=1.0, used_by=('select', 'report')
    )
    map_images: int = option(
        3000, 'report: images on the map, with thumbnails in the page', low=10, high=20000, used_by=('report',)
    )
    pack_side: int = option(
        0,
        'pack: shorter side of the packed images, in pixels, as JPEG; 0: the files as they are',
        low=0,
        high=4096,
        used_by=('pack',),
    )
    shard_megabytes: float = option(
        1000.0, 'pack: size at which the next archive begins', low=0.001, high=1e6, used_by=('pack',)
    )
    classifier: str = option(
        '',
        'infer: the classifier of evaluate that predicts: its file, or the folder of the set that it was trained on',
        used_by=('infer',),
    )
    neighbours: int = option(
        0,
        'infer: also save a picture of some images beside their nearest training images',
        low=0,
        high=50,
        used_by=('infer',),
    )
    projector_images: int = option(
        1000, "embed: images in TensorBoard's projector, with thumbnails; 0: none", low=0, high=8000, used_by=('embed',)
    )
    format: str = option(
        'torchvision',
        'export: the tool that is to load the backbone',
        ('torchvision', 'timm', 'detectron2', 'onnx', 'safetensors'),
        used_by=('export',),
    )


PRESETS = {
    'imagenet': {},
    # A few thousand photographs, from pretrained weights; engine/auto_preset.py sets the rest.
    'photos': {
        'proj_layers': 2,
        'learning_rate': 0.4,
        'batch_size': 64,
        'max_epochs': 12,
        'image_size': 160,
        'knn_k': 20,
        'knn_every': 2,
    },
    # Appendix D: 0.03 x batch / 256, weight decay 5e-4, 800 epochs, two-layer projector, no blur.
    'cifar10': {
        'image_path': 'data/cifar10',
        'image_size': 32,
        'crop_ratio': 1.0,
        'blur_prob': 0.0,
        'backbone': 'resnet18',
        'stem': 'cifar',
        'proj_layers': 2,
        'learning_rate': 0.03,
        'weight_decay': 5e-4,
        'max_epochs': 800,
        'probe_optimizer': 'sgd',
        'probe_epochs': 100,
    },
    # Our own drawings (dataloader/sources/demo.py), tuned to learn in about two minutes on two CPU cores.
    'demo': {
        'image_path': 'data/demo',
        'image_size': 32,
        'crop_ratio': 1.0,
        'blur_prob': 0.0,
        'backbone': 'small',
        'stem': 'cifar',
        'proj_layers': 2,
        'proj_dim': 512,
        'pred_dim': 128,
        'batch_size': 64,
        'learning_rate': 0.8,
        'weight_decay': 5e-4,
        'max_epochs': 15,
        'probe_optimizer': 'sgd',
        'probe_epochs': 300,
        'probe_learning_rate': 100.0,
        'cache_features': True,
        'crop_scale': 1.0,  # the size of a pattern matters here
    },
}

# What --init_from sets, where it is not given, for weights that are not of a run of this code.
GOING_ON = {'freeze_bn': True, 'heads_epochs': 2, 'backbone_lr_scale': 0.1, 'start_share': 0.5}

# The distortions. `scale` is the share of the area that a crop covers; `jitter` the strengths of brightness, contrast,
# saturation and hue; the rest are probabilities, and `sigma` the blur's range in pixels of the view.
AUGMENTATIONS = {
    'moco': {  # MoCo v2, the paper's (section 3)
        'scale': (0.2, 1.0),
        'ratio': (3 / 4, 4 / 3),
        'flip': 0.5,
        'jitter': (0.4, 0.4, 0.4, 0.1),
        'jitter_prob': 0.8,
        'gray_prob': 0.2,
        'sigma': (0.1, 2.0),
    },
    'crop': {  # with labels (paper, appendix A): a random resized crop, from --crop_scale on, and a flip
        'scale': (None, 1.0),
        'ratio': (3 / 4, 4 / 3),
        'flip': 0.5,
        'jitter': (0.0, 0.0, 0.0, 0.0),
        'jitter_prob': 0.0,
        'gray_prob': 0.0,
        'sigma': (0.1, 2.0),
    },
    'simclr': {  # SimCLR (arXiv 2002.05709, appendix A) at strength 1
        'scale': (0.08, 1.0),
        'ratio': (3 / 4, 4 / 3),
        'flip': 0.5,
        'jitter': (0.8, 0.8, 0.8, 0.2),
        'jitter_prob': 0.8,
        'gray_prob': 0.2,
        'sigma': (0.1, 2.0),
    },
}


# Mean and standard deviation of the pixels of ImageNet, red, green and blue, in [0, 1].
IMAGENET_PIXELS = {'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225)}


def channel_values(name, text):
    """The values of --mean or --std (`name`), a number a channel. Raises UserError for what is neither `imagenet` nor
    three numbers, or one for all."""
    if text.strip() == 'imagenet':
        return IMAGENET_PIXELS[name]
    try:
        values = tuple(float(part) for part in text.strip('()[] ').split(','))
    except ValueError:
        values = ()
    values = values * 3 if len(values) == 1 else values
    low = 0.0 if name == 'mean' else 1e-3
    if len(values) != 3 or not all(low <= value <= 1 for value in values):
        raise UserError(
            f'--{name} is imagenet, or three numbers between {low:g} and 1, such as --{name}=0.5,0.5,0.5, not {text!r}'
        )
    return values


def distortion(args, name):
    """The row `name` of AUGMENTATIONS, with the views' size (px), the share of them that is blurred, and how their
    pixels are resized and normalized."""
    row = {**AUGMENTATIONS[name], 'size': args.image_size, 'blur_prob': args.blur_prob}
    row |= {'mean': args.mean, 'std': args.std, 'interpolation': args.interpolation}
    return {**row, 'scale': (args.crop_scale, 1.0), 'blur_prob': 0.0} if name == 'crop' else row


OPTIONS = {f.name: f for f in fields(Config)}
# Themes of --help, by the first option of each in Config; and what people set most.
THEMES = {
    'Data': 'preset',
    'Views': 'augmentation',
    'Model': 'model_name',
    'The method, changed': 'stop_gradient',
    'Optimisation': 'batch_size',
    'Watching': 'knn_every',
    'Evaluation': 'evaluate_after',
    'Files': 'ckpt_path',
    'What a command makes': 'table',
}
OFTEN = (
    'preset',
    'image_path',
    'ckpt_name',
    'protocol',
    'backbone',
    'batch_size',
    'max_epochs',
    'learning_rate',
    'augmentation',
    'resume',
    'model_name',
    'output',
    'count',
    'sort',
    'diff',
    'format',
    'table',
    'image_size',
    'random_seed',
    'device',
    'num_workers',
    'amp',
    'ckpt_path',
)
TRUE, FALSE = ('true', '1', 'yes', 'on'), ('false', '0', 'no', 'off')

# What options are called in the official release, lightly, solo-learn, timm and torchvision's references.
ELSEWHERE = {
    'arch': 'backbone',
    'model': 'backbone',
    'data': 'image_path',
    'data_dir': 'image_path',
    'data_path': 'image_path',
    'dataset': 'image_path',
    'train_dir': 'image_path',
    'root': 'image_path',
    'j': 'num_workers',
    'b': 'batch_size',
    'e': 'max_epochs',
    'epochs': 'max_epochs',
    'gpu': 'device',
    'gpus': 'device',
    'accelerator': 'device',
    'precision': 'amp',
    'fp16': 'amp',
    'bf16': 'amp',
    'dim': 'proj_dim',
    'temp': 'knn_temperature',
    'k': 'knn_k',
    'name': 'model_name',
    'exp_name': 'model_name',
    'checkpoint': 'ckpt_name',
    'ckpt': 'ckpt_name',
    'pretrained': 'init_from',
    'weights': 'init_from',
    'output_dir': 'ckpt_path',
    'save_dir': 'ckpt_path',
    'crop_size': 'image_size',
    'img_size': 'image_size',
    'input_size': 'image_size',
    'num_crops': 'views',
    'aug': 'augmentation',
    'opt': 'optimizer',
    'warmup': 'warmup_epochs',
    'accum_iter': 'accumulate_steps',
    'grad_accum': 'accumulate_steps',
}


def get_config(**options):
    """The resolved options: defaults, then the preset, then `options` (strings as typed, or values).

    The result has one attribute per option, and `given`, the names that were set explicitly; `undecided`, whether the
    preset depends on the images (photos.choose_preset), and `chosen`, the names that were set for them.
    Raises UserError for an unknown name (naming the nearest one), a wrong type or a value out of range.
    """
    for name, value in options.items():
        if str(value).strip() == '':  # --resume="$RUN" where RUN is not set is not the same as no --resume
            raise UserError(f'--{name} is given as nothing (a variable that is not set?): leave it out, or say what')
    given = {name: parse(name, value) for name, value in options.items()}
    preset = given.get('preset', 'auto')
    undecided = preset == 'photos' or (preset == 'auto' and 'image_path' in given)
    if preset == 'auto':
        given.pop('preset', None)
        preset = 'imagenet' if undecided or (ROOT / 'data/imagenet/train').is_dir() else 'demo'
    if 'beside' in given and 'protocol' not in given:
        given['protocol'] = 'compare'
    args = Config(**{**PRESETS[preset], **given, 'preset': preset})
    args.given, args.undecided = set(given), undecided
    return args


def changed(args, **changes):
    """A copy of args with other values, which still knows what was given explicitly."""
    copy = replace(args, **changes)
    copy.given, copy.undecided, copy.chosen = args.given, args.undecided, args.chosen
    return copy


def parse(name, value):
    """`value` (a string from the command line, or already typed) as option `name` wants it; else UserError."""
    if name not in OPTIONS:
        raise UserError(f'unknown option --{name}; the nearest is --{meant(name)} (--help lists all)')
    wanted, limits = OPTIONS[name].type, OPTIONS[name].metadata
    value = OLD_PROTOCOLS.get(value, value) if name == 'protocol' else value
    text = str(value).strip()
    try:
        if wanted is bool:
            result = {**dict.fromkeys(TRUE, True), **dict.fromkeys(FALSE, False)}[text.lower()]
        elif wanted is int and isinstance(value, float) and value.is_integer():
            result = int(value)
        else:
            result = str(value) if wanted is str and not limits['choices'] else wanted(text)
        if wanted is float and not math.isfinite(result):
            raise ValueError
    except (KeyError, ValueError):
        kind = {bool: 'True or False', int: 'a whole number', float: 'a number', str: 'text'}[wanted]
        raise UserError(f'--{name} wants {kind}, not {text!r}: {limits["meaning"]}') from None
    if limits['choices'] and result not in limits['choices']:
        near = nearest(text, limits['choices'])
        raise UserError(f'--{name} is one of {", ".join(limits["choices"])}, not {text!r}; the nearest is {near}')
    low, high = limits['low'], limits['high']
    if low is not None and not low <= result <= high:
        raise UserError(f'--{name} must lie between {low} and {high}, not {text}: {limits["meaning"]}')
    if name in IMAGENET_PIXELS:
        channel_values(name, result)
    if name == 'model_name' and not (result.replace('-', '').replace('_', '').replace('.', '').isalnum()):
        raise UserError(f'--model_name names a folder: letters, digits, "-", "_" and "." only, not {text!r}')
    if name == 'model_name' and len(result.encode()) > 200:
        raise UserError(f'--model_name names a folder: 200 bytes at most, not {len(result.encode())}')
    return result


def meant(name):
    """The option that somebody means who writes `name`: as the field's other programs call it, by its initials, by a
    part of it, or spelled nearly as it is."""
    name = name.lower().replace('-', '_')
    if name in ELSEWHERE:
        return ELSEWHERE[name]
    initials = [option for option in OPTIONS if ''.join(part[0] for part in option.split('_')) == name]
    parts = [option for option in OPTIONS if name in option.split('_')]
    return [*initials, *parts, nearest(name, OPTIONS)][0]


def nearest(word, words):
    """The one of `words` that is spelled most like `word`."""
    return difflib.get_close_matches(word, words, n=1, cutoff=0.0)[0]


def help_text(command):
    """The options that `command` uses, the most used first, then by theme, each with its default and meaning; and what
    the presets change."""
    names = [name for name, f in OPTIONS.items() if command in f.metadata['used_by']]
    often = [name for name in OFTEN if name in names][:10]
    lines = ['Most used', *map(help_line, often)]
    for theme, group in themes().items():
        rest = [name for name in group if name in names and name not in often]
        lines += [f'\n{theme}', *map(help_line, rest)] if rest else []
    lines.append('\nPresets change these defaults:')
    for preset, changes in PRESETS.items():
        said = ' '.join(f'--{name}={value}' for name, value in changes.items())
        lines.append(f'  {preset}: {said or "none, the defaults are its values"}')
    return '\n'.join(lines)


def themes():
    """{theme: its options}, in the order of Config."""
    found, first = {}, {name: theme for theme, name in THEMES.items()}
    for name in OPTIONS:
        theme = first.get(name) or [*found][-1]
        found.setdefault(theme, []).append(name)
    return found


def help_line(name):
    """An option with its default, meaning and choices."""
    f = OPTIONS[name]
    default = repr(f.default) if f.default == '' else f.default
    choices = f' [{" | ".join(f.metadata["choices"])}]' if f.metadata['choices'] else ''
    return f'  --{name}={default}'.ljust(36) + f.metadata['meaning'] + choices


def help_of(name):
    """All there is to say of one option. Raises UserError where there is none of this name."""
    name = name.lstrip('-').replace('-', '_').lower()
    if name not in OPTIONS:
        raise UserError(f'--help={name}: there is no such option; the nearest is --help={meant(name)}')
    f = OPTIONS[name]
    limits, kind = f.metadata, {bool: 'True or False', int: 'a whole number', float: 'a number', str: 'text'}[f.type]
    lines = [f'--{name}, {kind}: {limits["meaning"]}', f'default    {f.default!r}']
    if limits['choices']:
        lines.append(f'one of     {", ".join(limits["choices"])}')
    if limits['low'] is not None:
        lines.append(f'between    {limits["low"]:g} and {limits["high"]:g}')
    lines += [f'preset     {preset}: {changes[name]!r}' for preset, changes in PRESETS.items() if name in changes]
    lines.append(f'theme      {next(theme for theme, names in themes().items() if name in names)}')
    lines.append(f'used by    {", ".join(limits["used_by"])}')
    return '\n'.join(lines)


def unused(args, command):
    """The explicitly given options that `command` has no use for, to be said and not silently dropped."""
    return sorted(name for name in args.given if command not in OPTIONS[name].metadata['used_by'])


def idle(args):
    """(name, what takes its effect away) of each explicitly given option that does nothing in train beside others."""
    found = {
        '--optimizer=adamw': ('momentum',) if args.optimizer == 'adamw' else (),
        '--predictor=none': ('pred_dim', 'fix_pred_lr') if args.predictor == 'none' else (),
        '--predictor=fixed': ('fix_pred_lr',) if args.predictor == 'fixed' else (),
        '--warmup_epochs=0': ('warmup_augmentation',) if not args.warmup_epochs else (),
        '--augment_on=worker': ('cache_images',) if args.augment_on == 'worker' and args.cache_images == 'on' else (),
        '--init_from': ('zero_init',) if args.init_from else (),
        '--freeze_bn=False': ('freeze_bn_affine',) if not args.freeze_bn else (),
        '--knn_every=0': ('knn_k', 'knn_temperature') if not args.knn_every and not args.evaluate_after else (),
    }
    return [(name, beside) for beside, names in found.items() for name in names if name in args.given]


def places(args, *more):
    """What a printed command has to repeat of this call: where its runs are, and `more` options, where given."""
    named = [name for name in ('ckpt_path', 'log_path', *more) if name in args.given]
    return ''.join(f' {shlex.quote(f"--{name}={getattr(args, name)}")}' for name in named)


# Options that name files or folders: two spellings of one path are one value.
PATHS = (
    'image_path',
    'transfer_path',
    'detection_path',
    'subset_list',
    'init_from',
    'ckpt_path',
    'log_path',
    'cache_path',
)


def same_path(one, other):
    """Whether two paths lead to one place: with or without / at the end, by way of .., of links."""
    return os.path.realpath(one) == os.path.realpath(other)


def same_value(name, one, other):
    """Whether two values of an option mean the same."""
    return one == other or (name in PATHS and bool(one) and bool(other) and same_path(path_of(one), path_of(other)))


def path_of(text):
    """An option's path as an absolute one: relative paths start at the repository's root."""
    try:
        return ROOT / Path(text).expanduser()
    except RuntimeError:
        raise UserError(f'{text}: there is no such user whose home it could be in') from None
