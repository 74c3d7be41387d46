"""Features of every image of a folder, for use elsewhere, and a look at them in TensorBoard's projector."""

import csv

import numpy as np
import torch

import distributed
from ckpt import get_model_ckpt
from config import UserError, path_of
from dataloader.images import shown
from dataloader.load_dataset import in_order
from infer import images_to_predict, pixels_of
from logger import Logger, say
from protocols.features import features_of
from utils import get_device, use_device, write_aside


def embed(args):
    """Write --output: .npz (arrays features, N x d float32, and names, N) or .csv (name, then d numbers). Returns it.

    The images are those that infer would predict. Up to --projector_images of them also go to TensorBoard's projector,
    with thumbnails. Raises UserError without a checkpoint or images, or for another kind of file.
    """
    output = path_of(args.output or 'data/features.npz')
    if output.suffix not in ('.npz', '.csv'):
        raise UserError(f'--output of embed ends in .npz or .csv, not {output.name!r}')
    if not args.ckpt_name:
        raise UserError('embed wants --ckpt_name=<run>/<checkpoint>: python3 cli.py evaluate lists them')
    wanted = path_of(args.image_path) if 'image_path' in args.given else None
    args.given -= {'image_path'}
    use_device(args)
    args, model, checkpoint = get_model_ckpt(args)
    backbone = model.backbone.to(get_device(args), memory_format=torch.channels_last)
    images = images_to_predict(args, wanted)
    features, _ = features_of(args, backbone, in_order(args, images), 'features')
    features = features.cpu()

    def write(aside):
        if output.suffix == '.npz':
            with open(aside, 'wb') as file:
                np.savez(file, features=features.numpy(), names=np.array(list(images.names)))
            return
        with open(aside, 'w', newline='', encoding='utf-8', errors='surrogateescape') as file:
            head = ['file', *(f'feature_{i}' for i in range(features.shape[1]))]
            csv.writer(file).writerows(
                [head, *([name, *row] for name, row in zip(images.names, features.tolist(), strict=True))]
            )

    if not distributed.rank():
        write_aside(output, write)
    say(f'{len(features)} x {features.shape[1]} features of {images.folder} written to {output}')
    if args.projector_images and not distributed.rank():
        logger = Logger(path_of(args.log_path) / checkpoint['run'].name / 'projector')
        rows = torch.linspace(0, len(images) - 1, min(args.projector_images, len(images))).round().long()
        names = [shown(images.names[row]) for row in rows]  # a tab or a new line would break its table
        thumbnails = torch.nn.functional.interpolate(pixels_of(args, images, rows), (32, 32), mode='area')
        logger.writer.add_embedding(features[rows], names, thumbnails, global_step=checkpoint['epoch'])
        logger.close()
        say(f'in the projector: tensorboard --logdir {logger.folder}')
    return output
