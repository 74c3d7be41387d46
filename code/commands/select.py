"""select: images to label first, near-duplicates and outliers, from the features of a checkpoint."""

import torch

import plots
from ckpt import get_model_ckpt
from dataloader.load_dataset import eval_loader, load_splits
from infer import load_crops
from metric import subset_selection
from protocols.features import extract_features
from runtime.atomic_write import save_png, write_csv
from runtime.checkpoints.run_folder import list_checkpoints
from runtime.console import printable
from runtime.device import init_device, move_network
from runtime.errors import UserError, resolve_path
from runtime.files import try_writing
from runtime.messages import log

GALLERY_IMAGES = 48  # images in a picture
GALLERY_COLUMNS = 12
METHODS = {'typical': subset_selection.typiclust, 'kcenter': subset_selection.k_center_greedy}


def select(args):
    """Write --output, the images of train to label first, and beside it the near-duplicates of all splits and the
    outliers of train, each as CSV and as a picture. Returns the path of --output.

    Raises UserError without a checkpoint, or if there are fewer images than --num_select.
    """
    if not args.ckpt_name:
        names = list_checkpoints(args)
        hint = f'the newest is --ckpt_name={names[-1]}' if names else 'train one first: python3 cli.py train'
        raise UserError(f'select needs --ckpt_name=<run>/<checkpoint>; {hint}')
    output = resolve_path(args.output or 'data/selected.csv')
    if output.suffix.lower() != '.csv':
        raise UserError(f'--output={args.output}: the list is a .csv, its pictures lie beside it')
    init_device(args)
    args, model, _ = get_model_ckpt(args)
    try_writing(output)
    backbone = move_network(args, model.backbone)
    splits = {name: images for name, images in load_splits(args).items() if images}
    train = splits['train']
    labeled = (train.labels >= 0).nonzero()[:, 0].tolist()
    labeled = labeled if len(labeled) < len(train) else []  # all are: the selection is for an experiment
    if args.num_select > len(train) - len(labeled):
        unlabeled = f'{len(train) - len(labeled)} unlabeled' if labeled else f'{len(train)}'
        raise UserError(f'--num_select={args.num_select}: {printable(train.folder)} has {unlabeled} images')
    features = {
        name: extract_features(args, backbone, eval_loader(args, images), f'features of {name}')[0]
        for name, images in splits.items()
    }
    chosen = METHODS[args.select_method](features['train'], args.num_select, args.random_seed, labeled)
    write_csv(output, [['file'], *([train.names[row]] for row in chosen.tolist())])
    save_png(image_grid(args, [(train, row) for row in chosen.tolist()[:GALLERY_IMAGES]]), output.with_suffix('.png'))
    without = f', beside the {len(labeled)} labeled ones' if labeled else ''
    log(f'{len(chosen)} of {len(train)} images to label first{without} ({args.select_method}): {output}')
    save_near_duplicates(args, splits, features, output)
    save_outliers(args, train, features['train'], output)
    return output


def save_near_duplicates(args, splits, features, output):
    """Write the groups of near-duplicates (cosine above --duplicates), also between splits, where they inflate
    accuracies."""
    places = [(name, row) for name, images in splits.items() for row in range(len(images))]
    rows, groups, near, cosines = subset_selection.near_groups(torch.cat([*features.values()]), args.duplicates)
    path = output.with_name(f'{output.stem}_duplicates.csv')
    named = [(split, splits[split].names[row]) for split, row in places]
    lines = [
        [group + 1, *named[row], f'{cosine:.4f}', *named[other]]
        for row, group, other, cosine in zip(
            rows.tolist(), groups.tolist(), near.tolist(), cosines.tolist(), strict=True
        )
    ]
    write_csv(path, [('group', 'split', 'file', 'cosine', 'nearest_split', 'nearest_file'), *lines])
    kinds = {}
    for group, split, *_ in lines:
        kinds.setdefault(group, set()).add(split)
    leaks = sum(len(splits_of_group) > 1 for splits_of_group in kinds.values())
    log(
        f'{len(lines)} images in {len(kinds)} groups of near-duplicates (cosine above {args.duplicates:g}), {leaks} of '
        f'the groups in two splits: {path}'
    )
    if lines:
        pairs = subset_selection.nearest_pairs(rows, near, cosines)[: GALLERY_IMAGES // 2]
        images = [(splits[places[row][0]], places[row][1]) for *pair, _ in pairs for row in pair]
        save_png(image_grid(args, images), path.with_suffix('.png'))
    else:
        path.with_suffix('.png').unlink(missing_ok=True)  # from an earlier call


def save_outliers(args, train, features, output):
    """Write the --num_select least typical images."""
    rows, near = subset_selection.outliers(features, min(args.num_select, len(train)))
    path = output.with_name(f'{output.stem}_outliers.csv')
    lines = [[f'{value:.4f}', train.names[row]] for row, value in zip(rows.tolist(), near.tolist(), strict=True)]
    write_csv(path, [('cosine_of_neighbors', 'file'), *lines])
    save_png(image_grid(args, [(train, row) for row in rows.tolist()[:GALLERY_IMAGES]]), path.with_suffix('.png'))
    log(f'the {len(rows)} outliers: {path}')


def image_grid(args, places):
    """Return a picture of images, given as (ImageDataset, row), with GALLERY_COLUMNS columns."""
    return plots.image_grid(
        [load_crops(args, images, torch.tensor([row]))[0] for images, row in places], GALLERY_COLUMNS
    )
