"""Validation of detection annotations: a table of images, boxes and categories as in COCO's JSON."""

import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from dataloader.loading.decode import open_image, stored_and_upright_size
from runtime.console import printable
from runtime.environment import cpu_count
from runtime.errors import WorkError
from runtime.messages import progress

MAX_COORDINATE = 1e6  # pixels; larger coordinates are invalid


def check_image_sizes(path, table, folder):
    """Check the image sizes in a table against the files. Returns the table with the sizes of the files: upright, or as
    stored (marked `stored`) if the annotations are in that frame. Sizes that are 0 or missing are filled in. Raises
    WorkError if sizes differ, with the number of such images."""
    images, wrong = [], []
    with ThreadPoolExecutor(cpu_count()) as pool:
        found = pool.map(lambda image: read_sizes(folder, image['file_name']), table['images'])
        sizes = [*progress(found, f'sizes of the images of {printable(folder.name)}', 'images', len(table['images']))]
    for image, (stored, upright) in zip(table['images'], sizes, strict=True):
        table_size = image.get('width') or 0, image.get('height') or 0
        if not stored:
            images.append(
                {**image, 'width': table_size[0] or MAX_COORDINATE, 'height': table_size[1] or MAX_COORDINATE}
            )
        elif table_size in ((0, 0), upright):
            images.append({**image, 'width': upright[0], 'height': upright[1]})
        elif table_size == stored:
            images.append({**image, 'stored': True})
        else:
            wrong.append((image['file_name'], table_size, upright))
    if wrong:
        name, table_size, file_size = wrong[0]
        raise WorkError(
            f'{path}: {len(wrong)} of the {len(table["images"])} images have another size than it says, such as '
            f'{printable(name)}: {table_size[0]} x {table_size[1]} pixels there, {file_size[0]} x {file_size[1]} in '
            'the file; boxes would be misplaced: use the files that were annotated'
        )
    return {**table, 'images': images}


def read_sizes(folder, name):
    """Return (stored, upright): the (width, height) of an image file; (None, None) if it is unreadable, which is
    reported when the image is read."""
    try:
        with open_image(folder / name, name) as file:
            return stored_and_upright_size(file)
    except WorkError:
        return None, None


def validate(path, table, folder, masks):
    """Validate the table of the file `path`, with images in `folder`. Returns (table, number of dropped annotations):
    annotations get id, area and iscrowd; those without area or outside of their image are dropped. Raises WorkError for
    an invalid one."""
    check_paths_inside(table, folder)
    table = check_image_sizes(path, table, folder)
    for kind in ('images', 'categories'):
        if reason := duplicate_id_reason([each['id'] for each in table[kind]]):
            raise WorkError(f'{path}: the ids of the {kind} {reason}')
    categories, images = (
        {each['id']: each['name'] for each in table['categories']},
        {x['id']: x for x in table['images']},
    )
    usable = []
    for number, box in enumerate(table['annotations'], 1):
        if reason := invalid_reason(box, images, categories, masks):
            raise WorkError(f'{path}: annotation {number} {reason}')
        left, top, width, height = box['bbox']
        image = images[box['image_id']]
        right, bottom = image.get('width', math.inf), image.get('height', math.inf)
        if has_area(box['bbox']) and -width < left < right and -height < top < bottom:
            area = width * height if box.get('area') is None else box['area']
            usable.append({**box, 'id': number, 'area': area, 'iscrowd': int(box.get('iscrowd') or 0)})
    return {**table, 'annotations': usable}, len(table['annotations']) - len(usable)


def duplicate_id_reason(ids):
    """Return why the ids of images or categories are invalid, or None."""
    if not (all(isinstance(x, str) for x in ids) or all(isinstance(x, int | float) for x in ids)):
        return 'are neither all numbers nor all text'
    double = next((x for x, count in Counter(ids).items() if count > 1), None)
    return None if double is None else f'are not unique: {double!r} occurs twice'


def has_area(bbox):
    """Whether a box has an area in float32, the type that detectors use."""
    left, top, width, height = map(np.float32, bbox)
    return bool(left + width > left and top + height > top)


def invalid_reason(box, images, categories, masks):
    """Return why an annotation is invalid, or None. images, categories: dicts by id."""
    if box['image_id'] not in images:
        return f'is of an unknown image, {box["image_id"]}'
    if box['category_id'] not in categories:
        return f'is of an unknown category, {box["category_id"]}'
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
    """Whether a segmentation is valid. pycocotools does not check run lengths, and reads beyond them."""
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
    """Decode COCO's compressed run lengths: five bits per character, lowest first, signed; from the third on they are
    differences to the last but one. Returns None for invalid text."""
    lengths, value, shift = [], 0, 0
    for letter in text:
        bits = ord(letter) - 48
        if not 0 <= bits < 64:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:  # more characters follow
            continue
        value -= bool(bits & 16) << shift
        lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
        value = shift = 0
    return lengths if not shift else None


def check_paths_inside(table, folder):
    """Raise WorkError if a file name leads out of the folder of the images."""
    for image in table['images']:
        if not isinstance(image['file_name'], str):
            raise WorkError(f'the annotations name {image["file_name"]!r}, which is not a file name')
        if not (folder / image['file_name']).resolve().is_relative_to(folder.resolve()):
            raise WorkError(f'the annotations name {image["file_name"]!r}, which is not inside {folder}')
