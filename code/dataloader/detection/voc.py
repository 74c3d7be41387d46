"""Boxes in the VOC format.

Annotations/*.xml, JPEGImages/, ImageSets/Main/{trainval and test, or train and val}.txt; no masks

torchvision.datasets.VOCDetection is not used: it requires VOCdevkit/VOC<year> above these folders, one of six years and
.jpg, and returns unchecked text; it would only replace `parse_xml`.
"""

import glob
import math
import os
import re
import xml.etree.ElementTree as ElementTree

from dataloader.detection.validate import validate
from dataloader.loading.decode import is_image
from runtime.errors import UserError, WorkError

CLASS_FLAG = re.compile(r'\s+(1|0|-1)$')  # after each name in the list of one class


def list_voc_classes(folder):
    """Return the sorted names of all annotated classes."""
    return sorted(
        {
            object_class(obj, path)
            for path in sorted((folder / 'Annotations').glob('*.xml'))
            for obj in parse_xml(path).iter('object')
        }
    )


def object_class(obj, path):
    """Return the class of an object. Raises WorkError if it has none."""
    name = (obj.findtext('name') or '').strip()
    if not name:
        raise WorkError(f'{path} has an object without a name')
    return name


def find_voc_lists(folder):
    """Return the paths of the lists for training and evaluation: trainval and test (paper, table 5), else train and
    val, else train and test. Raises UserError if there is no such pair."""
    lists = folder / 'ImageSets/Main'
    for train, val in (('trainval', 'test'), ('train', 'val'), ('train', 'test')):
        if (lists / f'{train}.txt').is_file() and (lists / f'{val}.txt').is_file():
            return lists / f'{train}.txt', lists / f'{val}.txt'
    raise UserError(f'`detection_path`: {lists} needs trainval.txt and test.txt, or train.txt and val.txt or test.txt')


def read_voc_split(folder, path, numbers):
    """Read the split of the list at `path`. numbers: {class: number}. Returns (folder of the images, name of the split,
    table, number of dropped boxes). Raises WorkError for invalid annotations."""
    images, boxes, image_dir = [], [], folder / 'JPEGImages'
    for number, line in enumerate(read_image_names(path)):
        file = folder / f'Annotations/{line}.xml'
        if not file.is_file() and (name := CLASS_FLAG.sub('', line)) != line:
            file, line = folder / f'Annotations/{name}.xml', name
        root = parse_xml(file)
        try:
            size = root.find('size')
            name = find_image(image_dir, line, root.findtext('filename'))
            width, height = (int(size.findtext(side) or 0) if size is not None else 0 for side in ('width', 'height'))
            images.append({'id': number, 'file_name': name, 'width': width, 'height': height})
            for obj in root.iter('object'):
                number_of = numbers[object_class(obj, file)]
                difficult = int(obj.findtext('difficult') == '1')
                box = {'image_id': number, 'category_id': number_of, 'bbox': object_box(obj)}
                boxes.append({**box, 'iscrowd': difficult, 'difficult': difficult})
        except (AttributeError, TypeError, ValueError) as error:
            raise WorkError(f'{file} is not in the VOC format: {error}') from None
    categories = [{'id': number, 'name': name} for name, number in numbers.items()]
    table = {'images': images, 'annotations': boxes, 'categories': categories}
    return image_dir, path.stem, *validate(path, table, image_dir, False)


def read_image_names(path):
    """Read a list of image names without endings."""
    try:
        lines = [line.strip() for line in path.read_text(encoding='utf-8-sig').splitlines()]
    except UnicodeDecodeError as error:
        raise WorkError(f'{path} is no list of names: {error}') from None
    return [line for line in lines if line]


def find_image(image_dir, name, annotated_name):
    """Return the file name of an image in `image_dir`: <name>.jpg, the name in its annotation, or another ending."""
    for file in (f'{name}.jpg', annotated_name or ''):
        if file and (image_dir / file).is_file():
            return file
    candidates = sorted(
        path.name for path in image_dir.glob(f'{glob.escape(name)}.*') if is_image(os.fsencode(path.name))
    )
    return candidates[0] if candidates else f'{name}.jpg'  # reported as missing when it is read


def object_box(obj):
    """Return [left, top, width, height] of an object. VOC counts pixels from 1 and includes both ends."""
    left, top, right, bottom = (float(obj.find('bndbox').findtext(side)) for side in ('xmin', 'ymin', 'xmax', 'ymax'))
    box = [left - 1, top - 1, right - left + 1, bottom - top + 1]
    if not all(map(math.isfinite, box)):
        raise ValueError(f'it has a box of {box}')
    return box


def parse_xml(path):
    try:
        return ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise WorkError(f'{path} cannot be read: {error}') from None
