"""A table of images, boxes and categories as COCO's JSON has them, whatever format it came in: can it be used?"""

import math

from config import WorkError


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
