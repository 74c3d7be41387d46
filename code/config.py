"""Every option of the project, once: its name, default, unit and meaning. Standard library only.

The defaults are the paper's ImageNet baseline (arXiv 2011.10566, section 3 and appendix A). A preset is a plain
table of overrides; what the user gives on the command line overrides both (runtime/options.py reads it).
"""

import ast
import itertools
from dataclasses import Field, dataclass, field, fields
from pathlib import Path

# Commands that an option matters to.
MODEL_COMMANDS = ('check_dataloader', 'train', 'evaluate', 'infer', 'embed', 'export', 'ablate', 'report', 'select')
EVERY, NETWORK = (*MODEL_COMMANDS, 'pack'), MODEL_COMMANDS[1:]
IMAGE_COMMANDS = tuple(command for command in MODEL_COMMANDS if command != 'export')  # of images, with a network
DATA = (*IMAGE_COMMANDS, 'pack')
SPLIT_COMMANDS = tuple(command for command in DATA if command != 'embed')  # in train and val
TRAIN = ('train', 'ablate')
AUGMENT_COMMANDS = ('check_dataloader', *TRAIN)
FORWARD = ('train', 'ablate', 'evaluate', 'infer', 'embed', 'report', 'select')  # that run a network
LOGGING = ('check_dataloader', 'train', 'evaluate', 'embed', 'ablate', 'report')
KNN_COMMANDS = ('train', 'evaluate', 'ablate', 'infer', 'report')  # that ask the neighbours
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
# Options and values as they were called; they go on working, in a checkpoint too.
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
}
RENAMED_VALUES = {'protocol': {'spectrum': 'label_free'}, 'select_method': {'kcentre': 'kcenter'}}
EVAL_COMMANDS = ('train', 'evaluate', 'ablate')
LINEAR, FINETUNE_STAGES = ('linear',), ('semi', 'finetune')


def option(default, choices=None, between=(None, None), used_by=(), only=(), **more):
    """One option; the string below it is its meaning, with the unit. choices: its values, perhaps a dict with their
    meanings; between: two bounds, both included; used_by: the commands that it matters to; only: the protocols of
    evaluate that it is for alone; these two where they are not the theme's. more: aliases, what other programs call it;
    often: its place among those that people set most; local: it belongs to this call and this machine, and never comes
    from a checkpoint; is_path: two spellings of one path are one value."""
    metadata = {'choices': choices, 'low': between[0], 'high': between[1], 'used_by': used_by, 'only': only}
    return field(default=default, metadata={**metadata, **more})


def read_meanings(path):
    """{option: the string below it} of the classes in a file. Python does not keep such strings (PEP 257)."""
    meanings = {}
    for node in ast.parse(Path(path).read_text(encoding='utf-8')).body:
        for one, following in itertools.pairwise(node.body) if isinstance(node, ast.ClassDef) else ():
            if isinstance(one, ast.AnnAssign) and isinstance(following, ast.Expr):
                meanings[one.target.id] = ' '.join(following.value.value.split())
    return meanings


MEANINGS = read_meanings(__file__)


def theme(title, used_by=EVAL_COMMANDS, only=()):
    """Make a class of options a dataclass. title: in --help; used_by, only: as of `option`, of those that say
    none."""

    def make(options):
        for name, value in vars(options).items():
            if isinstance(value, Field):
                own = {'aliases': '', 'often': 0, 'local': False, 'is_path': False, **value.metadata}
                own['only'] = own['only'] or only
                own['used_by'] = own['used_by'] or (EVAL_COMMANDS if own['only'] else used_by)
                own['meaning'] = ', '.join(own['only']) + ': ' * bool(own['only']) + MEANINGS[name]
                if isinstance(own['choices'], dict):
                    own['meaning'] += ' ' + '; '.join(f'{choice}: {said}' for choice, said in own['choices'].items())
                    own['choices'] = tuple(own['choices'])
                value.metadata = {**own, 'theme': title}
        return dataclass(options)

    return make


