"""Plots by matplotlib (curves, confusion matrix, map of features), and grids of images."""

import io
import math
import re
import warnings
from dataclasses import dataclass

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision.utils import make_grid

from runtime.console import printable

MAX_NAMED_CLASSES = 40  # with more classes a confusion matrix has no names
MAX_COUNTED_CLASSES = 20  # with more classes it has no counts
MAX_LABEL_CHARS = 40  # of a class name in a plot
MAX_LEGEND_CLASSES = 28  # with more classes the map has no legend
# Okabe and Ito's palette for color blindness, without black and yellow: visible on white and on black.
COLORS = ('#0072b2', '#e69f00', '#009e73', '#d55e00', '#56b4e9', '#cc79a7', '#808080')
MARKERS = ('o', 's', '^', 'D')  # for the first seven classes, the next seven, ...
RIGHT, WRONG = '#0072b2', '#d55e00'
TEXT_COLOR, GRID = '#222222', '#dddddd'  # replaced by the colors of the page in SVG
matplotlib.rcParams.update(
    {
        'font.size': 10,
        'axes.titlesize': 11,
        'axes.titlelocation': 'left',
        'axes.spines.top': False,
        'axes.spines.right': False,
        'axes.grid': True,
        'axes.axisbelow': True,
        'axes.edgecolor': TEXT_COLOR,
        'axes.labelcolor': TEXT_COLOR,
        'grid.color': GRID,
        'legend.frameon': False,
        'lines.linewidth': 2,
        'lines.markersize': 4,
        'svg.fonttype': 'none',
        'svg.hashsalt': 'simsiam',
        'text.color': TEXT_COLOR,
        'text.parse_math': False,
        'xtick.color': TEXT_COLOR,
        'ytick.color': TEXT_COLOR,
    }
)
warnings.filterwarnings('ignore', message='Glyph ')  # a character that the font lacks is drawn as a box


def make_figure(width, height):
    """Create an empty figure of width x height pixels."""
    figure = Figure(figsize=(width / 100, height / 100), dpi=100, layout='constrained')
    FigureCanvasAgg(figure)
    return figure


def figure_to_pil(figure, scale=1):
    """Render a figure as a PIL image, enlarged by `scale`."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', dpi=100 * scale)
    return Image.open(buffer).convert('RGB')


def figure_to_svg(figure, name):
    """Render a figure as SVG text for a page: transparent, in the page's colors. name: prefix of its ids."""
    buffer = io.StringIO()
    silent = dict.fromkeys(('Creator', 'Date', 'Format', 'Type'))
    figure.savefig(buffer, format='svg', transparent=True, metadata=silent)
    text = buffer.getvalue()
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', '', text[text.index('<svg') :])
    text = re.sub(r'(\bid="|url\(#|href="#)', rf'\g<1>{name}-', text)
    return text.replace(TEXT_COLOR, 'currentColor').replace(GRID, 'var(--line)')


@dataclass
class LineChart:
    """A line chart. lines: list of (name, [(x, y), ...]); y_limits: of the axis, extended if values exceed them;
    threshold_line: (name, y) of a dashed horizontal line; x_label: label of the x axis."""

    title: str
    lines: list
    y_limits: tuple = None
    threshold_line: tuple = None
    x_label: str = 'epochs'


def draw_curves(panels, size=(420, 300)):
    """Draw LineCharts side by side, with a legend below if there are several lines. Returns a figure."""
    lines = [name for name, _ in panels[0].lines]
    figure = make_figure(size[0] * len(panels), size[1] + 16 * len(lines) * (len(lines) > 1))
    every = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, panel in zip(every, panels, strict=True):
        draw_chart(axes, panel)
    if len(lines) > 1:
        figure.legend(*every[0].get_legend_handles_labels(), loc='outside lower left', fontsize=9)
    return figure


