"""The command line: python3 cli.py <command> --option=value ...

torch is imported only after the options are checked, so that a typo is reported at once.
"""

import errno
import gc
import importlib
import os
import sys
import traceback
from pathlib import Path

import fire
from fire.decorators import SetParseFn

from config import OPTIONS, PROTOCOLS, RENAMED_OPTIONS
from runtime import signals
from runtime.console import first_line, output_error, print_message, wrap_std_streams
from runtime.errors import UserError, WorkError, resolve_path
from runtime.options import closest_match, describe_renames, get_config, help_text, ignored_by_command, option_help

BUG_REPORT_ADDRESS = 'sally20921@snu.ac.kr (README.md, Contact)'
SINGLE_PROCESS_COMMANDS = ('check_dataloader', 'pack', 'export', 'report', 'select', 'runs')  # not for torchrun
OUTPUT_SUFFIX = {'infer': '.csv', 'runs': '.csv', 'report': '.html'}
# Endings of --output that are refused if they belong to another format; other endings are allowed.
KNOWN_SUFFIXES = ('.csv', '.html', '.json', '.npy', '.npz', '.parquet', '.pdf', '.png', '.pth', '.tsv', '.xlsx')
# {command: (module with a function of this name, description)}
COMMANDS = {
    'check_dataloader': (
        'commands.check_dataloader',
        'read every image, describe the batches, save a picture of the two views',
    ),
    'pack': ('commands.pack', 'write the images of --image_path as tar archives, perhaps resized, into --output'),
    'train': ('train', 'pretrain a backbone with SimSiam, or resume a run (--resume)'),
    'evaluate': ('evaluate', f'evaluate --ckpt_name: --protocol={", ".join(PROTOCOLS)}'),
    'infer': ('infer', 'predict the images of a folder with --ckpt_name, as a CSV file'),
    'ablate': (
        'commands.ablate',
        "train and evaluate the variants of an ablation (--ablation), and print them beside the paper's numbers",
    ),
    'report': ('commands.report', 'an HTML page on a run: curves, views, neighbors, confusion, map of features'),
    'select': (
        'commands.select',
        'images to label first, near-duplicates and outliers, by the features of --ckpt_name: CSV and pictures',
    ),
    'runs': (
        'commands.list_runs',
        'list the runs under --ckpt_path: state, metrics, options that differ; --diff=RUN1,RUN2',
    ),
    'embed': (
        'commands.embed',
        'write the features of the images of a folder (test or val, if it has splits), as .npz, .csv or .parquet',
    ),
    'export': ('commands.export', 'write the backbone for torchvision, timm, detectron2, ONNX or safetensors'),
}


def make_entry_point(command):
    """Return the function that Fire calls for `command`: it checks the options, then imports the command's module."""

    @SetParseFn(str)  # keep texts: Fire would guess types from the values
    def run(*positional, **options):
        try:
            args = read_options(command, positional, options)
        except UserError:
            if is_main_process():
                raise
            sys.exit(2)  # rank 0 prints the error
        if command == 'runs':  # without importing torch
            importlib.import_module(COMMANDS[command][0]).runs(args)
            return
        from runtime import distributed
        from runtime.environment import shorten_tmpdir, tune_malloc
        from runtime.messages import set_quiet

        tune_malloc()
        shorten_tmpdir()
        set_quiet(args.quiet)
        with signals.signal_handlers():
            try:
                getattr(importlib.import_module(COMMANDS[command][0]), command)(args)
            except signals.Interrupted:  # all ranks stop at the same step
                distributed.destroy_process_group()
                raise
        distributed.destroy_process_group()

    return run


def is_main_process():
    """Whether this is rank 0, without importing torch."""
    return not int(os.environ.get('RANK', 0))


