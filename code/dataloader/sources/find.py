"""Find the splits of a folder, an archive or a list, and the class of each image. Layouts:

FOLDER/{train,val,test}/<class>/...   or flat; val may be called valid or validation
FOLDER/<class>/...                    two or more folders of images: classes, as torchvision's ImageFolder has them
FOLDER/...                            any other folder: images at any depth, without classes
OUTER/FOLDER/...                      an outer folder that holds one folder and nothing else is passed over
train.tar, train-000000.tar, ...      in place of each split's folder; or all in one FILE.tar
train-00000-of-00005.parquet, ...     Parquet, as the Hugging Face hub has it; also in data/, or one FILE.parquet
train.txt, FILE.txt                   a list: one path per line, its class after a tab if wanted
ILSVRC2012_img_train.tar, ...         ImageNet as it is downloaded (imagenet.py)
ILSVRC/Data/CLS-LOC/...               ImageNet as Kaggle packs it
"""

import os
import re

import torch

from dataloader.loading.decode import is_image
from dataloader.readers.files import Files
from dataloader.sources import imagenet, parquet_files
from dataloader.sources.folder import list_folder, scan_images
from dataloader.sources.path_array import PathArray
from dataloader.sources.path_list import read_path_list
from dataloader.sources.split_names import SPLIT_ALIASES, check_no_splits_below, require_train, split_from_folder_name
from dataloader.sources.split_source import (
    SplitSource,
    source_from_class_folders,
    source_guess_classes,
    source_unlabeled,
)
from dataloader.sources.tar_index import COMPRESSED, open_archives
from dataloader.sources.tar_splits import (
    ARCHIVE,
    expand_braces,
    list_numbered_archives,
    source_from_shards,
    splits_in_archive,
)
from runtime.console import printable
from runtime.errors import UserError
from runtime.messages import log


def find_splits(root, cache_path, progress):
    """Find the splits of `image_path`: {'train': SplitSource, ...}, with val and test if they exist.

    progress: messages.progress. Raises UserError if there are no images, or the layout is none of the above.
    """
    if archives := expand_braces(root):
        return {'train': source_from_archives(archives, cache_path, progress)}
    if shards := parquet_files.find_shards(root):
        require_train(root, {name: paths[0].name for name, paths in shards.items()})
        return {name: parquet_files.source_from_parquet(paths) for name, paths in shards.items()}
    if root.is_file():
        return (
            {'train': load_single_source(root, cache_path, progress)}
            if not is_tar(root)
            else splits_in_archive(root, cache_path, progress)
        )
    if archives := imagenet.find_archives(root):
        scanned = {}
        for name, path in archives.items():
            images, store, _ = open_archives([path], cache_path, progress)
            if name == 'train':
                scanned[name] = source_from_class_folders(path, images, store)
            else:
                scanned[name] = SplitSource(
                    path, store, *imagenet.val_labels(root, images.names), images.other_files, images.skipped_folders
                )
        return scanned
    if kaggle := imagenet.find_kaggle_layout(root):
        return source_from_kaggle(root, *kaggle, cache_path, progress)
    places = split_locations(root)
    if not places:
        if inner := find_nested_root(root):
            log(f'the splits of {printable(root)} are in {printable(inner.relative_to(root))}')
            return find_splits(inner, cache_path, progress)
        if archives := list_numbered_archives(root):
            return {'train': source_from_archives(archives, cache_path, progress)}
        if (inner := skip_outer_folders(root)) != root:
            log(f'the images of {printable(root)} are in {printable(inner.relative_to(root))}')
            return find_splits(inner, cache_path, progress)
        scanned = scan_with_progress(root, progress)
        check_no_splits_below(root, scanned.names)
        return {'train': source_guess_classes(root, scanned, Files(root, scanned.names))}
    require_train(root, {name: paths[0].name for name, paths in places.items()})
    check_train_is_not_a_class(root, places)
    sources = {}
    for name, paths in places.items():
        try:
            sources[name] = load_location(paths, cache_path, progress)
        except UserError as error:
            if name == 'train':
                raise
            if name == 'val':
                raise UserError(f'{error}; without this folder a tenth of train is val') from None
            log(f'{error}; test is ignored')
    return sources


def source_from_kaggle(root, folder, table, cache_path, progress):
    """Return {split: SplitSource} of ImageNet as Kaggle packs it: the labels of val are in a CSV file, test has
    none."""
    log(f'{printable(root)} is ImageNet as Kaggle packs it: {printable(folder.relative_to(root))}')
    sources = {}
    for name in ('train', 'val', 'test'):
        if (folder / name).is_dir():
            sources[name] = load_location([folder / name], cache_path, progress)
    if 'val' in sources and not sources['val'].classes:
        if table is None:
            log(f'the labels of val are in {imagenet.SOLUTION}, which does not exist: val has no classes')
        else:
            val = sources['val']
            val.labels = imagenet.val_labels_from_csv(table, val.store.names, sources['train'].classes)
            val.classes = sources['train'].classes
    return sources


def find_nested_root(root):
    """Return the folder with splits if `root` contains nothing else, up to five levels down; else None."""
    folder = root
    for _ in range(5):
        files, folders = list_folder(folder)
        if files or len(folders) != 1:
            return None
        folder = folder / os.fsdecode(folders[0])
        if has_splits_here(folder):
            return folder
    return None


def skip_outer_folders(root):
    """Return the folder below `root`, up to five levels, that holds all there is: each above has one folder and nothing
    else. A folder that holds images itself is a class, and not entered."""
    folder = root
    for _ in range(5):
        files, folders = list_folder(folder)
        inner = folder / os.fsdecode(folders[0]) if len(folders) == 1 else None
        if files or not inner or inner.is_symlink() or list_folder(inner)[0]:  # a link may lead back
            break
        folder = inner
    return folder


