"""runs: a table of all runs in --ckpt_path: state, epoch, loss, std, rank, best epoch, kNN and linear accuracy, and
options that differ.

It reads only small files and does not import torch: a thousand runs take about a second.
"""

import shutil
import socket
import sys

from config import OPTIONS, READING
from runtime.checkpoints.best_epoch import find_best_epoch
from runtime.console import format_columns, truncate
from runtime.errors import UserError, resolve_path
from runtime.files import atomic_write, csv_writer, is_number, is_result_for, read_in_order, read_json, read_metrics
from runtime.options import rename_options
from runtime.run_lock import LOCK_FILE, is_alive

# Columns to sort by, and whether the largest value comes first.
COLUMNS = {
    'run': False,
    'state': False,
    'epoch': True,
    'loss': False,
    'std': True,
    'rank': False,
    'best': True,
    'knn': True,
    'linear': True,
}
# Allowed types of each option's value in JSON.
TYPES = {name: (option.type, int) if option.type is float else (option.type,) for name, option in OPTIONS.items()}
# Options of the call and the machine, which are not shown.
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
    """Print the table, sorted by --sort, or with --diff the options of two runs; with --output also write a CSV file.
    Returns the rows. Raises UserError if there is no run, or a run of --diff does not exist.
    """
    root = resolve_path(args.ckpt_path)
    marks = ('run.json', 'metrics.jsonl', 'loss_*_epoch_*')  # a run folder has one of these
    folders = sorted({path.parent for mark in marks for path in root.glob(f'*/{mark}')})
    if not folders:
        raise UserError(f'there is no run in {root} yet: python3 cli.py train')
    if args.diff:
        return diff_runs(root, [name.strip() for name in args.diff.split(',')], args.output)
    every = [read_run_options(folder) for folder in folders]
    entries = [(run_row(folder, options), options) for folder, options in zip(folders, every, strict=True)]
    readable = [options for options in every if options]
    differing = varying_options(readable)
    majority = {name: most_frequent([options.get(name) for options in readable]) for name in differing}
    for row, options in entries:
        deviating = [name for name in differing if name in options and options[name] != majority[name]]
        row['options'] = ' '.join(f'{name}={options[name]}' for name in deviating)
    rows = sort_rows([row for row, _ in entries], args.sort)
    print(format_table(rows, None if args.output or not sys.stdout.isatty() else shutil.get_terminal_size().columns))
    if args.output:
        write_table(resolve_path(args.output), [[*rows[0]], *(row.values() for row in rows)])
    return rows


def write_table(path, rows):
    """Write rows, with the titles first, as a CSV file."""
    atomic_write(path, csv_writer(rows))
    print(f'written to {path}')


def run_row(folder, options):
    """Return the row of a run: {column: text}; '' for missing values. best: the best epoch of a run from pretrained
    weights, to which knn and linear belong; the other columns, and all of other runs, belong to the last epoch. linear:
    the newest result with the preprocessing of the run."""
    lines, last = read_metrics(folder / 'metrics.jsonl'), {}
    for line in lines:
        if line['epoch'] or not lines[-1]['epoch']:  # skip epoch 0, the untrained network
            last = {**last, **line}
    at_end = {
        name: last.get(f'pretraining/{tag}')
        for name, tag in (('loss', 'loss'), ('std', 'std'), ('knn', 'knn_top1'), ('rank', 'rank'))
    }
    epochs, epoch = options.get('max_epochs'), last.get('epoch', 0)
    best = find_best_epoch(folder)  # the one that evaluate takes of a run from pretrained weights
    evaluated = epoch if best is None else best
    for line in lines:
        if line['epoch'] == best and 'pretraining/knn_top1' in line:
            at_end['knn'] = line['pretraining/knn_top1']  # of the epoch of `linear`
    results = [content for _, content in read_in_order(folder.glob('evaluate_linear*.json'))]
    linear = [
        result
        for result in results
        if is_number(result.get('top1'))
        and result.get('epoch', evaluated) == evaluated
        and is_result_for(result, options.get('image_path'))
        and is_read_as_in_run(result, options)
    ]
    number = {'loss': '.4f', 'std': '.3f', 'knn': '.2f', 'rank': '.1f'}
    return {
        'run': folder.name,
        'state': run_status(folder, epoch, epochs),
        'epoch': f'{epoch}/{epochs or "?"}',
        **{
            name: '' if at_end[name] is None else format(at_end[name], number[name]) for name in ('loss', 'std', 'rank')
        },
        'best': '' if best is None else f'{best}',
        'knn': '' if at_end['knn'] is None else format(at_end['knn'], number['knn']),
        'linear': f'{linear[-1]["top1"]:.2f}' if linear else '',
    }


