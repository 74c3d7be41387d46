"""Boxes in the format of VOC.

Annotations/*.xml, JPEGImages/, ImageSets/Main/{trainval and test, or train and val}.txt; no masks

Not by torchvision.datasets.VOCDetection: it wants VOCdevkit/VOC<year> above these folders, one of six years, and .jpg,
and gives the text of each element, unchecked; its reading would take the place of `annotation` alone.
"""

import glob
import math
import os
import re
import xml.etree.ElementTree as ElementTree

from dataloader.detection.validate import checked
from dataloader.loading.decode import is_image
from errors import UserError, WorkError

MARK = re.compile(r'\s+(1|0|-1)$')  # behind each name in a list of one class


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
    raise UserError(f'`detection_path`: {lists} has neither trainval.txt and test.txt nor train.txt and val.txt')


def voc_split(folder, path, numbers):
    """(folder of the images, name of the split, table, boxes left out) of the list at `path`. numbers: {class: its
    number}. Raises WorkError for what cannot be used."""
    images, boxes, place = [], [], folder / 'JPEGImages'
    for number, line in enumerate(lines_of(path)):
        file = folder / f'Annotations/{line}.xml'
        if not file.is_file() and (name := MARK.sub('', line)) != line:
            file, line = folder / f'Annotations/{name}.xml', name
        root = annotation(file)
        try:
            size = root.find('size')
            name = image_of(place, line, root.findtext('filename'))
            width, height = (int(size.findtext(side) or 0) if size is not None else 0 for side in ('width', 'height'))
            images.append({'id': number, 'file_name': name, 'width': width, 'height': height})
            for thing in root.iter('object'):
                number_of = numbers[name_of(thing, file)]
                difficult = int(thing.findtext('difficult') == '1')
                box = {'image_id': number, 'category_id': number_of, 'bbox': box_of(thing)}
                boxes.append({**box, 'iscrowd': difficult, 'difficult': difficult})
        except (AttributeError, TypeError, ValueError) as error:
            raise WorkError(f'{file} is not in the VOC format: {error}') from None
    categories = [{'id': number, 'name': name} for name, number in numbers.items()]
    table = {'images': images, 'annotations': boxes, 'categories': categories}
    return place, path.stem, *checked(path, table, place, False)


def lines_of(path):
    """What a list names: images without their endings."""
    try:
        lines = [line.strip() for line in path.read_text(encoding='utf-8-sig').splitlines()]
    except UnicodeDecodeError as error:
        raise WorkError(f'{path} is no list of names: {error}') from None
    return [line for line in lines if line]


def image_of(place, name, said):
    """The file in `place` of the image `name`: .jpg as in VOC, or what its annotation says, or another ending."""
    for file in (f'{name}.jpg', said or ''):
        if file and (place / file).is_file():
            return file
    others = sorted(path.name for path in place.glob(f'{glob.escape(name)}.*') if is_image(os.fsencode(path.name)))
    return others[0] if others else f'{name}.jpg'  # whoever reads it says that it is not there


def box_of(thing):
    """Left, top, width and height of an object; VOC counts pixels from 1, both ends included."""
    left, top, right, bottom = (float(thing.find('bndbox').findtext(side)) for side in ('xmin', 'ymin', 'xmax', 'ymax'))
    box = [left - 1, top - 1, right - left + 1, bottom - top + 1]
    if not all(map(math.isfinite, box)):
        raise ValueError(f'it has a box of {box}')
    return box


def annotation(path):
    try:
        return ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise WorkError(f'{path} cannot be read: {error}') from None
