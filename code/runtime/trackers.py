"""A run's numbers in a tracker beside TensorBoard: Weights & Biases, trackio or MLflow, imported when asked for."""

import logging
import os
from dataclasses import asdict

from config import OF_THE_CALL
from errors import UserError, path_of
from runtime.console import complain
from runtime.distributed import rank
from runtime.environment import extra
from runtime.files import read_json

PROJECT = 'simsiam'


class Tracker:
    """What `Logger` hands scalars to. log, finish: the tracker's own, log of ({tag: number}, epoch)."""

    def __init__(self, name, log, finish):
        self.name, self.their_log, self.finish = name, log, finish

    def log(self, epoch, values):
        """A tracker that fails, for its network perhaps, is warned of once and ends no run."""
        try:
            self.their_log(values, epoch)
        except Exception as error:
            complain('warning', f'--tracker={self.name} gets no more of this run: {said(error)}')
            self.their_log = lambda *_: None

    def close(self):
        try:
            self.finish()
        except Exception as error:
            complain('warning', f'--tracker={self.name} did not end well: {said(error)}')


def said(error):
    """What an exception says, on one line."""
    return ' '.join(str(error).split())


def package_of(args):
    """The module of --tracker, None for none. Raises UserError where it is missing."""
    return None if args.tracker == 'none' else extra(args.tracker, f'--tracker={args.tracker}')


def tracker_of(args, run):
    """The Tracker of --tracker for a run folder: the same entry there, whenever it is gone on with or evaluated; None
    for none, and in all processes but the first. Raises UserError where its package is missing or it will not start."""
    if args.tracker == 'none' or rank():
        return None
    begun = ''.join(c for c in read_json(run / 'run.json').get('started', '') if c.isdigit())
    mark = f'{run.name}-{begun}'
    package = package_of(args)
    path_of(args.log_path).mkdir(parents=True, exist_ok=True)
    start = {'wandb': wandb, 'trackio': trackio, 'mlflow': mlflow}[args.tracker]
    try:
        return Tracker(args.tracker, *start(package, args, run, mark))
    except Exception as error:
        raise UserError(
            f'--tracker={args.tracker} does not start: {said(error)}; --tracker=none goes without'
        ) from None


def wandb(package, args, run, mark):
    """WANDB_PROJECT, WANDB_MODE=offline and whatever else it knows are its own. Its steps only rise: epochs are one
    more number to it."""
    logs = path_of(args.log_path)
    entry = package.init(
        project=os.environ.get('WANDB_PROJECT', PROJECT),
        id=mark,
        name=run.name,
        resume='allow',
        dir=logs,
        config=asdict(args),
        settings=package.Settings(console='off', init_timeout=60),
    )
    entry.define_metric('epoch')
    entry.define_metric('*', step_metric='epoch')
    return lambda values, epoch: entry.log({'epoch': epoch, **values}), entry.finish


def trackio(package, args, run, mark):
    """Kept in TRACKIO_DIR, by default where `trackio show` looks."""
    package.init(project=PROJECT, name=mark, config=asdict(args), resume='allow')
    return lambda values, epoch: package.log(values, step=epoch), package.finish


def mlflow(package, args, run, mark):
    """In MLFLOW_TRACKING_URI, or else a file in the log folder."""
    for name in ('mlflow', 'alembic'):
        logging.getLogger(name).setLevel(logging.WARNING)
    logs = path_of(args.log_path)
    package.set_tracking_uri(os.environ.get('MLFLOW_TRACKING_URI', f'sqlite:///{logs}/mlflow.db'))
    project = os.environ.get('MLFLOW_EXPERIMENT_NAME', PROJECT)
    if not package.get_experiment_by_name(project):
        local = {} if 'MLFLOW_TRACKING_URI' in os.environ else {'artifact_location': f'{logs}/mlflow'}
        package.create_experiment(project, **local)
    package.set_experiment(project)
    known = package.search_runs(filter_string=f"tags.mark = '{mark}'", output_format='list')
    if known:
        package.start_run(run_id=known[0].info.run_id)
        before = known[0].data.params  # which stay as they were first said
        now = {name: value for name, value in asdict(args).items() if name not in OF_THE_CALL}
        package.set_tags({f'now {name}': value for name, value in now.items() if before.get(name) != str(value)})
    else:
        package.start_run(run_name=run.name, tags={'mark': mark})
        package.log_params(asdict(args))
    return lambda values, epoch: package.log_metrics(values, step=epoch), package.end_run
