"""Find the splits and classes of Parquet files, named as on the Hugging Face hub: data/train-00000-of-00005.parquet."""

import contextlib
import json
import os
import re

import numpy as np
import torch

from dataloader.loading.decode import is_image
from dataloader.readers.parquet import Parquet
from dataloader.sources.path_array import PathArray
from dataloader.sources.split_names import SPLIT_ALIASES
from dataloader.sources.split_source import SplitSource
from runtime.console import join_first, printable
from runtime.errors import UserError, WorkError
from runtime.messages import log, warn

# train.parquet, train-00000-of-00005.parquet, train-00000-of-00005-0123456789abcdef.parquet
SHARD = re.compile(r'([a-z]+)(-\d+-of-\d+)?(-[0-9a-f]+)?\.parquet')
IMAGE_COLUMNS, LABEL_COLUMNS = ('image', 'img', 'picture'), ('label', 'labels', 'fine_label', 'class', 'target')


def find_shards(root):
    """Return {split: its Parquet files} of a folder, or of its subfolder: data, or the only one there is, the hub's
    configuration (default/train/0000.parquet). {} if there are none."""
    for folder in (root, root / 'data', *only_subfolder(root)):
        shards = {}
        for path in sorted(folder.glob('*.parquet')) if folder.is_dir() else ():
            match = SHARD.fullmatch(path.name.lower())
            if match and match[1] in SPLIT_ALIASES:
                shards.setdefault(SPLIT_ALIASES[match[1]], []).append(path)
        for name in SPLIT_ALIASES if not shards else ():  # train/0000.parquet, as the hub converts other datasets
            if paths := sorted((folder / name).glob('*.parquet')):
                shards.setdefault(SPLIT_ALIASES[name], []).extend(paths)
        for paths in shards.values():
            warn_missing_shards(paths)
        if shards:
            return shards
    return {}


def only_subfolder(root):
    """Return [the only subfolder of a folder without images], else []."""
    folders = []
    with os.scandir(root) if root.is_dir() else contextlib.nullcontext(()) as entries:
        for entry in entries:
            if entry.is_dir() and not entry.name.startswith('.'):
                folders.append(root / entry.name)
            if len(folders) > 1 or is_image(os.fsencode(entry.name)):
                return []
    return folders


def warn_missing_shards(paths):
    """Warn if files of a split are missing: their names state how many there are."""
    match = re.search(r'-of-(\d+)', paths[0].name)
    if match and len(paths) < int(match[1]):
        warn(f'{printable(paths[0].parent)} has {len(paths)} of {int(match[1])} files of this split')


def source_from_parquet(paths):
    """Return the SplitSource of one split in Parquet files. Raises UserError if pyarrow is not installed or no column
    has images, WorkError for a damaged file."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(f'{printable(paths[0])}: pip3 install pyarrow reads Parquet files') from None
    names, labels, parts = [], [], []
    for number, path in enumerate(paths):
        try:
            file = pq.ParquetFile(path)
            schema = file.schema_arrow
            if not number:
                image, label, classes = find_columns(schema, paths[0])
            for column in [image] + [label] * bool(label):
                if column not in schema.names:
                    raise UserError(f'{printable(path)} has no column {column!r}, which {printable(paths[0].name)} has')
            rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            kind = schema.field(image).type
            has_paths = pa.types.is_struct(kind) and any(field.name == 'path' for field in kind)
            columns = [f'{image}.path'] * has_paths + [label] * bool(label)
            table = file.read(columns=columns, use_threads=False) if columns else None
        except pa.ArrowException as error:
            raise WorkError(f'cannot read the file {printable(path)}: {str(error).splitlines()[0]}') from None
        cells = table.column(image).to_pylist() if has_paths else [None] * sum(rows)
        file_names = [cell and cell['path'] for cell in cells]
        names += [f'{path.stem}/{row:07d}_{name or "image"}' for row, name in enumerate(file_names)]
        labels += table.column(label).to_pylist() if label else [None] * sum(rows)
        parts += [(number, group, row) for group, count in enumerate(rows) for row in range(count)]
    if not parts:
        raise UserError(f'{printable(paths[0])} holds no images')
    labels, classes = number_labels(labels, classes)
    index = np.array(parts, np.int64).T
    store = Parquet([str(path) for path in paths], image, PathArray(names), *map(np.ascontiguousarray, index))
    return SplitSource(join_shard_names(paths), store, labels, classes)


def find_columns(schema, path):
    """Find the columns of images and labels from the hub's metadata in the schema, else from their names. Returns
    (image column, label column or '', class names or None). Raises UserError if there is no image column."""
    import pyarrow as pa

    features = read_hub_features(schema)
    kinds = {name: value.get('_type') for name, value in features.items() if name in schema.names}
    images = [name for name, kind in kinds.items() if kind == 'Image']
    if not images:
        binary = [field.name for field in schema if holds_bytes(field.type, pa)]
        images = sorted(binary, key=lambda name: name not in IMAGE_COLUMNS)
    if not images:
        raise UserError(f'{printable(path)} has no column of images, but {join_first(schema.names)}')
    named = [name for name in LABEL_COLUMNS if name in schema.names]
    labels = sorted((name for name, kind in kinds.items() if kind == 'ClassLabel'), key=lambda name: name not in named)
    labels = labels or named
    if len(images) > 1 or len(labels) > 1:
        label = f', the classes {labels[0]!r}' if labels else ''
        log(f'{printable(path.name)}: the images are the column {images[0]!r}{label}, of {join_first(schema.names)}')
    label = labels[0] if labels else ''
    if label and pa.types.is_nested(schema.field(label).type):
        log(f'{printable(path.name)}: the column {label!r} has several values per image: the images are without labels')
        label = ''
    named = kinds.get(label) == 'ClassLabel' and pa.types.is_integer(schema.field(label).type)
    return images[0], label, features[label].get('names') if named else None


def read_hub_features(schema):
    """Return {column: its description} of the hub's metadata in a schema; {} if there is none, or an invalid one."""
    try:
        features = json.loads((schema.metadata or {}).get(b'huggingface', b'{}'))['info']['features']
        return {name: value for name, value in features.items() if isinstance(value, dict)}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def holds_bytes(kind, pa):
    """Whether a column of this type can have images: bytes, or a struct of bytes and path."""
    if pa.types.is_struct(kind):
        return any(field.name == 'bytes' for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def number_labels(labels, classes):
    """Convert label values to (N int64, class names). classes: names if the values are class numbers; None to use the
    distinct values as classes. A missing label is -1."""
    labels = [None if label != label else label for label in labels]  # nan
    if all(label is None for label in labels):
        return torch.full((len(labels),), -1), []
    if classes:
        numbers = [-1 if label is None or not 0 <= label < len(classes) else label for label in labels]
        beyond = [label for label in labels if label is not None and not -1 <= label < len(classes)]
        if beyond:
            warn(
                f'{len(beyond)} images have a class that the {len(classes)} names of the Parquet schema do not cover, '
                f'such as {beyond[0]}: they count as without a class'
            )
        return torch.tensor(numbers, dtype=torch.int64), [str(name) for name in classes]
    known = sorted(
        {label for label in labels if label is not None and label != -1}, key=lambda label: (str(type(label)), label)
    )
    numbers = {label: number for number, label in enumerate(known)}
    return torch.tensor([numbers.get(label, -1) for label in labels], dtype=torch.int64), [str(name) for name in known]


def join_shard_names(paths):
    """Return one path that stands for all files of a split, for messages."""
    return paths[0] if len(paths) == 1 else paths[0].with_name(f'{paths[0].stem.split("-")[0]}-*.parquet')
