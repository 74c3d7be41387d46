"""The monitor of a run: progress bar, collapse warning, kNN, few labels, label-free metrics, TensorBoard and
metrics.jsonl. It does not change the weights; it ends a run whose loss is not finite."""

import copy
import json
import time
from dataclasses import asdict

import torch

from ckpt import get_model_ckpt
from dataloader import vision
from dataloader.load_dataset import eval_loader, labeled_subset, splits_of_loaders
from logger import Logger
from metric import representation
from model.weights import average_weights, copy_weights
from protocols.collapse_verdict import baseline_label
from protocols.few_labels import log_missing_labels, mean_and_error, measure_labels
from protocols.label_free import MIN_IMAGES, RETRIEVAL_POOL, monitor_metrics
from protocols.protocol import missing_labels_reason
from runtime import signals
from runtime.atomic_write import atomic_write_on_main
from runtime.checkpoints.best_epoch import (
    FEW_LABELS,
    SIMILARITY,
    START_FILE,
    WATCHED,
    find_best_epoch,
    is_measured_with_labels,
)
from runtime.checkpoints.run_folder import checkpoints, finished_epoch
from runtime.device import get_device, move_network, peak_memory
from runtime.distributed import all_gather_rows, broadcast_from_rank0
from runtime.errors import resolve_path
from runtime.files import read_json, read_metrics
from runtime.messages import format_duration, log, progress
from runtime.options import replace_args
from runtime.tensors import async_tolist
from runtime.trackers import make_tracker

LOG_EVERY = 10  # steps between two reads of the loss; reading is delayed by as many, so that it does not synchronize


def is_measured(args, epoch):
    """Whether metrics are computed after this epoch (--knn_every, and the last)."""
    return epoch == args.max_epochs or bool(args.knn_every and epoch % args.knn_every == 0)


def gradient_norm(model):
    """Return the Euclidean norm of the current gradients, a scalar on the device."""
    return torch.nn.utils.get_total_norm([x.grad for x in model.parameters() if x.grad is not None])


def describe_measurement(args, train, val):
    """Describe what the measures of an epoch depend on besides the weights, as text: the images, and options that a
    resumed run may change."""
    options = {name: getattr(args, name) for name in ('cache_short_side', 'distill_size', 'distill_neighbors')}
    options['has_accuracy'] = args.knn_every > 0
    return f'{options} {train.digest()} {val.digest() if val else ""}'


