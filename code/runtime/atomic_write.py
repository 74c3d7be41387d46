"""Files that are whole or not there, written by one process of each machine."""

from runtime.distributed import first_here
from runtime.files import csv_of, put_aside


def write_aside(path, write):
    """Let `write(temporary path)` make a file, then rename it to `path`: whole or not there, whatever stops us. Of
    several processes the first of each machine writes."""
    if not first_here():
        return
    put_aside(path, write)


def write_csv(path, rows):
    """Write rows as a CSV file, as write_aside does."""
    write_aside(path, csv_of(rows))


def save_picture(image, path):
    """Write a PIL image as a PNG file, whole or not at all."""
    write_aside(path, lambda aside: image.save(aside, 'PNG'))
