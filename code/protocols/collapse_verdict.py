"""Names of the label-free measures, and the verdict on a run that follows from them."""

from config import READING
from runtime.checkpoints.best_epoch import (
    FEW_LABELS,
    SIMILARITY,
    WATCHED,
    find_best_epoch,
    find_best_epoch_in_metrics,
    is_judged_by_labels,
    is_measured_with_labels,
)
from runtime.files import read_metrics

# Printed names, in this order (metric/representation.py, protocols/label_free.py).
MEASURES = {
    'rank': 'retrieval rank of the positive view, features',
    'rank_z': 'retrieval rank of the positive view, z',
    'retrieval': 'positive view is the nearest, features, %',
    'retrieval_z': 'positive view is the nearest, z, %',
    'rotation': 'rotations told apart, %',
    'rankme': 'RankMe',
    'area': 'area under the cumulative spectrum',
    'alpha': 'alpha-ReQ',
    'lidar': 'LiDAR, features',
    'lidar_z': 'LiDAR, z',
    'alignment': 'alignment',
    'uniformity': 'uniformity',
    'std': 'std of z',
    'std_batch': 'std of z, by statistics of these images',
    'mean_direction': 'norm of the mean direction of z',
    'correlation': 'correlation of channels of z',
    'rank_z_minus_p': 'effective rank of z minus that of p',
    'norm_z': 'norm of z',
    'norm_p': 'norm of p',
}
OF_FEATURES = ('rank', 'retrieval', 'rotation', 'rankme', 'area', 'alpha', 'lidar', 'alignment', 'uniformity')
SUMMARY_METRICS = ('rank', 'retrieval', 'rank_z', 'rankme', 'area', 'alpha')  # one line per checkpoint
STD_KEYS = 'std', 'std_judged', 'std_batch'  # in training; with BN in eval mode; with the batch statistics of BN
SELECTION_METRIC = 'rank'  # smaller is better; code/results/README.md compares the measures
# Thresholds from the runs of bench/evidence.py with seeds 0 to 2; they were tested on other seeds.
STD_COLLAPSED, STD_PARTIAL, MAX_CORRELATION, RANK_RATIO_LEARNED = 0.5, 0.9, 0.8, 0.7

MEASURED_WITH = {*READING, 'start_share'}
GOOD = ('healthy', 'better than the start', 'perhaps better than the start', 'probably better than the start')

# Of runs from pretrained weights (results/LOG.md).
RANK_AFTER_WEIGHTS = 'the retrieval rank of the positive view falls whether features become better or worse'
FOR_COLLAPSED = (
    'Is the stop-gradient there, is the predictor trained, has the projector BN? results/README.md, What goes wrong'
)
FOR_NOTHING = 'Train longer, or try a milder --augmentation, or another --learning_rate: ten times as much, a tenth'
FOR_NO_MORE = 'It is no better than at the start; evaluate --protocol=label_free compares it with an untrained network'
FOR_WORSE = 'try fewer epochs, a lower --learning_rate, a milder augmentation, or more images'
FOR_UNSURE = 'the gain is within its standard error: more labeled images in val would tell, or more epochs'
FOR_UNCHANGED = (
    'no image of val is classified otherwise: is the backbone trained (--heads_epochs, --start_share), is val too easy?'
)
FOR_PARTLY = 'Try a lower --learning_rate, --fix_pred_lr=True, a weight decay above 0, a milder augmentation'


def baseline_label(from_weights):
    """Return the name of the network at epoch 0, for messages. from_weights: of a run from pretrained weights."""
    return 'at the start' if from_weights else 'untrained'


def judge_collapse(now, untrained, from_weights=False):
    """Judge whether a network has collapsed. Returns (word, sentence); the word is healthy, partly collapsed, collapsed
    or nothing learned, the sentence has the numbers and what to try.

    now, untrained: measures by name (std, rank, area, perhaps correlation) of the network and of its initial state.
    from_weights: whether these are pretrained weights. The largest of the measured std counts: with the running
    statistics of BN it can be too small after few steps, or on other images.
    """
    std, rank, before = max(now[name] for name in STD_KEYS if name in now), now['rank'], untrained['rank']
    label = baseline_label(from_weights)
    numbers = (
        f'std of z {std:.2f} (healthy is near 1), retrieval rank of the positive view {rank:.1f} ({label} {before:.1f})'
    )
    if std < STD_COLLAPSED:
        return 'collapsed', f'{numbers}: images get nearly the same z, whatever the loss says. {FOR_COLLAPSED}'
    if rank > RANK_RATIO_LEARNED * before:
        hint = FOR_NO_MORE if from_weights else FOR_NOTHING
        return 'nothing learned', f'{numbers}, and no collapse. {hint}'
    symptoms = []
    if now.get('correlation', 0) > MAX_CORRELATION:
        symptoms.append(f'channels of z correlated by {now["correlation"]:.2f}')
    if now['area'] > untrained['area']:
        symptoms.append(f'fewer directions used than {label} (area {now["area"]:.2f}, {untrained["area"]:.2f})')
    if symptoms or std < STD_PARTIAL:
        return 'partly collapsed', '; '.join([numbers, *symptoms]) + f'. Something was learned. {FOR_PARTLY}'
    return 'healthy', f'{numbers}. More epochs help as long as the rank falls'


