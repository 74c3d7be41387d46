"""Options: each has one home, and none is ever silently ignored."""

import re

import pytest
import torch

import cli
from ckpt import get_model_ckpt
from config import OPTIONS, RENAMED_OPTIONS
from conftest import CODE, TINY, one_line, own_paths, run
from protocols.protocol import ignored_by_protocol
from runtime import options
from runtime.checkpoints.format import upgrade
from runtime.checkpoints.read_file import read_checkpoint
from runtime.errors import UserError, resolve_path
from runtime.options import get_config, ignored_by_command, ignored_in_train, option_help, options_by_theme, parse


def test_option_aliases_are_unique():
    aliases = [name for f in OPTIONS.values() for name in f.metadata['aliases'].split()]
    assert len(aliases) == len({*aliases})
    assert not {*aliases} & {*OPTIONS}


@pytest.mark.parametrize(
    ('typed', 'meant'),
    [
        ('batchsize', 'batch_size'),
        ('lerning_rate', 'learning_rate'),
        ('epochs', 'max_epochs'),
        ('augmentatoin', 'augmentation'),
        ('lr', 'learning_rate'),
        ('wd', 'weight_decay'),
        ('bs', 'batch_size'),
        ('arch', 'backbone'),
        ('gpu', 'device'),
        ('seed', 'random_seed'),
        ('workers', 'num_workers'),
        ('warmup', 'warmup_epochs'),
        ('Momentom', 'momentum'),
    ],
)
def test_unknown_option_suggests_nearest(typed, meant, capsys):
    assert cli.main(['train', f'--{typed}=1']) == 2
    assert f'unknown option --{typed}; the nearest is --{meant} ' in one_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    ('argument', 'said'),
    [
        ('--batch_size=many', '--batch_size needs a whole number'),
        ('--max_epochs=1.5', '--max_epochs needs a whole number'),
        ('--learning_rate=fast', '--learning_rate needs a number'),
        ('--learning_rate=nan', '--learning_rate needs a number'),
        *((f'--{name}=', f'--{name} is empty') for name in ('resume', 'ckpt_name', 'batch_size', 'quiet')),
        *((f'--{name}= ', f'--{name} is empty') for name in ('resume', 'output', 'batch_size')),
        *((f'--{name}', f'--{name} is given without a value') for name in OPTIONS if OPTIONS[name].type is not bool),
        ('--resume=a --init_from=b', '--resume and --init_from name two starts'),
        ('--ckpt_name=a --from_run=b', '--ckpt_name and --from_run name two starts'),
        ('--image_path=~nobody-of-this-name/x', 'no such user'),
        (f'--output={CODE}', 'is a folder: name a file in it'),
        ('--evaluate_after=perhaps', '--evaluate_after needs True or False'),
        ('--batch_size=1', '--batch_size must lie between 2 and'),
        ('--momentum=2', '--momentum must lie between 0.0 and'),
        ('--random_seed=-1', '--random_seed must lie between 0 and'),
        ('--backbone=resnet49', 'the nearest is resnet34'),
        ('--augmentation=mocov2', 'the nearest is moco'),
        ('--preset=imagnet', 'the nearest is imagenet'),
        ('--model_name=../up', '--model_name names a folder'),
        ('--device=gpu', '--device is auto, cpu, cuda'),
        ('word', "'word' is not an option"),
        ('-', "'-' alone is not an option"),
    ],
)
def test_invalid_value_exits_2(argument, said, capsys):
    assert cli.main(['train', '--preset=demo', *re.split(' (?=--)', argument)]) == 2
    assert said in one_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    ('command', 'name'), [('infer', 'a.parquet'), ('infer', 'a.JSON'), ('runs', 'a.xlsx'), ('report', 'a.csv')]
)
def test_output_with_wrong_ending_exits_2(command, name, tmp_path, capsys):
    assert cli.main([command, f'--output={tmp_path / name}']) == 2
    assert f'{name}: {command} writes a .' in one_line(capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_unknown_command_suggests_nearest(capsys):
    assert cli.main(['trian']) == 2
    assert 'did you mean train?' in one_line(capsys.readouterr().err)


def test_option_without_effect_warns(capsys, tmp_path):
    assert cli.main(['evaluate', '--momentum=0.5', f'--ckpt_path={tmp_path}']) == 2
    assert '--momentum has no effect on evaluate' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('command', 'idle'),
    [
        ('export', 'batch_size num_workers knn_k image_path on_unreadable device log_path cache_short_side'),
        ('check_dataloader', 'proj_dim predictor knn_k learning_rate amp'),
        ('select', 'knn_temperature log_path augmentation'),
        ('embed', 'val_fraction download knn_k num_select'),
        ('infer', 'log_path num_views protocol'),
        ('pack', 'device amp backbone'),
    ],
)
def test_ignored_by_command_lists_unused_options(command, idle):
    given = {name: OPTIONS[name].default for name in idle.split()}
    assert ignored_by_command(get_config(preset='demo', **given), command) == sorted(given)


