"""`runs`: every run of --ckpt_path in a table: state, epoch, loss, std, kNN, rank, result, and the options that differ.

Reads small files alone and imports nothing heavy: a thousand runs take about a second.
"""

import shutil
import socket
import sys

from config import OPTIONS
from runtime.console import format_columns, truncate
from runtime.errors import UserError, resolve_path
from runtime.files import atomic_write, csv_writer, is_number, is_result_for, read_in_order, read_json, read_metrics
from runtime.options import rename_options
from runtime.run_lock import LOCK_FILE, is_alive

# Columns that may be sorted by, and whether the largest comes first.
COLUMNS = {
    'run': False,
    'state': False,
    'epoch': True,
    'loss': False,
    'std': True,
    'knn': True,
    'rank': False,
    'linear': True,
}
# What a value of each option may be in a file of JSON.
TYPES = {name: (option.type, int) if option.type is float else (option.type,) for name, option in OPTIONS.items()}
# Of the call and the machine, not of what is trained.
NOT_SHOWN = {
    'model_name',
    'ckpt_path',
    'log_path',
    'cache_path',
    'resume',
    'ckpt_name',
    'output',
    'quiet',
    'num_workers',
    'device',
    'evaluate_after',
}


def runs(args):
    """Print the table, sorted by --sort, or with --diff two runs' options side by side; --output: also as CSV.

    Raises UserError where there is no run, or none of a name in --diff.
    """
    root = resolve_path(args.ckpt_path)
    marks = ('run.json', 'metrics.jsonl', 'loss_*_epoch_*')  # any of them makes a folder a run's
    folders = sorted({path.parent for mark in marks for path in root.glob(f'*/{mark}')})
    if not folders:
        raise UserError(f'there is no run in {root} yet: python3 cli.py train')
    if args.diff:
        return diff_runs(root, [name.strip() for name in args.diff.split(',')], args.output)
    every = [read_run_options(folder) for folder in folders]
    found = [(run_row(folder, options), options) for folder, options in zip(folders, every, strict=True)]
    known = [options for options in every if options]
    varied = varying_options(known)
    majority = {name: mode([options.get(name) for options in known]) for name in varied}
    for row, options in found:
        own = [name for name in varied if name in options and options[name] != majority[name]]
        row['options'] = ' '.join(f'{name}={options[name]}' for name in own)
    rows = sort_rows([row for row, _ in found], args.sort)
    print(format_table(rows, None if args.output or not sys.stdout.isatty() else shutil.get_terminal_size().columns))
    if args.output:
        write_table(resolve_path(args.output), [[*rows[0]], *(row.values() for row in rows)])
    return rows


def write_table(path, rows):
    """Rows, the first their titles, as CSV."""
    atomic_write(path, csv_writer(rows))
    print(f'written to {path}')


def run_row(folder, options):
    """What a run has come to, as text by column; '' for what it has not."""
    lines, last = read_metrics(folder / 'metrics.jsonl'), {}
    for line in lines:
        if line['epoch'] or not lines[-1]['epoch']:  # what the untrained network had is not the run's
            last = {**last, **line}
    at_end = {
        name: last.get(f'pretraining/{tag}')
        for name, tag in (('loss', 'loss'), ('std', 'std'), ('knn', 'knn_top1'), ('rank', 'rank'))
    }
    epochs, epoch = options.get('max_epochs'), last.get('epoch', 0)
    results = [content for _, content in read_in_order(folder.glob('evaluate_linear*.json'))]
    judged = [
        result
        for result in results
        if is_number(result.get('top1'))
        and result.get('epoch', epoch) == epoch
        and is_result_for(result, options.get('image_path'))
    ]
    number = {'loss': '.4f', 'std': '.3f', 'knn': '.2f', 'rank': '.1f'}
    return {
        'run': folder.name,
        'state': run_status(folder, epoch, epochs),
        'epoch': f'{epoch}/{epochs or "?"}',
        **{name: '' if value is None else format(value, number[name]) for name, value in at_end.items()},
        'linear': f'{judged[-1]["top1"]:.2f}' if judged else '',
    }


def run_status(folder, epoch, epochs):
    """finished; running, where its process is there (or on another machine said to be); stopped, saved; lost: its
    process is gone and has not said so; unknown: its run.json is."""
    mark = read_json(folder / LOCK_FILE)
    if mark:
        if mark.get('host') != socket.gethostname():
            return f'running on {mark.get("host")}'
        return 'running' if is_alive(mark) else 'lost'
    if not epochs:
        return 'unknown'
    return 'finished' if epoch >= epochs else 'stopped'


def read_run_options(folder):
    """The options that a run says it has, as far as they are of their types; none where run.json is damaged."""
    found = read_json(folder / 'run.json').get('args', {})
    found = rename_options(found) if isinstance(found, dict) else {}
    return {name: value for name, value in found.items() if type(value) in TYPES.get(name, ())}


def varying_options(options):
    """The options that are not the same in all runs."""
    names = [name for name in OPTIONS if name not in NOT_SHOWN]
    return [name for name in names if len({repr(of.get(name)) for of in options}) > 1]


def mode(values):
    """The first of those that come most often; None where there are too many to tell."""
    return max(dict.fromkeys(values), key=values.count) if len({*values}) < 100 else None


def sort_rows(rows, column):
    """Rows by a column; those that have no number there last."""
    if column in ('run', 'state'):
        return sorted(rows, key=lambda row: row[column])
    with_it = [row for row in rows if row[column] not in ('', 'nan')]
    with_it.sort(key=lambda row: float(row[column].split('/')[0]), reverse=COLUMNS[column])
    return with_it + [row for row in rows if row[column] in ('', 'nan')]


def format_table(rows, width):
    """Columns under their names; lines no longer than `width`, where there is one."""
    text = format_columns([[*rows[0]], *(row.values() for row in rows)])
    return '\n'.join(line if not width else truncate(line, width) for line in text)


def diff_runs(root, names, output=''):
    """Print the options and last numbers in which the named runs differ, perhaps also as CSV; returns them."""
    for name in names:
        if not (root / name / 'run.json').is_file():
            raise UserError(f'--diff: there is no run {name} in {root}; python3 cli.py runs lists them')
    if len(names) != 2:
        raise UserError('--diff wants two runs: --diff=RUN1,RUN2')
    options = [read_run_options(root / name) for name in names]
    rows = [run_row(root / name, of) for name, of in zip(names, options, strict=True)]
    found = [(f'--{name}', *(str(of.get(name)) for of in options)) for name in varying_options(options)]
    found += [
        (name, *(row[name] for row in rows)) for name in COLUMNS if name != 'run' and rows[0][name] != rows[1][name]
    ]
    lines = [('', *names), *found]
    print('\n'.join(format_columns(lines)))
    if output:
        write_table(resolve_path(output), [('option', *names), *found])
    return found