class Monitor:
    """run: run_dir.RunDir. iterators: from load_dataset.get_iterator. state: the TrainState at the start."""

    def __init__(self, args, run, iterators, state):
        self.args, self.run = args, run
        self.loader, self.splits = iterators['train'], splits_of_loaders(iterators)
        train, val = self.splits['train'], self.splits['val']
        self.knn_train_loader = eval_loader(args, labeled_subset(train))
        self.knn_val_loader = eval_loader(args, labeled_subset(val)) if val else None
        self.knn_off = '--knn_every=0' if args.knn_every == 0 else missing_labels_reason(self.splits)
        self.measured_with = describe_measurement(args, train, val) if args.init_from else ''
        # A finished run keeps all that was written.
        after = state.epoch + 1 if run.resumed and state.epoch < args.max_epochs else 0
        logs, metrics = resolve_path(args.log_path) / run.folder.name, run.folder / 'metrics.jsonl'
        self.logger = Logger(logs, after, metrics, make_tracker(args, run.folder))
        self.started, self.began = None, state.epoch + state.images / max(1, len(train))
        self.bar, self.last_logged, self.outputs, self.norms = None, {}, None, []

    def start(self, state, teacher):
        """Log the options and the metrics of epoch 0. For a resumed run, compute the metrics of its last epoch if they
        are missing. teacher: engine.teacher.Teacher or None."""
        if self.knn_off:
            log(f'the kNN monitor is off: {self.knn_off}')
        else:
            log_missing_labels('few labels', self.splits['train'].labels, [WATCHED])
        if self.run.resumed:
            begun = state.epoch or 0 in self.logger.read_epochs()
            if self.args.init_from and begun and state.epoch < self.args.max_epochs:
                self.measure_again(state, teacher)
            if self.lacks_metrics(state):
                self.after_epoch(state, teacher)
            # The start was saved, and the run stopped before its metrics were written.
            if state.epoch or state.images or 0 in self.logger.read_epochs():
                return
        self.logger.text('options', [f'--{name}={value}' for name, value in asdict(self.args).items()])
        values, line = self.compute_metrics(state, teacher)
        self.logger.scalars(0, values)
        log(f'epoch 0/{self.args.max_epochs}{line} ({baseline_label(self.args.init_from)})')

    def lacks_metrics(self, state):
        """Whether the metrics of the last epoch are missing, because the run stopped after its checkpoint."""
        epochs = self.logger.read_epochs()
        return bool(state.epoch and epochs) and state.epoch not in epochs

    def begin_epoch(self, state, total):
        """Start the progress bar of an epoch of `total` images, at image state.images."""
        title = f'epoch {state.epoch + 1}/{self.args.max_epochs}'
        self.bar, self.total = progress(title=title, unit='images', total=total, first=state.images), total
        self.from_image, self.epoch_started, self.read = state.images, time.monotonic(), None
        self.started = self.started or self.epoch_started
        self.norms = []

    def show_views(self, views):
        """Save a picture of the views of the first 16 images."""
        self.logger.views('two_views', [vision.to_picture(view[:16], self.args) for view in views])

    def after_step(self, state, scalars, rates, p, z):
        """Record a step. scalars: loss, std and perhaps the distillation loss, on the device; rates: of backbone,
        projector and predictor; p, z: lists over views."""
        self.outputs = p[0], z[0]
        elapsed = time.monotonic() - self.epoch_started
        self.last_logged = {
            'speed/images_per_second': (state.images - self.from_image) / elapsed,
            'speed/waiting_for_data': self.loader.wait_seconds / elapsed,
            'schedule/learning_rate_projector': rates[1],
            'schedule/learning_rate_predictor': rates[2],
        }
        if rates[0] != rates[1]:
            self.last_logged['schedule/learning_rate_backbone'] = rates[0]
        if state.images // self.args.batch_size % LOG_EVERY == 0 or state.images >= self.total:
            self.check_step(state)
            norm = gradient_norm(state.model)
            retrieval = representation.view_retrieval_top1(z[0], z[1])
            self.read = async_tolist(torch.stack((*scalars[:2], retrieval, norm)))
        self.bar.update(self.args.batch_size)

    def end_epoch(self, state):
        """Read the last values of an epoch, and finish its progress bar. Raises NonFiniteLoss."""
        self.check_step(state)
        self.bar.close()

    def check_step(self, state):
        """Read the values of an earlier step. Warns of a collapse, raises NonFiniteLoss for an invalid loss."""
        if not self.read:
            return
        loss, std, retrieval, norm = self.read()
        self.norms.append(norm)
        self.run.check_finite(state, loss)
        if std < self.args.collapse_threshold:
            self.warn_collapse(state, loss, std)
        waiting = self.last_logged['speed/waiting_for_data']
        self.bar.set_postfix_str(
            f'loss {loss:.4f}, std {std:.3f}, {retrieval:.0f} % of positive views are the nearest, {waiting:.0%} '
            'waiting for data'
        )

    def after_epoch(self, state, teacher):
        """Log the scalars of a finished epoch, its metrics if they are due, and a line."""
        args, (loss, std, distill_loss) = self.args, state.last_epoch_means
        if std < args.collapse_threshold:
            self.warn_collapse(state, loss, std)
        values = {'pretraining/loss': loss, 'pretraining/std': std, **self.last_logged, **peak_memory(get_device(args))}
        if self.norms:
            values['pretraining/gradient_norm'] = sum(self.norms) / len(self.norms)
        line = f'epoch {state.epoch}/{args.max_epochs}  loss {loss:.4f}  std {std:.3f}'
        if distill_loss:
            values['pretraining/distillation'] = distill_loss
            line += f'  distillation {distill_loss:.3f}'
        if self.last_logged:
            line += f'  {self.last_logged["speed/images_per_second"]:.0f} images/s'
        last = state.epoch == args.max_epochs
        if is_measured(args, state.epoch):
            measured, words = self.compute_metrics(state, teacher)
            values, line = {**values, **measured}, line + words
        self.logger.scalars(state.epoch, values)
        if self.started and not last and state.epoch > self.began:
            each = (time.monotonic() - self.started) / (state.epoch - self.began)
            line += f'  {format_duration(each * (args.max_epochs - state.epoch))} left'
        log(line)

    def compute_metrics(self, state, teacher):
        """Compute the metrics: kNN and few labels if there are labels, and the label-free ones. Returns ({tag: number},
        text)."""
        args, values, tags, words, right, backbone = self.args, {}, {}, '', None, self.backbone(state)
        if not self.knn_off:
            values['knn_top1'], right = measure_labels(args, backbone, self.knn_train_loader, self.knn_val_loader)
            tags, few_words = self.few_labels(state.epoch, right)
            words = f'  kNN {values["knn_top1"]:.2f} %{few_words}'
        if args.init_from and not state.epoch:
            self.save_start(right)
        if (count := len(self.splits['train'])) >= MIN_IMAGES:
            values |= monitor_metrics(args, state.model, self.splits['train'])
            name = 'rank' if state.epoch else 'retrieval rank of the positive view'
            words += f'  {name} {values["rank"]:.1f} of {min(RETRIEVAL_POOL, count)}'
            if teacher:
                numbers = teacher.measure(args, backbone)
                tags |= zip(SIMILARITY, numbers, strict=True)
                words += f'  similarity to the targets {numbers[0]:.3f}' + f' ({numbers[1]:+.3f})' * bool(state.epoch)
        if self.outputs:
            p, z = (all_gather_rows(x) for x in self.outputs)
            values |= representation.output_statistics(z, p)
        return {**{f'pretraining/{name}': value for name, value in values.items()}, **tags}, words

    def backbone(self, state):
        """Return the backbone to measure: the trained one, averaged with the start by --start_share."""
        if not state.start or not self.args.start_share:
            return state.model.backbone
        backbone = copy.deepcopy(state.model.backbone)
        copy_weights(backbone, average_weights(state.start, backbone.state_dict(), self.args.start_share))
        return backbone

    def few_labels(self, epoch, right):
        """Return ({tag: number}, text): the accuracy with WATCHED labels per class and its gain over the start. right:
        from measure_labels."""
        top1 = 100 * right.mean().item()
        results, words = {FEW_LABELS.value: top1}, f'  {WATCHED} labels per class {top1:.2f} %'
        if not self.args.init_from or not epoch:
            return results, words
        before = torch.tensor(read_json(self.run.folder / START_FILE).get('right', []), dtype=torch.float64)
        if before.shape == right.shape:
            gain, error = results[FEW_LABELS.gain], results[FEW_LABELS.error] = mean_and_error(right - before)
            words += f' ({gain:+.2f} ± {error:.2f} over the start)'
        return results, words

    def save_start(self, right):
        """Save what the gains over the start depend on: which images of val the initial weights classify correctly
        (`right`, from measure_labels, or None), and by which images, labels and options."""
        val = labeled_subset(self.splits['val']).digest() if right is not None else ''
        right = [] if right is None else right.int().tolist()
        values = {'right': right, 'val': val, 'measured_with': self.measured_with}
        path = self.run.folder / START_FILE
        atomic_write_on_main(path, lambda aside: aside.write_text(json.dumps(values)))

    def measure_again(self, state, teacher):
        """If a resumed run has other images, labels or targets than before, measure the start and the best epoch so
        far again: a gain is paired by image. Gains of the other epochs no longer count."""
        folder, tags = self.run.folder, (FEW_LABELS.gain, FEW_LABELS.error, SIMILARITY.gain, SIMILARITY.error)

        def find_change():
            if read_json(folder / START_FILE).get('measured_with') == self.measured_with:
                return False, 0
            known_by_labels = is_measured_with_labels(read_metrics(self.logger.metrics))
            return not (self.knn_off and known_by_labels), find_best_epoch(folder) or 0

        changed, best = broadcast_from_rank0(find_change)
        if not changed:
            return
        epochs = f'the start and the best epoch, {best}, are' if best else 'the start is'
        log(
            f'the images, labels or targets are not known to be those of the earlier epochs: {epochs} measured '
            'again, and gains of the others no longer count'
        )
        right, similarity = {}, {}
        for epoch in sorted({0, best}):
            if not (backbone := self.backbone_of_epoch(state, epoch)):
                continue
            if not self.knn_off:
                _, right[epoch] = measure_labels(self.args, backbone, self.knn_train_loader, self.knn_val_loader)
            if teacher:
                similarity[epoch] = dict(zip(SIMILARITY, teacher.measure(self.args, backbone), strict=True))
        # Only now: a run that is stopped before measures again when it is resumed.
        with signals.defer_signals():
            self.logger.rename_tags({tag: f'{tag}_earlier' for tag in tags})
            self.save_start(right.get(0))
            for epoch in sorted({*right, *similarity}):
                values, _ = self.few_labels(epoch, right[epoch]) if epoch in right else ({}, '')
                self.logger.add_to_epoch(epoch, values | similarity.get(epoch, {}))

    def backbone_of_epoch(self, state, epoch):
        """Load the backbone after an earlier epoch of this run, on the device, averaged with the start by
        --start_share; None if its checkpoint is missing."""
        if not epoch and state.start:
            backbone = copy.deepcopy(state.model.backbone)
            copy_weights(backbone, state.start)
            return backbone
        paths = [path for path in checkpoints(self.run.folder) if finished_epoch(path) == epoch]
        if not paths:
            return None
        _, model, _ = get_model_ckpt(replace_args(self.args, ckpt_name=str(paths[-1])))
        return move_network(self.args, model.backbone)

    def warn_collapse(self, state, loss, std):
        """Warn once that the model collapses, with remedies."""
        self.logger.warn_once(
            'collapse',
            f'the model collapses: std {std:.3f} (healthy near 1, threshold {self.args.collapse_threshold}) at loss '
            f'{loss:.4f} in epoch {state.epoch + (state.images > 0)}: all images get nearly the same z, so the loss '
            'falls and nothing is learned. Try --augmentation=moco, or --warmup_epochs=10 with '
            '--warmup_augmentation=moco, or a lower --learning_rate; more: results/README.md, What goes wrong',
        )

    def close(self):
        if self.bar:
            self.bar.close()
        self.logger.close()
