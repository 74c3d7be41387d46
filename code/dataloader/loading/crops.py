"""From an opened image to what is handed on: random resized crops or the centre crop, S x S, uint8."""

import torch
from PIL import Image
from torch.nn.functional import interpolate

from dataloader.augment.crop import center_box
from dataloader.loading.decode import draft_downscale, rgb, to_uint8_tensor

RESAMPLING = {'bilinear': Image.Resampling.BILINEAR, 'bicubic': Image.Resampling.BICUBIC}


def random_crops(image, views, augmentation, generator, jpeg_draft=True, white_level=0.0):
    """`views` random resized crops, perhaps flipped, from one decoding: views x 3 x S x S uint8.

    image: as decode.open_image gives it. augmentation: of recipes. jpeg_draft: let the JPEG decoder leave out detail
    (decode.draft_downscale). white_level: of decode.rgb.
    """
    size, how = augmentation.size, augmentation.interpolation
    boxes = augmentation.crop.sample(views, image.height, image.width, generator)
    downscale = draft_downscale(image, boxes[:, 2:4].min().item() / size) if jpeg_draft else 1
    if downscale > 1:
        image = rgb(image, white_level)
    else:
        pixels = to_uint8_tensor(image, white_level)[None]
    crops = torch.empty(views, 3, size, size, dtype=torch.uint8)
    for out, (top, left, height, width, flip) in zip(crops, boxes.tolist(), strict=True):
        if downscale > 1:  # a box of the whole image, in pixels that stand for `spare` of its own: exact, and inside
            box = (left / downscale, top / downscale, (left + width) / downscale, (top + height) / downscale)
            crop = to_uint8_tensor(image.resize((size, size), RESAMPLING[how], box=box))
        else:  # the same to a grey level, three times as fast
            crop = pixels[:, :, int(top) : int(top + height), int(left) : int(left + width)]
            crop = crop.contiguous(memory_format=torch.channels_last)
            crop = interpolate(crop, (size, size), mode=how, antialias=True)[0]
        out.copy_(crop.flip(2) if flip else crop)
    return crops


def center_crop(image, size, ratio, white_level=0.0, how='bilinear'):
    """The view for evaluation: 1 x 3 x size x size uint8. ratio: share of the shorter side. how: of RESAMPLING."""
    top, left, height, width = center_box(image.height, image.width, ratio)
    image = rgb(image, white_level).resize((size, size), RESAMPLING[how], box=(left, top, left + width, top + height))
    return to_uint8_tensor(image)[None]
