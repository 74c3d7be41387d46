"""The best epoch of a run from pretrained weights, by metrics.jsonl. Does not import torch."""

from runtime.files import read_json, read_metrics

WATCHED = 10  # labels per class, for the few-label accuracy in training
FEW, GAIN, GAIN_ERROR = (
    'pretraining/few_labels_top1',
    'pretraining/few_labels_gain',
    'pretraining/few_labels_gain_error',
)
# File in a run folder: which images of val the initial weights classify correctly (protocols/monitor.py).
START_ACCURACY_FILE = 'few_labels_of_start.json'


def find_best_epoch(folder):
    """Return the best epoch of a run from pretrained weights, 0 for the initial weights; None for other runs, or if it
    was not measured (metrics.jsonl).

    With labels: the epoch with the highest few-label accuracy, if its gain over the start (paired by image) is more
    than its standard error, else 0. Without labels 0, because no label-free measure was found to select correctly.
    """
    saved = read_json(folder / 'run.json').get('args')
    if not isinstance(saved, dict) or not saved.get('init_from'):
        return None
    return find_best_epoch_in_metrics(read_metrics(folder / 'metrics.jsonl'))


def find_best_epoch_in_metrics(lines):
    """find_best_epoch from the lines of a metrics.jsonl."""
    measured = {line['epoch']: line for line in lines if FEW in line}
    if 0 in measured:
        better = [epoch for epoch, line in measured.items() if line.get(GAIN, 0) > max(0.01, line.get(GAIN_ERROR, 0))]
        return max(better, key=lambda epoch: measured[epoch][GAIN], default=0)
    return 0 if lines else None
