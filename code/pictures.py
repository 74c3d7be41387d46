"""Pictures of results, drawn with Pillow: a confusion matrix, images beside their nearest neighbours."""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

INK, PAPER = (30, 30, 30), (255, 255, 255)
NAMED = 40  # classes up to which they are named and counted in the picture


def confusion(counts, classes):
    """A confusion matrix as a PIL image: row the true class, column the predicted one, darker where more of the row.

    counts: C x C whole numbers; classes: C names.
    """
    share = counts.double() / counts.sum(1, keepdim=True).clamp(min=1)
    named = len(classes) <= NAMED
    cell = 34 if named else max(1, 900 // len(classes))
    font = ImageFont.load_default(12)
    margin = 12 + max(round(font.getlength(name)) for name in classes) if named else 12
    side = cell * len(classes)
    image = Image.new('RGB', (margin + side + 12, margin + side + 34), PAPER)
    pen = ImageDraw.Draw(image)
    blue = np.array([33, 102, 172])
    colours = 255 - share.sqrt().numpy()[..., None] * (255 - blue)
    matrix = Image.fromarray(colours.astype(np.uint8)).resize((side, side), Image.Resampling.NEAREST)
    image.paste(matrix, (margin, margin))
    pen.rectangle((margin - 1, margin - 1, margin + side, margin + side), outline=(170, 170, 170))
    if named:
        for i, name in enumerate(classes):
            at = margin + cell * i + cell // 2
            pen.text((margin - 6, at), name, INK, font, anchor='rm')
            sideways = Image.new('RGB', (margin - 6, 16), PAPER)
            ImageDraw.Draw(sideways).text((0, 8), name, INK, font, anchor='lm')
            image.paste(sideways.rotate(90, expand=True), (at - 8, 0))
            for j in range(len(classes)):
                if counts[i, j]:
                    colour = PAPER if share[i, j] > 0.35 else INK
                    place = (margin + cell * j + cell // 2, at)
                    pen.text(place, str(int(counts[i, j])), colour, ImageFont.load_default(10), anchor='mm')
    caption = f'rows: true class, columns: predicted; {int(counts.diag().sum())} of {int(counts.sum())} right'
    pen.text((12, margin + side + 10), caption, INK, font)
    return image


def beside(rows, captions, side=96):
    """A grid of images, each row led by a wider gap after its first: a query and its neighbours.

    rows: lists of 3 x S x S tensors in [0, 1]; captions: a line of text for each row. Returns a PIL image.
    """
    gap, line, font = 6, 18, ImageFont.load_default(12)
    width = max(len(row) for row in rows) * (side + gap) + 3 * gap
    image = Image.new('RGB', (max(width, 420), len(rows) * (side + line + gap) + gap), PAPER)
    pen = ImageDraw.Draw(image)
    for i, (row, caption) in enumerate(zip(rows, captions, strict=True)):
        top = gap + i * (side + line + gap)
        pen.text((gap, top), caption, INK, font)
        for j, tensor in enumerate(row):
            picture = Image.fromarray((tensor.permute(1, 2, 0) * 255).round().byte().cpu().numpy())
            left = gap + j * (side + gap) + (2 * gap if j else 0)
            image.paste(picture.resize((side, side), Image.Resampling.NEAREST), (left, top + line))
    return image


def as_tensor(image):
    """A PIL image as 3 x H x W in [0, 1], as TensorBoard wants it."""
    return torch.from_numpy(np.array(image.convert('RGB'))).permute(2, 0, 1) / 255
