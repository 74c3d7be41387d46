"""Which splits a folder, an archive or a list has, and the class of each image.

FOLDER/{train,val,test}/<class>/...   or flat; val may be called valid or validation
FOLDER/<class>/...                    two or more folders of images: classes, as torchvision's ImageFolder has them
FOLDER/...                            any other folder: images at any depth, without classes
train.tar, train-000000.tar, ...      in place of each split's folder; or all in one FILE.tar
train.txt, FILE.txt                   a list: a path a line, after a tab its class if wanted
ILSVRC2012_img_train.tar, ...         ImageNet as it is downloaded (imagenet.py)
"""

import os
import re
import stat
from collections import Counter

import torch

from config import UserError
from dataloader import imagenet
from dataloader.archives import PACKED, open_archives
from dataloader.images import is_image, shown
from dataloader.names import Names
from dataloader.part import Part
from dataloader.scan import Found, scan
from dataloader.stores.files import Files

SPLITS = {
    'train': 'train',
    'training': 'train',
    'val': 'val',
    'valid': 'val',
    'validation': 'val',
    'test': 'test',
    'testing': 'test',
}
ARCHIVE = re.compile(r'([a-z]+)(-\d+)?\.tar')


def find(root, cache_path, progress):
    """{'train': Part, 'val': Part, ...} of what --image_path names, the splits that are there; train always is.

    progress: logger.progress. Raises UserError where there are no images, or the layout is none of the above.
    """
    if root.is_file():
        return (
            {'train': whole(root, cache_path, progress)}
            if not is_tar(root)
            else in_one_archive(root, cache_path, progress)
        )
    if archives := imagenet.archives_of(root):
        found = {}
        for name, path in archives.items():
            images, store, _ = open_archives([path], cache_path, progress)
            if name == 'train':
                found[name] = part_of(path, images, store)
            else:
                found[name] = Part(path, store, *imagenet.labels_of(root, images.names), images.others, images.passed)
        return found
    places = places_of(root)
    if not places:
        return {'train': plain(root, scan_with_bar(root, progress))}
    if 'train' not in places:
        said = ', '.join(sorted(shown(paths[0].name) for paths in places.values()))
        raise UserError(f'{shown(root)} has {said} and no train: what is there to be trained on?')
    return {name: of_place(paths, cache_path, progress) for name, paths in places.items()}


def whole(path, cache_path, progress):
    """All images of a folder at any depth, an archive, a list, or one file, as a Part without labels (a list may have
    some). Raises UserError where there are none."""
    if path.is_dir():
        found = scan_with_bar(path, progress)
        return unlabelled(path, found, Files(path, found.names))
    if not path.is_file():
        is_what = 'is neither a file nor a folder' if path.exists() else 'is not there'
        raise UserError(f'{shown(path)} {is_what}')
    if is_tar(path):
        found, store, _ = open_archives([path], cache_path, progress)
        return unlabelled(path, found, store)
    if is_image(os.fsencode(path.name)):
        return Part(path, Files(path.parent, Names([path.name])), torch.tensor([-1]), [])
    return listed(path)


def is_tar(path):
    return path.name.lower().endswith(('.tar', *PACKED))


def has_splits(root):
    """Whether a folder is laid out for training."""
    return 'train' in places_of(root) or bool(imagenet.archives_of(root))


def places_of(root):
    """{split: [its folder, its list, or its archives]} of the splits that `root` holds, in the order of SPLITS."""
    folders, archives, lists = {}, {}, {}
    try:
        entries = sorted(root.iterdir())
    except OSError as error:
        raise UserError(f'the folder {shown(root)} may not be read: {error.strerror}') from None
    for path in entries:
        lower = path.name.lower()
        if lower in SPLITS and path.is_dir():
            folders.setdefault(SPLITS[lower], []).append(path)
        elif (match := ARCHIVE.fullmatch(lower)) and match[1] in SPLITS:
            archives.setdefault(SPLITS[match[1]], []).append(path)
        elif path.suffix.lower() == '.txt' and path.stem.lower() in SPLITS:
            lists.setdefault(SPLITS[path.stem.lower()], []).append(path)
    found = {}
    for name in ('train', 'val', 'test'):
        for kind in (folders, archives, lists):
            if name in kind and name not in found:
                found[name] = kind[name]
                stems = {re.sub(r'\d+\.tar$|\..*', '', path.name.lower()) for path in kind[name]}
                if len(stems) > 1 or (kind is folders and len(kind[name]) > 1):
                    said = ' and '.join(shown(kind[name][i].name) for i in (0, -1))
                    raise UserError(f'{shown(root)} has both {said}: which of them is {name}?')
    if found and 'train' not in found and not folders:
        return {}  # a val.txt or test.tar beside other things
    return found


def of_place(paths, cache_path, progress):
    """The Part of one split: its folder, its list, or its archives."""
    if paths[0].is_dir():
        found = scan_with_bar(paths[0], progress)
        return part_of(paths[0], found, Files(paths[0], found.names))
    if not is_tar(paths[0]):
        return listed(paths[0])
    found, store, by_cls = open_archives(paths, cache_path, progress)
    labels, classes = by_cls or (None, [])
    own = re.split(r'[-.]', paths[0].name)[0]
    if len(found.folders) == 1 and not found.loose and found.folders[0].lower() == own.lower():
        found, store, labels = inside(found, store, 0, labels)  # tar cf train.tar train
    return as_part(paths[0], found, store, labels, classes)


