"""Object detection: torchvision's Faster R-CNN or Mask R-CNN with a feature pyramid on the backbone, evaluated by
COCO's AP.

The paper (table 5) uses Detectron2's C4 detectors; use `export --format=detectron2` for these. This protocol needs only
torchvision and pycocotools.
"""

import contextlib
import io

import numpy as np
import torch
from torchvision.models import resnet
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import MultiScaleRoIAlign

from dataloader.cache.decoded import readable_rows
from dataloader.detection.dataset import load_detection_dataset
from dataloader.loading.loader import WatchedDataLoader, resolve_num_workers
from dataloader.readers.files import Files
from dataloader.sources.dataset_warnings import warn_train_test_overlap
from dataloader.sources.path_array import PathArray
from dataloader.sources.split_source import SplitSource
from optimizer.sgd import lr_schedule
from protocols.protocol import KNN_OPTIONS, Outcome, Protocol
from runtime.checkpoints.load_state import build_model
from runtime.console import printable
from runtime.device import get_device
from runtime.environment import require_package
from runtime.errors import UserError, WorkError, resolve_path
from runtime.messages import log, progress
from runtime.options import channel_numbers, expand_channel_values, pixel_levels
from runtime.precision import autocast
from runtime.seeding import generator_for, seed_step

# Modules whose outputs the pyramid uses, and the names of its levels.
RESNET_LAYERS = {'layer1': '0', 'layer2': '1', 'layer3': '2', 'layer4': '3'}
TINY_RESNET_LAYERS = {'3': '0', '4': '1', '5': '2'}
LAST_STRIDE = 32  # stride of the last feature map, in pixels
AP = ('AP', 'AP50', 'AP75')
WARMUP = 0.05  # share of the steps in which the learning rate rises


def evaluate_detection(args, model, splits, _):
    """Train a detector on --detection_path and evaluate it. Returns an Outcome with AP, AP50 and AP75 in percent.

    The backbone starts from `model`, or from random weights with --detector_init=random. All of it is trained,
    including BN.
    """
    train, val = splits['train'], splits['val']
    masks = train.masks
    log(f'{resolve_path(args.detection_path).name}: trained on {train.split}, evaluated on {val.split}')
    backbone = (build_model(args) if args.detector_init == 'random' else model).backbone
    detector = make_detector(args, backbone, len(train.table['categories']), masks).to(get_device(args))
    train_detector(args, detector, train)
    settings = {'init': args.detector_init, 'detector': args.detector, 'train': train.split, 'val': val.split}
    result = {**settings, **evaluate_ap(args, detector, val, masks)}
    return Outcome({**result, 'num_train': len(train), 'num_val': len(val)})


def load_detection_splits(args, _=None):
    """Load {'train', 'val'} of DetectionDataset from --detection_path. Raises UserError or WorkError if something is
    missing."""
    require_package('pycocotools', '--protocol=detection')
    if channel_numbers(args.channels):
        raise UserError(
            f'--protocol=detection is for red, green and blue, and this backbone takes --channels={args.channels}'
        )
    if not find_pyramid_layers(args.backbone):
        raise UserError(f'--protocol=detection needs a ResNet or small as backbone, not {args.backbone}')
    if not args.detection_path:
        raise UserError('--protocol=detection needs --detection_path=FOLDER in the format of COCO or VOC')
    splits = load_detection_dataset(
        resolve_path(args.detection_path), args.detector == 'mask_rcnn', pixel_levels(args.white_level)
    )
    if args.on_unreadable == 'skip':
        splits = {split: drop_unreadable(args, boxes) for split, boxes in splits.items()}
    for boxes in splits.values():
        absent = [name for name in boxes.names if not (boxes.folder / name).is_file()]
        if absent:  # check now: val is only read after the training
            raise WorkError(
                f'{len(absent)} of the {len(boxes)} images of {boxes.split} are not there, such as '
                f'{printable(boxes.folder / absent[0])}; --on_unreadable=skip leaves them out'
            )
        if not boxes.has_boxes():
            raise UserError(
                f'--detection_path: {resolve_path(args.detection_path)} has no boxes in {boxes.split} (crowd and '
                'difficult ones are ignored)'
            )
        if boxes.left_out:
            log(f'{boxes.split}: {boxes.left_out} boxes have no area or lie outside of their image, and are left out')
    sources = [
        SplitSource(boxes.folder.parent / boxes.split, file_reader(boxes), boxes.labels, [])
        for boxes in splits.values()
    ]
    warn_train_test_overlap(*sources)
    return splits


