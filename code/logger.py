"""What a run says: on the command line and in TensorBoard."""

import sys

from tqdm import tqdm

import pictures
from utils import write_aside


class Logger:
    """Lines for people, scalars and pictures for TensorBoard, of one run."""

    def __init__(self, folder, first_step=0):
        """folder: of the event files. first_step: what an earlier, longer try wrote from there on is hidden."""
        from torch.utils.tensorboard import SummaryWriter

        self.folder, self.warned = folder, set()
        self.writer = SummaryWriter(folder, purge_step=first_step or None)

    def warn_once(self, subject, line):
        """One line on standard error, the first time that this run has something to say on `subject`."""
        if subject not in self.warned:
            self.warned.add(subject)
            with tqdm.external_write_mode():
                print(f'warning: {line}', file=sys.stderr, flush=True)

    def scalars(self, step, **values):
        """step: epochs finished. A name `group_rest` is shown as group/rest, unless it has a / already."""
        for name, value in values.items():
            self.writer.add_scalar(name if '/' in name else name.replace('_', '/', 1), value, step)
        self.writer.flush()

    def image(self, name, grid, step):
        """grid: 3 x height x width in [0, 1]."""
        self.writer.add_image(name, grid, step)

    def picture(self, name, image, step):
        """A PIL image, also as a file: <folder>/<name with _ for />.png."""
        write_aside(self.folder / f'{name.replace("/", "_")}.png', lambda aside: image.save(aside, 'PNG'))
        self.image(name, pictures.as_tensor(image), step)

    def close(self):
        self.writer.close()


def say(line):
    """One line on standard output, above whatever progress bar is there."""
    with tqdm.external_write_mode():
        print(line, flush=True)


def duration(seconds):
    """Seconds as people say them."""
    seconds = round(seconds)
    hours, minutes = seconds // 3600, seconds % 3600 // 60
    if hours:
        return f'{hours} h {minutes} min'
    return f'{minutes} min {seconds % 60} s' if minutes else f'{seconds} s'