def in_one_archive(path, cache_path, progress):
    """The splits of one archive, which may be packed as a folder of them, or as a folder that holds such a one."""
    found, store, by_cls = open_archives([path], cache_path, progress)
    labels, classes = by_cls or (None, [])
    for _ in range(2):
        named = [(name, ARCHIVE.fullmatch(f'{name}.tar')) for name in found.folders]  # an archive in it is a folder
        if shards := [name for name, match in named if match and match[2] and match[1] in SPLITS]:
            raise UserError(f'{shown(path)} holds the shards {shown(shards[0])}, ...: unpack it (tar xf) into a folder')
        splits = {SPLITS[name.lower()]: row for row, name in enumerate(found.folders) if name.lower() in SPLITS}
        if 'train' in splits:
            return {
                name: as_part(path / name, *inside(found, store, row, labels), classes) for name, row in splits.items()
            }
        if len(found.folders) != 1 or found.loose:
            break
        found, store, labels = inside(found, store, 0, labels)
    if by_cls:
        return {'train': as_part(path, found, store, labels, classes)}
    return {'train': plain(path, found, store)}


def as_part(where, found, store, labels, classes):
    """The Part of an archive's images: of the classes that .cls files name, or else of its folders."""
    if labels is None:
        return part_of(where, found, store)
    return Part(where, store, labels, classes, found.others, found.passed)


def inside(found, store, row, labels=None):
    """(Found, store, labels) of what lies in folder number `row` of `found`."""
    start = found.loose + sum(found.counts[:row])
    end = start + found.counts[row]
    store, labels = store.select(range(start, end)), None if labels is None else labels[start:end]
    cut = len(os.fsencode(found.folders[row])) + 1
    names = [store.names.raw(i)[cut:] for i in range(len(store.names))]
    store.names = Names(names)
    tops = Counter(os.fsdecode(name.split(b'/', 1)[0]) for name in names if b'/' in name)
    folders = sorted(tops)
    return Found(store.names, folders, [tops[name] for name in folders], found.others, found.passed), store, labels


def part_of(where, found, store):
    """The Part of a split: its folders are its classes. Raises UserError where images lie beside them, or a class is
    empty (torchvision's ImageFolder refuses both, or drops the images)."""
    if not found.folders or not len(found.names):
        return unlabelled(where, found, store)
    if found.loose:
        stray = shown(found.names[0])
        raise UserError(f'{shown(where)} has class folders, and beside them the image {stray}: move it into a class')
    for name, count in zip(found.folders, found.counts, strict=True):
        if not count:
            raise UserError(f'the class folder {shown(where / name)} holds no images: fill or delete it')
    labels = torch.repeat_interleave(torch.tensor(found.counts))
    return Part(where, store, labels, found.folders, found.others, found.passed)


def plain(where, found, store=None):
    """The Part of a folder that has no splits: two or more folders of images, and none beside them, are classes."""
    store = store or Files(where, found.names)
    full = [(name, count) for name, count in zip(found.folders, found.counts, strict=True) if count]
    if len(full) < 2 or found.loose:
        return unlabelled(where, found, store)
    labels = torch.repeat_interleave(torch.tensor([count for _, count in full]))
    return Part(where, store, labels, [name for name, _ in full], found.others, found.passed)


def unlabelled(where, found, store):
    if not len(found.names):
        other = ', '.join(f'{count} {kind}' for kind, count in found.others.most_common(5)) or 'nothing else either'
        raise UserError(f'{shown(where)} holds no images that Pillow can open ({other})')
    return Part(where, store, torch.full((len(found.names),), -1), [], found.others, found.passed)


def listed(path):
    """The Part of a list: a path a line, relative to the list's folder, after a tab perhaps its class."""
    names, owners, content = [], [], path.read_bytes()
    if b'\0' in content[:1000]:
        raise UserError(f'{shown(path)} is no list of paths, for it is no text (images are known by their endings)')
    for line in content.removeprefix(b'\xef\xbb\xbf').splitlines():
        if not line.strip():
            continue
        name, _, owner = line.partition(b'\t')
        try:
            if not stat.S_ISREG(os.stat(os.path.join(os.fsencode(path.parent), name)).st_mode):
                raise UserError(f'{shown(path)} names {shown(name)}, which is no file')
        except FileNotFoundError:
            if not names:
                raise UserError(
                    f'{shown(path)}: there is no file {shown(name[:80])}, its first line, in '
                    f'{shown(path.parent)}; a list has a path a line, after a tab the class'
                ) from None
        except (OSError, ValueError):
            raise UserError(f'{shown(path)} is no list of paths: a line of it is {shown(name[:80])}') from None
        names.append(name)
        owners.append(os.fsdecode(owner.strip()))
    if not names:
        raise UserError(f'{shown(path)} names no image')
    classes = sorted(set(owners) - {''})
    number = {name: i for i, name in enumerate(classes)} | {'': -1}
    labels = torch.tensor([number[owner] for owner in owners])
    return Part(path, Files(path.parent, Names(names)), labels, classes)


def scan_with_bar(folder, progress):
    return scan(folder, lambda names: progress(names, f'looking through {shown(folder.name)}', 'folders'))
