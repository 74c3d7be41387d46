"""Which splits a folder, an archive or a list has, and the class of each image.

FOLDER/{train,val,test}/<class>/...   or flat; val may be called valid or validation
FOLDER/<class>/...                    two or more folders of images: classes, as torchvision's ImageFolder has them
FOLDER/...                            any other folder: images at any depth, without classes
train.tar, train-000000.tar, ...      in place of each split's folder; or all in one FILE.tar
train.txt, FILE.txt                   a list: a path a line, after a tab its class if wanted
ILSVRC2012_img_train.tar, ...         ImageNet as it is downloaded (imagenet.py)
ILSVRC/Data/CLS-LOC/...               ImageNet as Kaggle packs it
"""

import os
import re

import torch

from dataloader.loading.decode import is_image
from dataloader.readers.files import Files
from dataloader.sources import imagenet
from dataloader.sources.folder import right_in, scan
from dataloader.sources.path_array import Names
from dataloader.sources.path_list import listed
from dataloader.sources.split_names import SPLITS, split_of, wants_train
from dataloader.sources.split_source import Part, part_of, plain, unlabelled
from dataloader.sources.tar_index import PACKED, open_archives
from dataloader.sources.tar_splits import ARCHIVE, braced, in_one_archive, numbered_in, of_archives
from errors import UserError
from runtime.console import shown
from runtime.messages import say

# A folder's name in names that stand one after the other: it follows a / (or begins), and ends in one.
BELOW = re.compile(rb'(?<![^/])((?:' + b'|'.join(name.encode() for name in SPLITS) + rb')(?:[-_ ]?20\d\d)?)/', re.I)


def find(root, cache_path, progress):
    """{'train': Part, 'val': Part, ...} of what `image_path` names, the splits that are there; train always is.

    progress: messages.progress. Raises UserError where there are no images, or the layout is none of the above.
    """
    if archives := braced(root):
        return {'train': of_archives(archives, cache_path, progress)}
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
    if kaggle := imagenet.kaggle_of(root):
        return of_kaggle(root, *kaggle, cache_path, progress)
    places = places_of(root)
    if not places:
        if inner := inner_of(root):
            say(f'{shown(root)} holds the splits of {shown(inner.relative_to(root))}, and nothing else')
            return find(inner, cache_path, progress)
        if archives := numbered_in(root):
            return {'train': of_archives(archives, cache_path, progress)}
        found = scan_with_bar(root, progress)
        check_no_splits_below(root, found.names)
        return {'train': plain(root, found, Files(root, found.names))}
    wants_train(root, {name: paths[0].name for name, paths in places.items()})
    check_is_no_class(root, places)
    parts = {name: of_place(paths, cache_path, progress) for name, paths in places.items() if name != 'test'}
    if 'test' in places:
        try:
            parts['test'] = of_place(places['test'], cache_path, progress)
        except UserError as error:  # nothing is trained or judged on it
            say(f'{error}; there is no test then')
    return parts


def of_kaggle(root, folder, table, cache_path, progress):
    """The Parts of ImageNet as Kaggle packs it: val's labels are in a table, test has none."""
    say(f'{shown(root)} is ImageNet as Kaggle packs it: {shown(folder.relative_to(root))}')
    parts = {}
    for name in ('train', 'val', 'test'):
        if (folder / name).is_dir():
            parts[name] = of_place([folder / name], cache_path, progress)
    if 'val' in parts and not parts['val'].classes:
        if table is None:
            say(f'the labels of val are in {imagenet.SOLUTION}, which is not there: val has no classes')
        else:
            val = parts['val']
            val.labels = imagenet.labels_of_table(table, val.store.names, parts['train'].classes)
            val.classes = parts['train'].classes
    return parts


def check_no_splits_below(root, names):
    """Raise UserError where images that are about to be taken for one set lie in folders called train and val, or test:
    what is to be judged on would be trained on."""
    found = {}
    for match in BELOW.finditer(names.data):
        found.setdefault(split_of(os.fsdecode(match[1])), match)
        if 'train' in found and len(found) > 1:
            break
    if 'train' in found and len(found) > 1:
        first = next(name for name in names if f'/{os.fsdecode(found["train"][1])}/' in f'/{name}')
        above = first[: f'/{first}'.index(f'/{os.fsdecode(found["train"][1])}/')].rstrip('/')
        kinds = ' and '.join(shown(match[1]) for match in found.values())
        raise UserError(
            f'{shown(root)} has no splits itself, and folders called {kinds} lie below it: is {shown(root / above)} '
            'meant? Name that as `image_path`; to train on all of it as one set, call them otherwise'
        )