@theme('Data', used_by=IMAGE_COMMANDS)  # What to work on
class DataOptions:
    preset: str = option('auto', ('auto', 'photos', 'imagenet', 'cifar10', 'demo'), used_by=EVERY, often=1)
    """set of defaults; auto: for the images of --image_path photos, or cifar10 where they are small; without it
    imagenet if data/imagenet/train is there, else demo"""
    image_path: str = option(
        'data/imagenet', used_by=DATA, aliases='data data_dir data_path dataset train_dir root', often=2, is_path=True
    )
    """folder with train/, val/ and perhaps test/, or of class folders, or of images; .tar archives; a list of paths;
    for infer: the images"""
    val_fraction: float = option(0.1, between=(0.0, 0.9), used_by=SPLIT_COMMANDS)
    """share of the labelled images of every class that becomes val where there is none; 0: none"""
    channels: str = option('auto', used_by=(*NETWORK, 'check_dataloader'), aliases='in_chans in_channels bands')
    """of the images. auto: as the first images have them, of gray ones three that are the same; rgb: red, green and
    blue; 1,3,4: these, in this order; 1-5: all of five"""
    white_level: str = option('type', used_by=DATA)
    """pixels of more than 8 bits: the value that is white, or two, black and white. type: 65535 for integers, 1 for
    floats; auto: measured on some images"""
    exif: str = option('apply', ('apply', 'ignore'), used_by=DATA, aliases='exif_transpose')
    """orientation of photographs. apply: turned upright, as their EXIF says; ignore: as they are stored"""
    npy_axes: str = option('auto', ('auto', 'hwc', 'chw'), used_by=DATA)
    """order of the axes in .npy files: height, width, channels or channels, height, width; auto: by their lengths"""
    download: bool = option(False, used_by=SPLIT_COMMANDS, local=True)
    """fetch the set named by the last part of image_path: cifar10, cifar100 or stl10"""
    image_size: int = option(
        224, between=(8, 1024), used_by=MODEL_COMMANDS, aliases='crop_size img_size input_size', often=18
    )
    """side of a view, in pixels"""
    mean: str = option('auto', used_by=MODEL_COMMANDS)
    """mean of each channel, subtracted from pixels in [0, 1]: numbers (0.5,0.5,0.5), imagenet, weights (what the
    pretrained weights were trained with), dataset (measured on some images of train); auto: the weights', else
    imagenet for red, green and blue of 8 bits, else dataset"""
    std: str = option('auto', used_by=MODEL_COMMANDS)
    """standard deviation of each channel, by which pixels are divided: as --mean"""
    interpolation: str = option('bilinear', ('bilinear', 'bicubic'), used_by=MODEL_COMMANDS)
    """of resized crops, antialiased; pretrained weights bring their own"""
    crop_ratio: float = option(0.875, between=(0.1, 1.0))
    """evaluation: share of the shorter side in the centre crop"""
    num_workers: int = option(-1, between=(-1, 1024), aliases='j', often=21, local=True)
    """processes that decode images; -1 is one per CPU core, shared by the processes of a machine"""
    device: str = option('auto', aliases='gpu gpus accelerator', often=20, local=True)
    """auto (CUDA if there is one, else the CPU), cpu, cuda, cuda:1, mps"""
    cache_images: str = option('auto', ('auto', 'on', 'off'))
    """hold decoded images in memory: auto (one size, up to 96 px and 4 GiB), on (one size), off"""
    cache_short_side: int = option(0, between=(0, 4096))
    """keep larger images on disk, decoded, with this shorter side in pixels: finer detail is lost; 0: no"""
    cache_path: str = option('data/cache', used_by=DATA, local=True, is_path=True)
    """folder of what is kept for the next run: decoded images, indexes, trials"""
    jpeg_draft: bool = option(True, used_by=AUGMENT_COMMANDS)
    """let the JPEG decoder halve photos whose crops stay at least twice the view"""
    on_unreadable: str = option('error', ('error', 'skip'), used_by=DATA)
    """unreadable images: error stops, skip leaves them out and names them in a file (reads all, once)"""
    quiet: bool = option(False, used_by=EVERY, local=True)
    """say nothing but warnings and errors, show no bars; the log file of a run has it all"""
    random_seed: int = option(0, between=(0, 2**31 - 1), often=19)
    """seed of the weights, the data order and the augmentation"""


