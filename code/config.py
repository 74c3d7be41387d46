"""All options: names, defaults, units and meanings. Standard library only.

The defaults are the paper's ImageNet baseline (arXiv 2011.10566, section 3 and appendix A). A preset overrides
defaults; the command line overrides both (runtime/options.py parses it).
"""

import ast
import itertools
from dataclasses import Field, dataclass, field, fields
from pathlib import Path

# Groups of commands that use an option.
MODEL_COMMANDS = ('check_dataloader', 'train', 'evaluate', 'infer', 'embed', 'export', 'ablate', 'report', 'select')
EVERY, NETWORK = (*MODEL_COMMANDS, 'pack'), MODEL_COMMANDS[1:]
IMAGE_COMMANDS = tuple(command for command in MODEL_COMMANDS if command != 'export')  # images and a network
DATA = (*IMAGE_COMMANDS, 'pack')
SPLIT_COMMANDS = tuple(command for command in DATA if command != 'embed')  # use train and val
TRAIN = ('train', 'ablate')
AUGMENT_COMMANDS = ('check_dataloader', *TRAIN)
FORWARD = ('train', 'ablate', 'evaluate', 'infer', 'embed', 'report', 'select')  # run a network
LOGGING = ('check_dataloader', 'train', 'evaluate', 'embed', 'ablate', 'report')
KNN_COMMANDS = ('train', 'evaluate', 'ablate', 'infer', 'report')  # use kNN
# The protocols of evaluate: each is a file protocols/<name>.py.
PROTOCOLS = {
    'linear': 'a linear classifier on frozen features',
    'knn': 'nearest neighbors among frozen features',
    'compare': 'compared with other backbones, also with few labels',
    'semi': 'fine-tuned on few labels',
    'transfer': 'on the images of --transfer_path',
    'detection': 'object detection on --detection_path',
    'label_free': 'measures that need no labels',
}
# Former names of options and values, which still work, also in checkpoints.
RENAMED_OPTIONS = {
    'pixel_max': 'white_level',
    'jpeg_shrink': 'jpeg_draft',
    'resize_cache': 'cache_short_side',
    'bad_images': 'on_unreadable',
    'views': 'num_views',
    'augment_on': 'augment_backend',
    'accumulate_steps': 'grad_accum_steps',
    'symmetric': 'loss_symmetry',
    'knn_pixels': 'knn_raw_pixels',
    'cache_passes': 'cache_epochs',
    'save_every': 'save_every_epochs',
    'save_minutes': 'save_every_minutes',
    'keep_last': 'keep_checkpoints',
    'table': 'ablation',
    'count': 'num_select',
    'method': 'select_method',
    'map_images': 'report_max_images',
    'pack_side': 'pack_short_side',
    'init': 'detector_init',
    'neighbours': 'neighbors',
}
RENAMED_VALUES = {'protocol': {'spectrum': 'label_free'}, 'select_method': {'kcentre': 'kcenter'}}
EVAL_COMMANDS = ('train', 'evaluate', 'ablate')
LINEAR, FINETUNE_STAGES = ('linear',), ('semi', 'finetune')


def option(default, choices=None, between=(None, None), used_by=(), only=(), **more):
    """Define an option; the string below it is its meaning, with the unit. choices: the allowed values, or a dict of
    them with their meanings; between: bounds, both included; used_by: commands that use it; only: protocols of evaluate
    that use it (both default to the theme's). more: aliases: names in other programs; often: rank among the most used
    options; local: it belongs to this call and machine and is not restored from checkpoints; is_path: compare values as
    paths."""
    metadata = {'choices': choices, 'low': between[0], 'high': between[1], 'used_by': used_by, 'only': only}
    return field(default=default, metadata={**metadata, **more})


def read_meanings(path):
    """Return {option: the string below it} of the classes in a file. Python does not store such strings (PEP 257)."""
    meanings = {}
    for node in ast.parse(Path(path).read_text(encoding='utf-8')).body:
        for one, following in itertools.pairwise(node.body) if isinstance(node, ast.ClassDef) else ():
            if isinstance(one, ast.AnnAssign) and isinstance(following, ast.Expr):
                meanings[one.target.id] = ' '.join(following.value.value.split())
    return meanings