def judge_against_start(lines):
    """Judge a run from pretrained weights. Returns (word, sentence): better than the start (by more than two standard
    errors), perhaps better, no better, worse, or not known; None if it was not measured."""
    best = find_best_epoch_in_metrics(lines)
    judged = {
        line['epoch']: line
        for line in lines
        if FEW_LABELS.value in line and (FEW_LABELS.gain in line or not line['epoch'])
    }
    if best is None or len(judged) < 2 and FEW_LABELS.value in lines[0]:
        return None
    if not is_measured_with_labels(lines):
        return judge_without_labels(lines, best)
    last = judged[max(judged)]
    top1, gain, error = last[FEW_LABELS.value], last.get(FEW_LABELS.gain, 0.0), gain_error(last)
    gain_text = (
        f'{WATCHED} labels per class: {top1:.1f} % of val after epoch {last["epoch"]}, {gain:+.1f} ± {error:.1f} '
        f'beside the start ({top1 - gain:.1f} %)'
    )
    if best and not is_judged_by_labels(lines):
        similarity = describe_similarity(lines, best)
        return 'probably better than the start', (
            f'{gain_text}: no epoch differs from it by more than the error; {similarity}. More labeled images in val '
            'would show it'
        )
    if best:
        most = judged[best]
        more = (
            f'The best of {len(judged) - 1} measured epochs is epoch {best}: {most[FEW_LABELS.value]:.1f} %, '
            f'{most[FEW_LABELS.gain]:+.1f} ± {gain_error(most):.1f}'
        )
        # The best of several epochs is above one standard error by chance in one run of three or so.
        sure = most[FEW_LABELS.gain] > 2 * gain_error(most)
        return 'better than the start' if sure else 'perhaps better than the start', f'{gain_text}. {more}'
    if gain < -error:
        return 'worse than the start', f'{gain_text}. Keep the start, epoch 0; {FOR_WORSE}'
    changed = any(line.get(FEW_LABELS.gain) or gain_error(line) for line in judged.values())
    hint = (FOR_UNSURE if gain > 0 else FOR_WORSE) if changed else FOR_UNCHANGED
    return 'no better than the start', f'{gain_text}. Keep the start, epoch 0; {hint}'


def gain_error(line):
    """Return the standard error of the gain in a line of metrics.jsonl: nan of a val of one image."""
    return line.get(FEW_LABELS.error, 0.0)


def describe_similarity(lines, best):
    """Describe the similarity to the targets after an epoch, or the last one if `best` is 0; '' if it is not known."""
    judged = {line['epoch']: line for line in lines if SIMILARITY.gain in line}
    if not judged:
        return ''
    shown = judged[best or max(judged)]
    value, gain = shown[SIMILARITY.value], shown[SIMILARITY.gain]
    return (
        f'similarity to the targets {value:.3f} after epoch {shown["epoch"]}, {gain:+.3f} ± '
        f'{shown[SIMILARITY.error]:.3f} beside the start ({value - gain:.3f})'
    )


def judge_without_labels(lines, best):
    """judge_against_start without labels: by the similarity to the targets of the distillation. best: epoch."""
    numbers = 'no accuracy on val was measured (it needs labels, and --knn_every of 1 or more)'
    if similarity := describe_similarity(lines, best):
        numbers += f'; {similarity}'
    if best:
        return 'probably better than the start', f'{numbers}. A few labels per class would show it'
    return 'not known to be better than the start', (
        f'{numbers}; {RANK_AFTER_WEIGHTS}. The start, epoch 0, is taken unless another checkpoint is named'
    )


def judge_run(folder, epoch, args):
    """Return the verdict on a run after `epoch` epochs, (word, sentence), or None if it was not measured. args: the
    run's options. A run from pretrained weights is judged as a whole: `epoch` was selected among all of its epochs."""
    lines = read_metrics(folder / 'metrics.jsonl')
    lines = lines if args.init_from else [line for line in lines if line['epoch'] <= epoch]
    return judge_run_metrics(lines, bool(args.init_from))


def judge_checkpoint(checkpoint, args):
    """Return the verdict on the weights of a checkpoint (a dict with run, epoch and args), or None.

    The verdict on a run from pretrained weights is of its best epoch, which may be the start, and of the preprocessing
    and the average with the start that the training measured. args: options, perhaps with others.
    """
    run, epoch = checkpoint['run'], checkpoint['epoch']
    if args.init_from and (checkpoint.get('images') or epoch != find_best_epoch(run)):
        return None
    if args.init_from and any(
        getattr(args, name) != checkpoint['args'][name] for name in args.explicit & MEASURED_WITH
    ):
        return None
    return judge_run(run, epoch, args)


def judge_run_metrics(lines, from_weights=False):
    """Return the verdict on a run from its metrics (read_metrics): the last measured epoch compared with epoch 0; None
    if either is missing. With few images only gains over the start are measured (label_free.MIN_IMAGES)."""
    measured = [line for line in lines if {'pretraining/rank', 'pretraining/area'} <= line.keys()]
    verdict = judge_against_start(lines) if from_weights and lines else None
    if len(measured) < 2 or measured[0]['epoch'] or 'pretraining/std' not in measured[-1]:
        return verdict if any(FEW_LABELS.gain in line for line in lines) else None
    collapsed = max(measured[-1].get(f'pretraining/{name}', 0) for name in STD_KEYS) < STD_COLLAPSED
    if verdict and not collapsed:
        return verdict
    if verdict and find_best_epoch_in_metrics(lines):
        return verdict[0], f'{verdict[1]}. After epoch {measured[-1]["epoch"]} z is collapsed: {FOR_COLLAPSED}'
    untrained, now = (
        {key.removeprefix('pretraining/'): value for key, value in line.items()} for line in (measured[0], measured[-1])
    )
    return judge_collapse(now, untrained, from_weights)
