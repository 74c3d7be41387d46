"""A table of images, boxes and categories as COCO's JSON has them, whatever format it came in: can it be used?"""

import math
from collections import Counter

import numpy as np

from dataloader.loading.decode import open_image, stored_and_upright_size
from runtime.console import printable
from runtime.errors import WorkError

MAX_COORDINATE = 1e6  # pixels from an image's corner: what lies beyond is no box of one


def check_image_sizes(path, table, folder, progress=iter):
    """The table with the width and height of every image as its file has them: upright, as people and most tools see
    it, or where the table says so as it is stored (`stored`). What is 0 or missing in a table is unknown, and taken
    from the file. Raises WorkError where a table says other sizes than the files have, with their number."""
    images, wrong = [], []
    for image in progress(table['images']):
        said = image.get('width') or 0, image.get('height') or 0
        try:
            with open_image(folder / image['file_name'], image['file_name']) as file:
                stored, upright = stored_and_upright_size(file)
        except WorkError:  # whoever reads it says so; what is unknown stays so
            images.append({**image, 'width': said[0] or MAX_COORDINATE, 'height': said[1] or MAX_COORDINATE})
            continue
        if said in ((0, 0), upright):
            images.append({**image, 'width': upright[0], 'height': upright[1]})
        elif said == stored:
            images.append({**image, 'stored': True})
        else:
            wrong.append((image['file_name'], said, upright))
    if wrong:
        name, said, found = wrong[0]
        raise WorkError(
            f'{path}: {len(wrong)} of the {len(table["images"])} images have another size than it says, such as '
            f'{printable(name)}: {said[0]} x {said[1]} pixels there, {found[0]} x {found[1]} in the file; boxes would '
            'lie '
            'elsewhere: annotate these files, or take those that were annotated'
        )
    return {**table, 'images': images}


def validate(path, table, folder, masks):
    """(the table that `path` has, of images in `folder`, each annotation with id, area and iscrowd; how many are left
    out, for they have no area or lie outside of their image). Raises WorkError for one that cannot be used."""
    check_paths_inside(table, folder)
    table = check_image_sizes(path, table, folder)
    for kind in ('images', 'categories'):
        if reason := duplicate_id_reason([each['id'] for each in table[kind]]):
            raise WorkError(f'{path}: the ids of the {kind} {reason}')
    known, images = {each['id']: each['name'] for each in table['categories']}, {x['id']: x for x in table['images']}
    kept = []
    for number, box in enumerate(table['annotations'], 1):
        if reason := invalid_reason(box, images, known, masks):
            raise WorkError(f'{path}: annotation {number} {reason}')
        left, top, width, height = box['bbox']
        image = images[box['image_id']]
        right, bottom = image.get('width', math.inf), image.get('height', math.inf)
        if has_area(box['bbox']) and -width < left < right and -height < top < bottom:
            area = width * height if box.get('area') is None else box['area']
            kept.append({**box, 'id': number, 'area': area, 'iscrowd': int(box.get('iscrowd') or 0)})
    return {**table, 'annotations': kept}, len(table['annotations']) - len(kept)


def duplicate_id_reason(ids):
    """Why ids do not tell one image, or category, from another, or None."""
    if not (all(isinstance(x, str) for x in ids) or all(isinstance(x, int | float) for x in ids)):
        return 'are neither all numbers nor all text'
    double = next((x for x, count in Counter(ids).items() if count > 1), None)
    return None if double is None else f'are not of one each: {double!r} is there twice'


def has_area(bbox):
    """In single precision, which is what detectors compute in."""
    left, top, width, height = map(np.float32, bbox)
    return bool(left + width > left and top + height > top)


def invalid_reason(box, images, categories, masks):
    """Why an annotation cannot be used, or None. images and categories: by their ids."""
    if box['image_id'] not in images:
        return f'is of an image that is not there, {box["image_id"]}'
    if box['category_id'] not in categories:
        return f'is of a category that is not there, {box["category_id"]}'
    if len(box['bbox']) != 4 or not all(map(is_coordinate, box['bbox'])):
        return f'has no box of four numbers within {MAX_COORDINATE:,.0f} pixels but {str(box["bbox"])[:100]}'
    if box.get('iscrowd') not in (0, 1, None):
        return f'has iscrowd {box["iscrowd"]!r}, which is 0 or 1'
    area = box.get('area')
    if area is not None and not (isinstance(area, int | float) and 0 <= area <= MAX_COORDINATE**2):
        return f'has no number of pixels as its area but {str(area)[:100]}'
    image = images[box['image_id']]
    if not masks or is_mask(box.get('segmentation'), image['height'], image['width']):
        return None
    return 'has no mask: polygons, or run lengths of all of its image (or take faster_rcnn)'


def is_coordinate(x):
    return isinstance(x, int | float) and abs(x) <= MAX_COORDINATE  # False for nan


def is_mask(shape, height, width):
    """Whether COCO's library makes a mask of it; of run lengths that end early it makes what lies in memory."""
    if isinstance(shape, list):
        good = (isinstance(x, list) and len(x) >= 6 and len(x) % 2 == 0 and all(map(is_coordinate, x)) for x in shape)
        return bool(shape) and all(good)
    if not isinstance(shape, dict) or shape.get('size') != [height, width]:
        return False
    counts = shape.get('counts')
    counts = decode_rle_counts(counts) if isinstance(counts, str) else counts
    whole = isinstance(counts, list) and all(isinstance(x, int) and x >= 0 for x in counts)
    return whole and sum(counts) == height * width


def decode_rle_counts(text):
    """The run lengths that COCO's text stands for: five bits a letter, from the lowest, with a sign, and from the third
    on the difference to the last but one. None for other text."""
    lengths, value, shift = [], 0, 0
    for letter in text:
        bits = ord(letter) - 48
        if not 0 <= bits < 64:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:  # more follow
            continue
        value -= bool(bits & 16) << shift
        lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
        value = shift = 0
    return lengths if not shift else None


def check_paths_inside(table, folder):
    """No file name may lead out of the folder of the images."""
    for image in table['images']:
        if not isinstance(image['file_name'], str):
            raise WorkError(f'the annotations name {image["file_name"]!r}, which is no file name')
        if not (folder / image['file_name']).resolve().is_relative_to(folder.resolve()):
            raise WorkError(f'the annotations name {image["file_name"]!r}, which is not inside {folder}')
