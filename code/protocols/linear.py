"""Linear evaluation: a linear classifier on the frozen backbone (paper appendix A)."""

import torch
from torch.nn.functional import cross_entropy

from dataloader.load_dataset import in_order, labelled, shuffled_crops
from metric.accuracy import topk_accuracy
from optimizer.lars import Lars
from optimizer.sgd import learning_rate
from protocols.features import augmented_features, features_of, filled
from protocols.knn import REFERENCES, references, vote
from protocols.protocol import TOP, Outcome, Protocol, labelled_splits
from runtime.device import get_device
from runtime.messages import progress
from runtime.seeding import random_from
from runtime.tensors import to_device

# Of each --probe_optimizer: base learning rate (x batch / 256) and batch size (paper, appendix A; MoCo's for SGD).
PROBE = {'lars': (0.02, 4096), 'sgd': (30.0, 256)}


def linear(args, model, splits, _):
    """The Outcome of a linear classifier on the frozen backbone, and of kNN.

    Training sees a random resized crop and a flip of each image, anew in every epoch, or with --cache_features those of
    --cache_passes epochs again and again. Validation sees the centre crop. The last epoch's classifier is reported.
    """
    train, val = labelled(splits['train']), splits['val']
    backbone, num_classes = model.backbone.eval(), len(val.classes)
    size = min(args.probe_batch_size or PROBE[args.probe_optimizer][1], len(train))
    crops = shuffled_crops(args, train, drop_last=False, frozen=True)
    if args.cache_features:
        pairs_of = cached_features(args, backbone, crops, size)
    else:

        def pairs_of(epoch):
            return augmented_features(args, backbone, crops, epoch)

    weight, bias = train_probe(args, pairs_of, len(train), size, num_classes)

    bank, shown = in_order(args, train), in_order(args, val)
    val_features, val_labels = features_of(args, backbone, shown, 'features of val')
    scores = val_features @ weight.T + bias
    votes = vote(args, backbone, bank, val_features, num_classes)
    result = {
        'top1': topk_accuracy(scores, val_labels, 1),
        'top5': topk_accuracy(scores, val_labels, 5),
        'knn_top1': topk_accuracy(votes, val_labels, 1),
        **references(args, bank, shown),
        'features': f'{args.cache_passes} passes, kept' if args.cache_features else 'new crops in every epoch',
        'optimizer': args.probe_optimizer,
        'num_train': len(train),
        'num_val': len(val_labels),
    }
    return Outcome(result, scores, val_labels, val.classes, {'weight': weight.cpu(), 'bias': bias.cpu()})


def train_probe(args, pairs_of, count, size, num_classes):
    """The classifier (weight, num_classes x d; bias, num_classes) after --probe_epochs of LARS or SGD, no weight decay.

    pairs_of(epoch): an epoch's pairs of features, n x d, and labels, n, in batches of any size, `count` images in all.
    A step takes `size` of them, whatever the batches: the gradient of a batch that would not fit into memory at once.
    """
    device = get_device(args)
    base = args.probe_learning_rate or PROBE[args.probe_optimizer][0]
    top, steps, optimizer = base * size / 256, -(-count // size), None
    for epoch in progress(range(args.probe_epochs), 'linear probe', 'epochs'):
        for step, (x, labels) in enumerate(in_steps(pairs_of(epoch), size)):
            if optimizer is None:
                weight = 0.01 * torch.randn(num_classes, x.shape[1], generator=random_from(args.random_seed, 'probe'))
                weight = weight.to(device).requires_grad_()
                bias = torch.zeros(num_classes, device=device, requires_grad=True)
                kind = Lars if args.probe_optimizer == 'lars' else torch.optim.SGD
                optimizer = kind([weight, bias], lr=0.0, momentum=0.9)
            rate = learning_rate((epoch + step / steps) / args.probe_epochs, 0, top)
            optimizer.param_groups[0]['lr'] = rate
            loss = cross_entropy(x @ weight.T + bias, labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    return weight.detach(), bias.detach()


def in_steps(pairs, size):
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


def cached_features(args, backbone, crops, size):
    """pairs_of for train_probe, from the features of --cache_passes epochs that are extracted here, once.

    On a GPU they are kept in half precision, and there, where all passes take less than a quarter of its memory;
    else in the CPU's memory.
    """
    passes, count = [], len(crops.dataset)
    for epoch in progress(range(args.cache_passes), 'features', 'passes'):
        passes.append(filled(kept_small(args, augmented_features(args, backbone, crops, epoch), count), count))

    def pairs_of(epoch):
        x, labels = passes[epoch % len(passes)]
        order = torch.randperm(len(x), generator=random_from(args.random_seed, 'probe order', epoch))
        for rows in order.split(size):
            chosen = x.index_select(0, to_device(rows, x.device))  # on a CPU x[rows] takes eight times as long
            yield to_device(chosen, labels.device).float(), labels[to_device(rows, labels.device)]

    return pairs_of


def kept_small(args, pairs, count):
    """Pairs of features and labels, the features as cached_features keeps them, for `count` of them a pass."""
    for x, labels in pairs:
        if not x.is_cuda:
            yield x, labels
            continue
        room, half = torch.cuda.get_device_properties(x.device).total_memory / 4, x.half()
        yield (half if args.cache_passes * count * half[0].nbytes < room else half.cpu()), labels


PROTOCOL = Protocol(
    run=linear,
    splits=labelled_splits,
    numbers={**TOP, 'knn_top1': 'kNN top-1', **REFERENCES},
    smaller='--batch_size, or --cache_passes',
    several_ranks=True,
)