def read_options(command, positional, options):
    """Parse and check the options of a command line, and print notes and warnings. Returns args. Raises UserError."""
    if positional:
        raise UserError(f'{positional[0]!r} is not an option: options are given as --name=value')
    args = get_config(**options)
    for line in describe_renames(options) if is_main_process() else ():
        print_message('warning', line)
    if command in SINGLE_PROCESS_COMMANDS and int(os.environ.get('WORLD_SIZE', 1)) > 1:
        raise UserError(f'{command} runs in one process: start it without torchrun')
    if (
        command not in ('train', 'check_dataloader')
        or args.from_run
        or args.ckpt_name
        or args.resume not in ('', 'auto')
    ):
        args.preset_from_images = False
    has_choice = (
        {'preset', 'ckpt_name', 'from_run'} & args.explicit
        or args.resume not in ('', 'auto')
        or args.preset_from_images
    )
    if not has_choice and not args.quiet and command in ('train', 'check_dataloader'):
        state = 'exists' if args.preset == 'imagenet' else 'does not exist'
        print(f'preset=auto: data/imagenet/train {state}, so the preset is {args.preset}', flush=True)
    if args.output and command != 'pack' and (command, args.format) != ('export', 'timm'):  # which write a folder
        check_output(args.output, command)
    for name in ignored_by_command(args, command) if is_main_process() else ():
        print_message('warning', f'--{name} has no effect on {command}')
    return args


def check_output(output, command):
    """Raise UserError if --output is a folder, or has the ending of another format than the command writes."""
    path, written = resolve_path(output), OUTPUT_SUFFIX.get(command)
    if path.is_dir():
        raise UserError(f'--output={output} is a folder: name a file in it')
    if written and path.suffix.lower() in {*KNOWN_SUFFIXES} - {written}:
        raise UserError(f'--output={output}: {command} writes a {written}, and nothing else')


def reject_valueless_options(words):
    """Raise UserError for an option without its value, which Fire would read as True."""
    before = ''
    for word, following in zip(words, [*words, '--'][1:], strict=True):
        name = word.removeprefix('--').replace('-', '_')
        name = RENAMED_OPTIONS.get(name, name)
        value_of = before.startswith('--') and '=' not in before  # --learning_rate -1
        if word.startswith('-') and not word.startswith('--') and not value_of:
            raise UserError(f'{word!r} is not an option: options are given as --name=value')
        positive = name.removeprefix('no').removeprefix('_')
        if word.startswith('--no') and name not in OPTIONS and positive in OPTIONS:  # Fire's syntax for False
            raise UserError(f'{word} is not an option: --{positive}=<value> sets it')
        before = word
        needs = word.startswith('--') and name in OPTIONS and OPTIONS[name].type is not bool
        if needs and following[:1] == '-' and following[1:2] not in '0123456789.' and '=' not in word:
            raise UserError(f'--{name} is given without a value: --{name}=...; {OPTIONS[name].metadata["meaning"]}')


