"""Pictures of results, drawn with Pillow: a confusion matrix, images beside their nearest neighbours."""

import math
from dataclasses import dataclass

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


def beside(rows, captions, right, side=96):
    """A grid of images, each row led by a wider gap after its first: a query and its neighbours.

    rows: lists of 3 x S x S tensors in [0, 1]; captions: a line of text for each row; right: for each row, of each
    neighbour, whether its class is the query's, framed in green or red, or None where that is not known. Returns a PIL
    image.
    """
    gap, line, font = 6, 18, ImageFont.load_default(12)
    width = max(len(row) for row in rows) * (side + gap) + 3 * gap
    image = Image.new('RGB', (max(width, 420), len(rows) * (side + line + gap) + gap), PAPER)
    pen = ImageDraw.Draw(image)
    for i, (row, caption, judged) in enumerate(zip(rows, captions, right, strict=True)):
        top = gap + i * (side + line + gap)
        pen.text((gap, top), caption, INK, font)
        for j, tensor in enumerate(row):
            picture = Image.fromarray((tensor.permute(1, 2, 0) * 255).round().byte().cpu().numpy())
            left = gap + j * (side + gap) + (2 * gap if j else 0)
            image.paste(picture.resize((side, side), Image.Resampling.NEAREST), (left, top + line))
            if j and judged[j - 1] is not None:
                frame = (left - 2, top + line - 2, left + side + 1, top + line + side + 1)
                pen.rectangle(frame, outline='#1b9e77' if judged[j - 1] else '#d6301f', width=3)
    return image


def tiles(rows, side=96):
    """Rows of images, 3 x S x S in [0, 1] each, as one PIL image."""
    gap = 6
    width = max(map(len, rows)) * (side + gap) + gap
    image = Image.new('RGB', (width, len(rows) * (side + gap) + gap), PAPER)
    for i, row in enumerate(rows):
        for j, tensor in enumerate(row):
            picture = Image.fromarray((tensor.permute(1, 2, 0) * 255).round().byte().cpu().numpy())
            picture = picture.resize((side, side), Image.Resampling.BICUBIC)
            image.paste(picture, (gap + j * (side + gap), gap + i * (side + gap)))
    return image


def as_tensor(image):
    """A PIL image as 3 x H x W in [0, 1], as TensorBoard wants it."""
    return torch.from_numpy(np.array(image.convert('RGB'))).permute(2, 0, 1) / 255


COLOURS = (
    '#2166ac',
    '#d6604d',
    '#1b9e77',
    '#7570b3',
    '#e6ab02',
    '#666666',
    '#a65628',
    '#e7298a',
    '#66a61e',
    '#17becf',
    '#000000',
    '#bc80bd',
)


@dataclass
class Panel:
    """A line chart. lines: (name, [(x, y), ...]) each; bounds: of y, where the lines themselves do not say; mark: a
    level, (name, y), drawn as a dashed line."""

    title: str
    lines: list
    bounds: tuple = None
    mark: tuple = None


def curves(panels, size=(420, 300)):
    """Line charts over epochs, side by side, under them the names of the first one's lines where it has several.
    Returns a PIL image."""
    width, height = size
    names = [name for name, _ in panels[0].lines]
    names = names if len(names) > 1 else []
    image = Image.new('RGB', (2 * width * len(panels), 2 * (height + 24 * len(names) + 4 * bool(names))), PAPER)
    for number, panel in enumerate(panels):
        image.paste(chart(panel, (2 * width, 2 * height)), (2 * width * number, 0))
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(28)
    for i, name in enumerate(names):
        y = 2 * height + 24 + 48 * i
        pen.line((104, y, 164, y), fill=COLOURS[i % len(COLOURS)], width=6)
        pen.text((180, y), name, INK, font, anchor='lm')
    return image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)  # drawn large: smooth lines


def chart(panel, size):
    """One panel of `curves`, at twice its size."""
    image = Image.new('RGB', size, PAPER)
    pen, font, small = ImageDraw.Draw(image), ImageFont.load_default(28), ImageFont.load_default(22)
    left, top, right, bottom = 112, 72, size[0] - 36, size[1] - 84
    pen.text((left, 16), panel.title, INK, font)
    points = [point for _, line in panel.lines for point in line]
    if not points:
        pen.text((left, top + 40), 'not measured', INK, small)
        return image
    (first, last), (low, high) = ((min(axis), max(axis)) for axis in zip(*points, strict=True))
    last, margin = max(last, first + 1), 0.06 * (high - low) or 0.5
    low, high = panel.bounds or (low - margin, high + margin)

    def at(x, y):
        return (
            left + (x - first) * (right - left) / (last - first),
            bottom - (y - low) * (bottom - top) / (high - low),
        )

    for y in ticks(low, high):
        pen.line((*at(first, y), *at(last, y)), fill=(225, 225, 225), width=2)
        pen.text((left - 12, at(first, y)[1]), f'{y:.4g}', INK, small, anchor='rm')
    for x in ticks(first, last):
        pen.text((at(x, low)[0], bottom + 12), f'{x:.4g}', INK, small, anchor='ma')
    pen.text((right, bottom + 44), 'epochs', (110, 110, 110), small, anchor='ra')
    if panel.mark and low <= panel.mark[1] <= high:
        name, y = panel.mark
        for x in range(left, right, 20):
            pen.line((x, at(0, y)[1], x + 10, at(0, y)[1]), fill='#b2182b', width=3)
        pen.text((right, at(0, y)[1] - 4), name, '#b2182b', small, anchor='rd')
    for i, (_, line) in enumerate(panel.lines):
        colour = COLOURS[i % len(COLOURS)]
        where = [at(x, min(max(y, low), high)) for x, y in line]
        pen.line(where, fill=colour, width=5, joint='curve')
        for x, y in where[-1:] if len(where) > 30 else where:
            pen.ellipse((x - 6, y - 6, x + 6, y + 6), fill=colour)
    return image


def ticks(low, high, count=6):
    """At most `count` round numbers from `low` to `high`, evenly apart."""
    least = (high - low) / (count - 1)
    unit = 10.0 ** math.floor(math.log10(least))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= least * (1 - 1e-9))
    return [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def scatter(points, labels, classes, side=640):
    """Points in the plane, a colour a class. points: N x 2; labels: N, -1 for none. Returns a PIL image."""
    names = classes[:20]
    image = Image.new('RGB', (2 * (side + 160 if names else side), 2 * side), PAPER)
    pen, font = ImageDraw.Draw(image, 'RGBA'), ImageFont.load_default(26)
    low, high = points.min(0).values, points.max(0).values
    where = side + (points - (low + high) / 2) / (high - low).max().clamp(min=1e-9) * (2 * side - 64)
    hues = [
        ImageColor.getrgb(f'hsl({360 * i // max(1, len(classes))}, 70%, {40 + 12 * (i % 2)}%)')
        for i in range(len(classes))
    ]
    for (x, y), label in zip(where.tolist(), labels.tolist(), strict=True):
        colour = hues[label] if label >= 0 else (90, 90, 90)
        pen.ellipse((x - 6, 2 * side - y - 6, x + 6, 2 * side - y + 6), fill=(*colour, 170))
    for i, name in enumerate(names):
        y = 50 + 48 * i
        pen.ellipse((2 * side + 16, y - 10, 2 * side + 36, y + 10), fill=hues[i])
        pen.text((2 * side + 52, y), name, INK, font, anchor='lm')
    return image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)  # drawn large: smooth dots
