"""The options of a checkpoint, merged with those of the command."""

from config import NOT_RESTORED_OPTIONS, OPTIONS, PIXEL_OPTIONS, Config, init_from_defaults
from runtime.checkpoints.load_state import MAX_LISTED_KEYS
from runtime.console import join_first
from runtime.errors import UserError
from runtime.messages import log
from runtime.options import UNRESOLVED, get_config, replace_args


def set_init_from_defaults(args):
    """Set config.init_from_defaults, except settled options. A mild augmentation is mild during warm-up too, unless
    given. Returns (args, names of the options)."""
    distilled = args.distill_weight > 0 if 'distill_weight' in args.settled else args.stem != 'cifar'
    defaults = init_from_defaults(distilled)
    augmentation = args.augmentation if 'augmentation' in args.settled else defaults['augmentation']
    if args.warmup_epochs and augmentation == 'mild':
        defaults |= {'warmup_augmentation': 'mild'}
    return replace_args(args, **{name: defaults[name] for name in defaults.keys() - args.settled}), [*defaults]


def apply_preset(args, preset):
    """Return args with the defaults of another preset."""
    explicit = {name: getattr(args, name) for name in (*args.settled, *NOT_RESTORED_OPTIONS)}
    new_args = replace_args(get_config(preset=preset), **explicit)
    new_args.explicit, new_args.fixed = args.explicit, args.fixed
    return new_args


def leave_demo_preset(args):
    """Return args with the preset imagenet in place of demo, which was only taken for want of images: weights of other
    networks have nothing of it."""
    return apply_preset(args, 'imagenet') if args.preset == 'demo' and 'preset' not in args.settled else args


def merge_saved_options(args, saved, path, locked_options, initial=False):
    """Merge the options of a checkpoint with args: settled options and local ones are from args. initial: for a new run
    from the weights, whose mean and std may be measured. Returns a Config. Raises UserError if one of `locked_options`
    is given with another value."""
    for name in locked_options:
        unresolved = name in PIXEL_OPTIONS and getattr(args, name) in UNRESOLVED
        if name in args.settled and getattr(args, name) != saved.get(name) and not unresolved:
            hint = 'leave the option out, or name another checkpoint'
            if name not in args.explicit:  # of the run that is repeated
                hint = f'--{name}={saved.get(name)} in place of that of --from_run helps'
            raise UserError(
                f'--{name}={getattr(args, name)} contradicts the checkpoint {path.parent.name}/{path.name}, '
                f'which has {name}={saved.get(name)}: {hint}'
            )
    explicit = {name: getattr(args, name) for name in (*args.settled, *NOT_RESTORED_OPTIONS)}
    for name in PIXEL_OPTIONS:
        word = explicit.get(name)
        if word in UNRESOLVED and not (initial and word == 'dataset'):
            explicit.pop(name)
            if not initial:
                log(f'--{name}={word} applies to new runs; this one has --{name}={saved[name]}')
    merged = Config(**{**saved, **explicit})
    merged.explicit, merged.fixed = args.explicit, args.fixed
    return merged


def log_missing_options(path, preset, names):
    """Log the options that a checkpoint does not have because it is older, with the preset that sets them."""
    of_training = [name for name in names if {'train', 'evaluate'} & {*OPTIONS[name].metadata['used_by']}]
    names = [name for name in of_training if name not in NOT_RESTORED_OPTIONS]
    if names:
        options_text = join_first([f'--{name}' for name in names], MAX_LISTED_KEYS)
        log(f'{path.name} is older than the options {options_text}: they are those of --preset={preset}')
