"""The state of a training, as checkpoints store it."""

import random

import numpy as np
import torch

from runtime import distributed
from runtime.checkpoints.format import FORMAT
from runtime.tensors import zeros_f64


class TrainState:
    """model: SimSiam; optimizer: SGD or AdamW; scaler: GradScaler for float16, or None; start: the initial weights of
    the backbone, on the CPU, for --start_share and --distill_weight, or None.

    epoch: finished epochs. images: images seen in the current epoch; sums: 3, on the device, the sums of loss, std and
    distillation loss (0 without a teacher) over them, of this rank, or of all after all_reduce_sums. last_epoch_means:
    their means in the last finished epoch.
    """

    def __init__(self, model, optimizer, scaler=None, start=None):
        self.model, self.optimizer, self.scaler, self.start = model, optimizer, scaler, start
        self.epoch = self.images = 0
        self.sums = zeros_f64(3, device=next(model.parameters()).device)
        self.last_epoch_means = (0.0, 0.0, 0.0)

    @property
    def position(self):
        return self.epoch, self.images

    def add(self, scalars, images):
        """Add a step of `images` images. scalars, on the device: loss, std and, with a teacher, distillation loss."""
        self.sums[: len(scalars)] += images * torch.stack(scalars).detach().to(self.sums)
        self.images += images

    def means(self):
        """Return the means of the current epoch so far, else of the last. Synchronizes with the device."""
        return tuple((self.sums / self.images).tolist()) if self.images else self.last_epoch_means

    def all_reduce_sums(self):
        """Average the sums over all ranks, within an epoch, before rank 0 saves them."""
        if self.images:
            means = distributed.all_reduce_mean(self.sums.tolist(), self.sums.device)
            self.sums.copy_(self.sums.new_tensor(means))

    def finish_epoch(self, means):
        """Finish the epoch. means: of loss, std and distillation loss over all ranks."""
        self.epoch, self.images, self.last_epoch_means = self.epoch + 1, 0, means
        self.sums.zero_()

    def state_dict(self):
        """Return the state as a dict of tensors and plain values."""
        return {
            'format': FORMAT,
            'model': self.model.state_dict(),
            'optimizer': self.optimizer.state_dict(),
            'scaler': self.scaler.state_dict() if self.scaler else None,
            'epoch': self.epoch,
            'images': self.images,
            'sums': self.sums.cpu(),
            'last': self.last_epoch_means,
            'loss': self.means()[0],
            'rng': rng_states(),
            'start': self.start,
        }

    def load_state_dict(self, content):
        """Restore all but the model's weights (ckpt.get_model_ckpt loads them). The optimizer keeps its current
        momentum and weight decay, which this call may have changed, and its device options."""
        group_keys = ('momentum', 'weight_decay', 'fused', 'capturable')
        new_values = [
            {name: group[name] for name in group_keys if name in group} for group in self.optimizer.param_groups
        ]
        self.optimizer.load_state_dict(content['optimizer'])
        for group, values in zip(self.optimizer.param_groups, new_values, strict=True):
            group.update(values)
        if self.scaler and content['scaler']:
            self.scaler.load_state_dict(content['scaler'])
        self.epoch, self.images, self.last_epoch_means = content['epoch'], content['images'], tuple(content['last'])
        self.sums.copy_(content['sums'])
        self.start = content.get('start')
        if content['rng']:
            restore_rng(content['rng'])


def rng_states():
    """Return the states of the global random generators. Training itself uses keyed generators
    (seeding.generator_for)."""
    kind, keys, *rest = np.random.get_state()
    return {
        'python': random.getstate(),
        'numpy': (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        'torch': torch.get_rng_state(),
        'cuda': torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_rng(states):
    random.setstate(states['python'])
    kind, keys, *rest = states['numpy']
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states['torch'])
    if len(states['cuda']) == torch.cuda.device_count() > 0:
        torch.cuda.set_rng_state_all(states['cuda'])
