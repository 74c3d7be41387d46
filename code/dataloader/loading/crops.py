"""Crop and resize an opened image in a dataloader worker: random resized crops or the center crop, in the file's
type."""

import torch
from PIL import Image
from torch.nn.functional import interpolate

from dataloader.augment.crop import center_box, crop_resize
from dataloader.loading.arrays import is_read_as_array
from dataloader.loading.decode import (
    draft_downscale,
    exif_transpose_method,
    level_range,
    rgb,
    stored_and_upright_size,
    to_uint8_tensor,
    turn_upright,
)
from dataloader.loading.pixel_format import PixelFormat, to_array

RESAMPLING = {'bilinear': Image.Resampling.BILINEAR, 'bicubic': Image.Resampling.BICUBIC}
RGB8 = PixelFormat()


def random_crops(image, views, augmentation, generator, jpeg_draft=True, pixel_format=RGB8):
    """Make random resized crops, perhaps flipped, from one decoding. Returns views x C x S x S, with the channels and
    type of pixel_format.

    image: from decode.open_image. augmentation: augmentations.Augmentation. jpeg_draft: decode JPEGs at a lower
    resolution if the crops allow it (decode.draft_downscale).
    """
    size, how = augmentation.size, augmentation.interpolation
    if not pixel_format.is_rgb8 or is_read_as_array(image):
        pixels = torch.from_numpy(to_array(image, pixel_format))[None]
        boxes = augmentation.crop.sample(views, *pixels.shape[2:], generator)
        return torch.cat([resize_box(pixels, box, size, how, pixel_format.levels) for box in boxes.tolist()])
    turn = exif_transpose_method(image) if pixel_format.exif else None
    upright = pixel_format.exif or image.format == 'TIFF'  # Pillow always rotates TIFFs
    width, height = stored_and_upright_size(image)[1] if upright else image.size
    boxes = augmentation.crop.sample(views, height, width, generator)
    # A rotated image is only downscaled if its sides are multiples of 8: the last row or column would stand for fewer
    # pixels, and the rotation would move it.
    jpeg_draft = jpeg_draft and (turn is None or not (width % 8 or height % 8))
    downscale = draft_downscale(image, boxes[:, 2:4].min().item() / size) if jpeg_draft else 1
    if downscale > 1:
        image = rgb(image, pixel_format.levels)
        image = image if turn is None else image.transpose(turn)
    else:
        pixels = to_uint8_tensor(image, pixel_format.levels)
        pixels = (pixels if turn is None else turn_upright(pixels, turn))[None]
    crops = torch.empty(views, 3, size, size, dtype=torch.uint8)
    for out, (top, left, height, width, flip) in zip(crops, boxes.tolist(), strict=True):
        if downscale > 1:  # the box in pixels of the downscaled image; PIL takes fractions
            box = (left / downscale, top / downscale, (left + width) / downscale, (top + height) / downscale)
            crop = to_uint8_tensor(image.resize((size, size), RESAMPLING[how], box=box))
        else:  # equal to PIL within one gray level, and three times as fast
            crop = pixels[:, :, int(top) : int(top + height), int(left) : int(left + width)]
            crop = crop.contiguous(memory_format=torch.channels_last)
            crop = interpolate(crop, (size, size), mode=how, antialias=True)[0]
        out.copy_(crop.flip(2) if flip else crop)
    return crops


def resize_box(pixels, box, size, how, levels):
    """Crop a box (top, left, height, width, flip) of an image, 1 x C x H x W, and resize it to 1 x C x S x S of the
    same type, clamped to levels."""
    top, left, height, width, flip = box
    crop = pixels[:, :, int(top) : int(top + height), int(left) : int(left + width)]
    crop = interpolate(cut_to_levels(crop, levels)[0], (size, size), mode=how, antialias=True)
    return from_float(crop.flip(3) if flip else crop, pixels.dtype)


def center_crop(image, size, ratio, how='bilinear', pixel_format=RGB8):
    """Make the center crop for evaluation, 1 x C x size x size, with the channels and type of pixel_format. ratio: its
    share of the shorter side. how: a key of RESAMPLING."""
    if not pixel_format.is_rgb8 or is_read_as_array(image):
        pixels = torch.from_numpy(to_array(image, pixel_format))[None]
        box = torch.tensor([center_box(*pixels.shape[2:], ratio)])
        values, (black, white) = cut_to_levels(pixels, pixel_format.levels)
        crop = crop_resize(
            values - black, box, None, size, clip_to_box=False, cubic=how == 'bicubic', white=white - black
        )
        return from_float(crop + black, pixels.dtype)
    turn = exif_transpose_method(image) if pixel_format.exif else None
    image = rgb(image, pixel_format.levels)
    image = image if turn is None else image.transpose(turn)
    top, left, height, width = center_box(image.height, image.width, ratio)
    image = image.resize((size, size), RESAMPLING[how], box=(left, top, left + width, top + height))
    return to_uint8_tensor(image)[None]


def cut_to_levels(pixels, levels):
    """Clamp pixels to black and white before resizing, so that markers such as no-data values do not spread. Returns
    (floats, (black, white))."""
    black, white = level_range(levels, str(pixels.dtype).removeprefix('torch.'))
    return to_float(pixels).clamp(black, white), (black, white)


def to_float(pixels):
    """Convert pixels of any type to float32, or to float64 for 32-bit integers, which float32 cannot hold."""
    return pixels.double() if pixels.dtype in (torch.int32, torch.uint32) else pixels.float()


def from_float(values, dtype):
    """Convert floats to the nearest values of a type."""
    if dtype.is_floating_point:
        return values.to(dtype)
    limits = torch.iinfo(dtype)
    return values.round().clamp(limits.min, limits.max).to(torch.int64).to(dtype)
