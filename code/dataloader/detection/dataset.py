"""A detection dataset: images with boxes, and perhaps masks, from a folder in the COCO or VOC format."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from dataloader.detection.coco import read_coco_split
from dataloader.detection.voc import find_voc_lists, list_voc_classes, read_voc_split
from dataloader.loading.decode import decode
from dataloader.loading.loader import catch_as_value
from runtime.errors import UserError, WorkError


@dataclass
class DetectionDataset(Dataset):
    """The images of one split. table: images, annotations and categories as in COCO's JSON."""

    folder: Path
    split: str  # name of the split in the folder
    table: dict
    left_out: int  # dropped boxes: without area, or outside of the image
    masks: bool
    levels: tuple | None = None  # see decode.rgb

    def __post_init__(self):
        self.boxes_by_image = {image['id']: [] for image in self.table['images']}
        for box in self.table['annotations']:
            self.boxes_by_image[box['image_id']].append(box)
        ids = sorted(category['id'] for category in self.table['categories'])
        self.number = {category: i + 1 for i, category in enumerate(ids)}

    def has_boxes(self):
        """Whether there is a box that is no crowd; crowds are neither trained on nor evaluated."""
        return any(not box['iscrowd'] for box in self.table['annotations'])

    def select(self, rows):
        """Return the images with these row numbers, and their boxes."""
        images = [self.table['images'][row] for row in rows]
        ids = {image['id'] for image in images}
        boxes = [box for box in self.table['annotations'] if box['image_id'] in ids]
        return replace(self, table={**self.table, 'images': images, 'annotations': boxes})

    def __len__(self):
        return len(self.table['images'])

    @property
    def names(self):
        return [image['file_name'] for image in self.table['images']]

    @property
    def labels(self):
        """Number of boxes of each image."""
        return torch.tensor([len(self.boxes_by_image[image['id']]) for image in self.table['images']])

    def __getitems__(self, keys):
        """Load a batch: a tuple of images and a tuple of targets, or an exception (loader.catch_as_value)."""
        return catch_as_value(lambda: tuple(zip(*map(self.__getitem__, keys), strict=True)))

    def __getitem__(self, key):
        """key: (index, whether to flip). Returns (3 x H x W in [0, 1], target as torchvision's detectors expect it)."""
        index, hflip = key
        entry = self.table['images'][index]
        picture = decode(self.folder / entry['file_name'], levels=self.levels, upright=not entry.get('stored'))
        image = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
        annotations = [box for box in self.boxes_by_image[entry['id']] if not box['iscrowd']]
        boxes = torch.tensor([box['bbox'] for box in annotations], dtype=torch.float32).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]  # left, top, width, height to left, top, right, bottom
        target = {
            'boxes': boxes,
            'labels': torch.tensor([self.number[box['category_id']] for box in annotations], dtype=torch.int64),
            'image_id': entry['id'],
        }
        if self.masks:
            masks = [decode_mask(box['segmentation'], *image.shape[1:]) for box in annotations]
            if other := {tuple(mask.shape) for mask in masks} - {tuple(image.shape[1:])}:
                raise WorkError(f'{entry["file_name"]} has {tuple(image.shape[1:])} pixels, and a mask {other.pop()}')
            target['masks'] = torch.stack(masks) if masks else torch.zeros(0, *image.shape[1:], dtype=torch.uint8)
        if hflip:
            image = image.flip(2)
            boxes[:, [0, 2]] = image.shape[2] - boxes[:, [2, 0]]
            if self.masks:
                target['masks'] = target['masks'].flip(2)
        return image, target


def load_detection_dataset(folder, masks, levels=None):
    """Load {'train', 'val'} of DetectionDataset from a folder in the COCO or VOC format. levels: see decode.rgb. Raises
    UserError for other layouts."""
    if (folder / 'annotations').is_dir():
        splits = {
            split: DetectionDataset(*read_coco_split(folder, split, masks), masks, levels) for split in ('train', 'val')
        }
        names = [{each['id']: each['name'] for each in splits[split].table['categories']} for split in splits]
        if names[0] != names[1]:
            raise WorkError(f'the categories of train and of val in {folder}/annotations are not the same')
        return splits
    if (folder / 'ImageSets/Main').is_dir():
        if masks:
            raise UserError(
                '`detector=mask_rcnn` needs masks, which the VOC format does not have: take faster_rcnn or COCO'
            )
        numbers = {name: number + 1 for number, name in enumerate(list_voc_classes(folder))}
        lists = zip(('train', 'val'), find_voc_lists(folder), strict=True)
        return {split: DetectionDataset(*read_voc_split(folder, path, numbers), masks, levels) for split, path in lists}
    raise UserError(f'`detection_path`: {folder} has neither annotations/ (COCO) nor ImageSets/Main/ (VOC)')


def decode_mask(segmentation, height, width):
    """Decode a COCO segmentation (polygons or run lengths) to height x width uint8, 1 inside."""
    from pycocotools import mask

    if isinstance(segmentation, list):
        segmentation = mask.merge(mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation['counts'], list):
        segmentation = mask.frPyObjects(segmentation, height, width)
    return torch.from_numpy(mask.decode(segmentation))