MEANINGS = read_meanings(__file__)


def theme(title, used_by=EVAL_COMMANDS, only=()):
    """Class decorator: make a dataclass of options. title: in --help; used_by, only: defaults for its options (see
    `option`)."""

    def make(options):
        for name, value in vars(options).items():
            if isinstance(value, Field):
                metadata = {'aliases': '', 'often': 0, 'local': False, 'is_path': False, **value.metadata}
                metadata['only'] = metadata['only'] or only
                metadata['used_by'] = metadata['used_by'] or (EVAL_COMMANDS if metadata['only'] else used_by)
                protocols = ', '.join(metadata['only']).replace('finetune', 'transfer=finetune')
                metadata['meaning'] = protocols + ': ' * bool(protocols) + MEANINGS[name]
                if isinstance(metadata['choices'], dict):
                    metadata['meaning'] += ' ' + '; '.join(
                        f'{choice}: {meaning}' for choice, meaning in metadata['choices'].items()
                    )
                    metadata['choices'] = tuple(metadata['choices'])
                value.metadata = {**metadata, 'theme': title}
        return dataclass(options)

    return make


@theme('Data', used_by=IMAGE_COMMANDS)  # What to work on
class DataOptions:
    preset: str = option('auto', ('auto', 'photos', 'imagenet', 'cifar10', 'demo'), used_by=EVERY, often=1)
    """set of defaults; auto: with --image_path photos, or cifar10 if the images are small; without it imagenet if
    data/imagenet/train exists, else demo"""
    image_path: str = option(
        'data/imagenet', used_by=DATA, aliases='data data_dir data_path dataset train_dir root', often=2, is_path=True
    )
    """folder with train/, val/ and perhaps test/, or of class folders, or of images; .tar archives; Parquet files; a
    list of paths; for infer: the images to predict"""
    val_fraction: float = option(0.1, between=(0.0, 0.9), used_by=SPLIT_COMMANDS)
    """share of the labeled images of every class that is held out as val if there is none; 0: none"""
    channels: str = option('auto', used_by=(*NETWORK, 'check_dataloader'), aliases='in_chans in_channels bands')
    """channels of the images. auto: those of the first images, gray becomes three equal channels; rgb: red, green and
    blue; 1,3,4: these, in this order; 1-5: all of five"""
    white_level: str = option('type', used_by=DATA)
    """white level of pixels with more than 8 bits, or black and white level (-1024,3071). type: 65535 for integers, 1
    for floats; auto: measured on some images"""
    exif: str = option('apply', ('apply', 'ignore'), used_by=DATA, aliases='exif_transpose')
    """EXIF orientation of photographs. apply: rotate them upright; ignore: use them as stored"""
    npy_axes: str = option('auto', ('auto', 'hwc', 'chw'), used_by=DATA)
    """order of the axes in .npy files: height, width, channels or channels, height, width; auto: by their lengths"""
    download: bool = option(False, used_by=SPLIT_COMMANDS, local=True)
    """download the dataset that the last part of image_path names: cifar10, cifar100 or stl10"""
    image_size: int = option(
        224, between=(8, 1024), used_by=MODEL_COMMANDS, aliases='crop_size img_size input_size', often=18
    )
    """side of a view, in pixels"""
    mean: str = option('auto', used_by=MODEL_COMMANDS)
    """mean of each channel, subtracted from pixels in [0, 1]: numbers (0.5,0.5,0.5), imagenet, weights (those of the
    pretrained weights), dataset (measured on some images of train); auto: weights, else imagenet for 8-bit RGB, else
    dataset"""
    std: str = option('auto', used_by=MODEL_COMMANDS)
    """standard deviation of each channel, by which pixels are divided; values as for --mean"""
    interpolation: str = option('bilinear', ('bilinear', 'bicubic'), used_by=MODEL_COMMANDS)
    """interpolation of resized crops, antialiased; pretrained weights set it"""
    crop_ratio: float = option(0.875, between=(0.1, 1.0), used_by=MODEL_COMMANDS)
    """share of the shorter side in the center crop of evaluation"""
    num_workers: int = option(-1, between=(-1, 1024), aliases='j', often=21, local=True)
    """dataloader workers of each rank; -1: the CPU cores divided by the ranks of the machine"""
    device: str = option('auto', aliases='gpu gpus accelerator', often=20, local=True)
    """auto (CUDA if there is one, else the CPU), cpu, cuda, cuda:1, mps"""
    cache_images: str = option('auto', ('auto', 'on', 'off'))
    """keep decoded images in memory: auto (if all have one size, up to 96 px and 4 GiB in all), on (all of one size),
    off"""
    cache_short_side: int = option(0, between=(0, 4096))
    """cache larger images on disk, decoded and resized to this shorter side, in pixels; 0: no cache"""
    cache_path: str = option('data/cache', used_by=DATA, local=True, is_path=True)
    """folder of caches: decoded images, indexes of archives, benchmarks"""
    jpeg_draft: bool = option(True, used_by=AUGMENT_COMMANDS)
    """let the JPEG decoder downscale photos if crops stay at least twice the size of the view"""
    on_unreadable: str = option('error', ('error', 'skip'), used_by=DATA)
    """unreadable images: error stops; skip leaves them out and lists them in a file (decodes all images once)"""
    quiet: bool = option(False, used_by=EVERY, local=True)
    """print only warnings and errors, no progress bars; the log file of a run has all lines"""
    random_seed: int = option(0, between=(0, 2**31 - 1), often=19)
    """seed of the weights, the data order and the augmentation"""


