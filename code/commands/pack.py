"""pack: the images of a folder as tar archives, which cost a disk one long file in place of a million."""

import io
import os
import tarfile

from PIL import Image

from dataloader.cache.decoded import readable, smaller
from dataloader.load_dataset import parts_of
from dataloader.loading.decode import is_image
from dataloader.readers.memory import Memory
from dataloader.sources.folder import OF_SYSTEMS
from errors import UserError, WorkError, path_of, same_path
from runtime.atomic_write import write_aside
from runtime.console import complain, hushed, shown
from runtime.files import try_writing
from runtime.messages import progress, say

QUALITY = 95  # of JPEG, where images are made smaller
JPEG_SIDE = 65_500  # px, the most that the library writes


def pack(args):
    """Write --output/<split>-000000.tar, ...: a folder in it is a class. Returns --output.

    The files go in as they are, or with --pack_side with this shorter side in pixels, as JPEG. The same images give the
    same bytes. Raises UserError where --output holds archives already, WorkError for an image that cannot be read
    where it has to be.
    """
    if not args.output:
        raise UserError('pack wants --output=FOLDER, for the archives')
    output = path_of(args.output)
    if same_path(output, path_of(args.image_path)) or output.suffix == '.tar':
        raise UserError(f'--output={args.output}: name another folder, for the archives')
    if there := sorted(output.glob('*-??????.tar')):
        raise UserError(f'{shown(output)} holds {shown(there[0].name)} already: pack into another folder')
    try_writing(output / 'train-000000.tar')
    parts = parts_of(args)
    for part in parts.values():
        if part.classes and (none := int((part.labels < 0).sum())):
            raise UserError(
                f'{none} of the {len(part.labels)} images of {shown(part.where)} have no class: an archive says it of '
                'all or of none, pack them apart'
            )
    for name, part in parts.items():
        if args.bad_images == 'skip' and not isinstance(part.store, Memory):
            part = part.select(readable(part.store, part.where, path_of(args.cache_path) / part.share))
        shards, left_out = write_split(args, output, name, part)
        say(f'{name:5}  {len(part.labels) - left_out} images in {shards} archives')
    say(f'use them: --image_path={shown(output)}')
    return output


def write_split(args, output, name, part):
    """Write the archives of one split; returns how many, and how many images were left out."""
    rows, number, left_out = iter(progress(range(len(part.labels)), f'packing {name}', 'images')), 0, []
    folders, taken = folders_of(part.classes), {}
    ahead = next(rows, None)
    while ahead is not None:
        path = output / f'{name}-{number:06d}.tar'

        def write(aside):
            nonlocal ahead
            with tarfile.open(aside, 'w', format=tarfile.GNU_FORMAT) as archive, hushed():
                while ahead is not None and archive.offset < args.shard_megabytes * 1e6:
                    try:
                        member, content = entry(args, part, ahead, folders)
                        add(archive, another(member, taken), content)
                    except WorkError as error:
                        if args.bad_images != 'skip':
                            raise
                        left_out.append(str(error))  # said when standard error is heard again
                    ahead = next(rows, None)

        write_aside(path, write)
        number += 1
    for line in left_out:
        complain('warning', f'{line}; left out')
    return number, len(left_out)


def entry(args, part, row, folders):
    """(name in the archive, bytes) of an image: in the folder of its class, or in none, where a folder would be one."""
    raw, label = part.store.names.raw(row), int(part.labels[row])
    parts = [seen(piece) for piece in raw.split(b'/') if piece not in (b'', b'.', b'..')]
    if label < 0:
        parts = [b'%2F'.join(parts)]
    elif parts[0] != folders[label] or len(parts) == 1:
        parts.insert(0, folders[label])
    name = b'/'.join(parts)
    if args.pack_side:
        image, buffer = Image.fromarray(smaller(part.store, row, args.pack_side, args.pixel_max)), io.BytesIO()
        if max(image.size) > JPEG_SIDE:
            raise WorkError(
                f'{shown(part.store.names[row])} would have {image.width} x {image.height} pixels, and a JPEG has '
                f'{JPEG_SIDE} a side at most: leave --pack_side out, or the image (--bad_images=skip)'
            )
        image.save(buffer, 'JPEG', quality=QUALITY, subsampling=0)
        return name if name.lower().endswith((b'.jpg', b'.jpeg')) else name + b'.jpg', buffer.getvalue()
    with part.store.opened(row) as image:
        if getattr(image, 'fp', None):
            image.fp.seek(0)
            return name if is_image(name) else name + ending_of(image.format), image.fp.read()
        buffer = io.BytesIO()  # decoded already: torchvision's own files
        image.save(buffer, 'PNG')
        return name + b'.png', buffer.getvalue()


def seen(name):
    """A name (bytes) that is not passed over when the archive is read."""
    return b'_' + name if name.startswith(b'.') or name.lower() in OF_SYSTEMS else name


def folders_of(classes):
    """The folder of each class, as bytes; no two share one."""
    taken = {}
    return [another(seen(os.fsencode(name).replace(b'/', b'_')), taken) for name in classes]


def another(name, taken):
    """A name (bytes) that is not among the `taken`, to which it is added: it, or with a number before its ending.
    taken: a dict of names to the last number tried."""
    stem, ending = os.path.splitext(name)
    new = name
    while new in taken:
        taken[name] += 1
        new = stem + b'_%d' % taken[name] + ending
    taken[new] = 1
    return new


def ending_of(kind):
    """The ending by which a format of Pillow is known."""
    endings = [ending for ending, of in Image.registered_extensions().items() if of == kind]
    return next(ending.encode() for ending in endings if is_image(b'x' + ending.encode()))


def add(archive, name, content):
    """One file, without owner or time."""
    member = tarfile.TarInfo(os.fsdecode(name))
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))
