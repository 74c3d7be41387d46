"""Transfer to another labeled dataset: logistic regression on frozen features, or fine-tuning."""

from dataloader.load_dataset import eval_loader, labeled_subset, load_splits, num_labeled_classes
from metric.accuracy import topk_accuracy
from protocols.features import extract_features
from protocols.finetune import FINETUNE_NAMES, finetune
from protocols.logistic import fit_logistic_regression
from protocols.protocol import KNN_OPTIONS, Outcome, Protocol, leave_out_unlabeled
from runtime.console import printable
from runtime.errors import UserError, resolve_path
from runtime.files import sanitize_name
from runtime.options import replace_args


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
    if val is None or num_labeled_classes(train.labels) < 2 or not num_labeled_classes(val.labels):
        raise UserError(f'--transfer_path: {printable(path)} needs images of two classes in train, and labels in val')
    if args.transfer == 'finetune' and len(train) < 2:
        raise UserError(f'--transfer_path: {printable(path)} has one image to train on; fine-tuning needs two')
    return leave_out_unlabeled({'train': splits['train'], 'val': val})


def target_args(args):
    """Return args for the dataset of --transfer_path."""
    return replace_args(args, image_path=args.transfer_path, preset='imagenet')


def logistic_eval(args, backbone, train, val):
    """Evaluate fit_logistic_regression on the features of center crops. Returns (result, scores, labels)."""
    x, labels = extract_features(args, backbone, eval_loader(args, train), 'features of train')
    val_x, val_labels = extract_features(args, backbone, eval_loader(args, val), 'features of val')
    weight, bias, chosen = fit_logistic_regression(args, x, labels, len(val.classes))
    scores = val_x @ weight.T + bias
    result = {
        'top1': topk_accuracy(scores, val_labels, 1),
        'top5': topk_accuracy(scores, val_labels, 5),
        **chosen,
        'num_train': len(train),
        'num_val': len(val),
    }
    return result, scores, val_labels


PROTOCOL = Protocol(
    run=evaluate_transfer,
    splits=target_splits,
    numbers={**FINETUNE_NAMES, 'held_out_top1': 'top-1 held out'},
    smaller='--batch_size, or --finetune_batch_size',
    path=lambda args: args.transfer_path,
    details=lambda args: [args.transfer, sanitize_name(resolve_path(args.transfer_path).name)[:40]],
    unused=('image_path', 'download', *KNN_OPTIONS),
)