def file_reader(boxes):
    return Files(boxes.folder, PathArray(boxes.names))


def drop_unreadable(args, boxes):
    """Return the readable images, with their boxes. Raises WorkError if there are none."""
    rows = readable_rows(file_reader(boxes), boxes.folder.parent / boxes.split, resolve_path(args.cache_path))
    return boxes.select(rows.tolist())


def find_pyramid_layers(backbone):
    """Return {module: level} for the pyramid of a backbone, or None if it is not supported."""
    return TINY_RESNET_LAYERS if backbone == 'small' else RESNET_LAYERS if backbone in resnet.__all__ else None


def make_detector(args, backbone, num_classes, masks):
    """Build torchvision's detector on a feature pyramid of the backbone. num_classes: without the background.

    As in torchvision, anchors are 8 strides wide, and the last level is the pooled last stage. The pyramid has BN
    (MoCo, arXiv 1911.05722, section 4.2): pretrained features can have any scale, and without BN a detector does not
    learn from small ones.
    """
    stages = find_pyramid_layers(args.backbone)
    with torch.no_grad():
        maps = IntermediateLayerGetter(backbone.cpu().eval(), stages)(torch.zeros(1, 3, 256, 256))
    strides = [256 // feature_map.shape[2] for feature_map in maps.values()]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.random_seed)
        channels = [feature_map.shape[1] for feature_map in maps.values()]
        pyramid = BackboneWithFPN(backbone, stages, channels, 256, norm_layer=torch.nn.BatchNorm2d)
        pyramid = AutocastFPN(args, pyramid)
        sizes = [(8 * stride,) for stride in (*strides, 2 * strides[-1])]
        heads = {
            'rpn_anchor_generator': AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
            'box_roi_pool': MultiScaleRoIAlign(list(maps), output_size=7, sampling_ratio=2),
        }
        if masks:
            heads['mask_roi_pool'] = MultiScaleRoIAlign(list(maps), output_size=14, sampling_ratio=2)
        kind = MaskRCNN if masks else FasterRCNN
        size = args.detection_size
        sizes = {'min_size': size, 'max_size': round(size * 5 / 3)}
        pixels = {f'image_{name}': expand_channel_values(name, getattr(args, name), 3) for name in ('mean', 'std')}
        return kind(pyramid, num_classes + 1, **sizes, **pixels, **heads)


class AutocastFPN(torch.nn.Module):
    """The pyramid in the precision of --amp, with outputs in float32. The heads compute coordinates, and in bfloat16
    small boxes far from the corner have no width."""

    def __init__(self, args, body):
        super().__init__()
        self.args, self.body, self.out_channels = args, body, body.out_channels

    def forward(self, images):
        with autocast(self.args, uses_grad_scaler=False):
            maps = self.body(images)
        return {name: feature_map.float() for name, feature_map in maps.items()}


def train_detector(args, detector, train):
    """Train the detector by SGD with momentum 0.9 and weight decay 1e-4, a short warm-up and a cosine schedule. Raises
    WorkError if the loss is not finite."""
    device = get_device(args)
    size = min(args.detection_batch_size, len(train))
    if size == 1 and args.detection_size <= LAST_STRIDE:  # the last map of a square image has one value
        raise UserError(
            f'--detection_size={args.detection_size}: too small for BN with one image per step, whose last '
            f'feature map is one pixel: --detection_batch_size=2, or a size above {LAST_STRIDE}'
        )
    steps = len(train) // size
    optimizer = torch.optim.SGD(detector.parameters(), lr=0.0, momentum=0.9, weight_decay=1e-4)
    bar = progress(title='detection', total=steps * args.detection_epochs)
    detector.train()
    for epoch in range(args.detection_epochs):
        generator = generator_for(args.random_seed, 'detection', epoch)
        order = torch.randperm(len(train), generator=generator).tolist()
        mirror = (torch.rand(len(train), generator=generator) < 0.5).tolist()
        sampler_keys = [(index, mirror[index]) for index in order[: steps * size]]
        for step, (images, targets) in enumerate(loader(args, train, sampler_keys, size)):
            fraction_done = (epoch + step / steps) / args.detection_epochs
            optimizer.param_groups[0]['lr'] = lr_schedule(
                fraction_done, WARMUP, args.detection_learning_rate * size / 16
            )
            images = [image.to(device, non_blocking=True) for image in images]
            targets = [
                {name: value.to(device) if torch.is_tensor(value) else value for name, value in target.items()}
                for target in targets
            ]
            seed_step(args.random_seed, 'regions', epoch, step)
            loss = sum(detector(images, targets).values())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            bar.update()
            if step % 20 == 0 or step + 1 == steps:
                value = loss.item()
                bar.set_postfix_str(f'loss {value:.3f}')
                if not np.isfinite(value):
                    raise WorkError(
                        f'the detection loss is {value} in epoch {epoch + 1}: try a lower '
                        f'--detection_learning_rate (now {args.detection_learning_rate})'
                    )
    bar.close()


def loader(args, boxes, sampler_keys, size):
    """Build a loader of (images, targets) for these keys, in order."""
    return WatchedDataLoader(boxes, resolve_num_workers(args.num_workers), batch_size=size, sampler=sampler_keys)


@torch.inference_mode()
def evaluate_ap(args, detector, val, masks):
    """Return {'AP', 'AP50', 'AP75'} of boxes, and with masks {'mask_AP', ...}, in percent."""
    device, numbers = get_device(args), {number: category for category, number in val.number.items()}
    detector.eval()
    detections = {'bbox': [], 'segm': []}
    sampler_keys = [(index, False) for index in range(len(val))]
    batches = loader(args, val, sampler_keys, args.detection_batch_size)
    for images, targets in progress(batches, 'detecting'):
        outputs = detector([image.to(device) for image in images])
        for output, target in zip(outputs, targets, strict=True):
            boxes = output['boxes'].cpu()
            boxes[:, 2:] -= boxes[:, :2]
            rows = zip(boxes.tolist(), output['labels'].tolist(), output['scores'].tolist(), strict=True)
            for i, (box, label, confidence) in enumerate(rows):
                prediction = {'image_id': target['image_id'], 'category_id': numbers[label], 'score': confidence}
                detections['bbox'].append({**prediction, 'bbox': box})
                if masks:
                    detections['segm'].append({**prediction, 'segmentation': encode_rle(output['masks'][i, 0] > 0.5)})
    result = {}
    for kind, prefix in (('bbox', ''), ('segm', 'mask_')) if masks else (('bbox', ''),):
        values = average_precision(val.table, detections[kind], kind)
        result |= {f'{prefix}{name}': value for name, value in zip(('AP', 'AP50', 'AP75'), values, strict=True)}
    return result


def encode_rle(mask):
    from pycocotools import mask as coco

    return coco.encode(np.asfortranarray(mask.cpu().numpy().astype(np.uint8)))


def voc_difficult_cocoeval(judge):
    """Return a subclass of COCOeval that ignores VOC's difficult objects instead of treating them as crowds: a
    detection that matches one is ignored, by the usual overlap, but not every detection inside it."""

    class Judge(judge):
        def _prepare(self):
            super()._prepare()
            for key, boxes in self._gts.items():
                self._gts[key] = [{**box, 'ignore': 1, 'iscrowd': 0} if box.get('difficult') else box for box in boxes]

    return Judge


def average_precision(table, detections, kind):
    """Return (AP, AP50, AP75) in percent of detections in COCO's format. table: the annotations; kind: bbox or segm."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    if not detections:
        return 0.0, 0.0, 0.0
    with contextlib.redirect_stdout(io.StringIO()):  # COCO and COCOeval print
        coco_gt = COCO()
        coco_gt.dataset = {'info': {}, **table}
        coco_gt.createIndex()
        judge = voc_difficult_cocoeval(COCOeval)(coco_gt, coco_gt.loadRes(detections), kind)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return tuple(100 * float(value) for value in judge.stats[:3])


PROTOCOL = Protocol(
    run=evaluate_detection,
    splits=load_detection_splits,
    numbers={kind + name: (kind + name).replace('_', ' ') for kind in ('', 'mask_') for name in AP},
    smaller='--detection_batch_size or --detection_size',
    path=lambda args: args.detection_path,
    details=lambda args: [args.detector_init],
    unused=(
        *('image_path', 'val_fraction', 'download', 'image_size', 'interpolation', 'crop_ratio', 'cache_images'),
        *('cache_short_side', 'batch_size', *KNN_OPTIONS),
    ),
)
