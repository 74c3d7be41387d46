"""The variants of the paper's ablations (section 4), and of a table of causes of collapse: the options of each."""

from pathlib import Path

from config import OPTIONS
from engine.run_dir import resolve_resume
from protocols import results
from runtime.checkpoints.run_folder import CHECKPOINT_RE, checkpoints
from runtime.distributed import broadcast_from_rank0
from runtime.errors import resolve_path
from runtime.files import is_result_for

WARMUP = {'warmup_epochs': lambda args: max(1, args.max_epochs // 5)}
WARMUP_10_PERCENT = {
    'warmup_epochs': lambda args: args.warmup_epochs or max(1, args.max_epochs // 10)
}  # the paper's 10 of 100
# For each table: (variant, options, the paper's ImageNet linear top-1 in percent, as remembered). A value that depends
# on the preset is a function of args.
TABLES = {
    'stopgrad': (  # figure 2; the constant predictor rate is introduced after it in the paper
        ('with stop-gradient', {'fix_pred_lr': False}, 67.7),
        ('without', {'stop_gradient': False, 'fix_pred_lr': False}, 0.1),
    ),
    'predictor': (  # table 1
        ('MLP, rate decays', {'fix_pred_lr': False}, 67.7),
        ('none', {'predictor': 'none', 'fix_pred_lr': False}, 0.1),
        ('fixed at random', {'predictor': 'fixed', 'fix_pred_lr': False}, 1.5),
        ('MLP, rate constant', {'fix_pred_lr': True}, 68.1),
    ),
    'batch_size': tuple(  # table 2
        (str(size), {'batch_size': size, **(WARMUP_10_PERCENT if size >= 1024 else {})}, top1)
        for size, top1 in ((64, 66.1), (128, 67.3), (256, 68.1), (512, 68.1), (1024, 68.0), (2048, 67.9), (4096, 64.0))
    ),
    'bn': (  # table 3
        ('none', {'proj_bn': 'none', **WARMUP_10_PERCENT}, 34.6),
        ('hidden layers', {'proj_bn': 'hidden'}, 67.4),
        ('default', {'proj_bn': 'default'}, 68.1),
        ('all', {'proj_bn': 'all'}, 'unstable'),
    ),
    'similarity': (  # section 4.5
        ('cosine', {'similarity': 'cosine'}, 68.1),
        ('cross-entropy', {'similarity': 'softmax'}, 63.2),
    ),
    'symmetric': (  # section 4.6
        ('symmetric', {'loss_symmetry': 'true'}, 68.1),
        ('asymmetric', {'loss_symmetry': 'false'}, 64.8),
        ('asymmetric, 2 pairs', {'loss_symmetry': '2x'}, 67.3),
    ),
    'collapse': (  # not from the paper: causes of collapse and remedies (results/README.md, What goes wrong)
        ('unchanged', {}, ''),
        ('no stop-gradient', {'stop_gradient': False}, ''),
        ('no predictor', {'predictor': 'none'}, ''),
        ('no BN in projector and predictor', {'proj_bn': 'none'}, ''),
        ('learning rate x 10', {'learning_rate': lambda args: 10 * args.learning_rate}, ''),
        ('learning rate / 10', {'learning_rate': lambda args: args.learning_rate / 10}, ''),
        ('weight decay x 10', {'weight_decay': lambda args: 10 * args.weight_decay}, ''),
        ('no weight decay', {'weight_decay': 0.0}, ''),
        ('batch / 8', {'batch_size': lambda args: max(2, args.batch_size // 8)}, ''),
        ('SimCLR augmentation', {'augmentation': 'simclr'}, ''),
        ('SimCLR, rate rises for a fifth', {'augmentation': 'simclr', 'warmup_augmentation': 'simclr', **WARMUP}, ''),
        ('SimCLR, MoCo while the rate rises', {'augmentation': 'simclr', 'warmup_augmentation': 'moco', **WARMUP}, ''),
    ),
}


def finished_checkpoint(variant_args):
    """Return the last checkpoint of a finished run with exactly these options, or None."""
    name = resolve_resume(variant_args).ckpt_name

    def find_path():
        run = resolve_path(variant_args.ckpt_path) / name
        if not name or not run.is_dir():  # no run; a run whose newest file is damaged
            return ''
        path = checkpoints(run)[-1]
        last = CHECKPOINT_RE.fullmatch(path.name)
        return '' if int(last[2]) < variant_args.max_epochs or last[3] else str(path)

    path = broadcast_from_rank0(find_path)
    return Path(path) if path else None


def finished_result(variant_args):
    """Return (run folder, result of its linear evaluation) of a finished run with exactly these options, or None. The
    last checkpoint is evaluated, also of a run from pretrained weights: the best one could be the start."""
    if not (path := finished_checkpoint(variant_args)):
        return None
    run = path.parent
    linear_options = {
        name: getattr(variant_args, name) for name, f in OPTIONS.items() if 'linear' in f.metadata['only']
    }

    def find_matching():  # rank 0 writes results
        return [
            result
            for result in results.load_results(run, protocol='linear', checkpoint=path.name, preset=variant_args.preset)
            if linear_options.items() <= result.get('settings', {}).items()
            and is_result_for(result, variant_args.image_path)
        ][-1:]

    matching = broadcast_from_rank0(find_matching)
    return (run, matching[-1]) if matching else None