@pytest.mark.parametrize(
    ('stage', 'idle'),
    [
        ('--protocol=knn', 'probe_epochs label_fraction detection_size crop_scale'),
        ('--protocol=linear', 'transfer_path finetune_epochs detector_init baseline'),
        ('--protocol=semi', 'probe_epochs transfer detector'),
        ('--protocol=transfer', 'probe_learning_rate finetune_epochs label_fraction'),
        ('--protocol=transfer --transfer=finetune', 'probe_epochs label_fraction detection_epochs'),
        ('--protocol=label_free', 'cache_features subset_list'),
    ],
)
def test_ignored_by_protocol_lists_unused_options(stage, idle):
    words = dict(word.removeprefix('--').split('=') for word in stage.split())
    given = {name: OPTIONS[name].default for name in (*idle.split(), 'batch_size')} | words
    given = {name: 'x' if value == '' else value for name, value in given.items()}
    assert ignored_by_protocol(get_config(preset='demo', **given)) == sorted(idle.split())


@pytest.mark.parametrize(
    ('words', 'names'),
    [
        ('optimizer=adamw momentum=0.5', ['momentum']),
        ('predictor=none pred_dim=5 fix_pred_lr=False', ['pred_dim', 'fix_pred_lr']),
        ('predictor=fixed fix_pred_lr=False', ['fix_pred_lr']),
        ('warmup_augmentation=simclr', ['warmup_augmentation']),
        ('warmup_augmentation=simclr warmup_epochs=1', []),
        ('augment_backend=worker cache_images=on', ['cache_images']),
        ('augment_backend=worker cache_images=off', []),
        ('knn_every=0 knn_k=5', ['knn_k']),
        ('init_from=x zero_init=False', ['zero_init']),
        ('zero_init=False', []),
        ('augmentation=mild blur_prob=0.1', ['blur_prob']),
        ('augmentation=mild blur_prob=0.1 warmup_epochs=1', []),
        ('momentum=0.5', []),
    ],
)
def test_ignored_in_train_lists_overridden_options(words, names):
    args = get_config(preset='demo', **dict(word.split('=') for word in words.split()))
    assert [name for name, _ in ignored_in_train(args)] == names


def test_help_lists_options_without_importing_torch(tmp_path):
    """It lists every option of the command with its default, and imports no torch: that is what makes it quick."""
    (tmp_path / 'torch.py').write_text('raise SystemExit("torch was imported")')
    done = run('train', '--help', env={'PYTHONPATH': str(tmp_path), 'PATH': ''})
    assert done.returncode == 0, done.stderr
    for name, option in OPTIONS.items():
        if 'train' in option.metadata['used_by']:
            assert re.search(
                rf'--{name}={re.escape(str(option.default))}.* {re.escape(option.metadata["meaning"])}', done.stdout
            ), name
    headings = re.findall(r'^(?=\w)(?!Presets|train)(.+)$', done.stdout, re.M)
    assert headings == [
        'Most used',
        'Data',
        'Views',
        'Model',
        'Ablations of the method',
        'Optimization',
        'Metrics and checkpoints',
        'Evaluation',
        'Files',
    ]
    assert len(done.stdout.split('Most used')[1].split('\n\n')[0].strip().splitlines()) == 10
    one = run('train', '--help=learning-rate', env={'PYTHONPATH': str(tmp_path), 'PATH': ''})
    assert 'preset     cifar10: 0.03' in one.stdout
    assert 'between    0 and 100' in one.stdout
    wrong = run('train', '--help=learning', env={'PYTHONPATH': str(tmp_path), 'PATH': ''})
    assert (wrong.returncode, 'nearest is --help=learning_rate' in wrong.stderr) == (2, True)
    typo = run('train', '--batchsize=3', env={'PYTHONPATH': str(tmp_path), 'PATH': ''})
    assert (typo.returncode, 'torch' in typo.stderr) == (2, False)


def test_options_have_theme_meaning_and_commands():
    grouped = [name for names in options_by_theme().values() for name in names]
    assert grouped == [*OPTIONS]
    for name, option in OPTIONS.items():
        said = option_help(name)
        assert option.metadata['meaning'] in said
        assert repr(option.default) in said
        assert all(command in said for command in option.metadata['used_by'])


def test_options_are_read_somewhere():
    """An option that nobody reads is an option that is ignored."""
    sources = [path.read_text() for path in CODE.rglob('*.py') if 'tests' not in path.parts]
    text = '\n'.join(sources)
    for name in OPTIONS:
        assert re.search(rf'args\.{name}\b', text), name