def check_train_is_not_a_class(root, places):
    """Raise UserError if the folder train may be a class: it is the only split, has no class folders, and lies beside
    other folders of images."""
    train = places['train'][0]
    if len(places) > 1 or not train.is_dir() or list_folder(train)[1]:
        return
    siblings = [os.fsdecode(name) for name in sorted(list_folder(root)[1]) if os.fsdecode(name) != train.name]
    with_images = [printable(name) for name in siblings if list_folder(root / name)[0]]
    if len(with_images) > 1:
        raise UserError(
            f'{printable(root)}: {printable(train.name)} may be the training split, or a class like {with_images[0]} '
            f'and {with_images[1]} beside it. If it is a class, rename it; if not, set `image_path` to it'
        )


def has_splits_here(folder):
    return 'train' in split_locations(folder) or bool(imagenet.find_archives(folder))


def load_single_source(path, cache_path, progress):
    """Return a SplitSource of all images of a folder, an archive, a list or one file, without labels (a list may have
    some). Raises UserError if there are none."""
    if archives := expand_braces(path):
        return source_from_shards(archives, cache_path, progress)
    if path.is_dir():
        if archives := list_numbered_archives(path):
            return source_from_shards(archives, cache_path, progress)
        if shards := parquet_files.find_shards(path):
            return parquet_files.source_from_parquet(
                next(shards[name] for name in ('test', 'val', 'train') if name in shards)
            )
        scanned = scan_with_progress(path, progress)
        if not len(scanned.names) and (places := list_splits(path)):  # archives, or lists
            paths = next(places[name] for name in ('test', 'val', 'train') if name in places)
            return load_location(paths, cache_path, progress)
        return source_unlabeled(path, scanned, Files(path, scanned.names))
    if not path.is_file():
        is_what = 'is neither a file nor a folder' if path.exists() else 'is not there'
        raise UserError(f'{printable(path)} {is_what}')
    if path.suffix.lower() == '.parquet':
        return parquet_files.source_from_parquet([path])
    if is_tar(path):
        scanned, store, _ = open_archives([path], cache_path, progress)
        return source_unlabeled(path, scanned, store)
    if is_image(os.fsencode(path.name)):
        return SplitSource(path, Files(path.parent, PathArray([path.name])), torch.tensor([-1]), [])
    return read_path_list(path)


def is_tar(path):
    return path.name.lower().endswith(('.tar', *COMPRESSED))


def has_splits(root):
    """Whether a folder has splits."""
    return has_splits_here(root) or bool(find_nested_root(root))


def split_locations(root):
    """list_splits, but empty if there is only a val.txt or test.tar among other files."""
    locations = list_splits(root)
    return locations if 'train' in locations or any(paths[0].is_dir() for paths in locations.values()) else {}


def list_splits(root):
    """Return {split: [its folder, its list, or its archives]} of the splits in `root`. Raises UserError if a split is
    ambiguous."""
    folders, archives, lists = {}, {}, {}
    try:
        entries = sorted(root.iterdir())
    except OSError as error:
        raise UserError(f'the folder {printable(root)} cannot be read: {error.strerror}') from None
    for path in entries:
        lower = path.name.lower()
        match = ARCHIVE.fullmatch(lower)
        archive = SPLIT_ALIASES.get(match[1]) if match else None
        listed = SPLIT_ALIASES.get(path.stem.lower()) if path.suffix.lower() == '.txt' else None
        if (split_from_folder_name(lower) or archive or listed) and path.is_symlink() and not path.exists():
            raise UserError(f'{printable(path)} is a broken link')
        if (archive or listed) and not path.is_file():  # reading a pipe would block
            raise UserError(f'{printable(path)} is no file')
        if split_from_folder_name(lower) and path.is_dir():
            folders.setdefault(split_from_folder_name(lower), []).append(path)
        elif archive:
            archives.setdefault(archive, []).append(path)
        elif listed:
            lists.setdefault(listed, []).append(path)
    locations = {}
    for name in ('train', 'val', 'test'):
        for kind in (folders, archives, lists):
            if name in kind and name not in locations:
                locations[name] = kind[name]
                stems = {re.sub(r'\d+\.tar$|\..*', '', path.name.lower()) for path in kind[name]}
                if len(stems) > 1 or (kind is folders and len(kind[name]) > 1):
                    both_names = ' and '.join(printable(kind[name][i].name) for i in (0, -1))
                    raise UserError(f'{printable(root)} has both {both_names}: which of them is {name}?')
    return locations


def load_location(paths, cache_path, progress):
    """Return the SplitSource of one split. paths: its folder, its list, or its archives."""
    if paths[0].is_dir():
        if archives := list_numbered_archives(paths[0]):
            return source_from_archives(archives, cache_path, progress)
        scanned = scan_with_progress(paths[0], progress)
        return source_from_class_folders(paths[0], scanned, Files(paths[0], scanned.names))
    if not is_tar(paths[0]):
        return read_path_list(paths[0])
    return source_from_archives(paths, cache_path, progress)


def source_from_archives(paths, cache_path, progress):
    """source_from_shards, for training. Raises UserError if the archives hold splits in folders below."""
    source = source_from_shards(paths, cache_path, progress)
    check_no_splits_below(source.location, source.store.names, is_archive=True)
    return source


def scan_with_progress(folder, progress):
    return scan_images(folder, lambda names: progress(names, f'looking through {printable(folder.name)}', 'folders'))