@theme('Views', used_by=AUGMENT_COMMANDS)  # Augmentation (paper section 3; MoCo v2)
class ViewOptions:
    augmentation: str = option('moco', ('moco', 'simclr', 'mild'), aliases='aug', often=9)
    """augmentation of the views: moco, the stronger simclr, or the weaker mild, which --init_from sets for weights that
    are not from a run of this code"""
    warmup_augmentation: str = option('moco', ('moco', 'simclr', 'mild'), used_by=TRAIN)
    """augmentation during the warmup_epochs"""
    augment_backend: str = option('device', ('device', 'worker'))
    """device: batched operations, for a CPU in the dataloader workers; worker: torchvision's transforms, slow"""
    jitter: str = option('image', ('image', 'channel'))
    """brightness and contrast. image: the same for all channels, for RGB with saturation and hue; channel: a gain and
    an offset for each channel"""
    num_views: int = option(2, between=(2, 16), aliases='num_crops')
    """views per image and step; with more than 2 each predicts the mean z of the others (FastSiam)"""
    blur_prob: float = option(0.5, between=(0.0, 1.0))
    """probability that a view is blurred"""


@theme('Model', used_by=TRAIN)  # The network (paper section 3), and training on from pretrained weights
class ModelOptions:
    model_name: str = option('simsiam', aliases='name exp_name', often=11)
    """name of the run folder: model_name_<model_name>_ckpt_<number>"""
    backbone: str = option('resnet50', used_by=MODEL_COMMANDS, aliases='arch model', often=5)
    """small, timm/<name>, or a classification network of torchvision"""
    freeze_bn: bool = option(False)
    """keep the backbone's BN in eval mode, with its running statistics; --init_from sets it for weights that are not
    from a run of this code"""
    freeze_bn_affine: bool = option(False)
    """with --freeze_bn: do not train the scale and shift of the backbone's BN either"""
    heads_epochs: int = option(0, between=(-1, 1000))
    """first epochs, in which only projector and predictor are trained (and, without --freeze_bn, the backbone's BN
    statistics move); -1: the epochs of 80 steps; --init_from may set it: see --freeze_bn"""
    trained_share: float = option(1.0, between=(0.001, 1.0))
    """share of the backbone's weights that are trained, from the last layer on; the first layers stay as they are (but
    for BN statistics without --freeze_bn)"""
    backbone_lr_scale: float = option(1.0, between=(0.0, 10.0))
    """learning rate of the backbone divided by the projector's; --init_from may set it: see --freeze_bn"""
    start_share: float = option(0.0, between=(0.0, 1.0), used_by=NETWORK)
    """weight of the initial weights in their average with the trained ones, which is evaluated and exported;
    training measures kNN and few labels of it (WiSE-FT, arXiv 2109.01903); --init_from may set it: see --freeze_bn"""
    distill_weight: float = option(0.0, between=(0.0, 1000.0))
    """weight of the distillation loss, 1 - cosine similarity of the features of a view and those that the initial
    weights give to the center crop of the image at --distill_size (engine/teacher.py). This loss is logged beside
    SimSiam's, without the weight. --init_from may set it: see --freeze_bn"""
    distill_size: int = option(0, between=(0, 1024))
    """side of the images for --distill_weight, in pixels; 0: 224, or image_size if that is larger, or if the network
    accepts no other size or has the stem cifar"""
    distill_neighbors: int = option(10, between=(0, 1000))
    """nearest training images whose features are averaged with those of the image, for --distill_weight; 0: none"""
    stem: str = option('imagenet', ('imagenet', 'cifar'), used_by=NETWORK)
    """imagenet: 7x7 stride 2 and max-pool; cifar: 3x3 stride 1"""
    zero_init: bool = option(True)
    """initialize the weight of the last BN of each residual block to zero, as in the official release, else to one"""
    proj_layers: int = option(3, between=(1, 10), used_by=NETWORK)
    """fully connected layers of the projector"""
    proj_dim: int = option(2048, between=(2, 65536), used_by=NETWORK, aliases='dim')
    """width of the projector, and dimension of z and p"""
    pred_dim: int = option(512, between=(1, 65536), used_by=NETWORK)
    """width of the predictor's hidden layer"""


