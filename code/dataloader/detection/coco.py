"""Boxes (and masks) in the format of COCO.

annotations/instances_<split>*.json, images in <split>*/ (such as train2017/) or images/<split>*/

Masks are drawn, and APs measured, by pycocotools. The table is read by json: pycocotools' COCO does the same, prints
as it does, checks nothing, and is an extra that boxes without masks need for their AP alone.
"""

import json

from dataloader.detection.validate import validate
from runtime.errors import UserError, WorkError


def coco_split(folder, split, masks):
    """(folder of the images, name of the split there, table, boxes left out) of `split`, train or val. Raises UserError
    where it is not there, WorkError where it cannot be used."""
    files = sorted((folder / 'annotations').glob(f'instances_{split}*.json'))
    if not files:
        raise UserError(f'`detection_path`: there is no {folder}/annotations/instances_{split}*.json')
    if len(files) > 1:
        names = ' and '.join(path.name for path in files[:2])
        raise UserError(
            f'`detection_path`: {folder}/annotations has both {names}: which of them is {split}? Move one out'
        )
    split_name = files[0].stem.removeprefix('instances_')
    image_dir_candidates = [
        folder / split_name,
        folder / 'images' / split_name,
        folder / split,
        folder / 'images' / split,
        folder / 'images',
    ]
    images = next((place for place in image_dir_candidates if place.is_dir()), None)
    if images is None:
        raise UserError(f'`detection_path`: the images of {files[0].name} are not in {folder}/{split_name}')
    try:
        coco_dict = json.loads(files[0].read_text(encoding='utf-8'))
        coco_dict = {key: coco_dict[key] for key in ('images', 'annotations', 'categories')}
        return images, split_name, *validate(files[0], coco_dict, images, masks)
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise WorkError(f'{files[0]} is not in the COCO format: {error!r}') from None