@theme('Views', used_by=AUGMENT_COMMANDS)  # Augmentation (paper section 3; MoCo v2)
class ViewOptions:
    augmentation: str = option('moco', ('moco', 'simclr'), aliases='aug', often=9)
    """distortion of the views: moco, or SimCLR's stronger one"""
    warmup_augmentation: str = option('moco', ('moco', 'simclr'), used_by=TRAIN)
    """distortion during the warmup_epochs"""
    augment_backend: str = option('device', ('device', 'worker'))
    """device: our operations on a batch, on a CPU in the workers; worker: torchvision's transforms, slow"""
    jitter: str = option('image', ('image', 'channel'))
    """of brightness and contrast. image: of all channels alike, of red, green and blue also saturation and hue;
    channel: a gain and an offset for each"""
    num_views: int = option(2, between=(2, 16), aliases='num_crops')
    """views of an image a step; above 2 each is compared with the mean z of the others (FastSiam)"""
    blur_prob: float = option(0.5, between=(0.0, 1.0))
    """share of views that are blurred"""


@theme('Model', used_by=TRAIN)  # The network (paper section 3), and training on from pretrained weights
class ModelOptions:
    model_name: str = option('simsiam', aliases='name exp_name', often=11)
    """names the run folder: model_name_<this>_ckpt_<number>"""
    backbone: str = option('resnet50', used_by=NETWORK, aliases='arch model', often=5)
    """the encoder: small, timm/<name>, or a classification network of torchvision"""
    freeze_bn: bool = option(False)
    """keep the statistics of the backbone's BN as they are (eval mode); --init_from sets it for weights that are not
    of a run of this code"""
    freeze_bn_affine: bool = option(False)
    """with --freeze_bn: do not train the scale and shift of the backbone's BN either"""
    heads_epochs: int = option(0, between=(-1, 1000))
    """first epochs, in which projector and predictor alone are trained; -1: as many as 80 steps take; --init_from sets
    it, as --freeze_bn"""
    backbone_lr_scale: float = option(1.0, between=(0.0, 10.0))
    """the backbone's learning rate is this times the projector's; --init_from sets it, as --freeze_bn"""
    start_share: float = option(0.0, between=(0.0, 1.0))
    """share of the pretrained weights in the backbone that is measured, evaluated and exported, the rest is the
    trained one (WiSE-FT, arXiv 2109.01903); --init_from sets it, as --freeze_bn"""
    stem: str = option('imagenet', ('imagenet', 'cifar'), used_by=NETWORK)
    """imagenet: 7x7 stride 2 and max-pool; cifar: 3x3 stride 1"""
    zero_init: bool = option(True)
    """the last BN of each residual block starts at zero, as in the official release; or at one"""
    proj_layers: int = option(3, between=(1, 10), used_by=NETWORK)
    """fully connected layers of the projector"""
    proj_dim: int = option(2048, between=(2, 65536), used_by=NETWORK, aliases='dim')
    """width of the projector, and dimension of z and p"""
    pred_dim: int = option(512, between=(1, 65536), used_by=NETWORK)
    """width of the predictor's hidden layer"""


@theme(
    'The method, changed', used_by=TRAIN
)  # What the paper changes to see what it is for (section 4); `ablate` runs these
class MethodOptions:
    stop_gradient: bool = option(True)
    """hold z constant in the loss (figure 2)"""
    predictor: str = option('mlp', ('mlp', 'none', 'fixed'), used_by=NETWORK)
    """mlp; none: p is z; fixed: never trained (table 1)"""
    proj_bn: str = option('default', ('none', 'hidden', 'default', 'all'), used_by=NETWORK)
    """BN in projector and predictor (table 3): none; hidden layers; default: and the output of the projector; all: and
    of the predictor"""
    similarity: str = option('cosine', ('cosine', 'softmax'))
    """in the loss (section 4.5): cosine, or cross-entropy of softmaxes"""
    loss_symmetry: str = option('true', ('true', 'false', '2x'), used_by=AUGMENT_COMMANDS)
    """each view predicts the other (true), the first the second (false), or two such pairs of views (2x)"""