def is_read_as_in_run(result, options):
    """Whether a result is of images that were read with the options of its run, and of its average with the start."""
    settings = result.get('settings', {})  # early versions have none, and fewer options
    names = (*READING, 'start_share') if result.get('epoch') else READING  # of the start any average is the start
    return all(settings.get(name, options[name]) == options[name] for name in names if name in options)


def run_status(folder, epoch, epochs):
    """Return the state of a run: running (or running on another machine), lost (its process died), stopped, finished,
    or unknown (no run.json)."""
    mark = read_json(folder / LOCK_FILE)
    if mark:
        if mark.get('host') != socket.gethostname():
            return f'running on {mark.get("host")}'
        return 'running' if is_alive(mark) else 'lost'
    if not epochs:
        return 'unknown'
    return 'finished' if epoch >= epochs else 'stopped'


def read_run_options(folder):
    """Read the options of a run from run.json; {} if it is damaged. Values of a wrong type are skipped."""
    saved = read_json(folder / 'run.json').get('args', {})
    saved = rename_options(saved) if isinstance(saved, dict) else {}
    return {name: value for name, value in saved.items() if type(value) in TYPES.get(name, ())}


def varying_options(options):
    """Return the names of options that differ between runs. options: a list of dicts."""
    names = [name for name in OPTIONS if name not in NOT_SHOWN]
    return [name for name in names if len({repr(each.get(name)) for each in options}) > 1]


def most_frequent(values):
    """Return the most frequent value; None if there are 100 different ones or more."""
    return max(dict.fromkeys(values), key=values.count) if len({*values}) < 100 else None


def sort_rows(rows, column):
    """Sort rows by a column; those without a value come last."""
    if column in ('run', 'state'):
        return sorted(rows, key=lambda row: row[column])
    with_it = [row for row in rows if row[column] not in ('', 'nan')]
    with_it.sort(key=lambda row: float(row[column].split('/')[0]), reverse=COLUMNS[column])
    return with_it + [row for row in rows if row[column] in ('', 'nan')]


def format_table(rows, width):
    """Format rows as a table with titles. width: of the terminal, to truncate lines; None for no limit."""
    text = format_columns([[*rows[0]], *(row.values() for row in rows)])
    return '\n'.join(line if not width else truncate(line, width) for line in text)


def diff_runs(root, names, output=''):
    """Print the options and last metrics in which two runs differ, and write them as CSV with `output`. Returns
    rows."""
    for name in names:
        if not (root / name / 'run.json').is_file():
            raise UserError(f'--diff: there is no run {name} in {root}; python3 cli.py runs lists them')
    if len(names) != 2:
        raise UserError('--diff needs two runs: --diff=RUN1,RUN2')
    options = [read_run_options(root / name) for name in names]
    rows = [run_row(root / name, each) for name, each in zip(names, options, strict=True)]
    differences = [(f'--{name}', *(str(each.get(name)) for each in options)) for name in varying_options(options)]
    differences += [
        (name, *(row[name] for row in rows)) for name in COLUMNS if name != 'run' and rows[0][name] != rows[1][name]
    ]
    lines = [('', *names), *differences]
    print('\n'.join(format_columns(lines)))
    if output:
        write_table(resolve_path(output), [('option', *names), *differences])
    return differences