@theme('Ablations of the method', used_by=TRAIN)  # The paper's ablations (section 4); `ablate` runs them
class MethodOptions:
    stop_gradient: bool = option(True)
    """stop-gradient on z in the loss (figure 2)"""
    predictor: str = option('mlp', ('mlp', 'none', 'fixed'), used_by=NETWORK)
    """mlp; none: p = z; fixed: not trained (table 1)"""
    proj_bn: str = option('default', ('none', 'hidden', 'default', 'all'), used_by=NETWORK)
    """BN in projector and predictor (table 3): none; hidden: hidden layers; default: also the projector's output; all:
    also the predictor's output"""
    similarity: str = option('cosine', ('cosine', 'softmax'))
    """similarity in the loss (section 4.5): cosine, or softmax for cross-entropy"""
    loss_symmetry: str = option('true', ('true', 'false', '2x'), used_by=AUGMENT_COMMANDS)
    """true: each view predicts the other; false: the first predicts the second; 2x: as false, with two pairs of
    views"""


@theme('Optimization', used_by=TRAIN)  # Optimization (paper section 3), precision and speed
class OptimizationOptions:
    batch_size: int = option(512, between=(2, 65536), used_by=IMAGE_COMMANDS, aliases='b', often=6)
    """images per step, over all ranks"""
    grad_accum_steps: int = option(1, between=(1, 1024), aliases='accum_iter grad_accum')
    """micro-batches per step, to save memory; BN uses the statistics of a micro-batch"""
    max_epochs: int = option(100, between=(1, 100000), aliases='e epochs', often=7)
    """passes over the training images"""
    learning_rate: float = option(0.05, between=(0.0, 100.0), often=8)
    """base learning rate: a step uses this x batch_size / 256"""
    fix_pred_lr: bool = option(True)
    """keep the predictor's learning rate constant (the best row of the paper's table 1)"""
    optimizer: str = option('sgd', ('sgd', 'adamw'), aliases='opt')
    """sgd (the paper's), or adamw for networks without BN (ViT, ConvNeXt), with a --learning_rate near 0.002"""
    momentum: float = option(0.9, between=(0.0, 0.9999))
    """momentum of SGD"""
    weight_decay: float = option(1e-4, between=(0.0, 1.0))
    """L2 penalty on all parameters, biases and BN too"""
    warmup_epochs: int = option(0, between=(0, 1000), aliases='warmup')
    """first epochs, in which the learning rate rises linearly and warmup_augmentation is used"""
    max_minutes: float = option(0.0, between=(0.0, 1e6), local=True)
    """stop after this many minutes, between two steps, with a checkpoint; 0: no limit"""
    amp: str = option(
        'auto', ('auto', 'bf16', 'fp16', 'off'), used_by=FORWARD, aliases='precision fp16 bf16', often=22, local=True
    )
    """precision of the network: bf16 (CUDA, CPU), fp16 (CUDA), off (float32); auto: bf16 if the GPU supports it (else
    fp16, with tensor cores), on a CPU if a short benchmark shows a speed-up of 1.3"""
    compile: str = option('auto', ('auto', 'True', 'False'), local=True)
    """torch.compile: True, False; auto: on CUDA, if it works and the run has at least 5,000 steps"""
    cuda_graph: str = option('auto', ('auto', 'True', 'False'), local=True)
    """capture the training step as a CUDA graph, on one GPU, not with fp16: True, False; auto: if launching the step
    takes at least half of its time"""


