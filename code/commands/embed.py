"""embed: write the features of every image of a folder, and show some in TensorBoard's projector."""

import contextlib
import io

import numpy as np
import torch

from dataloader.load_dataset import eval_loader
from infer import images_to_predict, load_backbone, load_crops
from logger import Logger
from metric.knn import topk_neighbors
from metric.projection_2d import tsne_2d
from protocols.features import extract_features
from runtime import distributed
from runtime.atomic_write import atomic_write_on_main, write_csv
from runtime.console import printable
from runtime.environment import require_package
from runtime.errors import UserError, resolve_path
from runtime.messages import log
from runtime.tensors import evenly_spaced

NEIGHBORS = 15


def embed(args):
    """Write --output: .npz (features, N x d float32, and names, N), .csv (name and d numbers) or .parquet
    (arrow_table). Returns its path.

    The images are those that infer would predict. Up to --projector_images are written for TensorBoard's projector,
    with thumbnails. Raises UserError without a checkpoint or images, or for another file type.
    """
    output = resolve_path(args.output or 'data/features.npz')
    if output.suffix not in ('.npz', '.csv', '.parquet'):
        raise UserError(f'--output of embed ends in .npz, .csv or .parquet, not {output.name!r}')
    parquet = require_package('pyarrow.parquet', output.name) if output.suffix == '.parquet' else None
    if not args.ckpt_name:
        raise UserError('embed needs --ckpt_name=<run>/<checkpoint>: python3 cli.py evaluate lists them')
    requested_path = resolve_path(args.image_path) if 'image_path' in args.explicit else None
    args, backbone, checkpoint = load_backbone(args, output)
    images = images_to_predict(args, requested_path)
    features, _ = extract_features(args, backbone, eval_loader(args, images), 'features')
    features = features.cpu()

    def write(aside):
        if parquet:
            parquet.write_table(arrow_table(images, features), aside)
            return
        with open(aside, 'wb') as file:
            np.savez(file, features=features.numpy(), names=np.array(list(images.names)))

    if not distributed.rank() and output.suffix == '.csv':
        head = ['file', *(f'feature_{i}' for i in range(features.shape[1]))]
        write_csv(output, [head, *([name, *row] for name, row in zip(images.names, features.tolist(), strict=True))])
    elif not distributed.rank():
        atomic_write_on_main(output, write)
    log(f'{len(features)} x {features.shape[1]} features of {images.folder} written to {output}')
    if args.projector_images and not distributed.rank():
        logger = Logger(resolve_path(args.log_path) / checkpoint['run'].name / 'projector')
        rows = evenly_spaced(len(images), args.projector_images)
        names = [printable(images.names[row]) for row in rows]  # tabs and newlines would break the projector's table
        thumbnails = torch.nn.functional.interpolate(load_crops(args, images, rows), (32, 32), mode='area')
        with contextlib.redirect_stdout(io.StringIO()):  # TensorBoard prints a warning for an existing folder
            logger.writer.add_embedding(features[rows], names, thumbnails, global_step=checkpoint['epoch'])
        logger.close()
        log(f'in the projector: tensorboard --logdir {logger.folder}')
    return output


def arrow_table(images, features):
    """Build a pyarrow table for embedding viewers, one row per image: file, label, features (d float32), x and y (a 2-D
    projection), and neighbors {ids: row numbers, distances: 1 - cosine}."""
    import pyarrow

    cosine, rows = topk_neighbors(features, features, min(NEIGHBORS + 1, len(features)))
    neighbors = [
        {'ids': ids, 'distances': distance}
        for ids, distance in zip(rows.tolist(), (1 - cosine).clamp(min=0).tolist(), strict=True)
    ]
    labels = [printable(images.classes[label]) if label >= 0 else None for label in images.labels.tolist()]
    x, y = tsne_2d(features).T
    return pyarrow.table(
        {
            'file': [printable(name) for name in images.names],
            'label': pyarrow.array(labels, pyarrow.string()),
            'features': pyarrow.array(features.tolist(), pyarrow.list_(pyarrow.float32())),
            'x': x,
            'y': y,
            'neighbors': neighbors,
        }
    )
