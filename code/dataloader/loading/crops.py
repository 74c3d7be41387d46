"""From an opened image to what is handed on: random resized crops or the centre crop, S x S, uint8."""

import torch
from PIL import Image
from torch.nn.functional import interpolate

from dataloader.augment.crop import centre_box
from dataloader.loading.decode import pixels_of, rgb, shrink

RESAMPLING = {'bilinear': Image.Resampling.BILINEAR, 'bicubic': Image.Resampling.BICUBIC}


def random_crops(image, views, augmentation, generator, halve=True, white=0.0):
    """`views` random resized crops, perhaps flipped, from one decoding: views x 3 x S x S uint8.

    image: as decode.opened gives it. augmentation: of recipes. halve: let the JPEG decoder leave out detail
    (decode.shrink). white: of decode.rgb.
    """
    size, how = augmentation.size, augmentation.interpolation
    boxes = augmentation.crop.sample(views, image.height, image.width, generator)
    spare = shrink(image, boxes[:, 2:4].min().item() / size) if halve else 1
    if spare > 1:
        image = rgb(image, white)
    else:
        pixels = pixels_of(image, white)[None]
    crops = torch.empty(views, 3, size, size, dtype=torch.uint8)
    for out, (top, left, height, width, flip) in zip(crops, boxes.tolist(), strict=True):
        if spare > 1:  # a box of the whole image, in pixels that stand for `spare` of its own: exact, and inside
            box = (left / spare, top / spare, (left + width) / spare, (top + height) / spare)
            crop = pixels_of(image.resize((size, size), RESAMPLING[how], box=box))
        else:  # the same to a grey level, three times as fast
            crop = pixels[:, :, int(top) : int(top + height), int(left) : int(left + width)]
            crop = crop.contiguous(memory_format=torch.channels_last)
            crop = interpolate(crop, (size, size), mode=how, antialias=True)[0]
        out.copy_(crop.flip(2) if flip else crop)
    return crops


def centre_crop(image, size, ratio, white=0.0, how='bilinear'):
    """The view for evaluation: 1 x 3 x size x size uint8. ratio: share of the shorter side. how: of RESAMPLING."""
    top, left, height, width = centre_box(image.height, image.width, ratio)
    image = rgb(image, white).resize((size, size), RESAMPLING[how], box=(left, top, left + width, top + height))
    return pixels_of(image)[None]