@theme('Metrics and checkpoints', used_by=TRAIN)
class MonitorOptions:
    knn_every: int = option(5, between=(0, 100000))
    """epochs between two evaluations of the metrics (kNN, few labels, label-free); 0: label-free, at start and end"""
    knn_k: int = option(200, between=(1, 100000), used_by=KNN_COMMANDS, aliases='k')
    """neighbors in kNN; at most the mean number of images per class"""
    knn_temperature: float = option(0.1, between=(0.001, 100.0), used_by=KNN_COMMANDS, aliases='temp')
    """temperature T of the votes' weights exp(cosine / T) in kNN"""
    collapse_threshold: float = option(0.25, between=(0.0, 1.0))
    """warn if std(z / |z|) x sqrt(proj_dim) is below this; healthy is near 1"""
    tracker: str = option('none', ('none', 'wandb', 'trackio', 'mlflow'), used_by=EVAL_COMMANDS, local=True)
    """experiment tracker besides TensorBoard, configured by its environment variables (WANDB_MODE=offline)"""
    save_every_epochs: int = option(10, between=(1, 100000))
    """epochs between two checkpoints; the last is always kept"""
    save_every_minutes: float = option(15.0, between=(0.0, 1e6), local=True)
    """minutes between two checkpoints within an epoch; 0: never"""
    keep_checkpoints: int = option(0, between=(0, 100000), local=True)
    """number of checkpoints of a run to keep; older ones are deleted; 0: keep all. A run from pretrained weights keeps
    its start and its best epoch besides"""
    resume: str = option('', often=10, local=True)
    """resume a run, or one of its checkpoints; auto: the newest run with these options, or start one"""
    from_run: str = option('', local=True)
    """start a new run with the options of this run"""


@theme('Evaluation', used_by=EVAL_COMMANDS)  # The protocols of evaluate
class EvaluationOptions:
    evaluate_after: bool = option(False, used_by=TRAIN, local=True)
    """run evaluate after the training, on the last checkpoint, or on the best of a run from pretrained weights"""
    protocol: str = option('linear', PROTOCOLS, often=4, local=True)
    """evaluation protocol: """
    beside: str = option('untrained,start', only=('compare',))
    """backbones to compare with, comma-separated: untrained, start (of the run), imagenet, timm/<name>, a run, a file;
    implies --protocol=compare"""
    labels: str = option('1,5,10,30', only=('compare',))
    """numbers of labeled images per class, comma-separated"""
    draws: int = option(5, between=(1, 1000), only=('compare',))
    """random subsets of labeled images, the same for every backbone"""
    knn_raw_pixels: bool = option(False, local=True)
    """also report the kNN accuracy of raw pixels"""
    crop_scale: float = option(0.08, between=(0.01, 1.0), only=(*LINEAR, *FINETUNE_STAGES))
    """smallest share of the image area in a training crop"""


