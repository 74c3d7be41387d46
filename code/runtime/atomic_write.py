"""Atomic writes of files by one rank per machine."""

from runtime import files
from runtime.distributed import is_local_main


def atomic_write_on_main(path, write):
    """Call `write(temporary path)`, then rename that file to `path`, so that `path` is never incomplete. Only the first
    rank of each machine writes."""
    if not is_local_main():
        return
    files.atomic_write(path, write)


def write_csv(path, rows):
    """Write rows as a CSV file, atomically, on the first rank of each machine."""
    atomic_write_on_main(path, files.csv_writer(rows))


def save_png(image, path):
    """Write a PIL image as a PNG file, atomically, on the first rank of each machine."""
    atomic_write_on_main(path, lambda aside: image.save(aside, 'PNG'))
