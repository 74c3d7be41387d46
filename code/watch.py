"""What looks at a run: the bar, the guard, kNN, the measures without labels, TensorBoard and metrics.jsonl. It changes
nothing."""

import time
from dataclasses import asdict

import torch

from config import path_of
from dataloader import vision
from dataloader.load_dataset import in_order, labelled
from distributed import gather
from evaluate import why_no_labels
from logger import Logger, duration, progress, say
from metric import spectrum
from protocols.knn import knn_accuracy
from protocols.spectrum import FOUND_AMONG, LEAST, quick
from tracker import tracker_of
from utils import get_device, later, peak_memory
from verdict import began

READ_EVERY = 10  # steps between two looks at the loss, which is then that many steps old


class Watch:
    """run: runs.Run. iterators: load_dataset.get_iterator's. state: where the run begins, or goes on."""

    def __init__(self, args, run, iterators, state):
        self.args, self.run = args, run
        train, self.val = iterators['train'].dataset, iterators['val']
        self.splits = {'train': train, 'val': None if self.val is None else self.val.dataset}
        self.bank = in_order(args, labelled(train))
        self.knn_off = '--knn_every=0' if args.knn_every == 0 else why_no_labels(self.splits)
        # Of a run that is only looked at again nothing that was written changes.
        after = state.epoch + 1 if run.path and state.epoch < args.max_epochs else 0
        logs, metrics = path_of(args.log_path) / run.folder.name, run.folder / 'metrics.jsonl'
        self.logger = Logger(logs, after, metrics, tracker_of(args, run.folder))
        self.started, self.began = time.monotonic(), state.epoch + state.images / max(1, len(train))
        self.bar, self.seen, self.outputs = None, {}, None

    def begin(self, state):
        """Before the first step: the options, the untrained network's kNN; of a run that goes on, the epoch that it was
        saved after and stopped before it could be looked at."""
        if self.knn_off:
            say(f'the kNN monitor is off: {self.knn_off}')
        if self.run.path:
            if state.epoch and self.logger.lacks(state.epoch):
                self.epoch(state)
            return
        self.logger.text('options', [f'--{name}={value}' for name, value in asdict(self.args).items()])
        values, line = self.measured(state)
        self.logger.scalars(0, values)
        say(f'epoch 0/{self.args.max_epochs}{line} ({began(self.args)})')

    def waits(self, batches):
        """`batches`; notes how long they take to come. Of the loader itself: what comes after is the device's work."""
        self.waited, batches = 0.0, iter(batches)
        while True:
            before = time.monotonic()
            batch = next(batches, None)
            self.waited += time.monotonic() - before
            if batch is None:
                return
            yield batch

    def steps(self, state, batches, total):
        """`batches`, what is left of an epoch of `total` images, behind a bar."""
        title = f'epoch {state.epoch + 1}/{self.args.max_epochs}'
        self.bar = progress(title=title, unit='images', total=total, first=state.images)
        self.from_image, self.epoch_started, self.read = state.images, time.monotonic(), None
        for batch in batches:
            yield batch
            self.bar.update(self.args.batch_size)
        self.bar.close()

    def first_views(self, views):
        self.logger.views('two_views', [vision.denormalise(view[:16]) for view in views])

    def step(self, state, loss, std, rates, p, z):
        """A step is done. loss, std: on the device; rates: of the encoder and of the predictor; p, z: of each view."""
        self.outputs = p[0], z[0]
        elapsed = time.monotonic() - self.epoch_started
        self.seen = {
            'speed/images_per_second': (state.images - self.from_image) / elapsed,
            'speed/waiting_for_data': self.waited / elapsed,
            'schedule/learning_rate_encoder': rates[0],
            'schedule/learning_rate_predictor': rates[1],
        }
        if state.images // self.args.batch_size % READ_EVERY == 0:
            self.look(state)
            self.read = later(torch.stack((loss, std, spectrum.retrieval(z[0], z[1]))))

    def look(self, state):
        """What an earlier step has to say: a bad run is stopped, or warned of."""
        if not self.read:
            return
        loss, std, found = self.read()
        self.run.check_finite(state, loss)
        if std < self.args.collapse_threshold:
            self.warn_of_collapse(state, loss, std)
        waiting = self.seen['speed/waiting_for_data']
        self.bar.set_postfix_str(
            f'loss {loss:.4f}, std {std:.3f}, {found:.0f} % find their other view, {waiting:.0%} waiting for data'
        )

    def epoch(self, state):
        """An epoch is over: its scalars, kNN where it is due, and a line."""
        args, (loss, std) = self.args, state.last
        if std < args.collapse_threshold:
            self.warn_of_collapse(state, loss, std)
        values = {'pretraining/loss': loss, 'pretraining/std': std, **self.seen, **peak_memory(get_device(args))}
        line = f'epoch {state.epoch}/{args.max_epochs}  loss {loss:.4f}  std {std:.3f}'
        if self.seen:
            line += f'  {self.seen["speed/images_per_second"]:.0f} images/s'
        last = state.epoch == args.max_epochs
        if last or (args.knn_every and state.epoch % args.knn_every == 0):
            measured, said = self.measured(state)
            values, line = {**values, **measured}, line + said
        self.logger.scalars(state.epoch, values)
        if not last and state.epoch > self.began:
            each = (time.monotonic() - self.started) / (state.epoch - self.began)
            line += f'  {duration(each * (args.max_epochs - state.epoch))} left'
        say(line)

    def measured(self, state):
        """({tag: number}, a few words): how good the network is, by kNN where there are labels, and without any."""
        args, found, words = self.args, {}, ''
        if not self.knn_off:
            found['knn_top1'] = knn_accuracy(args, state.model.backbone, self.bank, self.val)
            words = f'  kNN {found["knn_top1"]:.2f} %'
        if (count := len(self.splits['train'])) >= LEAST:
            found |= quick(args, state.model, self.splits['train'])
            words += f'  rank {found["rank"]:.1f} of {min(FOUND_AMONG, count)}'
        if self.outputs:
            p, z = (gather(x) for x in self.outputs)
            found |= spectrum.of_outputs(z, p)
        return {f'pretraining/{name}': value for name, value in found.items()}, words

    def warn_of_collapse(self, state, loss, std):
        self.logger.warn_once(
            'collapse',
            f'the model collapses: std {std:.3f} (healthy near 1, threshold {self.args.collapse_threshold}) at loss '
            f'{loss:.4f} in epoch {state.epoch + (state.images > 0)}: all images get nearly the same z, so the loss '
            'falls and nothing is learned. Try --augmentation=moco, or --warmup_epochs=10 with '
            '--warmup_augmentation=moco, or a lower --learning_rate; README.md, When it collapses, has more',
        )

    def close(self):
        if self.bar:
            self.bar.close()
        self.logger.close()