@theme('Evaluation', only=LINEAR)  # The linear classifier
class LinearOptions:
    probe_optimizer: str = option('lars', ('lars', 'sgd', 'lbfgs'))
    """lars: LARS (paper, appendix A), for large datasets; sgd; lbfgs: logistic regression on center crops, for few
    images, with l2 chosen on a held-out fifth"""
    probe_epochs: int = option(90, between=(1, 10000))
    """epochs of the classifier"""
    probe_batch_size: int = option(0, between=(0, 65536))
    """images per step; 0: 4096 (lars), 256 (sgd)"""
    probe_learning_rate: float = option(0.0, between=(0.0, 1000.0))
    """base learning rate, x batch / 256; 0: 0.02 (lars), 30 (sgd)"""
    cache_features: bool = option(False)
    """train on the cached features of --cache_epochs augmented epochs: many times faster"""
    cache_epochs: int = option(4, between=(1, 1000))
    """augmented epochs that --cache_features caches"""
    label_fraction: float = option(0.1, between=(0.0001, 1.0), only=('semi',))
    """share of the labels to use, with the same number of each class"""
    subset_list: str = option('', only=('semi',), is_path=True)
    """file with the names of the labeled images to use, one per line, instead of --label_fraction"""


@theme('Evaluation', only=FINETUNE_STAGES)  # Fine-tuning
class FinetuneOptions:
    baseline: bool = option(False)
    """also train from scratch on the same labels"""
    finetune_epochs: int = option(50, between=(1, 100000))
    """epochs"""
    finetune_batch_size: int = option(256, between=(2, 65536))
    """images per step"""
    finetune_learning_rate: float = option(0.05, between=(0.0, 100.0))
    """base learning rate of the backbone, x batch / 256"""
    head_learning_rate: float = option(1.0, between=(0.0, 1000.0))
    """base learning rate of the new linear head, x batch / 256"""
    baseline_learning_rate: float = option(0.1, between=(0.0, 100.0))
    """base learning rate of the --baseline, x batch / 256"""
    finetune_warmup: float = option(0.1, between=(0.0, 0.9))
    """share of the epochs in which the learning rates rise"""
    finetune_weight_decay: float = option(1e-4, between=(0.0, 1.0))
    """L2 penalty"""
    transfer_path: str = option('', only=('transfer',), is_path=True)
    """folder with train/<class>/ and val/<class>/"""
    transfer: str = option('linear', ('linear', 'finetune'), only=('transfer',))
    """linear: logistic regression on frozen features, with l2 chosen on a held-out fifth of train; finetune"""


@theme('Evaluation', only=('detection',))  # Object detection
class DetectionOptions:
    detection_path: str = option('', is_path=True)
    """folder in the format of VOC or COCO"""
    detector: str = option('faster_rcnn', ('faster_rcnn', 'mask_rcnn'))
    """torchvision detector, with a feature pyramid"""
    detector_init: str = option('checkpoint', ('checkpoint', 'random'))
    """initial weights of the backbone: the checkpoint, or random for a baseline"""
    detection_epochs: int = option(12, between=(1, 1000))
    """epochs"""
    detection_batch_size: int = option(16, between=(1, 1024))
    """images per step"""
    detection_learning_rate: float = option(0.02, between=(0.0, 10.0))
    """learning rate, x batch / 16"""
    detection_size: int = option(800, between=(32, 4096))
    """shorter side of an image, in pixels; the longer side is at most 5/3 of it"""


