"""Images with boxes (and masks), from a folder in the format of COCO or of VOC, as one COCO-style table."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from dataloader.detection.coco import coco_split
from dataloader.detection.voc import voc_classes, voc_lists, voc_split
from dataloader.loading.decode import decode
from dataloader.loading.loader import catch_as_value
from runtime.errors import UserError, WorkError


@dataclass
class DetectionDataset(Dataset):
    """The images of one split. table: images, annotations and categories as COCO's JSON has them."""

    folder: Path
    split: str  # its name in the folder
    table: dict
    left_out: int  # boxes without an area, or outside of their image
    masks: bool
    levels: tuple | None = None  # of decode.rgb

    def __post_init__(self):
        self.boxes_by_image = {image['id']: [] for image in self.table['images']}
        for box in self.table['annotations']:
            self.boxes_by_image[box['image_id']].append(box)
        ids = sorted(category['id'] for category in self.table['categories'])
        self.number = {category: i + 1 for i, category in enumerate(ids)}

    def has_boxes(self):
        """Whether there is one to learn from, or to be judged by: a crowd is neither."""
        return any(not box['iscrowd'] for box in self.table['annotations'])

    def select(self, rows):
        """The images of these row numbers, with their boxes."""
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
        """How many boxes each image has."""
        return torch.tensor([len(self.boxes_by_image[image['id']]) for image in self.table['images']])

    def __getitems__(self, keys):
        """Two tuples, of images and of targets, or an exception (loader.catch_as_value)."""
        return catch_as_value(lambda: tuple(zip(*map(self.__getitem__, keys), strict=True)))

    def __getitem__(self, key):
        """key: (index, whether to mirror). Returns (3 x H x W in [0, 1], target of torchvision's detectors)."""
        index, hflip = key
        entry = self.table['images'][index]
        picture = decode(self.folder / entry['file_name'], levels=self.levels, upright=not entry.get('stored'))
        image = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
        kept = [box for box in self.boxes_by_image[entry['id']] if not box['iscrowd']]
        boxes = torch.tensor([box['bbox'] for box in kept], dtype=torch.float32).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]  # left, top, width, height to left, top, right, bottom
        target = {
            'boxes': boxes,
            'labels': torch.tensor([self.number[box['category_id']] for box in kept], dtype=torch.int64),
            'image_id': entry['id'],
        }
        if self.masks:
            masks = [decode_mask(box['segmentation'], *image.shape[1:]) for box in kept]
            if other := {tuple(mask.shape) for mask in masks} - {tuple(image.shape[1:])}:
                raise WorkError(f'{entry["file_name"]} has {tuple(image.shape[1:])} pixels, and a mask {other.pop()}')
            target['masks'] = torch.stack(masks) if masks else torch.zeros(0, *image.shape[1:], dtype=torch.uint8)
        if hflip:
            image = image.flip(2)
            boxes[:, [0, 2]] = image.shape[2] - boxes[:, [2, 0]]
            if self.masks:
                target['masks'] = target['masks'].flip(2)
        return image, target


def load_boxes(folder, masks, levels=None):
    """{'train': DetectionDataset, 'val': DetectionDataset} of a folder in either format. levels: of decode.rgb. Raises
    UserError where it is in neither."""
    if (folder / 'annotations').is_dir():
        splits = {
            split: DetectionDataset(*coco_split(folder, split, masks), masks, levels) for split in ('train', 'val')
        }
        names = [{each['id']: each['name'] for each in splits[split].table['categories']} for split in splits]
        if names[0] != names[1]:
            raise WorkError(f'the categories of train and of val in {folder}/annotations are not the same')
        return splits
    if (folder / 'ImageSets/Main').is_dir():
        if masks:
            raise UserError('`detector=mask_rcnn` wants masks, which the VOC format has not: take faster_rcnn or COCO')
        numbers = {name: number + 1 for number, name in enumerate(voc_classes(folder))}
        found = zip(('train', 'val'), voc_lists(folder), strict=True)
        return {split: DetectionDataset(*voc_split(folder, path, numbers), masks, levels) for split, path in found}
    raise UserError(f'`detection_path`: {folder} has neither annotations/ (COCO) nor ImageSets/Main/ (VOC)')


def decode_mask(segmentation, height, width):
    """A COCO segmentation (polygons or run lengths) as height x width uint8, 1 inside."""
    from pycocotools import mask

    if isinstance(segmentation, list):
        segmentation = mask.merge(mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation['counts'], list):
        segmentation = mask.frPyObjects(segmentation, height, width)
    return torch.from_numpy(mask.decode(segmentation))