def check_torchrun_env(command):
    """Check the variables of torchrun. Raises UserError for contradictions; warns if srun has started several
    independent processes."""
    env, hint = {}, 'torchrun sets it for each process: start with torchrun, or unset it'
    for name, least in (('WORLD_SIZE', 1), ('RANK', 0), ('LOCAL_WORLD_SIZE', 1), ('LOCAL_RANK', 0)):
        text = os.environ.get(name)
        if text is None:
            continue
        if not text.isdecimal():
            raise UserError(f'{name}={text} is in the environment and is not a number; {hint}')
        if int(text) < least:
            raise UserError(f'{name}={text} is in the environment and is not a number of processes; {hint}')
        env[name] = int(text)
    world = env.get('WORLD_SIZE', 1)
    local_world = min(world, env.get('LOCAL_WORLD_SIZE', world))
    for name, size, count in (('RANK', 'WORLD_SIZE', world), ('LOCAL_RANK', 'LOCAL_WORLD_SIZE', local_world)):
        if env.get(name, 0) >= count:
            raise UserError(f'{name}={env[name]} is in the environment and must be below {size}={count}; {hint}')
    missing = [name for name in ('RANK', 'MASTER_ADDR', 'MASTER_PORT') if not os.environ.get(name)]
    if world > 1 and missing:
        raise UserError(f'WORLD_SIZE={world} is in the environment, and {missing[0]} is not; {hint}')
    port = os.environ.get('MASTER_PORT', '')  # Kubernetes sets it to an address for a service called master
    if world > 1 and not (port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(f'MASTER_PORT={port} is in the environment and is not a port from 1 to 65535; {hint}')
    if os.environ.get('SLURM_STEP_NUM_TASKS', '1') != '1' and world == 1 and command in ('train', 'ablate'):
        print_message(
            'warning',
            f'srun has started {os.environ["SLURM_STEP_NUM_TASKS"]} processes, and each trains a run of its own; to '
            'train one together start one torchrun task per machine (runtime/README.md)',
        )


def main(argv):
    """Run a command line. Returns the exit code: 0 success, 1 failed work, 2 bad use, 128 + number for a signal."""
    if not argv or argv[0] in ('--help', '-h', 'help'):
        print('python3 cli.py <command> --option=value ...\n')
        print('\n'.join(f'  {name:18}{purpose}' for name, (_, purpose) in COMMANDS.items()))
        print('\npython3 cli.py <command> --help lists the options of a command, --help=<option> tells more of one.')
        return 0
    command = argv[0]
    try:
        if command.startswith('--help='):
            print(option_help(command.removeprefix('--help=')))
            return 0
        if command not in COMMANDS:
            raise UserError(f'there is no command {command!r}; did you mean {closest_match(command, COMMANDS)}?')
        if help_words := [word for word in argv if word.startswith('--help=')]:
            print(option_help(help_words[0].removeprefix('--help=')))
            return 0
        if {'--help', '-h'} & set(argv):
            print(f'{command}: {COMMANDS[command][1]}\n\n{help_text(command)}')
            return 0
        if '-' in argv or '--' in argv:  # Fire's separators, after which it ignores words
            raise UserError("'-' alone is not an option: options are given as --name=value")
        reject_valueless_options(argv[1:])
        check_torchrun_env(command)
        fire.Fire({name: make_entry_point(name) for name in COMMANDS}, argv, name='cli.py')
    except (UserError, WorkError) as error:
        return print_error(error, 2 if isinstance(error, UserError) else 1)
    except OSError as error:
        return explain_os_error(error)
    except KeyboardInterrupt:
        print('\nstopped', file=sys.stderr)
        return 130
    except signals.Interrupted as end:
        if is_main_process():
            print(end, file=sys.stderr)
        return 128 + end.number
    except Exception as error:
        if place := 'runtime.device' in sys.modules and sys.modules['runtime.device'].is_oom(error):
            return print_error(f'{place} is out of memory: {first_line(error)}')
        if type(error).__module__.startswith(('torch._dynamo', 'torch._inductor')):
            return print_error(f'torch.compile fails: {first_line(error)[:200]}; --compile=False turns it off')
        if dead_ranks := 'runtime.distributed' in sys.modules and sys.modules['runtime.distributed'].dead_ranks():
            return print_error(f'{dead_ranks}: the last checkpoint is intact, and --resume=auto resumes from it')
        return print_unexpected(error)
    return 0


def explain_os_error(error):
    """Print an OSError as one line. Returns the exit code."""
    name = os.fsdecode(error.filename2 or error.filename or '')
    if name and isinstance(error, FileExistsError | NotADirectoryError):
        for path in (*reversed(Path(name).parents), Path(name)):
            if path.is_file():
                return print_error(f'{path} is a file, but a folder is needed there', 2)
    if error.errno in (errno.ENOSPC, errno.EDQUOT) and not name:
        return print_error(f'{error.strerror}: --ckpt_path, --log_path or --cache_path lies on a full disk')
    return print_error(
        f'{error.strerror or error}' + (f' ({name})' if name else ''), 2 if error.errno == errno.ENAMETOOLONG else 1
    )


def print_unexpected(error):
    """Print an unexpected exception with its traceback and how to report it. Returns the exit code."""
    if type(error).__name__ == 'WorkerException':  # its text is the traceback of the dataloader worker
        print(error, file=sys.stderr)
    else:
        traceback.print_exception(error)
    return print_error(
        f'this is a bug of this program: please send the lines above and the command to {BUG_REPORT_ADDRESS}'
    )


def print_error(reason, code=1):
    """Print an error, unless another rank has printed it. Returns the exit code."""
    if 'runtime.distributed' not in sys.modules or sys.modules['runtime.distributed'].claim_message(str(reason)):
        print_message('error', reason)
    return code


if __name__ == '__main__':
    wrap_std_streams()
    code = main(sys.argv[1:])
    if reason := output_error():
        worked = sys.argv[1:2] in (['train'], ['ablate'])  # their output is in the run's log.txt as well
        print_message('warning' if worked else 'error', f'the output is incomplete: {reason}')
        code = code if worked else code or 1
    gc.freeze()  # skips the last garbage collection, which takes a second with torch
    sys.exit(code)