@theme('Files', used_by=NETWORK)  # Checkpoints and logs
class FileOptions:
    ckpt_path: str = option(
        'data/checkpoints',
        used_by=(*NETWORK, 'runs'),
        aliases='output_dir save_dir',
        often=23,
        local=True,
        is_path=True,
    )
    """folder of the run folders with checkpoints"""
    ckpt_name: str = option('', aliases='checkpoint ckpt', often=3, local=True)
    """checkpoint under ckpt_path: <run>/loss_<loss>_epoch_<n>, or <run> for its newest (from pretrained weights: its
    best); or weights as for --init_from"""
    log_path: str = option('data/logs', used_by=LOGGING, local=True, is_path=True)
    """folder of TensorBoard logs and plots"""
    init_from: str = option('', used_by=AUGMENT_COMMANDS, aliases='pretrained weights', is_path=True)
    """pretrained weights for a new run: imagenet (torchvision), timm or timm/<name>.<tag>, a run, or a file of another
    tool; none for random weights with --preset=photos"""


@theme('Options of single commands', used_by=('infer', 'embed', 'export', 'pack', 'select', 'report', 'runs'))
class CommandOptions:
    ablation: str = option(
        'stopgrad',
        ('stopgrad', 'predictor', 'batch_size', 'bn', 'similarity', 'symmetric', 'collapse'),
        used_by=('ablate',),
        often=17,
    )
    """table of the paper to reproduce, or collapse: causes of collapse and remedies"""
    output: str = option('', often=12, local=True)
    """output file; defaults in data/: infer submission.csv, embed features.npz (or .csv, .parquet), export backbone.pth
    or a folder, select selected.csv; report: an HTML page; runs: a CSV file; pack: a folder"""
    sort: str = option(
        'run',
        ('run', 'state', 'epoch', 'loss', 'std', 'rank', 'best', 'knn', 'linear'),
        used_by=('runs',),
        often=14,
        local=True,
    )
    """runs: the column to sort by, best first"""
    diff: str = option('', used_by=('runs',), often=15, local=True)
    """runs: compare the options of two runs, RUN1,RUN2"""
    num_select: int = option(100, between=(1, 10**6), used_by=('select',), often=13, local=True)
    """select: number of images to label first"""
    select_method: str = option('typical', ('typical', 'kcenter'), used_by=('select',), local=True)
    """select: typical: the most typical image of each cluster (TypiClust); kcenter: each image is the farthest from
    those before"""
    duplicates: float = option(0.99, between=(-1.0, 1.0), used_by=('select', 'report'), local=True)
    """cosine above which two images count as near-duplicates"""
    report_max_images: int = option(3000, between=(10, 20000), used_by=('report',))
    """report: number of images on the map of features"""
    pack_short_side: int = option(0, between=(0, 4096), used_by=('pack',))
    """pack: resize to this shorter side, in pixels, and save as JPEG; 0: pack the files unchanged"""
    shard_megabytes: float = option(1000.0, between=(0.001, 1e6), used_by=('pack',))
    """pack: size of an archive, in megabytes"""
    classifier: str = option('', used_by=('infer',), local=True)
    """infer: the classifier to use, trained by evaluate: its file, or the folder of its dataset"""
    neighbors: int = option(0, between=(0, 50), used_by=('infer',))
    """infer: save a picture of some images with this many nearest training images; 0: no picture"""
    projector_images: int = option(1000, between=(0, 8000), used_by=('embed',))
    """embed: number of images in TensorBoard's projector; 0: none"""
    format: str = option(
        'torchvision', ('torchvision', 'timm', 'detectron2', 'onnx', 'safetensors'), used_by=('export',), often=16
    )
    """export: the tool that loads the backbone"""


