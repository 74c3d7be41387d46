"""What the README's commands meet when test_readme.py runs them as they are written: the same programs, made small.

    python stand_in.py NAME [ARGUMENTS ...]

NAME is the program that a command calls. python3 runs the real cli.py and benchmarks on fewer epochs, small networks
and few images; torchrun is the real one with two processes on this machine; tensorboard is started, waited for and
ended. docker, sudo, srun and scontrol are not to be had, and are played. make does all but `make test`, which is what
runs this.
"""

import os
import subprocess
import sys
from pathlib import Path

import warm

FEW = ['--max_epochs=1', '--batch_size=8', '--num_workers=1', '--knn_every=1', '--amp=off']
SMALL = [
    '--backbone=resnet18',
    '--image_size=32',
    '--proj_dim=32',
    '--pred_dim=8',
    '--probe_epochs=2',
    '--cache_epochs=1',
]
TUNE = ['--finetune_epochs=1']
JUDGE = {
    'linear': ['--probe_epochs=2', '--cache_epochs=1'],
    'semi': TUNE,
    'transfer': TUNE,
    'detection': ['--detection_epochs=1', '--detection_size=64', '--detection_batch_size=2'],
}
BENCH = {
    'kill.py': ['--kills=1', '--terms=1', '--groups=1', '--image_path=data/photos', '--batch_size=8'],
    'cifar10.py': ['--epochs=1', '--supervised_epochs=1', *FEW[1:], *SMALL, '--backbone=small'],
    'switches.py': ['--image_path=data/photos', *FEW[1:3], *SMALL, '--backbone=small'],
}
# What makes the other benchmarks short: (as it stands there, what is put in its place).
SHORTER = {
    'cifar10.py': [],
    'loader.py': [('PHOTOS, TINY = 768, 6144', 'PHOTOS, TINY = 64, 512')],
    'step.py': [("'cifar10', 64, 32, 6", "'cifar10', 8, 32, 1"), ("'demo', 64, 48, 40", "'demo', 8, 48, 2")],
    'epoch.py': [("'cifar10', 64, 32, 6", "'cifar10', 8, 32, 2"), ("'demo', 64, 48, 40", "'demo', 8, 48, 2")],
}


def smaller(command, options):
    """What is added to the options of `cli.py command`; what stands last counts."""
    if command == 'train' and any(option.startswith('--init_from=') for option in options):
        return [*FEW, *SMALL[1:2]]
    if command == 'train' and '--preset=demo' in options:
        return ['--max_epochs=1', '--max_minutes=0.05', '--knn_every=0', '--probe_epochs=2']
    if command == 'train' and any(option.startswith('--preset=') for option in options):
        return [*FEW, *SMALL, *(['--backbone=small'] if '--preset=cifar10' in options else [])]
    if command == 'train' and any(
        option.startswith('--image_path=') for option in options
    ):  # weights are not to be had
        return [*FEW, *SMALL[1:2], '--init_from=data/checkpoint_0099.pth.tar', '--labels=1']
    if command == 'train':
        return (
            ['--max_epochs=6', '--probe_epochs=30']
            if options == ['--evaluate_after=True', '--knn_raw_pixels=True']
            else ['--max_epochs=1', '--max_minutes=0.05', '--knn_every=0', '--model_name=demo']
        )
    if command == 'ablate':
        return ['--preset=demo', '--image_path=data/photos', *FEW, *SMALL[1:]]
    if command == 'evaluate':
        said = dict(option.partition('=')[::2] for option in options)
        protocol = 'compare' if '--beside' in said else said.get('--protocol', 'linear')
        by_lbfgs = protocol == 'linear' and '_photos_' in said.get('--ckpt_name', '')  # nothing to shorten
        logistic = protocol == 'transfer' and said.get('--transfer') != 'finetune'
        own = [] if logistic or by_lbfgs else JUDGE.get(protocol, [])
        demo = any(option == '--ckpt_name=model_name_simsiam_ckpt_0' for option in options)  # 5,000 drawings are many
        own_set = protocol not in ('transfer', 'detection')
        small = (
            ['--image_path=data/cifar10-jpeg'] if demo else ['--image_size=32']
        )  # of a backbone alone, 224 otherwise
        return [*own, *(small if own_set else []), '--num_workers=1', '--amp=off']
    return FEW[1:3] if command == 'check_dataloader' else []


def python(given):
    """The exit code of `python *given`: of a warm one (warm.py) where there is one."""
    if warm.WARM not in os.environ or given[0] == '-c':
        return subprocess.run([sys.executable, *given], check=False).returncode
    return warm.Process(given, os.getcwd(), os.environ, [0, 1, 2]).wait()


def call(name, given):
    """The exit code of the stand-in for program `name`."""
    if name in ('python3', 'python'):
        if given[0] == 'cli.py' and len(given) > 1:
            given = [*given, *smaller(given[1], given[2:])]
        elif given[0].startswith('bench/'):
            bench = Path(given[0]).name
            given = [*([__file__, 'once'] if bench in SHORTER else []), *given, *BENCH.get(bench, [])]
        return python(given)
    if name == 'once':  # a benchmark that goes each of its ways once
        sys.argv, path = given, Path(given[0]).absolute()
        sys.path.insert(0, str(path.parent))
        import common

        from runtime import precision

        untried = {'ratio': 0.0, 'failed': 'not tried'}
        for module, function, short in (  # each takes seconds, and no figure is read
            (common, 'run_in_turns', lambda ours, other, rounds=1: [common.speed(ours), common.speed(other), 1.0]),
            (common, 'matmul_rate', lambda device, dtype: 1e12),
            (precision, 'cached_benchmark', lambda path, options: untried),
        ):
            assert hasattr(module, function), f'{module.__name__} has no {function}'
            setattr(module, function, short)
        text = path.read_text()
        for long, short in SHORTER[path.name]:
            assert long in text, f'{path.name} has no {long}'
            text = text.replace(long, short)
        exec(compile(text, path, 'exec'), {'__name__': '__main__'})
        return 0
    if name == 'torchrun':
        script = given.index('cli.py')
        command = [
            '--standalone',
            '--nproc_per_node=2',
            *given[script:],
            *smaller(given[script + 1], given[script + 2 :]),
        ]
        return python(['-m', 'torch.distributed.run', *command])
    if name == 'tensorboard':
        command = [sys.executable, '-m', 'tensorboard.main', '--port=0', *given]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            serves = any('TensorBoard 2' in line and 'http' in line for line in process.stderr)
            process.terminate()
        return 0 if serves else 1
    if name == 'make':
        return 0 if given == ['test'] else subprocess.run(['/usr/bin/make', *given], check=False).returncode
    if name == 'pip3':
        return subprocess.run([sys.executable, '-m', 'pip', *given], check=False).returncode
    if name == 'sudo':
        return subprocess.run(['env', *given], check=False).returncode
    if name == 'srun':
        return subprocess.run(given, check=False).returncode
    print({'docker': f'docker {" ".join(given)}', 'scontrol': 'localhost'}[name])
    return 0


if __name__ == '__main__':
    sys.exit(call(sys.argv[1], sys.argv[2:]))