def test_presets_equal_published_settings():
    """Section 3 and appendix A for ImageNet, appendix D for CIFAR-10."""
    imagenet = {
        'backbone': 'resnet50',
        'stem': 'imagenet',
        'image_size': 224,
        'batch_size': 512,
        'learning_rate': 0.05,
        'weight_decay': 1e-4,
        'momentum': 0.9,
        'max_epochs': 100,
        'fix_pred_lr': True,
        'proj_layers': 3,
        'proj_dim': 2048,
        'pred_dim': 512,
        'augmentation': 'moco',
        'blur_prob': 0.5,
        'warmup_epochs': 0,
    }
    cifar10 = imagenet | {
        'backbone': 'resnet18',
        'stem': 'cifar',
        'image_size': 32,
        'learning_rate': 0.03,
        'weight_decay': 5e-4,
        'max_epochs': 800,
        'proj_layers': 2,
        'blur_prob': 0.0,
    }
    for preset, values in (('imagenet', imagenet), ('cifar10', cifar10)):
        args = get_config(preset=preset)
        assert {name: getattr(args, name) for name in values} == values
    assert get_config(preset='cifar10', max_epochs='7').max_epochs == 7


def test_preset_auto_is_imagenet_if_data_exists(tmp_path, monkeypatch):
    monkeypatch.setattr(options, 'ROOT', tmp_path)
    assert get_config().preset == 'demo'
    (tmp_path / 'data/imagenet/train').mkdir(parents=True)
    assert get_config().preset == 'imagenet'
    assert get_config(preset='auto').preset == 'imagenet'


def test_parse_accepts_typed_values():
    args = get_config(batch_size=32.0, evaluate_after=True, learning_rate='1e-3')
    assert (args.batch_size, args.evaluate_after, args.learning_rate) == (32, True, 1e-3)
    assert args.explicit == {'batch_size', 'evaluate_after', 'learning_rate'}
    with pytest.raises(UserError, match='whole number'):
        get_config(batch_size=True)


def test_resolve_path_is_relative_to_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_path('data/demo') == CODE.parent / 'data/demo'
    assert resolve_path('/somewhere').as_posix() == '/somewhere'


@pytest.mark.parametrize(
    ('words', 'said'),
    [
        (['--nooutput'], '--nooutput is not an option: --output=<value> sets it'),
        (['--no-quiet'], '--no-quiet is not an option: --quiet=<value> sets it'),
        (['-output'], "'-output' is not an option: options are given as --name=value"),
        (['--output', '-sort=loss'], '--output is given without a value'),
    ],
)
def test_option_without_value_exits_2(words, said, tmp_path, capsys, monkeypatch):
    """Fire would take them for True and False, and a file would have that name."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(['runs', *words]) == 2
    assert said in one_line(capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_help_of_option_without_command_prints_it(capsys):
    assert cli.main(['--help=LEARNING_RATE']) == 0
    assert capsys.readouterr().out.startswith('--learning_rate, a number: ')


def test_renamed_protocol_is_accepted_with_warning(tmp_path, capsys):
    assert get_config(preset='demo', protocol='spectrum').protocol == 'label_free'
    given = ['evaluate', '--protocol=spectrum', '--ckpt_name=none', f'--ckpt_path={tmp_path}']
    assert cli.main(given) == 2
    assert '--protocol=spectrum is called --protocol=label_free now' in capsys.readouterr().err


@pytest.mark.parametrize(('old', 'new'), RENAMED_OPTIONS.items())
def test_renamed_option_is_accepted_with_warning(old, new, tmp_path, capsys):
    """On a command line, in the options of a run and in a checkpoint; both names at once are refused."""
    limits, kind = OPTIONS[new].metadata, OPTIONS[new].type
    value = limits['choices'][-1] if limits['choices'] else limits['low'] or (True if kind is bool else 1)
    args = get_config(preset='demo', **{old: value})
    assert getattr(args, new) == parse(new, value)
    assert new in args.explicit
    assert cli.main(['evaluate', f'--{old}={value}', '--ckpt_name=none', f'--ckpt_path={tmp_path}']) == 2
    assert f'--{old} is called --{new} now' in capsys.readouterr().err
    assert cli.main(['evaluate', f'--{old}={value}', f'--{new}={value}']) == 2
    assert 'leave one out' in capsys.readouterr().err
    assert old not in OPTIONS


def test_checkpoint_with_renamed_options_loads(drawn, tmp_path):
    options = ['--max_epochs=1', '--save_every_epochs=7', '--blur_prob=0.25', f'--image_path={drawn}']
    assert cli.main(['train', *TINY, *options, *own_paths(tmp_path)]) == 0
    (path,) = (tmp_path / 'ckpt').glob('*/loss_*')
    content = torch.load(path, weights_only=True)
    back = {new: old for old, new in RENAMED_OPTIONS.items()}
    content['args'] = {back.get(name, name): value for name, value in content['args'].items()}
    torch.save(content, path)
    args, _, _ = get_model_ckpt(get_config(ckpt_name=str(path)))
    assert (args.blur_prob, args.save_every_epochs) == (0.25, 7)
    assert upgrade(read_checkpoint(path))[0]['args']['save_every_epochs'] == 7
