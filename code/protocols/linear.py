"""Linear evaluation: a linear classifier on the frozen backbone (paper appendix A)."""

import torch
from torch.nn.functional import cross_entropy

from dataloader.load_dataset import eval_loader, labeled_subset, supervised_loader
from metric.accuracy import topk_accuracy
from optimizer.lars import Lars
from optimizer.sgd import lr_schedule
from protocols.features import augmented_features, concat_into_buffer, extract_features
from protocols.knn import REFERENCES, knn_scores_from_loader, untrained_baselines
from protocols.protocol import TOP, Outcome, Protocol, labeled_splits
from runtime.device import get_device
from runtime.messages import progress
from runtime.seeding import generator_for
from runtime.tensors import to_device

# Of each --probe_optimizer: base learning rate (x batch / 256) and batch size (paper, appendix A; MoCo's for SGD).
PROBE_DEFAULTS = {'lars': (0.02, 4096), 'sgd': (30.0, 256)}


def linear(args, model, splits, _):
    """The Outcome of a linear classifier on the frozen backbone, and of kNN.

    Training sees a random resized crop and a flip of each image, anew in every epoch, or with --cache_features those of
    --cache_epochs epochs again and again. Validation sees the centre crop. The last epoch's classifier is reported.
    """
    train, val = labeled_subset(splits['train']), splits['val']
    backbone, num_classes = model.backbone.eval(), len(val.classes)
    size = min(args.probe_batch_size or PROBE_DEFAULTS[args.probe_optimizer][1], len(train))
    crops = supervised_loader(args, train, drop_last=False, for_frozen_backbone=True)
    if args.cache_features:
        epoch_features = cache_features(args, backbone, crops, size)
    else:

        def epoch_features(epoch):
            return augmented_features(args, backbone, crops, epoch)

    weight, bias = train_probe(args, epoch_features, len(train), size, num_classes)

    bank, val_loader = eval_loader(args, train), eval_loader(args, val)
    val_features, val_labels = extract_features(args, backbone, val_loader, 'features of val')
    scores = val_features @ weight.T + bias
    votes = knn_scores_from_loader(args, backbone, bank, val_features, num_classes)
    result = {
        'top1': topk_accuracy(scores, val_labels, 1),
        'top5': topk_accuracy(scores, val_labels, 5),
        'knn_top1': topk_accuracy(votes, val_labels, 1),
        **untrained_baselines(args, bank, val_loader),
        'features': f'{args.cache_epochs} passes, kept' if args.cache_features else 'new crops in every epoch',
        'optimizer': args.probe_optimizer,
        'num_train': len(train),
        'num_val': len(val_labels),
    }
    return Outcome(result, scores, val_labels, val.classes, {'weight': weight.cpu(), 'bias': bias.cpu()})


def train_probe(args, epoch_features, count, size, num_classes):
    """The classifier (weight, num_classes x d; bias, num_classes) after --probe_epochs of LARS or SGD, no weight decay.

    pairs_of(epoch): an epoch's pairs of features, n x d, and labels, n, in batches of any size, `count` images in all.
    A step takes `size` of them, whatever the batches: the gradient of a batch that would not fit into memory at once.
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
    """The rows of `pairs` of tensors in groups of `size`; the last may be smaller."""
    kept, count = [], 0
    for pair in pairs:
        kept.append(pair)
        count += len(pair[0])
        while count >= size:
            x, labels = (torch.cat(parts) for parts in zip(*kept, strict=True))
            yield x[:size], labels[:size]
            kept, count = [(x[size:], labels[size:])], count - size
    if count:
        yield tuple(torch.cat(parts) for parts in zip(*kept, strict=True))


def cache_features(args, backbone, crops, size):
    """pairs_of for train_probe, from the features of --cache_epochs epochs that are extracted here, once.

    On a GPU they are kept in half precision, and there, where all passes take less than a quarter of its memory;
    else in the CPU's memory.
    """
    passes, count = [], len(crops.dataset)
    for epoch in progress(range(args.cache_epochs), 'features', 'passes'):
        passes.append(concat_into_buffer(to_half(args, augmented_features(args, backbone, crops, epoch), count), count))

    def epoch_features(epoch):
        x, labels = passes[epoch % len(passes)]
        order = torch.randperm(len(x), generator=generator_for(args.random_seed, 'probe order', epoch))
        for rows in order.split(size):
            chosen = x.index_select(0, to_device(rows, x.device))  # on a CPU x[rows] takes eight times as long
            yield to_device(chosen, labels.device).float(), labels[to_device(rows, labels.device)]

    return epoch_features


def to_half(args, pairs, count):
    """Pairs of features and labels, the features as cache_features keeps them, for `count` of them a pass."""
    for x, labels in pairs:
        if not x.is_cuda:
            yield x, labels
            continue
        room, half = torch.cuda.get_device_properties(x.device).total_memory / 4, x.half()
        yield (half if args.cache_epochs * count * half[0].nbytes < room else half.cpu()), labels


PROTOCOL = Protocol(
    run=linear,
    splits=labeled_splits,
    numbers={**TOP, 'knn_top1': 'kNN top-1', **REFERENCES},
    smaller='--batch_size, or --cache_epochs',
    several_ranks=True,
)
