"""Parsing, checking and --help of the options that config.py defines."""

import difflib
import functools
import math
import shlex
from dataclasses import replace

from config import OPTIONS, PRESETS, RENAMED_OPTIONS, RENAMED_VALUES, Config
from runtime.errors import ROOT, UserError, resolve_path, same_path

TRUE, FALSE = ('true', '1', 'yes', 'on'), ('false', '0', 'no', 'off')
UNRESOLVED = ('auto', 'weights', 'dataset')  # values of --mean, --std, --white_level, --channels still to be resolved
MAX_CHANNELS = 4096  # that --channels may name
PIXEL_WORDS = ('auto', 'imagenet', 'weights', 'dataset')  # values of --mean and --std besides numbers
# Mean and standard deviation of ImageNet's pixels (red, green, blue) in [0, 1].
IMAGENET_PIXELS = {'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225)}


def get_config(**options):
    """Resolve the options: defaults, then the preset, then `options` (strings as typed, or values). Returns a Config.

    It has one attribute per option, and some more (see Config).
    Raises UserError for an unknown name (with the nearest one), a wrong type or a value out of range.
    """
    renamed = [name for name in options if RENAMED_OPTIONS.get(name) in options]
    if renamed:
        raise UserError(
            f'--{renamed[0]} is called --{RENAMED_OPTIONS[renamed[0]]} now, and both are given: leave one out'
        )
    options = rename_options(options)
    for name, value in options.items():
        if str(value).strip() == '':  # such as --resume="$RUN" with RUN unset
            raise UserError(f'--{name} is empty (a variable that is not set?): leave it out, or give a value')
    explicit = {name: parse(name, value) for name, value in options.items()}
    preset = explicit.get('preset', 'auto')
    preset_from_images = preset == 'photos' or (preset == 'auto' and 'image_path' in explicit)
    if preset == 'auto':
        explicit.pop('preset', None)
        preset = 'imagenet' if preset_from_images or (ROOT / 'data/imagenet/train').is_dir() else 'demo'
    if explicit.get('init_from') == 'none':
        explicit['init_from'] = ''
    if 'beside' in explicit and 'protocol' not in explicit:
        explicit['protocol'] = 'compare'
    args = Config(**{**preset_options(preset), **explicit, 'preset': preset})
    args.explicit, args.preset_from_images = set(explicit), preset_from_images
    return args


def rename_options(options):
    """Rename options to their current names (config.RENAMED_OPTIONS). If an option is given under both names, the
    current one counts."""
    renamed = {RENAMED_OPTIONS[name]: value for name, value in options.items() if name in RENAMED_OPTIONS}
    return {**renamed, **{name: value for name, value in options.items() if name not in RENAMED_OPTIONS}}


def describe_renames(options):
    """Return a message for each renamed option or value of a command line."""
    names = [f'--{old} is called --{new} now' for old, new in RENAMED_OPTIONS.items() if old in options]
    values = [
        f'--{name}={value} is called --{name}={RENAMED_VALUES[name][value]} now'
        for name, value in rename_options(options).items()
        if str(value) in RENAMED_VALUES.get(name, ())
    ]
    return names + values


def replace_args(args, **changes):
    """Return a copy of args with changed values. Its attributes that are no options stay."""
    copy = replace(args, **changes)
    for name in ('explicit', 'fixed', 'preset_from_images', 'set_from_images'):
        setattr(copy, name, getattr(args, name))
    return copy


@functools.cache
def preset_options(preset):
    """Return the {option: value} of a preset."""
    pairs = (word.removeprefix('--').split('=', 1) for word in PRESETS[preset].split())
    return {name: parse(name, value) for name, value in pairs}


def parse(name, value):
    """Convert `value` (a string from the command line, or a typed value) to the type of the option `name`. Raises
    UserError for an invalid value."""
    if name not in OPTIONS:
        raise UserError(f'unknown option --{name}; the nearest is --{suggest_option(name)} (--help lists all)')
    option_type, limits = OPTIONS[name].type, OPTIONS[name].metadata
    value = RENAMED_VALUES.get(name, {}).get(value, value) if isinstance(value, str) else value
    text = str(value).strip()
    try:
        if option_type is bool:
            result = {**dict.fromkeys(TRUE, True), **dict.fromkeys(FALSE, False)}[text.lower()]
        elif option_type is int and isinstance(value, float) and value.is_integer():
            result = int(value)
        else:
            result = str(value) if option_type is str and not limits['choices'] else option_type(text)
        if option_type is float and not math.isfinite(result):
            raise ValueError
    except (KeyError, ValueError):
        kind_text = {bool: 'True or False', int: 'a whole number', float: 'a number', str: 'text'}[option_type]
        raise UserError(f'--{name} needs {kind_text}, not {text!r}: {limits["meaning"]}') from None
    if limits['choices'] and result not in limits['choices']:
        near = closest_match(text, limits['choices'])
        raise UserError(f'--{name} is one of {", ".join(limits["choices"])}, not {text!r}; the nearest is {near}')
    low, high = limits['low'], limits['high']
    if low is not None and not low <= result <= high:
        raise UserError(f'--{name} must lie between {low} and {high}, not {text}: {limits["meaning"]}')
    if name in IMAGENET_PIXELS:
        channel_values(name, result)
    if name == 'channels':
        channel_numbers(result)
    if name == 'white_level':
        result = 'type' if result in ('0', '0.0') else result  # as it was called
        pixel_levels(result)
    if name == 'model_name' and not (result.replace('-', '').replace('_', '').replace('.', '').isalnum()):
        raise UserError(f'--model_name names a folder: letters, digits, "-", "_" and "." only, not {text!r}')
    if name == 'model_name' and len(result.encode()) > 200:
        raise UserError(f'--model_name names a folder: 200 bytes at most, not {len(result.encode())}')
    return result


def suggest_option(name):
    """Suggest an option for an unknown name: by its name in other programs, its initials, a part of its name, or
    similar spelling."""
    name = name.lower().replace('-', '_')
    for option, f in OPTIONS.items():
        if name in f.metadata['aliases'].split():
            return option
    initials = [option for option in OPTIONS if ''.join(part[0] for part in option.split('_')) == name]
    parts = [option for option in OPTIONS if name in option.split('_')]
    return [*initials, *parts, closest_match(name, OPTIONS)][0]


def closest_match(word, words):
    """Return the one of `words` with the most similar spelling."""
    return difflib.get_close_matches(word, words, n=1, cutoff=0.0)[0]


def help_text(command):
    """Return the --help of a command: its options with defaults and meanings, the most used first, then by theme; and
    the presets."""
    names = [name for name, f in OPTIONS.items() if command in f.metadata['used_by']]
    often = sorted((name for name in names if OPTIONS[name].metadata['often']), key=common_rank)[:10]
    lines = ['Most used', *map(help_line, often)]
    for theme, group in options_by_theme().items():
        rest = [name for name in group if name in names and name not in often]
        lines += [f'\n{theme}', *map(help_line, rest)] if rest else []
    lines.append('\nPresets change these defaults:')
    for preset, changes in PRESETS.items():
        lines.append(f'  {preset}: {" ".join(changes.split()) or "none, the defaults are its values"}')
    return '\n'.join(lines)


def common_rank(name):
    return OPTIONS[name].metadata['often']


def options_by_theme():
    """Return {theme: names of its options}, in the order of Config."""
    themes = {}
    for name, f in OPTIONS.items():
        themes.setdefault(f.metadata['theme'], []).append(name)
    return themes


def help_line(name):
    """Format an option with its default, meaning and choices in one line."""
    f = OPTIONS[name]
    default = repr(f.default) if f.default == '' else f.default
    choices = f' [{" | ".join(f.metadata["choices"])}]' if f.metadata['choices'] else ''
    return f'  --{name}={default}'.ljust(36) + f.metadata['meaning'] + choices


def option_help(name):
    """Return the full help of one option. Raises UserError for an unknown name."""
    name = name.lstrip('-').replace('-', '_').lower()
    if name not in OPTIONS:
        raise UserError(f'--help={name}: there is no such option; the nearest is --help={suggest_option(name)}')
    f = OPTIONS[name]
    limits, kind = f.metadata, {bool: 'True or False', int: 'a whole number', float: 'a number', str: 'text'}[f.type]
    lines = [f'--{name}, {kind}: {limits["meaning"]}', f'default    {f.default!r}']
    if limits['choices']:
        lines.append(f'one of     {", ".join(limits["choices"])}')
    if limits['low'] is not None:
        lines.append(f'between    {limits["low"]:g} and {limits["high"]:g}')
    lines += [
        f'preset     {preset}: {changes[name]!r}' for preset in PRESETS if name in (changes := preset_options(preset))
    ]
    lines.append(f'theme      {next(theme for theme, names in options_by_theme().items() if name in names)}')
    lines.append(f'used by    {", ".join(limits["used_by"])}')
    return '\n'.join(lines)


def ignored_by_command(args, command):
    """Return the explicit options that have no effect on `command`."""
    return sorted(name for name in args.explicit if command not in OPTIONS[name].metadata['used_by'])


def ignored_in_train(args):
    """Return (name, reason) of each explicit option that has no effect on train because of another option."""
    from_weights, of_distillation = args.init_from or args.ckpt_name, ('distill_size', 'distill_neighbors')
    augmentations = {args.augmentation, args.warmup_augmentation if args.warmup_epochs else args.augmentation}
    ignored = {
        '--optimizer=adamw': ('momentum',) if args.optimizer == 'adamw' else (),
        '--predictor=none': ('pred_dim', 'fix_pred_lr') if args.predictor == 'none' else (),
        '--predictor=fixed': ('fix_pred_lr',) if args.predictor == 'fixed' else (),
        '--augmentation=mild': ('blur_prob',) if augmentations == {'mild'} else (),
        '--warmup_epochs=0': ('warmup_augmentation',) if not args.warmup_epochs else (),
        '--augment_backend=worker': ('cache_images',)
        if args.augment_backend == 'worker' and args.cache_images == 'on'
        else (),
        '--init_from': ('zero_init',) if args.init_from else (),
        'random weights': () if from_weights else ('start_share', 'distill_weight', *of_distillation),
        '--distill_weight=0': of_distillation if from_weights and not args.distill_weight else (),
        '--freeze_bn=False': ('freeze_bn_affine',) if not args.freeze_bn else (),
        '--knn_every=0': ('knn_k', 'knn_temperature') if not args.knn_every and not args.evaluate_after else (),
    }
    return [(name, beside) for beside, names in ignored.items() for name in names if name in args.explicit]


def repeat_options(args, *more, command='train'):
    """Return the explicit options that a printed command must repeat: --ckpt_path, --log_path and `more`, those of them
    that it uses."""
    named = [
        name
        for name in ('ckpt_path', 'log_path', *more)
        if name in args.explicit and command in OPTIONS[name].metadata['used_by']
    ]
    return ''.join(f' {shlex.quote(f"--{name}={getattr(args, name)}")}' for name in named)


def repeat_ckpt_name(args, command, *more):
    """Return --ckpt_name and the explicit options that a printed `command` must repeat to load the same weights, and
    `more` of them."""
    return shlex.quote(f'--ckpt_name={args.ckpt_name}') + repeat_options(
        args, 'backbone', 'channels', *more, command=command
    )


def same_value(name, one, other):
    """Whether two values of an option are equal; paths are equal if they are the same place."""
    return one == other or (
        OPTIONS[name].metadata['is_path']
        and bool(one)
        and bool(other)
        and same_path(resolve_path(one), resolve_path(other))
    )


def channel_values(name, text):
    """Parse --mean or --std (`name`) to a tuple: one number per channel, or one for all; ImageNet's if `text` is a
    word. Raises UserError for an invalid value."""
    if text.strip() in PIXEL_WORDS:
        return IMAGENET_PIXELS[name]
    try:
        values = tuple(float(part) for part in text.strip('()[] ').split(','))
    except ValueError:
        values = ()
    low = 0.0 if name == 'mean' else 1e-6
    if not values or not all(low <= value <= 1 for value in values):
        raise UserError(
            f'--{name} is {", ".join(PIXEL_WORDS)}, or numbers between {low:g} and 1, one a channel or one for all, '
            f'such as --{name}=0.5,0.5,0.5, not {text!r}'
        )
    return values


def check_mean_std(args):
    """Raise UserError if `mean` or `std` is neither a word, nor one number for all channels, nor one for each."""
    for name in ('mean', 'std'):
        word = getattr(args, name)
        if word not in UNRESOLVED and len(channel_values(name, word)) not in (1, args.num_channels):
            raise UserError(
                f'`{name}={word}` is not one number for all of {args.num_channels} channels nor one for each; '
                f'`{name}=dataset` measures them'
            )


def expand_channel_values(name, text, count):
    """Return channel_values as a list of `count` numbers."""
    values = channel_values(name, text)
    return [*(values * count if len(values) == 1 else values)]


def channel_numbers(text):
    """Parse --channels to a tuple of channel numbers, from 1 on; () for auto and rgb. Raises UserError."""
    if text in ('auto', 'rgb'):
        return ()
    try:
        first, is_range, last = text.partition('-')
        ends = (int(first), min(int(last), MAX_CHANNELS + int(first))) if is_range else ()
        numbers = (*range(ends[0], ends[1] + 1),) if is_range else (*map(int, text.split(',')),)
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1 or len(numbers) > MAX_CHANNELS:
        raise UserError(
            f'--channels is auto, rgb, or up to {MAX_CHANNELS} numbers from 1 on: --channels=1,3,4 picks three, 1-5 is '
            f'all of five; not {text!r}'
        )
    return numbers


def pixel_levels(text):
    """Parse --white_level to (black, white); None for type and auto. Raises UserError."""
    if text in ('type', 'auto'):
        return None
    try:
        values = [float(part) for part in text.split(',')]
    except ValueError:
        values = []
    values = [0.0, *values] if len(values) == 1 else values
    if len(values) != 2 or not all(map(math.isfinite, values)) or values[0] >= values[1]:
        raise UserError(
            f'--white_level is type, auto, a number above 0, or two, black and white: --white_level=-1024,3071; not '
            f'{text!r}'
        )
    return tuple(values)
