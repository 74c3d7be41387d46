"""Linear evaluation: a linear classifier on the frozen backbone (paper appendix A)."""

import torch
from torch.nn.functional import cross_entropy

from dataloader.load_dataset import eval_loader, labeled_subset, supervised_loader
from metric.accuracy import topk_accuracy
from optimizer.lars import Lars
from optimizer.sgd import lr_schedule
from protocols.features import augmented_features, concat_into_buffer, extract_features
from protocols.knn import REFERENCES, knn_scores_from_loader, log_clipped_k, untrained_baselines
from protocols.logistic import fit_logistic_regression
from protocols.protocol import TOP, Outcome, Protocol, labeled_splits
from runtime.device import get_device
from runtime.distributed import rank
from runtime.messages import progress, warn
from runtime.seeding import generator_for
from runtime.tensors import to_device

# {--probe_optimizer: (base learning rate, x batch / 256, batch size)}: paper, appendix A; MoCo's for SGD.
PROBE_DEFAULTS = {'lars': (0.02, 4096), 'sgd': (30.0, 256)}
PROBE_OPTIONS = (
    'probe_epochs',
    'probe_batch_size',
    'probe_learning_rate',
    'crop_scale',
    'cache_features',
    'cache_epochs',
)
MIN_LARS_STEPS = 1000  # a step changes the weights by about 0.03 % of their norm


def evaluate_linear(args, model, splits, _):
    """Train a linear classifier on the frozen backbone, and evaluate it and kNN. Returns an Outcome.

    The classifier is trained by train_on_crops or, with --probe_optimizer=lbfgs, is fit_logistic_regression on center
    crops. Evaluation uses center crops.
    """
    train, val = labeled_subset(splits['train']), splits['val']
    if not rank():
        warn_of_options(args, len(train))
    backbone, num_classes = model.backbone.eval(), len(val.classes)
    bank, val_loader = eval_loader(args, train), eval_loader(args, val)
    log_clipped_k(args, train.labels)
    if args.probe_optimizer == 'lbfgs':
        x, labels = extract_features(args, backbone, bank, 'features of train')
        weight, bias, about = fit_logistic_regression(args, x, labels, num_classes)
        about['features'] = 'center crops'
    else:
        weight, bias, about = train_on_crops(args, backbone, train, num_classes)
    val_features, val_labels = extract_features(args, backbone, val_loader, 'features of val')
    scores = val_features @ weight.T + bias
    votes = knn_scores_from_loader(args, backbone, bank, val_features, num_classes)
    result = {
        'top1': topk_accuracy(scores, val_labels, 1),
        'top5': topk_accuracy(scores, val_labels, 5),
        'knn_top1': topk_accuracy(votes, val_labels, 1),
        **untrained_baselines(args, bank, val_loader),
        **about,
        'optimizer': args.probe_optimizer,
        'num_train': len(train),
        'num_val': len(val_labels),
    }
    return Outcome(result, scores, val_labels, val.classes, {'weight': weight.cpu(), 'bias': bias.cpu()})


