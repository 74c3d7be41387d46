"""Object detection from the backbone: torchvision's Faster R-CNN or Mask R-CNN with a feature pyramid, AP as COCO's.

The paper (table 5) has Detectron2's C4 detectors; those are for `export --format=detectron2`. This protocol needs
nothing but torchvision and pycocotools, and compares backbones on any folder of boxes.
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

from ckpt import build_model
from dataloader.cache.decoded import readable_rows
from dataloader.detection.dataset import load_boxes
from dataloader.loading.loader import WatchedDataLoader, resolve_num_workers
from dataloader.readers.files import Files
from dataloader.sources.dataset_warnings import warn_train_test_overlap
from dataloader.sources.path_array import PathArray
from dataloader.sources.split_source import SplitSource
from optimizer.sgd import lr_schedule
from protocols.protocol import KNN_OPTIONS, Outcome, Protocol
from runtime.console import printable
from runtime.device import get_device
from runtime.environment import require_package
from runtime.errors import UserError, WorkError, resolve_path
from runtime.messages import log, progress
from runtime.options import channel_numbers, expand_channel_values, pixel_levels
from runtime.precision import autocast
from runtime.seeding import generator_for, seed_step

# The modules whose outputs a pyramid is made of, and the names of its levels.
RESNET = {'layer1': '0', 'layer2': '1', 'layer3': '2', 'layer4': '3'}
TINY_RESNET_LAYERS = {'3': '0', '4': '1', '5': '2'}
LAST_STRIDE = 32  # pixels of an image that one value of the last map stands for
AP = ('AP', 'AP50', 'AP75')
WARMUP = 0.05  # share of the steps in which the learning rate rises


def detection(args, model, splits, _):
    """Train a detector on --detection_path and judge it: AP, AP50 and AP75 in percent.

    The backbone starts from `model`, or with --detector_init=random untrained; all of it is trained, its BN included.
    """
    train, val = splits['train'], splits['val']
    masks = train.masks
    log(f'{resolve_path(args.detection_path).name}: trained on {train.split}, judged on {val.split}')
    backbone = (build_model(args) if args.detector_init == 'random' else model).backbone
    detector = make_detector(args, backbone, len(train.table['categories']), masks).to(get_device(args))
    train_detector(args, detector, train)
    said = {'init': args.detector_init, 'detector': args.detector, 'train': train.split, 'val': val.split}
    result = {**said, **evaluate_ap(args, detector, val, masks)}
    return Outcome({**result, 'num_train': len(train), 'num_val': len(val)})


def load_detection_splits(args, _=None):
    """{'train', 'val'} of DetectionDataset of --detection_path. Raises UserError for what is missing."""
    require_package('pycocotools', '--protocol=detection')
    if channel_numbers(args.channels):
        raise UserError(
            f'--protocol=detection is for red, green and blue, and this backbone takes --channels={args.channels}'
        )
    if not fpn_layers(args.backbone):
        raise UserError(f'--protocol=detection makes its pyramid of a ResNet or of small, not of {args.backbone}')
    if not args.detection_path:
        raise UserError('--protocol=detection wants --detection_path=FOLDER in the format of COCO or VOC')
    splits = load_boxes(resolve_path(args.detection_path), args.detector == 'mask_rcnn', pixel_levels(args.white_level))
    if args.on_unreadable == 'skip':
        splits = {split: drop_unreadable(args, boxes) for split, boxes in splits.items()}
    for boxes in splits.values():
        absent = [name for name in boxes.names if not (boxes.folder / name).is_file()]
        if absent:  # else those of val would be missed at the end of the training
            raise WorkError(
                f'{len(absent)} of the {len(boxes)} images of {boxes.split} are not there, such as '
                f'{printable(boxes.folder / absent[0])}; --on_unreadable=skip leaves them out'
            )
        if not boxes.has_boxes():
            raise UserError(
                f'--detection_path: {resolve_path(args.detection_path)} has no boxes in {boxes.split} (a crowd, or '
                'what is '
                'difficult, is neither learned nor judged)'
            )
        if boxes.left_out:
            log(f'{boxes.split}: {boxes.left_out} boxes have no area or lie outside of their image, and are left out')
    parts = [
        SplitSource(boxes.folder.parent / boxes.split, file_reader(boxes), boxes.labels, [])
        for boxes in splits.values()
    ]
    warn_train_test_overlap(*parts)
    return splits


def file_reader(boxes):
    return Files(boxes.folder, PathArray(boxes.names))


def drop_unreadable(args, boxes):
    """Those images, with their boxes, that can be read. Raises WorkError where there are none."""
    rows = readable_rows(file_reader(boxes), boxes.folder.parent / boxes.split, resolve_path(args.cache_path))
    return boxes.select(rows.tolist())


def fpn_layers(backbone):
    """The modules that a pyramid is made of, with their levels' names; None for a network that has no such."""
    return TINY_RESNET_LAYERS if backbone == 'small' else RESNET if backbone in resnet.__all__ else None


