"""pack: write the images of a dataset as tar archives, for fast sequential reading."""

import io
import os
import tarfile

import numpy as np
from PIL import Image

from dataloader.cache.decoded import readable_rows, resize_short_side
from dataloader.load_dataset import find_split_sources
from dataloader.loading.decode import is_image, to_8_bits
from dataloader.loading.pixel_settings import find_pixel_format, resolve_pixels, warn_pixel_range
from dataloader.readers.memory import Memory
from dataloader.sources.folder import SYSTEM_NAMES
from runtime.atomic_write import atomic_write_on_main
from runtime.console import printable, silence_stderr
from runtime.errors import UserError, WorkError, resolve_path, same_path
from runtime.files import try_writing
from runtime.messages import log, progress, warn

ARRAY_ENDINGS = {'NPY': b'.npy', 'array': b'.npy', 'DICOM': b'.dcm'}
JPEG_QUALITY = 95  # of resized images
MAX_JPEG_SIDE = 65_500  # pixels; limit of libjpeg


def pack(args):
    """Write --output/<split>-000000.tar, ..., with a folder per class. Returns --output.

    Files are packed unchanged, or with --pack_short_side resized, as JPEG. The result is deterministic. Raises
    UserError if --output has archives already, WorkError for an unreadable image that must be resized.
    """
    if not args.output:
        raise UserError('pack needs --output=FOLDER, for the archives')
    output = resolve_path(args.output)
    if same_path(output, resolve_path(args.image_path)) or output.suffix == '.tar':
        raise UserError(f'--output={args.output}: name another folder, for the archives')
    if existing := sorted(output.glob('*-??????.tar')):
        raise UserError(f'{printable(output)} holds {printable(existing[0].name)} already: pack into another folder')
    try_writing(output / 'train-000000.tar')
    sources = find_split_sources(args)
    for source in sources.values():
        if source.classes and (num_unlabeled := int((source.labels < 0).sum())):
            raise UserError(
                f'{num_unlabeled} of the {len(source.labels)} images of {printable(source.location)} have no class: '
                'an archive has classes for all or none, pack them separately'
            )
    args = resolve_pixels(args, sources['train'].store)
    if args.pack_short_side and args.channels != 'rgb':
        raise UserError(
            '--pack_short_side writes JPEGs, of red, green and blue of 8 bits, and these images have --channels='
            f'{args.channels}: leave it out'
        )
    if args.pack_short_side and not isinstance(sources['train'].store, Memory):
        pixel_format = find_pixel_format(args, sources['train'].store)
        if pixel_format.dtype != 'uint8':
            log(f'--pack_short_side: {pixel_format.dtype} becomes 8 bits, from black to white at --white_level')
            warn_pixel_range(args, sources['train'].store, pixel_format)
    for name, source in sources.items():
        if args.on_unreadable == 'skip' and not isinstance(source.store, Memory):
            pixel_format = find_pixel_format(args, source.store)
            cache_dir = resolve_path(args.cache_path) / source.cache_subdir
            source = source.select(readable_rows(source.store, source.location, cache_dir, pixel_format))
        shards, left_out = write_split(args, output, name, source)
        log(f'{name:5}  {len(source.labels) - left_out} images in {shards} archives')
    log(f'use them: --image_path={printable(output)}')
    return output


def write_split(args, output, name, source):
    """Write the archives of one split. Returns (number of archives, number of skipped images)."""
    rows, number, left_out = iter(progress(range(len(source.labels)), f'packing {name}', 'images')), 0, []
    folders, used_names = class_folder_names(source.classes), {}
    pixel_format = find_pixel_format(args, source.store) if args.pack_short_side else None
    ahead = next(rows, None)
    while ahead is not None:
        path = output / f'{name}-{number:06d}.tar'

        def write(aside):
            nonlocal ahead
            with tarfile.open(aside, 'w', format=tarfile.GNU_FORMAT) as archive, silence_stderr():
                while ahead is not None and archive.offset < args.shard_megabytes * 1e6:
                    try:
                        member, content = tar_member(args, source, ahead, folders, pixel_format)
                        add_member(archive, unique_name(member, used_names), content)
                    except WorkError as error:
                        if args.on_unreadable != 'skip':
                            raise
                        left_out.append(str(error))  # printed later: stderr is silenced here
                    ahead = next(rows, None)

        atomic_write_on_main(path, write)
        number += 1
    for line in left_out:
        warn(f'{line}; left out')
    return number, len(left_out)


def tar_member(args, source, row, folders, pixel_format):
    """Return (name in the archive, bytes) of an image. The name begins with the class folder; without classes it has no
    folder, which would become a class. pixel_format: for --pack_short_side."""
    raw, label = source.store.names.bytes_at(row), int(source.labels[row])
    parts = [unhide_name(piece) for piece in raw.split(b'/') if piece not in (b'', b'.', b'..')]
    if label < 0:
        parts = [b'%2F'.join(parts)]
    elif parts[0] != folders[label] or len(parts) == 1:
        parts.insert(0, folders[label])
    name = b'/'.join(parts)
    if args.pack_short_side:
        pixels = resize_short_side(source.store, row, args.pack_short_side, pixel_format)
        if not pixel_format.is_rgb8:
            pixels = to_8_bits(pixels, pixel_format.levels).transpose(1, 2, 0)
        image, buffer = Image.fromarray(np.ascontiguousarray(pixels)), io.BytesIO()
        if max(image.size) > MAX_JPEG_SIDE:
            raise WorkError(
                f'{printable(source.store.names[row])} would have {image.width} x {image.height} pixels, and a JPEG '
                f'has {MAX_JPEG_SIDE} a side at most: leave --pack_short_side out, or the image (--on_unreadable=skip)'
            )
        image.save(buffer, 'JPEG', quality=JPEG_QUALITY, subsampling=0)
        return name if name.lower().endswith((b'.jpg', b'.jpeg')) else name + b'.jpg', buffer.getvalue()
    with source.store.open(row) as image:
        if getattr(image, 'fp', None):
            image.fp.seek(0)
            return name if is_image(name) else name + file_extension(image.format), image.fp.read()
        buffer = io.BytesIO()  # already decoded: torchvision's datasets
        image.save(buffer, 'PNG')
        return name + b'.png', buffer.getvalue()


def unhide_name(name):
    """Prefix hidden and system names (bytes), which would be skipped when the archive is read."""
    return b'_' + name if name.startswith(b'.') or name.lower() in SYSTEM_NAMES else name


def class_folder_names(classes):
    """Return a unique folder name (bytes) for each class."""
    used_names = {}
    return [unique_name(unhide_name(os.fsencode(name).replace(b'/', b'_')), used_names) for name in classes]


def unique_name(name, used_names):
    """Return a name (bytes) that is not used yet, with a number before the ending if necessary, and add it to
    used_names, {name: last number}."""
    stem, ending = os.path.splitext(name)
    new = name
    while new in used_names:
        used_names[name] += 1
        new = stem + b'_%d' % used_names[name] + ending
    used_names[new] = 1
    return new


def file_extension(kind):
    """Return the file ending (bytes) of an image format."""
    if kind in ARRAY_ENDINGS:
        return ARRAY_ENDINGS[kind]
    endings = [ending for ending, image_format in Image.registered_extensions().items() if image_format == kind]
    return next(ending.encode() for ending in endings if is_image(b'x' + ending.encode()))


def add_member(archive, name, content):
    """Add a file to the archive, without owner and time."""
    member = tarfile.TarInfo(os.fsdecode(name))
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))
