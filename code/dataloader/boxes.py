"""Images with boxes (and masks), from a folder in the format of COCO or of VOC, as one COCO-style table.

COCO   annotations/instances_<split>*.json, images in <split>*/ (such as train2017/) or images/<split>*/
VOC    Annotations/*.xml, JPEGImages/, ImageSets/Main/{trainval and test, or train and val}.txt; boxes, no masks
"""

import json
import math
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from config import UserError, WorkError
from dataloader.batches import caught
from dataloader.images import decode


@dataclass
class Boxes(Dataset):
    """The images of one split. table: images, annotations and categories as COCO's JSON has them."""

    folder: Path
    table: dict
    masks: bool
    split: str  # its name in the folder
    left_out: int = 0  # boxes without an area, or outside of their image

    def __post_init__(self):
        self.of_image = {image['id']: [] for image in self.table['images']}
        for box in self.table['annotations']:
            self.of_image[box['image_id']].append(box)
        ids = sorted(category['id'] for category in self.table['categories'])
        self.number = {category: i + 1 for i, category in enumerate(ids)}

    def has_boxes(self):
        """Whether there is one to learn from, or to be judged by: a crowd is neither."""
        return any(not box['iscrowd'] for box in self.table['annotations'])

    def __len__(self):
        return len(self.table['images'])

    @property
    def names(self):
        return [image['file_name'] for image in self.table['images']]

    @property
    def labels(self):
        """How many boxes each image has."""
        return torch.tensor([len(self.of_image[image['id']]) for image in self.table['images']])

    def __getitems__(self, keys):
        """Two tuples, of images and of targets, or an exception (batches.caught)."""
        return caught(lambda: tuple(zip(*map(self.__getitem__, keys), strict=True)))

    def __getitem__(self, key):
        """key: (index, whether to mirror). Returns (3 x H x W in [0, 1], target of torchvision's detectors)."""
        index, mirror = key
        entry = self.table['images'][index]
        image = torch.from_numpy(np.array(decode(self.folder / entry['file_name']))).permute(2, 0, 1) / 255
        kept = [box for box in self.of_image[entry['id']] if not box['iscrowd']]
        boxes = torch.tensor([box['bbox'] for box in kept], dtype=torch.float32).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]  # left, top, width, height to left, top, right, bottom
        target = {
            'boxes': boxes,
            'labels': torch.tensor([self.number[box['category_id']] for box in kept], dtype=torch.int64),
            'image_id': entry['id'],
        }
        if self.masks:
            masks = [mask_of(box['segmentation'], *image.shape[1:]) for box in kept]
            target['masks'] = torch.stack(masks) if masks else torch.zeros(0, *image.shape[1:], dtype=torch.uint8)
        if mirror:
            image = image.flip(2)
            boxes[:, [0, 2]] = image.shape[2] - boxes[:, [2, 0]]
            if self.masks:
                target['masks'] = target['masks'].flip(2)
        return image, target


def load_boxes(folder, masks):
    """{'train': Boxes, 'val': Boxes} of a folder in either format. Raises UserError where it is in neither."""
    if (folder / 'annotations').is_dir():
        splits = {split: coco_split(folder, split, masks) for split in ('train', 'val')}
        names = [{each['id']: each['name'] for each in splits[split].table['categories']} for split in splits]
        if names[0] != names[1]:
            raise WorkError(f'the categories of train and of val in {folder}/annotations are not the same')
        return splits
    if (folder / 'ImageSets/Main').is_dir():
        if masks:
            raise UserError('--detector=mask_rcnn wants masks, which the VOC format has not: take faster_rcnn or COCO')
        numbers = {name: number + 1 for number, name in enumerate(voc_classes(folder))}
        train, val = voc_lists(folder)
        return {'train': voc_split(folder, train, numbers), 'val': voc_split(folder, val, numbers)}
    raise UserError(f'--detection_path: {folder} has neither annotations/ (COCO) nor ImageSets/Main/ (VOC)')


def coco_split(folder, split, masks):
    files = sorted((folder / 'annotations').glob(f'instances_{split}*.json'))
    if not files:
        raise UserError(f'--detection_path: there is no {folder}/annotations/instances_{split}*.json')
    own = files[0].stem.removeprefix('instances_')
    places = [folder / own, folder / 'images' / own, folder / split, folder / 'images' / split, folder / 'images']
    images = next((place for place in places if place.is_dir()), None)
    if images is None:
        raise UserError(f'--detection_path: the images of {files[0].name} are not in {folder}/{own}')
    try:
        table = json.loads(files[0].read_text(encoding='utf-8'))
        table = {key: table[key] for key in ('images', 'annotations', 'categories')}
        table, left_out = checked(files[0], table, images, masks)
        return Boxes(images, table, masks, own, left_out)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise WorkError(f'{files[0]} is not in the COCO format: {error!r}') from None