def inner_of(root):
    """The folder with splits that lies in `root` alone, a few levels down; or None."""
    folder = root
    for _ in range(5):
        files, folders = right_in(folder)
        if files or len(folders) != 1:
            return None
        folder = folder / os.fsdecode(folders[0])
        if has_splits_itself(folder):
            return folder
    return None


def check_is_no_class(root, places):
    """Raise UserError where the folder train, the only split, may be a class: it has none, and lies beside folders of
    images."""
    train = places['train'][0]
    if len(places) > 1 or not train.is_dir() or right_in(train)[1]:
        return
    found = [os.fsdecode(name) for name in sorted(right_in(root)[1]) if os.fsdecode(name) != train.name]
    full = [shown(name) for name in found if right_in(root / name)[0]]
    if len(full) > 1:
        raise UserError(
            f'{shown(root)}: is {shown(train.name)} a class, as {full[0]} and {full[1]} beside it seem to be, or all '
            'that is to be trained on? Call the class otherwise, or point `image_path` at train'
        )


def has_splits_itself(folder):
    return 'train' in places_of(folder) or bool(imagenet.archives_of(folder))


def whole(path, cache_path, progress):
    """All images of a folder at any depth, an archive, a list, or one file, as a Part without labels (a list may have
    some). Raises UserError where there are none."""
    if path.is_dir():
        found = scan_with_bar(path, progress)
        if not len(found.names) and (places := splits_in(path)):  # archives, or lists
            paths = next(places[name] for name in ('test', 'val', 'train') if name in places)
            return of_place(paths, cache_path, progress)
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
    return has_splits_itself(root) or bool(inner_of(root))


def places_of(root):
    """`splits_in`, but for a val.txt or test.tar beside other things, which makes no splits of them."""
    found = splits_in(root)
    return found if 'train' in found or any(paths[0].is_dir() for paths in found.values()) else {}


def splits_in(root):
    """{split: [its folder, its list, or its archives]} of the splits that `root` holds, in the order of SPLITS."""
    folders, archives, lists = {}, {}, {}
    try:
        entries = sorted(root.iterdir())
    except OSError as error:
        raise UserError(f'the folder {shown(root)} may not be read: {error.strerror}') from None
    for path in entries:
        lower = path.name.lower()
        match = ARCHIVE.fullmatch(lower)
        archive = SPLITS.get(match[1]) if match else None
        listed = SPLITS.get(path.stem.lower()) if path.suffix.lower() == '.txt' else None
        if (split_of(lower) or archive or listed) and path.is_symlink() and not path.exists():
            raise UserError(f'{shown(path)} is a link that leads nowhere')
        if (archive or listed) and not path.is_file():  # a pipe would be waited for
            raise UserError(f'{shown(path)} is no file')
        if split_of(lower) and path.is_dir():
            folders.setdefault(split_of(lower), []).append(path)
        elif archive:
            archives.setdefault(archive, []).append(path)
        elif listed:
            lists.setdefault(listed, []).append(path)
    found = {}
    for name in ('train', 'val', 'test'):
        for kind in (folders, archives, lists):
            if name in kind and name not in found:
                found[name] = kind[name]
                stems = {re.sub(r'\d+\.tar$|\..*', '', path.name.lower()) for path in kind[name]}
                if len(stems) > 1 or (kind is folders and len(kind[name]) > 1):
                    said = ' and '.join(shown(kind[name][i].name) for i in (0, -1))
                    raise UserError(f'{shown(root)} has both {said}: which of them is {name}?')
    return found


def of_place(paths, cache_path, progress):
    """The Part of one split: its folder, its list, or its archives."""
    if paths[0].is_dir():
        if archives := numbered_in(paths[0]):
            return of_archives(archives, cache_path, progress)
        found = scan_with_bar(paths[0], progress)
        return part_of(paths[0], found, Files(paths[0], found.names))
    if not is_tar(paths[0]):
        return listed(paths[0])
    return of_archives(paths, cache_path, progress)


def scan_with_bar(folder, progress):
    return scan(folder, lambda names: progress(names, f'looking through {shown(folder.name)}', 'folders'))
