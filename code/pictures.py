"""Pictures of results, drawn with Pillow: a confusion matrix, images beside their nearest neighbours."""

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont

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


COLOURS = ('#2166ac', '#d6604d', '#1b9e77', '#7570b3', '#e6ab02', '#666666', '#a65628')


def curves(panels, size=(420, 300)):
    """Line charts side by side. panels: title to a list of (name, [(x, y), ...]). Returns a PIL image."""
    width, height = size
    image = Image.new('RGB', (width * len(panels), height + 26 * max(1, len(next(iter(panels.values()))))), PAPER)
    pen, font, small = ImageDraw.Draw(image), ImageFont.load_default(14), ImageFont.load_default(11)
    for number, (title, lines) in enumerate(panels.items()):
        left, top, right, bottom = width * number + 52, 34, width * (number + 1) - 16, height - 26
        pen.text((left, 8), title, INK, font)
        points = [point for _, line in lines for point in line]
        if not points:
            pen.text((left, top + 20), 'not measured', INK, small)
            continue
        (first, last), (low, high) = ((min(axis), max(axis)) for axis in zip(*points, strict=True))
        last, margin = max(last, first + 1), 0.05 * (high - low) or 0.5
        low, high = low - margin, high + margin
        for part in range(5):
            y = bottom - part * (bottom - top) / 4
            pen.line((left, y, right, y), fill=(225, 225, 225))
            pen.text((left - 6, y), f'{low + part * (high - low) / 4:.3g}', INK, small, anchor='rm')
            x = left + part * (right - left) / 4
            pen.text((x, bottom + 6), f'{first + part * (last - first) / 4:.3g}', INK, small, anchor='ma')
        for i, (name, line) in enumerate(lines):
            colour = COLOURS[i % len(COLOURS)]
            wide, tall = (right - left) / (last - first), (bottom - top) / (high - low)
            where = [(left + (x - first) * wide, bottom - (y - low) * tall) for x, y in line]
            pen.line(where, fill=colour, width=2)
            for x, y in where[-1:]:
                pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
            if number == 0:
                pen.line((52, height + 12 + 22 * i, 82, height + 12 + 22 * i), fill=colour, width=3)
                pen.text((90, height + 12 + 22 * i), name, INK, font, anchor='lm')
    pen.text((image.width - 16, height + 12), 'over epochs', INK, small, anchor='rm')
    return image


def scatter(points, labels, classes, side=640):
    """Points in the plane, a colour a class. points: N x 2; labels: N, -1 for none. Returns a PIL image."""
    names = classes[:20]
    image = Image.new('RGB', (side + 160 if names else side, side), PAPER)
    pen, font = ImageDraw.Draw(image, 'RGBA'), ImageFont.load_default(13)
    low, high = points.min(0).values, points.max(0).values
    where = 16 + (points - low) / (high - low).clamp(min=1e-9) * (side - 32)
    hues = [ImageColor.getrgb(f'hsl({360 * i // max(1, len(classes))}, 70%, {40 + 12 * (i % 2)}%)')
            for i in range(len(classes))]  # fmt: skip
    for (x, y), label in zip(where.tolist(), labels.tolist(), strict=True):
        colour = hues[label] if label >= 0 else (90, 90, 90)
        pen.ellipse((x - 3, side - y - 3, x + 3, side - y + 3), fill=(*colour, 170))
    for i, name in enumerate(names):
        pen.ellipse((side + 8, 20 + 24 * i, side + 18, 30 + 24 * i), fill=hues[i])
        pen.text((side + 26, 25 + 24 * i), name, INK, font, anchor='lm')
    return image