@theme('Optimisation', used_by=TRAIN)  # Optimization (paper section 3), precision and speed
class OptimizationOptions:
    batch_size: int = option(512, between=(2, 65536), used_by=IMAGE_COMMANDS, aliases='b', often=6)
    """images a step, of all processes together"""
    grad_accum_steps: int = option(1, between=(1, 1024), aliases='accum_iter grad_accum')
    """parts of a step that go through the network one after the other, for small memories; BN sees a part alone"""
    max_epochs: int = option(100, between=(1, 100000), aliases='e epochs', often=7)
    """passes over the training images"""
    learning_rate: float = option(0.05, between=(0.0, 100.0), often=8)
    """base learning rate: a step uses this x batch_size / 256"""
    fix_pred_lr: bool = option(True)
    """keep the predictor's learning rate constant (the paper's best row)"""
    optimizer: str = option('sgd', ('sgd', 'adamw'), aliases='opt')
    """sgd, the paper's; adamw for networks without BN (ViT, ConvNeXt), with a --learning_rate near 0.002"""
    momentum: float = option(0.9, between=(0.0, 0.9999))
    """momentum of SGD"""
    weight_decay: float = option(1e-4, between=(0.0, 1.0))
    """L2 penalty on all parameters, biases and BN too"""
    warmup_epochs: int = option(0, between=(0, 1000), aliases='warmup')
    """first epochs: learning rate rises linearly, warmup_augmentation is used"""
    max_minutes: float = option(0.0, between=(0.0, 1e6), local=True)
    """stop between two steps when this many minutes have passed, with a checkpoint; 0: no limit"""
    amp: str = option(
        'auto', ('auto', 'bf16', 'fp16', 'off'), used_by=FORWARD, aliases='precision fp16 bf16', often=22, local=True
    )
    """precision of the network: bf16 (CUDA, CPU), fp16 (CUDA), off (float32); auto: bf16 where the GPU has it (else
    fp16, with tensor cores), or a short trial on this CPU shows that it is at least 1.3 times as fast"""
    compile: str = option('auto', ('auto', 'True', 'False'), local=True)
    """torch.compile: True, False, auto: on CUDA, where it works, for a run of 5,000 steps or more"""
    cuda_graph: str = option('auto', ('auto', 'True', 'False'), local=True)
    """record a step and replay it at one launch, on one GPU, not with fp16: True, False, auto: where launching it
    takes more than half of its time"""


@theme('Watching', used_by=TRAIN)  # What is measured, saved and resumed
class MonitorOptions:
    knn_every: int = option(5, between=(0, 100000))
    """epochs between two kNN tests on val; 0: never"""
    knn_k: int = option(200, between=(1, 100000), used_by=KNN_COMMANDS, aliases='k')
    """neighbours that vote; fewer where a class has fewer images"""
    knn_temperature: float = option(0.1, between=(0.001, 100.0), used_by=KNN_COMMANDS, aliases='temp')
    """a vote weighs exp(cosine / this)"""
    collapse_threshold: float = option(0.25, between=(0.0, 1.0))
    """warn when std(z / |z|) x sqrt(proj_dim) falls under this; healthy is near 1"""
    tracker: str = option('none', ('none', 'wandb', 'trackio', 'mlflow'), used_by=EVAL_COMMANDS, local=True)
    """where the scalars also go; offline, project, server: by its own variables (WANDB_MODE=offline)"""
    save_every_epochs: int = option(10, between=(1, 100000))
    """epochs between two checkpoints; the last is always kept"""
    save_every_minutes: float = option(15.0, between=(0.0, 1e6), local=True)
    """minutes after which a checkpoint is saved within an epoch too; 0: never"""
    keep_checkpoints: int = option(0, between=(0, 100000), local=True)
    """checkpoints of a run that are kept, the older ones are deleted; 0: all"""
    resume: str = option('', often=10, local=True)
    """go on with a run, or from one of its checkpoints; auto: with the newest run of these options, or start it"""
    from_run: str = option('', local=True)
    """a run whose options are taken for a new run"""


@theme('Evaluation', used_by=EVAL_COMMANDS)  # The protocols of evaluate
class EvaluationOptions:
    evaluate_after: bool = option(False, used_by=TRAIN, local=True)
    """evaluate the last checkpoint when training ends"""
    protocol: str = option('linear', PROTOCOLS, often=4, local=True)
    """how a backbone is judged: """
    beside: str = option('untrained,start', only=('compare',))
    """backbones in rows of their own, with commas between: untrained, start (of the run), imagenet, timm/<name>, a
    run, a file; given alone it means --protocol=compare"""
    labels: str = option('1,5,10,30', only=('compare',))
    """numbers of labelled images a class, with commas between"""
    draws: int = option(5, between=(1, 1000), only=('compare',))
    """draws of the labelled images, the same for every backbone"""
    knn_raw_pixels: bool = option(False, local=True)
    """also report the kNN accuracy of raw pixels"""
    crop_scale: float = option(0.08, between=(0.01, 1.0), only=(*LINEAR, *FINETUNE_STAGES))
    """smallest share of the area in a training crop"""