def checked(path, table, folder, masks):
    """(the table that `path` has, of images in `folder`, each annotation with id, area and iscrowd; how many are left
    out, for they have no area or lie outside of their image). Raises WorkError for one that cannot be used."""
    inside(table, folder)
    known, images = {each['id'] for each in table['categories']}, {image['id']: image for image in table['images']}
    kept = []
    for number, box in enumerate(table['annotations'], 1):
        if reason := why_not(box, images, known, masks):
            raise WorkError(f'{path}: annotation {number} {reason}')
        left, top, width, height = box['bbox']
        image = images[box['image_id']]
        right, bottom = image.get('width', math.inf), image.get('height', math.inf)
        if width > 0 and height > 0 and -width < left < right and -height < top < bottom:
            kept.append({'iscrowd': 0, 'area': width * height, **box, 'id': number})
    return {**table, 'annotations': kept}, len(table['annotations']) - len(kept)


def why_not(box, images, categories, masks):
    """Why an annotation cannot be used, or None. images: by their ids; categories: ids."""
    if box['image_id'] not in images:
        return f'is of an image that is not there, {box["image_id"]}'
    if box['category_id'] not in categories:
        return f'is of a category that is not there, {box["category_id"]}'
    if len(box['bbox']) != 4 or not all(isinstance(x, int | float) and math.isfinite(x) for x in box['bbox']):
        return f'has no box of four numbers but {box["bbox"]}'
    if not masks or box.get('iscrowd'):
        return None
    shape, image = box.get('segmentation'), images[box['image_id']]
    if isinstance(shape, list):
        good = shape and all(isinstance(x, list) and len(x) >= 6 and len(x) % 2 == 0 for x in shape)
    else:
        good = isinstance(shape, dict) and shape.get('size') == [image['height'], image['width']] and 'counts' in shape
    return None if good else 'has no mask: polygons, or run lengths of the size of its image (or take faster_rcnn)'


def inside(table, folder):
    """No file name may lead out of the folder of the images."""
    for image in table['images']:
        if not isinstance(image['file_name'], str):
            raise WorkError(f'the annotations name {image["file_name"]!r}, which is no file name')
        if not (folder / image['file_name']).resolve().is_relative_to(folder.resolve()):
            raise WorkError(f'the annotations name {image["file_name"]!r}, which is not inside {folder}')


def voc_classes(folder):
    """The names of all classes that are annotated, sorted."""
    return sorted(
        {
            name_of(thing, path)
            for path in sorted((folder / 'Annotations').glob('*.xml'))
            for thing in annotation(path).iter('object')
        }
    )


def name_of(thing, path):
    """The class of an object. Raises WorkError."""
    name = (thing.findtext('name') or '').strip()
    if not name:
        raise WorkError(f'{path} has an object without a name')
    return name


def voc_lists(folder):
    """The lists to train and to judge by: trainval and test, the field's convention (paper, table 5), or train and val,
    whichever pair is there."""
    lists = folder / 'ImageSets/Main'
    for train, val in (('trainval', 'test'), ('train', 'val'), ('train', 'test')):
        if (lists / f'{train}.txt').is_file() and (lists / f'{val}.txt').is_file():
            return lists / f'{train}.txt', lists / f'{val}.txt'
    raise UserError(f'--detection_path: {lists} has neither trainval.txt and test.txt nor train.txt and val.txt')


def voc_split(folder, path, numbers):
    images, boxes = [], []
    try:
        lines = path.read_text().split()
    except UnicodeDecodeError as error:
        raise WorkError(f'{path} is no list of names: {error}') from None
    for number, line in enumerate(lines):
        file = folder / f'Annotations/{line}.xml'
        root = annotation(file)
        try:
            size = root.find('size')
            images.append(
                {
                    'id': number,
                    'file_name': f'{line}.jpg',
                    'width': int(size.findtext('width')),
                    'height': int(size.findtext('height')),
                }
            )
            for thing in root.iter('object'):
                left, top, right, bottom = (
                    float(thing.find('bndbox').findtext(side)) for side in ('xmin', 'ymin', 'xmax', 'ymax')
                )
                box = [left - 1, top - 1, right - left + 1, bottom - top + 1]  # VOC counts pixels from 1, both included
                if not all(map(math.isfinite, box)):
                    raise ValueError(f'it has a box of {box}')
                boxes.append(
                    {
                        'image_id': number,
                        'category_id': numbers[name_of(thing, file)],
                        'bbox': box,
                        'iscrowd': int(thing.findtext('difficult') == '1'),
                    }
                )
        except (AttributeError, TypeError, ValueError) as error:
            raise WorkError(f'{file} is not in the VOC format: {error}') from None
    categories = [{'id': number, 'name': name} for name, number in numbers.items()]
    table = {'images': images, 'annotations': boxes, 'categories': categories}
    table, left_out = checked(path, table, folder / 'JPEGImages', False)
    return Boxes(folder / 'JPEGImages', table, masks=False, split=path.stem, left_out=left_out)


def annotation(path):
    try:
        return ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise WorkError(f'{path} cannot be read: {error}') from None


def mask_of(segmentation, height, width):
    """A COCO segmentation (polygons or run lengths) as height x width uint8, 1 inside."""
    from pycocotools import mask

    if isinstance(segmentation, list):
        segmentation = mask.merge(mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation['counts'], list):
        segmentation = mask.frPyObjects(segmentation, height, width)
    return torch.from_numpy(mask.decode(segmentation))
