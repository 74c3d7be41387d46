"""What a run says: on the command line and in TensorBoard."""

import sys
import time

from tqdm import tqdm

import pictures
from dataloader import vision
from distributed import rank
from utils import write_aside

LOG = []  # the file of the run, once there is one


class Logger:
    """Lines for people, scalars and pictures for TensorBoard, of one run."""

    def __init__(self, folder, first_step=0):
        """folder: of the event files. first_step: what an earlier, longer try wrote from there on is hidden."""
        from torch.utils.tensorboard import SummaryWriter

        self.folder, self.warned = folder, set()
        self.writer = None if rank() else SummaryWriter(folder, purge_step=first_step or None)

    def warn_once(self, subject, line):
        """One line on standard error, the first time that this run has something to say on `subject`."""
        if subject not in self.warned and not rank():
            self.warned.add(subject)
            with tqdm.external_write_mode():
                print(f'warning: {line}', file=sys.stderr, flush=True)

    def scalars(self, step, **values):
        """step: epochs finished. A name `group_rest` is shown as group/rest, unless it has a / already."""
        if self.writer:
            for name, value in values.items():
                self.writer.add_scalar(name if '/' in name else name.replace('_', '/', 1), value, step)
            self.writer.flush()

    def image(self, name, grid, step):
        """grid: 3 x height x width in [0, 1]."""
        if self.writer:
            self.writer.add_image(name, grid, step)

    def views(self, name, rows):
        """Rows of views, N x 3 x S x S in [0, 1] each, as a grid; also as <folder>/<name>.png."""
        if self.writer:
            self.image(name, vision.picture(rows, self.folder / f'{name}.png'), 0)

    def picture(self, name, image, step):
        """A PIL image, also as a file: <folder>/<name with _ for />.png."""
        write_aside(self.folder / f'{name.replace("/", "_")}.png', lambda aside: image.save(aside, 'PNG'))
        self.image(name, pictures.as_tensor(image), step)

    def close(self):
        if self.writer:
            self.writer.close()


def say(line):
    """One line on standard output, above whatever progress bar is there, and in the run's log (log_to)."""
    if rank():
        return
    with tqdm.external_write_mode():
        print(line, flush=True)
    if LOG:
        with open(LOG[0], 'a', encoding='utf-8') as file:
            file.write(f'{time.strftime("%Y-%m-%d %H:%M:%S")}  {line}\n')


def log_to(path):
    """From now on, what is said is also written to the end of this file."""
    LOG[:] = [path]


def duration(seconds):
    """Seconds as people say them."""
    seconds = round(seconds)
    hours, minutes = seconds // 3600, seconds % 3600 // 60
    if hours:
        return f'{hours} h {minutes} min'
    return f'{minutes} min {seconds % 60} s' if minutes else f'{seconds} s'
