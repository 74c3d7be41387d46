"""pack: the images of a folder as tar archives, which cost a disk one long file in place of a million."""

import io
import os
import tarfile

import numpy as np
from PIL import Image

from dataloader.cache.decoded import readable_rows, resize_short_side
from dataloader.load_dataset import find_split_sources
from dataloader.loading.decode import is_image
from dataloader.loading.pixel_format import format_from_options
from dataloader.loading.pixel_settings import find_pixel_format, resolve_pixels
from dataloader.readers.memory import Memory
from dataloader.sources.folder import SYSTEM_NAMES
from runtime.atomic_write import atomic_write_on_main
from runtime.console import print_message, printable, silence_stderr
from runtime.errors import UserError, WorkError, resolve_path, same_path
from runtime.files import try_writing
from runtime.messages import log, progress

QUALITY = 95  # of JPEG, where images are made smaller
JPEG_SIDE = 65_500  # px, the most that the library writes


def pack(args):
    """Write --output/<split>-000000.tar, ...: a folder in it is a class. Returns --output.

    The files go in as they are, or with --pack_short_side with this shorter side in pixels, as JPEG. The same images
    give the same bytes. Raises UserError where --output holds archives already, WorkError for an image that cannot be
    read where it has to be.
    """
    if not args.output:
        raise UserError('pack wants --output=FOLDER, for the archives')
    output = resolve_path(args.output)
    if same_path(output, resolve_path(args.image_path)) or output.suffix == '.tar':
        raise UserError(f'--output={args.output}: name another folder, for the archives')
    if there := sorted(output.glob('*-??????.tar')):
        raise UserError(f'{printable(output)} holds {printable(there[0].name)} already: pack into another folder')
    try_writing(output / 'train-000000.tar')
    parts = find_split_sources(args)
    for part in parts.values():
        if part.classes and (none := int((part.labels < 0).sum())):
            raise UserError(
                f'{none} of the {len(part.labels)} images of {printable(part.where)} have no class: an archive says '
                'it of '
                'all or of none, pack them apart'
            )
    args = resolve_pixels(args, parts['train'].store)
    if args.pack_short_side and args.channels != 'rgb':
        raise UserError(
            '--pack_short_side writes JPEGs, of red, green and blue of 8 bits, and these images have --channels='
            f'{args.channels}: leave it out'
        )
    for name, part in parts.items():
        if args.on_unreadable == 'skip' and not isinstance(part.store, Memory):
            pixel_format = find_pixel_format(args, part.store)
            kept = resolve_path(args.cache_path) / part.cache_subdir
            part = part.select(readable_rows(part.store, part.where, kept, pixel_format))
        shards, left_out = write_split(args, output, name, part)
        log(f'{name:5}  {len(part.labels) - left_out} images in {shards} archives')
    log(f'use them: --image_path={printable(output)}')
    return output


def write_split(args, output, name, part):
    """Write the archives of one split; returns how many, and how many images were left out."""
    rows, number, left_out = iter(progress(range(len(part.labels)), f'packing {name}', 'images')), 0, []
    folders, used_names = class_folder_names(part.classes), {}
    ahead = next(rows, None)
    while ahead is not None:
        path = output / f'{name}-{number:06d}.tar'

        def write(aside):
            nonlocal ahead
            with tarfile.open(aside, 'w', format=tarfile.GNU_FORMAT) as archive, silence_stderr():
                while ahead is not None and archive.offset < args.shard_megabytes * 1e6:
                    try:
                        member, content = tar_member(args, part, ahead, folders)
                        add_member(archive, unique_name(member, used_names), content)
                    except WorkError as error:
                        if args.on_unreadable != 'skip':
                            raise
                        left_out.append(str(error))  # said when standard error is heard again
                    ahead = next(rows, None)

        atomic_write_on_main(path, write)
        number += 1
    for line in left_out:
        print_message('warning', f'{line}; left out')
    return number, len(left_out)


def tar_member(args, part, row, folders):
    """(name in the archive, bytes) of an image: in the folder of its class, or in none, where a folder would be one."""
    raw, label = part.store.names.bytes_at(row), int(part.labels[row])
    parts = [unhide_name(piece) for piece in raw.split(b'/') if piece not in (b'', b'.', b'..')]
    if label < 0:
        parts = [b'%2F'.join(parts)]
    elif parts[0] != folders[label] or len(parts) == 1:
        parts.insert(0, folders[label])
    name = b'/'.join(parts)
    if args.pack_short_side:
        pixels = resize_short_side(part.store, row, args.pack_short_side, format_from_options(args))
        image, buffer = Image.fromarray(np.ascontiguousarray(pixels)), io.BytesIO()
        if max(image.size) > JPEG_SIDE:
            raise WorkError(
                f'{printable(part.store.names[row])} would have {image.width} x {image.height} pixels, and a JPEG has '
                f'{JPEG_SIDE} a side at most: leave --pack_short_side out, or the image (--on_unreadable=skip)'
            )
        image.save(buffer, 'JPEG', quality=QUALITY, subsampling=0)
        return name if name.lower().endswith((b'.jpg', b'.jpeg')) else name + b'.jpg', buffer.getvalue()
    with part.store.opened(row) as image:
        if getattr(image, 'fp', None):
            image.fp.seek(0)
            return name if is_image(name) else name + file_extension(image.format), image.fp.read()
        buffer = io.BytesIO()  # decoded already: torchvision's own files
        image.save(buffer, 'PNG')
        return name + b'.png', buffer.getvalue()


def unhide_name(name):
    """A name (bytes) that is not passed over when the archive is read."""
    return b'_' + name if name.startswith(b'.') or name.lower() in SYSTEM_NAMES else name


def class_folder_names(classes):
    """The folder of each class, as bytes; no two share one."""
    used_names = {}
    return [unique_name(unhide_name(os.fsencode(name).replace(b'/', b'_')), used_names) for name in classes]


def unique_name(name, used_names):
    """A name (bytes) that is not among the `used_names`, to which it is added: it, or with a number before its ending.
    used_names: a dict of names to the last number tried."""
    stem, ending = os.path.splitext(name)
    new = name
    while new in used_names:
        used_names[name] += 1
        new = stem + b'_%d' % used_names[name] + ending
    used_names[new] = 1
    return new


def file_extension(kind):
    """The ending by which a format of Pillow is known."""
    endings = [ending for ending, of in Image.registered_extensions().items() if of == kind]
    return next(ending.encode() for ending in endings if is_image(b'x' + ending.encode()))


def add_member(archive, name, content):
    """One file, without owner or time."""
    member = tarfile.TarInfo(os.fsdecode(name))
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))
