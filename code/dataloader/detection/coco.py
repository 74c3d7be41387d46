"""Boxes and masks in the COCO format.

annotations/instances_<split>*.json, images in <split>*/ (such as train2017/) or images/<split>*/

pycocotools decodes masks and computes AP. The JSON is read directly: pycocotools' COCO class prints while it reads and
does not validate.
"""

import json

from dataloader.detection.validate import validate
from runtime.errors import UserError, WorkError


def read_coco_split(folder, split, masks):
    """Read a split, train or val. Returns (folder of the images, name of the split, table, number of dropped boxes).
    Raises UserError if it is missing, WorkError if it is invalid."""
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