def make_detector(args, backbone, num_classes, masks):
    """torchvision's detector on a pyramid of the backbone's stages. num_classes: without the background.

    As there, an anchor is 8 times as wide as the stride of its level, and the last level is the pooled last stage. The
    pyramid has BN, for pretrained features may be of any size, a tenth of what an untrained network's are, and without
    it a detector learns nothing from those (MoCo, arXiv 1911.05722, section 4.2: BN in the new layers).
    """
    stages = fpn_layers(args.backbone)
    with torch.no_grad():
        maps = IntermediateLayerGetter(backbone.cpu().eval(), stages)(torch.zeros(1, 3, 256, 256))
    strides = [256 // found.shape[2] for found in maps.values()]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.random_seed)
        channels = [found.shape[1] for found in maps.values()]
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
    """The pyramid in the precision of --amp, its maps in float32: the heads reckon with coordinates, and in bfloat16 a
    box of a few pixels far from the corner has no width, whose logarithm ends the training."""

    def __init__(self, args, body):
        super().__init__()
        self.args, self.body, self.out_channels = args, body, body.out_channels

    def forward(self, images):
        with autocast(self.args, uses_grad_scaler=False):
            maps = self.body(images)
        return {name: found.float() for name, found in maps.items()}


def train_detector(args, detector, train):
    """SGD with momentum 0.9 and weight decay 1e-4, a short linear rise of the rate and half a cosine to zero."""
    device = get_device(args)
    size = min(args.detection_batch_size, len(train))
    if size == 1 and args.detection_size <= LAST_STRIDE:  # a square image is one value of each channel
        raise UserError(
            f'--detection_size={args.detection_size}: BN wants more than one value, and one image of that size has one '
            f'in its last map: --detection_batch_size=2, or a size above {LAST_STRIDE}'
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
            done = (epoch + step / steps) / args.detection_epochs
            optimizer.param_groups[0]['lr'] = lr_schedule(done, WARMUP, args.detection_learning_rate * size / 16)
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
    """Loader of (images, targets) for these keys, in order."""
    return WatchedDataLoader(boxes, resolve_num_workers(args.num_workers), batch_size=size, sampler=sampler_keys)


@torch.inference_mode()
def evaluate_ap(args, detector, val, masks):
    """AP, AP50 and AP75 of boxes, and of masks where there are, in percent, by pycocotools."""
    device, numbers = get_device(args), {number: category for category, number in val.number.items()}
    detector.eval()
    found = {'bbox': [], 'segm': []}
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
                found['bbox'].append({**prediction, 'bbox': box})
                if masks:
                    found['segm'].append({**prediction, 'segmentation': encode_rle(output['masks'][i, 0] > 0.5)})
    result = {}
    for kind, prefix in (('bbox', ''), ('segm', 'mask_')) if masks else (('bbox', ''),):
        values = average_precision(val.table, found[kind], kind)
        result |= {f'{prefix}{name}': value for name, value in zip(('AP', 'AP50', 'AP75'), values, strict=True)}
    return result


def encode_rle(mask):
    from pycocotools import mask as coco

    return coco.encode(np.asfortranarray(mask.cpu().numpy().astype(np.uint8)))


def voc_difficult_cocoeval(judge):
    """COCO's judge, for which a difficult object of VOC is no crowd: it is overlooked where it is found, by VOC's own
    overlap, and excuses nothing that lies inside it."""

    class Judge(judge):
        def _prepare(self):
            super()._prepare()
            for key, boxes in self._gts.items():
                self._gts[key] = [{**box, 'ignore': 1, 'iscrowd': 0} if box.get('difficult') else box for box in boxes]

    return Judge


def average_precision(table, found, kind):
    """(AP, AP50, AP75) in percent of detections in COCO's format against a table like COCO's. kind: bbox or segm."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    if not found:
        return 0.0, 0.0, 0.0
    with contextlib.redirect_stdout(io.StringIO()):  # both print as they go
        coco_gt = COCO()
        coco_gt.dataset = {'info': {}, **table}
        coco_gt.createIndex()
        judge = voc_difficult_cocoeval(COCOeval)(coco_gt, coco_gt.loadRes(found), kind)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return tuple(100 * float(value) for value in judge.stats[:3])


PROTOCOL = Protocol(
    run=detection,
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
