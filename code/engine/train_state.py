"""What a training is at a moment, and what a checkpoint holds of it."""

import random

import numpy as np
import torch

from runtime import distributed
from runtime.checkpoint_format import FORMAT


class TrainState:
    """model: SimSiam; optimizer: its SGD or AdamW; scaler: of float16's gradients, or None; start: the backbone's
    weights that it began with, on the CPU, where they are a part of the result (--start_share), or None.

    epoch: how many are finished; images: how many of the next are seen, and sums, 2, on the device: of loss and std
    over these (of this process, or agreed upon). last: (loss, std), the means of the epoch that was finished last.
    """

    def __init__(self, model, optimizer, scaler=None, start=None):
        self.model, self.optimizer, self.scaler, self.start = model, optimizer, scaler, start
        self.epoch = self.images = 0
        self.sums = zeros_f64(next(model.parameters()).device)
        self.last_epoch_means = (0.0, 0.0)

    @property
    def position(self):
        return self.epoch, self.images

    def add(self, loss, std, images):
        """A step is done: its loss and std, on the device, and how many images it took."""
        self.sums += images * torch.stack((loss.detach(), std)).to(self.sums)
        self.images += images

    def means(self):
        """(loss, std) of the epoch under way as far as it went, else of the last. Waits for the device."""
        return tuple((self.sums / self.images).tolist()) if self.images else self.last_epoch_means

    def all_reduce_sums(self):
        """Within an epoch, make the sums those of all processes, which are all here: one of them writes its own for
        all."""
        if self.images:
            means = distributed.all_reduce_mean(self.sums.tolist(), self.sums.device)
            self.sums.copy_(self.sums.new_tensor(means))  # in double precision, as they are

    def finish_epoch(self, means):
        """The epoch is over. means: (loss, std) of all processes; keeps them."""
        self.epoch, self.images, self.last_epoch_means = self.epoch + 1, 0, means
        self.sums.zero_()

    def state_dict(self):
        """All of it as a dict of tensors and plain values."""
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
        """Go on from `content`; the model has its weights already (ckpt.get_model_ckpt). The optimizer keeps the
        momentum and the weight decay that it was made with: they may be this call's; its rates are set at each step. It
        keeps what is this machine's, too."""
        kept = ('momentum', 'weight_decay', 'fused', 'capturable')
        wanted = [{name: group[name] for name in kept if name in group} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(content['optimizer'])
        for group, values in zip(self.optimizer.param_groups, wanted, strict=True):
            group.update(values)
        if self.scaler and content['scaler']:
            self.scaler.load_state_dict(content['scaler'])
        self.epoch, self.images, self.last_epoch_means = content['epoch'], content['images'], tuple(content['last'])
        self.sums.copy_(content['sums'])
        self.start = content.get('start')
        if content['rng']:
            restore_rng(content['rng'])


def zeros_f64(device):
    return torch.zeros(2, dtype=torch.float32 if device.type == 'mps' else torch.float64, device=device)


def rng_states():
    """Of the global random generators; what is drawn in training is keyed and needs none (seeding.generator_for)."""
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