def draw_chart(axes, panel):
    """Draw one LineChart into axes."""
    axes.set_title(escape_label(panel.title))
    axes.xaxis.set_major_locator(MaxNLocator('auto', integer=True))
    axes.set_xlabel(panel.x_label, loc='right')
    for i, (name, line) in enumerate(panel.lines):
        if line:
            marker = MARKERS[i // len(COLORS) % len(MARKERS)] if len(line) <= 30 else None
            color, style = COLORS[i % len(COLORS)], '-' if i < len(COLORS) else '--'
            axes.plot(
                *zip(*line, strict=True), style, color=color, marker=marker, label=escape_label(name), clip_on=False
            )
    if not any(line for _, line in panel.lines):
        axes.text(0.05, 0.9, 'not measured', transform=axes.transAxes)
    if panel.y_limits:
        low, high = panel.y_limits
        values = [value for _, line in panel.lines for _, value in line if math.isfinite(value)]
        axes.set_ylim(low, max([high, *(1.05 * value for value in values)]))
    if panel.threshold_line:
        axes.axhline(panel.threshold_line[1], color=WRONG, linestyle='--', linewidth=1)
        right = axes.get_yaxis_transform()
        axes.text(
            1,
            panel.threshold_line[1],
            panel.threshold_line[0],
            color=WRONG,
            fontsize=8,
            ha='right',
            va='bottom',
            transform=right,
        )


def draw_confusion(counts, classes):
    """Draw a confusion matrix: rows are true classes, columns predicted ones, darker for a larger share of the row.

    counts: C x C integers; classes: C names. Returns a figure.
    """
    share = (counts.double() / counts.sum(1, keepdim=True).clamp(min=1)).numpy()
    names = [class_label(name) for name in classes] if len(classes) <= MAX_NAMED_CLASSES else []
    # 7 pixels per character of the labels, on both axes.
    side = max(420, 160 + 34 * len(names)) + 7 * max(map(len, names)) if names else 900
    figure = make_figure(side, side)
    axes = figure.subplots()
    axes.grid(False)
    axes.imshow(share, cmap='Blues', norm=PowerNorm(0.5, 0, 1), interpolation='nearest')
    axes.set_title(f'{int(counts.diag().sum())} of {int(counts.sum())} right')
    axes.set_xlabel('predicted')
    axes.set_ylabel('true class')
    if names:
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
    if len(classes) <= MAX_COUNTED_CLASSES:
        for i, j in counts.nonzero().tolist():
            ink = 'white' if share[i, j] > 0.35 else 'black'
            axes.text(j, i, int(counts[i, j]), color=ink, ha='center', va='center', fontsize=8)
    return figure


def escape_label(name):
    """Escape a label. matplotlib leaves names that begin with '_' out of legends, so a space is put before them."""
    return ' ' * name.startswith('_') + printable(name)


def class_label(name):
    """Escape and truncate the name of a class."""
    name = escape_label(name)
    return name if len(name) <= MAX_LABEL_CHARS else f'{name[:MAX_LABEL_CHARS]}…'


def draw_scatter(points, labels, classes):
    """Draw points, N x 2, with a color and a marker per class. labels: N, -1 for no label. Returns a figure."""
    figure = make_figure(800, 640)
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set_aspect('equal', adjustable='datalim')
    for label in range(-1, len(classes)):
        class_points = points[labels == label]
        if len(class_points):
            color = COLORS[label % len(COLORS)] if label >= 0 else TEXT_COLOR
            marker = MARKERS[label // len(COLORS) % len(MARKERS)]
            name = class_label(classes[label]) if label >= 0 else 'no class'
            axes.scatter(*class_points.T, s=9, color=color, marker=marker, alpha=0.7, linewidths=0, label=name)
    if len(classes) <= MAX_LEGEND_CLASSES:
        figure.legend(loc='outside right upper', markerscale=2)
    return figure


def image_grid(images, across, side=96):
    """Arrange images, 3 x S x S in [0, 1], in a grid with `across` columns. Returns a PIL image."""
    image = tensor_to_pil(make_grid(list(images), nrow=across, padding=0))
    scale = side / images[0].shape[-1]
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def tensor_to_pil(tensor):
    """Convert a tensor, 3 x H x W in [0, 1], to a PIL image."""
    return Image.fromarray((tensor.permute(1, 2, 0) * 255).round().byte().cpu().numpy())


def neighbor_grid(rows, captions, right, side=96):
    """Draw rows of images, each a query and, after a gap, its neighbors. Returns a PIL image.

    rows: lists of 3 x S x S tensors in [0, 1]; captions: a line of text per row; right: for each row, whether each
    neighbor has the query's class (a blue frame, else orange), or None if unknown (no frame).
    """
    gap, line, font = 6, 18, ImageFont.load_default(12)
    width = max(len(row) for row in rows) * (side + gap) + 3 * gap
    image = Image.new('RGB', (max(width, 420), len(rows) * (side + line + gap) + gap), 'white')
    pen = ImageDraw.Draw(image)
    for i, (row, caption, judged) in enumerate(zip(rows, captions, right, strict=True)):
        top = gap + i * (side + line + gap)
        pen.text((gap, top), caption, TEXT_COLOR, font)
        for j, (tensor, same) in enumerate(zip(row, [None, *judged], strict=True)):
            frame = 'white' if same is None else RIGHT if same else WRONG
            picture = tensor_to_pil(tensor).resize((side - 4, side - 4), Image.Resampling.NEAREST)
            left = gap + j * (side + gap) + (2 * gap if j else 0)
            image.paste(ImageOps.expand(picture, 3, frame), (left - 1, top + line - 1))
    return image
