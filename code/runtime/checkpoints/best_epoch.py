"""The best epoch of a run from pretrained weights, by metrics.jsonl. Does not import torch."""

import math
from typing import NamedTuple

from runtime.files import read_json, read_metrics

WATCHED = 10  # labels per class, for the few-label accuracy in training


class Tags(NamedTuple):
    """Tags of a measure in metrics.jsonl: its value, the gain over the start, and the gain's standard error."""

    value: str
    gain: str
    error: str


FEW_LABELS = Tags('pretraining/few_labels_top1', 'pretraining/few_labels_gain', 'pretraining/few_labels_gain_error')
# Similarity to the targets of the distillation (engine/teacher.py), a cosine.
SIMILARITY = Tags(
    'pretraining/target_similarity',
    'pretraining/target_similarity_gain',
    'pretraining/target_similarity_gain_error',
)
# File in a run folder: which images of val the initial weights classify correctly, and what that was measured with
# (protocols/monitor.py).
START_FILE = 'few_labels_of_start.json'


def find_best_epoch(folder):
    """Return the best epoch of a run from pretrained weights, 0 for the initial weights; None for other runs, or if it
    was not measured (metrics.jsonl).

    With labels: of the epochs whose few-label accuracy has a gain over the start (paired by image) of more than its
    standard error and 0.01 points, the one with the largest; 0 if there is none. Without labels: the same with the
    similarity to the targets of the distillation, two standard errors and 0.001; also if val has so few labels that no
    epoch differs from the start by more than the error (is_judged_by_labels). With neither 0.
    """
    saved = read_json(folder / 'run.json').get('args')
    if not isinstance(saved, dict) or not saved.get('init_from'):
        return None
    return find_best_epoch_in_metrics(read_metrics(folder / 'metrics.jsonl'))


def find_best_epoch_in_metrics(lines):
    """find_best_epoch from the lines of a metrics.jsonl."""
    tags, factor, least = (FEW_LABELS, 1, 0.01) if is_judged_by_labels(lines) else (SIMILARITY, 2, 0.001)
    gains = {}
    for line in lines:
        gain, error = line.get(tags.gain, math.nan), line.get(tags.error, math.nan)  # of one image the error is nan
        if gain > least and gain > factor * error:
            gains[line['epoch']] = gain
    return max(gains, key=gains.get, default=0 if lines else None)


def is_measured_with_labels(lines):
    """Whether the start was measured with labels: the lines of a metrics.jsonl."""
    return any(FEW_LABELS.value in line and not line['epoch'] for line in lines)


def is_judged_by_labels(lines):
    """Whether the few-label accuracy selects the epoch: it was measured, and the gain of some epoch is larger than its
    standard error, or there is no similarity to the targets to judge by."""
    told = any(abs(line.get(FEW_LABELS.gain, 0.0)) > line.get(FEW_LABELS.error, math.inf) for line in lines)
    has_similarity = any(SIMILARITY.gain in line and line['epoch'] for line in lines)
    return is_measured_with_labels(lines) and (told or not has_similarity)