def warn_of_options(args, count):
    """Warn of options without effect, and of LARS with so few steps that the classifier stays near its random
    weights. count: images of train."""
    if args.probe_optimizer == 'lbfgs':
        for name in sorted({*PROBE_OPTIONS} & args.explicit):
            warn(f'--{name} has no effect with --probe_optimizer=lbfgs')
    elif not args.cache_features and 'cache_epochs' in args.explicit:
        warn('--cache_epochs has no effect without --cache_features=True')
    steps = args.probe_epochs * -(-count // (args.probe_batch_size or PROBE_DEFAULTS['lars'][1]))
    if args.probe_optimizer == 'lars' and steps < MIN_LARS_STEPS:
        warn(
            f'--probe_optimizer=lars takes {steps} steps on {count} images, and needs thousands (28,170 on ImageNet): '
            'its top-1 will be far too low; --probe_optimizer=lbfgs'
        )


def train_on_crops(args, backbone, train, num_classes):
    """Train the classifier by LARS or SGD on random resized crops and flips, new ones in every epoch, or with
    --cache_features those of --cache_epochs epochs. Returns (weight, bias, {'features'}); the last epoch counts."""
    size = min(args.probe_batch_size or PROBE_DEFAULTS[args.probe_optimizer][1], len(train))
    crops = supervised_loader(args, train, drop_last=False, for_frozen_backbone=True)
    if args.cache_features:
        epoch_features = cache_features(args, backbone, crops, size)
    else:

        def epoch_features(epoch):
            return augmented_features(args, backbone, crops, epoch)

    weight, bias = train_probe(args, epoch_features, len(train), size, num_classes)
    features = f'{args.cache_epochs} passes, kept' if args.cache_features else 'new crops in every epoch'
    return weight, bias, {'features': features}


def train_probe(args, epoch_features, count, size, num_classes):
    """Train the classifier for --probe_epochs by LARS or SGD without weight decay. Returns (weight, num_classes x d;
    bias, num_classes).

    epoch_features(epoch): yields (features, n x d, labels, n) of `count` images, in batches of any size; they are
    regrouped to batches of `size`.
    """
    device = get_device(args)
    base = args.probe_learning_rate or PROBE_DEFAULTS[args.probe_optimizer][0]
    top, steps, optimizer = base * size / 256, -(-count // size), None
    for epoch in progress(range(args.probe_epochs), 'linear probe', 'epochs'):
        for step, (x, labels) in enumerate(rebatch(epoch_features(epoch), size)):
            if optimizer is None:
                weight = 0.01 * torch.randn(num_classes, x.shape[1], generator=generator_for(args.random_seed, 'probe'))
                weight = weight.to(device).requires_grad_()
                bias = torch.zeros(num_classes, device=device, requires_grad=True)
                kind = Lars if args.probe_optimizer == 'lars' else torch.optim.SGD
                optimizer = kind([weight, bias], lr=0.0, momentum=0.9)
            rate = lr_schedule((epoch + step / steps) / args.probe_epochs, 0, top)
            optimizer.param_groups[0]['lr'] = rate
            loss = cross_entropy(x @ weight.T + bias, labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    return weight.detach(), bias.detach()


def rebatch(pairs, size):
    """Regroup pairs of tensors to batches of `size` rows; the last may be smaller."""
    pending, count = [], 0
    for pair in pairs:
        pending.append(pair)
        count += len(pair[0])
        while count >= size:
            x, labels = (torch.cat(parts) for parts in zip(*pending, strict=True))
            yield x[:size], labels[:size]
            pending, count = [(x[size:], labels[size:])], count - size
    if count:
        yield tuple(torch.cat(parts) for parts in zip(*pending, strict=True))


def cache_features(args, backbone, crops, size):
    """Compute the features of --cache_epochs epochs. Returns epoch_features for train_probe.

    With a GPU they are stored in half precision, in GPU memory if they take less than a quarter of it, else in CPU
    memory.
    """
    passes, count = [], len(crops.dataset)
    for epoch in progress(range(args.cache_epochs), 'features', 'passes'):
        passes.append(
            concat_into_buffer(convert_for_cache(args, augmented_features(args, backbone, crops, epoch), count), count)
        )

    def epoch_features(epoch):
        x, labels = passes[epoch % len(passes)]
        order = torch.randperm(len(x), generator=generator_for(args.random_seed, 'probe order', epoch))
        for rows in order.split(size):
            chosen = x.index_select(0, to_device(rows, x.device))  # x[rows] takes eight times as long on a CPU
            yield to_device(chosen, labels.device).float(), labels[to_device(rows, labels.device)]

    return epoch_features


def convert_for_cache(args, pairs, count):
    """Convert the features of (features, labels) pairs to the type and device of cache_features. count: images per
    pass."""
    for x, labels in pairs:
        if not x.is_cuda:
            yield x, labels
            continue
        room, half = torch.cuda.get_device_properties(x.device).total_memory / 4, x.half()
        yield (half if args.cache_epochs * count * half[0].nbytes < room else half.cpu()), labels


PROTOCOL = Protocol(
    run=evaluate_linear,
    splits=labeled_splits,
    numbers={**TOP, 'held_out_top1': 'top-1 held out', 'knn_top1': 'kNN top-1', **REFERENCES},
    smaller='--batch_size, or --cache_epochs',
    several_ranks=True,
)