@theme('Evaluation', only=LINEAR)  # The linear classifier
class LinearOptions:
    probe_optimizer: str = option('lars', ('lars', 'sgd'))
    """LARS (paper, appendix A) or SGD"""
    probe_epochs: int = option(90, between=(1, 10000))
    """epochs of the classifier"""
    probe_batch_size: int = option(0, between=(0, 65536))
    """images a step, whatever the memory holds at once; 0: 4096 (lars), 256 (sgd)"""
    probe_learning_rate: float = option(0.0, between=(0.0, 1000.0))
    """base learning rate, x batch / 256; 0: 0.02 (lars), 30 (sgd)"""
    cache_features: bool = option(False)
    """extract the features of some augmented passes once, and train on them: many times faster"""
    cache_epochs: int = option(4, between=(1, 1000))
    """augmented passes that --cache_features keeps"""
    label_fraction: float = option(0.1, between=(0.0001, 1.0), only=('semi',))
    """share of the labels, the same number of every class"""
    subset_list: str = option('', only=('semi',), is_path=True)
    """a file with the names of the labelled images, one a line, in its place"""


@theme('Evaluation', only=FINETUNE_STAGES)  # Fine-tuning
class FinetuneOptions:
    baseline: bool = option(False)
    """also train from scratch on the same labels"""
    finetune_epochs: int = option(50, between=(1, 100000))
    """epochs"""
    finetune_batch_size: int = option(256, between=(2, 65536))
    """images a step"""
    finetune_learning_rate: float = option(0.05, between=(0.0, 100.0))
    """base learning rate of the backbone, x batch / 256"""
    head_learning_rate: float = option(1.0, between=(0.0, 1000.0))
    """base learning rate of the new linear head, x batch / 256"""
    baseline_learning_rate: float = option(0.1, between=(0.0, 100.0))
    """of the --baseline: base learning rate of the whole network, x batch / 256"""
    finetune_warmup: float = option(0.1, between=(0.0, 0.9))
    """share of the epochs in which the rates rise"""
    finetune_weight_decay: float = option(1e-4, between=(0.0, 1.0))
    """L2 penalty"""
    transfer_path: str = option('', only=('transfer',), is_path=True)
    """folder with train/<class>/ and val/<class>/"""
    transfer: str = option('linear', ('linear', 'finetune'), only=('transfer',))
    """logistic regression on frozen features (linear), l2 chosen on a held-out fifth of train; or finetune"""


@theme('Evaluation', only=('detection',))  # Object detection
class DetectionOptions:
    detection_path: str = option('', is_path=True)
    """folder in the format of VOC or COCO"""
    detector: str = option('faster_rcnn', ('faster_rcnn', 'mask_rcnn'))
    """torchvision detector, with a feature pyramid"""
    detector_init: str = option('checkpoint', ('checkpoint', 'random'))
    """start from the checkpoint, or random: the baseline"""
    detection_epochs: int = option(12, between=(1, 1000))
    """epochs"""
    detection_batch_size: int = option(16, between=(1, 1024))
    """images a step"""
    detection_learning_rate: float = option(0.02, between=(0.0, 10.0))
    """learning rate, x batch / 16"""
    detection_size: int = option(800, between=(32, 4096))
    """shorter side of an image, in pixels; the longer is at most 5/3 of it"""


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
    """checkpoint under ckpt_path: <run>/loss_<loss>_epoch_<n>, or <run> for its newest; or weights as --init_from has
    them"""
    log_path: str = option('data/logs', used_by=LOGGING, local=True, is_path=True)
    """folder of TensorBoard logs and pictures"""
    init_from: str = option('', used_by=TRAIN, aliases='pretrained weights', is_path=True)
    """start a new run from these weights: imagenet (torchvision's), timm or timm/<name>.<tag> (timm's), a run, or a
    file of another tool"""


