"""Experiment trackers besides TensorBoard: Weights & Biases, trackio, MLflow. They are imported when used."""

import logging
import os
from dataclasses import asdict

from config import NOT_RESTORED_OPTIONS
from runtime.distributed import rank
from runtime.environment import require_package
from runtime.errors import UserError, resolve_path
from runtime.files import read_json
from runtime.messages import warn

PROJECT = 'simsiam'


class Tracker:
    """An experiment tracker. log: function ({tag: number}, epoch); finish: function ()."""

    def __init__(self, name, log, finish):
        self.name, self.log_fn, self.finish = name, log, finish

    def log(self, epoch, values):
        """Log scalars. An error, of the network for example, is warned of once and does not end the run."""
        try:
            self.log_fn(values, epoch)
        except Exception as error:
            warn(f'--tracker={self.name} is turned off for this run: {one_line(error)}')
            self.log_fn = lambda *_: None

    def close(self):
        try:
            self.finish()
        except Exception as error:
            warn(f'--tracker={self.name} failed to close: {one_line(error)}')


def one_line(error):
    """Return the message of an exception on one line."""
    return ' '.join(str(error).split())


def import_tracker(args):
    """Import the module of --tracker; None for none. Raises UserError if it is not installed."""
    return None if args.tracker == 'none' else require_package(args.tracker, f'--tracker={args.tracker}')


def make_tracker(args, run):
    """Start the Tracker of --tracker for a run folder. Resuming or evaluating a run continues its entry. Returns None
    for none, and on all ranks but 0. Raises UserError if the package is not installed or does not start."""
    if args.tracker == 'none' or rank():
        return None
    begun = ''.join(c for c in read_json(run / 'run.json').get('started', '') if c.isdigit())
    run_id = f'{run.name}-{begun}'
    package = import_tracker(args)
    resolve_path(args.log_path).mkdir(parents=True, exist_ok=True)
    start = {'wandb': wandb, 'trackio': trackio, 'mlflow': mlflow}[args.tracker]
    try:
        return Tracker(args.tracker, *start(package, args, run, run_id))
    except Exception as error:
        raise UserError(
            f'--tracker={args.tracker} does not start: {one_line(error)}; --tracker=none turns it off'
        ) from None


def wandb(package, args, run, run_id):
    """Start Weights & Biases, configured by its own variables (WANDB_PROJECT, WANDB_MODE). Its steps cannot decrease,
    so the epoch is logged as a metric. Returns (log, finish)."""
    logs = resolve_path(args.log_path)
    entry = package.init(
        project=os.environ.get('WANDB_PROJECT', PROJECT),
        id=run_id,
        name=run.name,
        resume='allow',
        dir=logs,
        config=asdict(args),
        settings=package.Settings(console='off', init_timeout=60),
    )
    entry.define_metric('epoch')
    entry.define_metric('*', step_metric='epoch')
    return lambda values, epoch: entry.log({'epoch': epoch, **values}), entry.finish


def trackio(package, args, run, run_id):
    """Start trackio, which stores in TRACKIO_DIR. Returns (log, finish)."""
    package.init(project=PROJECT, name=run_id, config=asdict(args), resume='allow')
    return lambda values, epoch: package.log(values, step=epoch), package.finish


def mlflow(package, args, run, run_id):
    """Start MLflow, at MLFLOW_TRACKING_URI or in a file in the log folder. Returns (log, finish)."""
    for name in ('mlflow', 'alembic'):
        logging.getLogger(name).setLevel(logging.WARNING)
    logs = resolve_path(args.log_path)
    package.set_tracking_uri(os.environ.get('MLFLOW_TRACKING_URI', f'sqlite:///{logs}/mlflow.db'))
    project = os.environ.get('MLFLOW_EXPERIMENT_NAME', PROJECT)
    if not package.get_experiment_by_name(project):
        local = {} if 'MLFLOW_TRACKING_URI' in os.environ else {'artifact_location': f'{logs}/mlflow'}
        package.create_experiment(project, **local)
    package.set_experiment(project)
    known = package.search_runs(filter_string=f"tags.mark = '{run_id}'", output_format='list')
    if known:
        package.start_run(run_id=known[0].info.run_id)
        before = known[0].data.params  # parameters cannot be changed
        now = {name: value for name, value in asdict(args).items() if name not in NOT_RESTORED_OPTIONS}
        package.set_tags({f'now {name}': value for name, value in now.items() if before.get(name) != str(value)})
    else:
        package.start_run(run_name=run.name, tags={'mark': run_id})
        package.log_params(asdict(args))
    return lambda values, epoch: package.log_metrics(values, step=epoch), package.end_run