@dataclass
class Config(
    CommandOptions,
    FileOptions,
    DetectionOptions,
    FinetuneOptions,
    LinearOptions,
    EvaluationOptions,
    MonitorOptions,
    OptimizationOptions,
    MethodOptions,
    ModelOptions,
    ViewOptions,
    DataOptions,
):
    """All options, one attribute each. (A dataclass takes its fields from the last base to the first.)

    Four attributes are no options. explicit: names of the options of the call; fixed: names of others that neither a
    preset nor weights set any more, because --from_run or the file of the weights has; preset_from_images: whether the
    preset is still to be chosen from the images (engine/auto_preset.py); set_from_images: names of options that were.
    """

    explicit, fixed, preset_from_images, set_from_images = frozenset(), frozenset(), False, frozenset()

    @property
    def settled(self):
        """Names of the options that neither a preset nor weights set."""
        return self.explicit | self.fixed

    @property
    def num_channels(self):
        """Number of channels of an image (runtime.options.channel_numbers)."""
        if self.channels in ('auto', 'rgb'):
            return 3
        first, _, last = self.channels.partition('-')
        return int(last) - int(first) + 1 if last else first.count(',') + 1


OPTIONS = {f.name: f for f in fields(Config)}
NOT_RESTORED_OPTIONS = tuple(name for name, f in OPTIONS.items() if f.metadata['local'])
# Options among these that `train --resume` takes from the run all the same: how it is watched, saved and evaluated.
RESUMED_OPTIONS = (
    *('evaluate_after', 'protocol', 'knn_raw_pixels'),
    *('tracker', 'save_every_minutes', 'keep_checkpoints'),
)
# Groups of options that commands treat alike.
ARCHITECTURE = ('backbone', 'stem', 'proj_layers', 'proj_dim', 'pred_dim', 'predictor', 'proj_bn')
PIXEL_OPTIONS = ('channels', 'white_level', 'mean', 'std')  # may be measured on the images of a new run
# Options that weights bring. mean and std are relative to white_level.
PREPROCESSING = ('mean', 'std', 'white_level', 'interpolation', 'crop_ratio', 'image_size')
READING = (*PREPROCESSING, 'exif', 'npy_axes')  # what the pixels of an image depend on


# Options that a preset changes, as on a command line.
PRESETS = {
    'imagenet': '',
    # Photographs, from pretrained weights; engine/auto_preset.py sets the rest.
    'photos': """
        --proj_layers=2 --learning_rate=0.4 --batch_size=64 --max_epochs=12 --image_size=160 --knn_k=20
        --knn_every=2 --probe_optimizer=lbfgs
    """,
    # Appendix D: 0.03 x batch / 256, weight decay 5e-4, 800 epochs, two-layer projector, no blur.
    'cifar10': """
        --image_path=data/cifar10 --image_size=32 --crop_ratio=1.0 --blur_prob=0.0 --backbone=resnet18
        --stem=cifar --proj_layers=2 --learning_rate=0.03 --weight_decay=0.0005 --max_epochs=800
        --probe_optimizer=sgd --probe_epochs=100
    """,
    # Drawn patterns (dataloader/sources/demo.py), tuned for about two minutes on two CPU cores.
    'demo': """
        --image_path=data/demo --image_size=32 --crop_ratio=1.0 --blur_prob=0.0 --backbone=small
        --stem=cifar --proj_layers=2 --proj_dim=512 --pred_dim=128 --batch_size=64 --learning_rate=0.8
        --weight_decay=0.0005 --max_epochs=15 --probe_optimizer=sgd --probe_epochs=300
        --probe_learning_rate=100.0 --cache_features=True --crop_scale=1.0
    """,
}

# Options that --init_from sets, unless explicit, for weights that are not from a run of this code (results/LOG.md).
INIT_FROM_DEFAULTS = {
    'freeze_bn': True,
    'heads_epochs': -1,
    'backbone_lr_scale': 0.1,
    'start_share': 0.0,
    'distill_weight': 8.0,
    'augmentation': 'mild',
}
# In place of these without distillation: with --distill_weight=0, and for stem=cifar, whose networks are made for small
# images and describe larger ones no better.
WITHOUT_DISTILLATION = {'start_share': 0.5, 'distill_weight': 0.0, 'augmentation': 'moco'}


def init_from_defaults(distilled=True):
    """Return the options that --init_from sets, with or without distillation."""
    return INIT_FROM_DEFAULTS | ({} if distilled else WITHOUT_DISTILLATION)
