"""Transfer to another labeled dataset: logistic regression on frozen features, or fine-tuning."""

import torch
from torch.nn.functional import cross_entropy

from ckpt import sanitize_name
from dataloader.load_dataset import eval_loader, labeled_subset, load_splits
from metric.accuracy import topk_accuracy
from protocols.features import extract_features
from protocols.finetune import FINETUNE_NAMES, finetune, rows_per_class
from protocols.protocol import KNN_OPTIONS, Outcome, Protocol, report_unlabeled
from runtime.console import printable
from runtime.errors import UserError, resolve_path
from runtime.messages import progress
from runtime.options import replace_args

L2 = torch.logspace(5, -6, 45).tolist()  # l2 strengths to try, strong to weak (Kornblith et al., arXiv 1805.08974)
HELD_OUT = 0.2  # share of train that is held out to choose the strength


def evaluate_transfer(args, model, splits, _):
    """Evaluate the backbone on the dataset of --transfer_path. Returns an Outcome."""
    own_args, train, val = target_args(args), labeled_subset(splits['train']), splits['val']
    if args.transfer == 'finetune':
        result, scores, labels = finetune(own_args, model.backbone, train, val)
    else:
        result, scores, labels = logistic_eval(own_args, model.backbone, train, val)
    result = {'transfer': args.transfer, 'transfer_path': str(resolve_path(args.transfer_path)), **result}
    return Outcome(result, scores, labels, val.classes)


def target_splits(args, _):
    """Return {'train', 'val'} of the dataset of --transfer_path. Raises UserError if something is missing."""
    if not args.transfer_path:
        raise UserError('--protocol=transfer needs --transfer_path=FOLDER with train/<class>/ and val/<class>/')
    path = resolve_path(args.transfer_path)
    if not path.exists():
        raise UserError(f'--transfer_path: {printable(path)} is not there')
    splits = load_splits(target_args(args))
    train, val = labeled_subset(splits['train']), splits['val']
    if val is None or not len(train) or not (val.labels >= 0).all():
        raise UserError(f'--transfer_path: {printable(path)} needs classes in train and, of every image, in val')
    if args.transfer == 'finetune' and len(train) < 2:
        raise UserError(f'--transfer_path: {printable(path)} has one image to train on; fine-tuning needs two')
    return report_unlabeled({'train': splits['train'], 'val': val})


def target_args(args):
    """Return args for the dataset of --transfer_path."""
    return replace_args(args, image_path=args.transfer_path, preset='imagenet')


def logistic_eval(args, backbone, train, val):
    """Evaluate multinomial logistic regression on the features of center crops. Its l2 strength is chosen on a held-out
    part of train; then it is fitted to all of train. Returns (result, scores, labels)."""
    x, labels = extract_features(args, backbone, eval_loader(args, train), 'features of train')
    val_x, val_labels = extract_features(args, backbone, eval_loader(args, val), 'features of val')
    num_classes = len(val.classes)
    best, held_out = select_l2(args, x, labels, num_classes)
    weight, bias = logistic_regression(x, labels, num_classes, best)
    scores = val_x @ weight.T + bias
    result = {
        'top1': topk_accuracy(scores, val_labels, 1),
        'top5': topk_accuracy(scores, val_labels, 5),
        'l2': best,
        'held_out_top1': held_out,
        'num_train': len(train),
        'num_val': len(val),
    }
    return result, scores, val_labels


def select_l2(args, x, labels, num_classes):
    """Choose the l2 strength. Returns (strength, its top-1 on the held-out images). If no class has two images, nothing
    can be held out: returns the middle strength and None."""
    holdout = holdout_mask(labels.cpu(), args.random_seed).to(x.device)
    if not holdout.any():
        return L2[len(L2) // 2], None
    warm_start, tried = None, {}
    for l2 in progress(L2, 'l2 strength', 'fits'):
        warm_start = logistic_regression(x[~holdout], labels[~holdout], num_classes, l2, warm_start)
        tried[l2] = topk_accuracy(x[holdout] @ warm_start[0].T + warm_start[1], labels[holdout], 1)
    best = max(tried, key=tried.get)  # the strongest of equals
    return best, tried[best]


def holdout_mask(labels, seed):
    """Return which rows are held out, N bool: HELD_OUT of each class, at least one and at most half."""
    holdout = torch.zeros(len(labels), dtype=torch.bool)
    for rows in rows_per_class(labels, seed):
        holdout[rows[: min(len(rows) // 2, max(1, round(HELD_OUT * len(rows))))]] = True
    return holdout


def logistic_regression(x, labels, num_classes, l2, warm_start=None, iterations=200):
    """Fit logistic regression by L-BFGS: minimize the sum of cross-entropies + l2 / 2 |weight|^2.

    x: N x d; labels: N. warm_start: (weight, bias) to start from, such as the solution for a stronger l2. Returns
    (weight, num_classes x d; bias, num_classes).
    """
    mean = x.mean(0)
    scale = (x - mean).square().mean().sqrt().item() or 1.0
    x = (x - mean) / scale  # does not change the minimum; converges faster, and the tolerances fit any feature scale
    penalty = l2 / (2 * len(x) * scale**2)
    shares = torch.bincount(labels, minlength=num_classes).to(x) / len(x)  # log: the optimal biases for weight 0
    weight, bias = warm_start or (x.new_zeros(num_classes, x.shape[1]), shares.clamp(min=1e-6).log())
    weight, bias = (weight * scale).requires_grad_(), (bias + weight @ mean).requires_grad_()
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=iterations, tolerance_grad=1e-6, tolerance_change=1e-9, line_search_fn='strong_wolfe'
    )

    def loss():
        solver.zero_grad()
        value = cross_entropy(x @ weight.T + bias, labels) + penalty * weight.square().sum()
        value.backward()
        return value

    solver.step(loss)
    weight, bias = weight.detach() / scale, bias.detach()
    return weight, bias - weight @ mean


PROTOCOL = Protocol(
    run=evaluate_transfer,
    splits=target_splits,
    numbers={**FINETUNE_NAMES, 'held_out_top1': 'top-1 held out'},
    smaller='--batch_size, or --finetune_batch_size',
    path=lambda args: args.transfer_path,
    details=lambda args: [args.transfer, sanitize_name(resolve_path(args.transfer_path).name)[:40]],
    unused=('image_path', 'download', *KNN_OPTIONS),
)