@theme(
    'What a command makes', used_by=('infer', 'embed', 'export', 'pack', 'select', 'report', 'runs')
)  # What single commands make
class CommandOptions:
    ablation: str = option(
        'stopgrad',
        ('stopgrad', 'predictor', 'batch_size', 'bn', 'similarity', 'symmetric', 'collapse'),
        used_by=('ablate',),
        often=17,
    )
    """which of the paper's tables, or collapse: what goes wrong, and what helps"""
    output: str = option('', often=12, local=True)
    """the file to write; in data/: infer submission.csv, embed features.npz (.csv, .parquet), export backbone.pth, or
    a folder, select selected.csv; report: a page; runs: a CSV file; pack: a folder"""
    sort: str = option(
        'run',
        ('run', 'state', 'epoch', 'loss', 'std', 'knn', 'rank', 'linear'),
        used_by=('runs',),
        often=14,
        local=True,
    )
    """runs: the column that they are sorted by, the best first"""
    diff: str = option('', used_by=('runs',), often=15, local=True)
    """runs: two runs whose options are compared, RUN1,RUN2"""
    num_select: int = option(100, between=(1, 10**6), used_by=('select',), often=13, local=True)
    """select: images to label first"""
    select_method: str = option('typical', ('typical', 'kcenter'), used_by=('select',), local=True)
    """select: the most typical of as many clusters, or each the farthest from all before"""
    duplicates: float = option(0.99, between=(-1.0, 1.0), used_by=('select', 'report'), local=True)
    """cosine above which two images count as double"""
    report_max_images: int = option(3000, between=(10, 20000), used_by=('report',))
    """report: images on the map, with thumbnails in the page"""
    pack_short_side: int = option(0, between=(0, 4096), used_by=('pack',))
    """pack: shorter side of the packed images, in pixels, as JPEG; 0: the files as they are"""
    shard_megabytes: float = option(1000.0, between=(0.001, 1e6), used_by=('pack',))
    """pack: size at which the next archive begins"""
    classifier: str = option('', used_by=('infer',), local=True)
    """infer: the classifier of evaluate that predicts: its file, or the folder of the set that it was trained on"""
    neighbours: int = option(0, between=(0, 50), used_by=('infer',))
    """infer: also save a picture of some images beside their nearest training images"""
    projector_images: int = option(1000, between=(0, 8000), used_by=('embed',))
    """embed: images in TensorBoard's projector, with thumbnails; 0: none"""
    format: str = option(
        'torchvision', ('torchvision', 'timm', 'detectron2', 'onnx', 'safetensors'), used_by=('export',), often=16
    )
    """export: the tool that is to load the backbone"""


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
    """All options, one attribute each: dataclasses take their fields from the last base to the first.

    given: the names that were set explicitly; undecided: whether the preset depends on the images
    (engine/auto_preset.py); chosen: the names that were set for them. These three are no options.
    """

    given, undecided, chosen = frozenset(), False, frozenset()

    @property
    def num_channels(self):
        """How many channels an image has (runtime.options.channel_numbers)."""
        if self.channels in ('auto', 'rgb'):
            return 3
        first, _, last = self.channels.partition('-')
        return int(last) - int(first) + 1 if last else first.count(',') + 1


OPTIONS = {f.name: f for f in fields(Config)}
NOT_RESTORED_OPTIONS = tuple(name for name, f in OPTIONS.items() if f.metadata['local'])


# What a preset changes, as on a command line.
PRESETS = {
    'imagenet': '',
    # A few thousand photographs, from pretrained weights; engine/auto_preset.py sets the rest.
    'photos': """
        --proj_layers=2 --learning_rate=0.4 --batch_size=64 --max_epochs=12 --image_size=160 --knn_k=20
        --knn_every=2
    """,
    # Appendix D: 0.03 x batch / 256, weight decay 5e-4, 800 epochs, two-layer projector, no blur.
    'cifar10': """
        --image_path=data/cifar10 --image_size=32 --crop_ratio=1.0 --blur_prob=0.0 --backbone=resnet18
        --stem=cifar --proj_layers=2 --learning_rate=0.03 --weight_decay=0.0005 --max_epochs=800
        --probe_optimizer=sgd --probe_epochs=100
    """,
    # Our own drawings (dataloader/sources/demo.py), tuned to learn in about two minutes on two CPU cores.
    'demo': """
        --image_path=data/demo --image_size=32 --crop_ratio=1.0 --blur_prob=0.0 --backbone=small
        --stem=cifar --proj_layers=2 --proj_dim=512 --pred_dim=128 --batch_size=64 --learning_rate=0.8
        --weight_decay=0.0005 --max_epochs=15 --probe_optimizer=sgd --probe_epochs=300
        --probe_learning_rate=100.0 --cache_features=True --crop_scale=1.0
    """,
}

# What --init_from sets, where it is not given, for weights that are not of a run of this code.
GOING_ON = {'freeze_bn': True, 'heads_epochs': -1, 'backbone_lr_scale': 0.1, 'start_share': 0.5}
