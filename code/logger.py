"""What a run says: on the command line, in its log file and in TensorBoard."""

import os
import threading
import time

import torch
from torch.nn.functional import pad
from torchvision.transforms.functional import to_tensor
from tqdm import tqdm

from runtime.atomic_write import atomic_write_on_main, save_png
from runtime.console import print_message, printable
from runtime.distributed import rank
from runtime.errors import UserError
from runtime.files import dumps_nan_safe, read_metrics


class Logger:
    """Lines for people, scalars and pictures for TensorBoard, of one run."""

    def __init__(self, folder, first_step=0, metrics=None, tracker=None):
        """folder: of the event files. metrics: a file that gets a line of JSON for each step with all scalars, for who
        reads a run without TensorBoard. first_step: what an earlier, longer try wrote from there on is hidden in the
        one and taken out of the other. tracker: of runtime/trackers.py, which gets the scalars too."""
        from torch.utils.tensorboard import SummaryWriter

        self.folder, self.warned_subjects, self.metrics, self.tracker = folder, set(), metrics, tracker
        try:
            self.writer = None if rank() else SummaryWriter(folder, purge_step=first_step or None)
        except UnicodeError:  # the names of files are ASCII here, TensorBoard's are UTF-8
            raise UserError(
                f'TensorBoard cannot write to {printable(folder)} in this locale: PYTHONUTF8=1 helps'
            ) from None
        if first_step and metrics and metrics.is_file() and not rank():
            kept = [dumps_nan_safe(line) + '\n' for line in read_metrics(metrics) if line['epoch'] < first_step]
            atomic_write_on_main(metrics, lambda aside: aside.write_text(''.join(kept)))

    def write_tensorboard(self, write):
        """Let `put(writer)` write to TensorBoard. A log that cannot be written any more, for its folder was deleted or
        its disk is full, is warned of once, and ends no run."""
        if not self.writer:
            return
        try:
            write(self.writer)
        except Exception as error:  # OSError, and TensorBoard's own kinds of it
            self.writer = None
            reason = getattr(error, 'strerror', None) or error
            print_message('warning', f'TensorBoard gets no more of this run, {self.folder} cannot be written: {reason}')

    def is_missing_epoch(self, step):
        """Whether the metrics of the steps before are there and those of this one are not."""
        return self.metrics.is_file() and step not in {line['epoch'] for line in read_metrics(self.metrics)}

    def warn_once(self, subject, line):
        """One line on standard error, the first time that this run has something to say on `subject`."""
        if subject not in self.warned_subjects and not rank():
            self.warned_subjects.add(subject)
            with tqdm.external_write_mode():
                print_message('warning', line)

    def scalars(self, step, values):
        """step: epochs finished. values: {tag: number}; TensorBoard groups tags by what stands before the /."""

        def write(writer):
            for tag, value in values.items():
                writer.add_scalar(tag, value, step)
            writer.flush()

        self.write_tensorboard(write)
        if self.metrics and not rank():
            line = {'epoch': step, 'time': time.strftime('%Y-%m-%d %H:%M:%S'), **values}
            with open(self.metrics, 'ab+') as file:
                cut = file.tell() and file.seek(-1, os.SEEK_END) and file.read() != b'\n'  # the last line, by a kill
                file.write(('\n' * bool(cut) + dumps_nan_safe(line) + '\n').encode())
        if self.tracker:
            self.tracker.log(step, values)

    def text(self, tag, lines, step=0):
        """Lines of text, as they are."""
        text = '\n'.join(f'    {line}' for line in lines)  # Markdown's literal block
        self.write_tensorboard(
            lambda writer: writer.add_text(tag, text.encode(errors='backslashreplace').decode(), step)
        )

    def image(self, tag, grid, step):
        """grid: 3 x height x width in [0, 1]."""
        self.write_tensorboard(lambda writer: writer.add_image(tag, grid, step))

    def views(self, name, rows):
        """Rows of views, N x 3 x S x S in [0, 1] each, as a grid; also as <folder>/<name>.png."""
        if self.writer:
            self.image(f'pretraining/{name}', picture(rows, self.folder / f'{name}.png'), 0)

    def picture(self, name, image, step):
        """A PIL image, also as a file: <folder>/<name>.png."""
        save_png(image, self.folder / f'{name}.png')
        self.image(f'results/{name}', to_tensor(image), step)

    def close(self):
        self.write_tensorboard(lambda writer: writer.close())
        if self.tracker:
            self.tracker.close()


def silence_tensorboard_thread(of_thread, usual=threading.excepthook):
    """TensorBoard's thread hands what it meets to `board`: it need not be shown as well."""
    if type(of_thread.thread).__name__ != '_AsyncWriterThread':
        usual(of_thread)


threading.excepthook = silence_tensorboard_thread


RENAMED_TAGS = {'schedule/learning_rate_encoder': 'schedule/learning_rate_projector'}  # as earlier runs have them


def read_scalars(folder):
    """What was logged in this folder: {tag: [(step, value), ...]}, nothing where there is no such folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not folder.is_dir():
        return {}
    events = EventAccumulator(str(folder), size_guidance={'scalars': 0}).Reload()
    return {
        RENAMED_TAGS.get(tag, tag): [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()['scalars']
    }


def picture(rows, path, zoom_to=64):
    """Save views as a grid, one row per tensor of `rows` (each N x 3 x S x S in [0, 1]), enlarged to be seen.

    Returns the grid, 3 x height x width in [0, 1].
    """
    from torchvision.utils import make_grid, save_image

    zoom = max(1, round(zoom_to / rows[0].shape[-1]))
    grid = make_grid(torch.cat(rows).cpu(), nrow=len(rows[0]), padding=1, pad_value=1)
    grid = pad(grid, (1, 1, 1, 1), value=1).repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
    save_image(grid, path)
    return grid
