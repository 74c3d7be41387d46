"""Files that are whole or not there, written by one process of each machine."""

from runtime import files
from runtime.distributed import is_local_main


def atomic_write_on_main(path, write):
    """Let `write(temporary path)` make a file, then rename it to `path`: whole or not there, whatever stops us. Of
    several processes the first of each machine writes."""
    if not is_local_main():
        return
    files.atomic_write(path, write)


def write_csv(path, rows):
    """Write rows as a CSV file, as atomic_write_on_main does."""
    atomic_write_on_main(path, files.csv_writer(rows))


def save_png(image, path):
    """Write a PIL image as a PNG file, whole or not at all."""
    atomic_write_on_main(path, lambda aside: image.save(aside, 'PNG'))
