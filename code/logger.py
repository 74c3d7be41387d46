"""Logging of a run: TensorBoard, metrics.jsonl, experiment tracker, warnings on the command line."""

import os
import threading
import time

import torch
from torch.nn.functional import pad
from torchvision.transforms.functional import to_tensor

from runtime.atomic_write import atomic_write_on_main, save_png
from runtime.console import printable
from runtime.distributed import broadcast_from_rank0, rank
from runtime.errors import UserError
from runtime.files import dumps_nan_safe, read_metrics
from runtime.messages import warn

VIEW_SIDE = 64  # pixels of a view in the grid of views


class Logger:
    """Writes scalars, text and pictures of one run."""

    def __init__(self, folder, first_step=0, metrics=None, tracker=None):
        """folder: for TensorBoard's event files. metrics: path of metrics.jsonl, which gets a line of JSON per epoch,
        or None. first_step: when resuming, entries from this epoch on are removed. tracker: from runtime/trackers.py,
        or None."""
        from torch.utils.tensorboard import SummaryWriter

        self.folder, self.warned_subjects, self.metrics, self.tracker = folder, set(), metrics, tracker
        try:
            self.writer = None if rank() else SummaryWriter(folder, purge_step=first_step or None)
        except UnicodeError:  # TensorBoard uses UTF-8, and the locale is ASCII
            raise UserError(
                f'TensorBoard cannot write to {printable(folder)} in this locale: PYTHONUTF8=1 helps'
            ) from None
        if first_step and metrics and metrics.is_file() and not rank():
            self.rewrite([line for line in read_metrics(metrics) if line['epoch'] < first_step])

    def write_tensorboard(self, write):
        """Call `write(writer)`. An error, such as a deleted folder or a full disk, is warned of once and does not end
        the run."""
        if not self.writer:
            return
        try:
            write(self.writer)
        except Exception as error:  # OSError, and TensorBoard's own types
            self.writer = None
            reason = getattr(error, 'strerror', None) or error
            warn(f'TensorBoard is turned off for this run, {self.folder} cannot be written: {reason}')

    def rename_tags(self, names):
        """Rename tags in the lines of metrics.jsonl. names: {old: new}."""
        lines = [{names.get(tag, tag): value for tag, value in line.items()} for line in read_metrics(self.metrics)]
        self.rewrite(lines)

    def add_to_epoch(self, epoch, values):
        """Set {tag: number} in the line of an epoch in metrics.jsonl; a missing line is added."""
        lines = {line['epoch']: line for line in read_metrics(self.metrics)}
        lines[epoch] = {**lines.get(epoch, {'epoch': epoch}), **values}
        self.rewrite([lines[number] for number in sorted(lines)])

    def rewrite(self, lines):
        """Write metrics.jsonl anew."""
        if not rank():
            text = ''.join(dumps_nan_safe(line) + '\n' for line in lines)
            atomic_write_on_main(self.metrics, lambda aside: aside.write_text(text))

    def read_epochs(self):
        """Return the epochs in metrics.jsonl, on all ranks as on rank 0."""
        return broadcast_from_rank0(lambda: [line['epoch'] for line in read_metrics(self.metrics)])

    def warn_once(self, subject, line):
        """Print a warning, once per subject."""
        if subject not in self.warned_subjects:
            self.warned_subjects.add(subject)
            warn(line)

    def scalars(self, step, values):
        """Log {tag: number} for an epoch. step: finished epochs. TensorBoard groups tags by the part before '/'."""

        def write(writer):
            for tag, value in values.items():
                writer.add_scalar(tag, value, step)
            writer.flush()

        self.write_tensorboard(write)
        if self.metrics and not rank():
            line = {'epoch': step, 'time': time.strftime('%Y-%m-%d %H:%M:%S'), **values}
            with open(self.metrics, 'ab+') as file:
                # A killed process may have left an incomplete last line.
                cut = file.tell() and file.seek(-1, os.SEEK_END) and file.read() != b'\n'
                file.write(('\n' * bool(cut) + dumps_nan_safe(line) + '\n').encode())
        if self.tracker:
            self.tracker.log(step, values)

    def text(self, tag, lines, step=0):
        """Log lines of text, unformatted."""
        text = '\n'.join(f'    {line}' for line in lines)  # Markdown's literal block
        self.write_tensorboard(
            lambda writer: writer.add_text(tag, text.encode(errors='backslashreplace').decode(), step)
        )

    def image(self, tag, grid, step):
        """Log an image, 3 x height x width in [0, 1]."""
        self.write_tensorboard(lambda writer: writer.add_image(tag, grid, step))

    def views(self, name, rows):
        """Log a grid of views and save it as <folder>/<name>.png. rows: list of N x 3 x S x S in [0, 1]."""
        if self.writer:
            self.image(f'pretraining/{name}', save_view_grid(rows, self.folder / f'{name}.png'), 0)

    def picture(self, name, image, step):
        """Log a PIL image and save it as <folder>/<name>.png."""
        save_png(image, self.folder / f'{name}.png')
        self.image(f'results/{name}', to_tensor(image), step)

    def close(self):
        self.write_tensorboard(lambda writer: writer.close())
        if self.tracker:
            self.tracker.close()


def silence_tensorboard_thread(of_thread, usual=threading.excepthook):
    """threading.excepthook that ignores exceptions of TensorBoard's writer thread: write_tensorboard reports them."""
    if type(of_thread.thread).__name__ != '_AsyncWriterThread':
        usual(of_thread)


threading.excepthook = silence_tensorboard_thread


RENAMED_TAGS = {'schedule/learning_rate_encoder': 'schedule/learning_rate_projector'}  # {tag in earlier runs: tag}


def read_scalars(folder):
    """Read the scalars of a TensorBoard folder: {tag: [(step, value), ...]}; {} if it does not exist."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not folder.is_dir():
        return {}
    events = EventAccumulator(str(folder), size_guidance={'scalars': 0}).Reload()
    return {
        RENAMED_TAGS.get(tag, tag): [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()['scalars']
    }


def load_scalars(run, logs):
    """Load the scalars of a run, {tag: [(epoch, value), ...]}: of its metrics.jsonl, which moves with the run, or, for
    runs of early versions, of TensorBoard's folder in `logs`."""
    scalars = {}
    for line in read_metrics(run / 'metrics.jsonl'):
        for tag in line.keys() - {'epoch', 'time'}:
            scalars.setdefault(tag, []).append((line['epoch'], line[tag]))
    return scalars or read_scalars(logs / run.name)


def save_view_grid(rows, path):
    """Save views as a grid, a row per tensor of `rows` (N x 3 x S x S in [0, 1]), enlarged to about VIEW_SIDE pixels
    each. Returns the grid, 3 x height x width in [0, 1].
    """
    from torchvision.utils import make_grid, save_image

    zoom = max(1, round(VIEW_SIDE / rows[0].shape[-1]))
    grid = make_grid(torch.cat(rows).cpu(), nrow=len(rows[0]), padding=1, pad_value=1)
    grid = pad(grid, (1, 1, 1, 1), value=1).repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
    save_image(grid, path)
    return grid
