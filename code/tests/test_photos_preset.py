"""--preset=auto looks at the images that are there; photos takes its settings from them and from the device."""

import types

import pytest
import torch
from PIL import Image

import cli
from config import INIT_FROM_DEFAULTS
from conftest import CODE, draw_folder, own_paths
from dataloader.load_dataset import find_split_sources
from engine import auto_preset
from runtime.files import read_json
from runtime.options import get_config
from test_distributed import TORCHRUN, begin


def choose(folder, **options):
    args = get_config(image_path=str(folder), device='cpu', **options)
    return auto_preset.choose_preset(args, find_split_sources(args) if args.preset_from_images else None)


@pytest.fixture(scope='session')
def photographs(tmp_path_factory):
    """24 and 8 of each of three kinds, 150 px, one of another size."""
    folder = draw_folder(tmp_path_factory.mktemp('photos') / 'set', {'train': 24, 'val': 8}, side=150, suffix='.jpg')
    path = next((folder / 'train/checks').iterdir())
    with Image.open(path) as image:
        image.resize((300, 200)).save(path)
    return folder


def test_preset_auto_chooses_cifar10_or_photos(drawn, photographs):
    assert choose(drawn).preset == 'cifar10'
    assert choose(drawn).batch_size == 16  # at most a quarter of the 72 images
    assert choose(drawn, batch_size=64).batch_size == 64
    args = choose(photographs)
    assert (args.preset, args.image_size, args.batch_size) == ('photos', 128, 16)
    assert args.init_from
    assert args.evaluate_after
    assert args.probe_optimizer == 'lbfgs'  # LARS would take 90 steps
    assert args.finetune_batch_size == args.batch_size  # 256 need more memory than the pretraining


@pytest.mark.parametrize(
    'given',
    [
        {'preset': 'imagenet'},
        {'preset': 'demo'},
        {'image_size': 64},
        {'batch_size': 8, 'max_epochs': 3},
        {'backbone': 'resnet18'},
        {'backbone': 'small', 'stem': 'cifar'},
        {'init_from': 'imagenet'},
        {'learning_rate': 0.7, 'evaluate_after': False},
    ],
)
def test_preset_photos_keeps_explicit_options(given, photographs):
    args = choose(photographs, **given)
    for name, value in given.items():
        assert getattr(args, name) == value
    if given.get('backbone') == 'small':
        assert args.init_from == ''
    if given.get('backbone') == 'resnet18':
        assert args.init_from == 'imagenet'


@pytest.mark.parametrize(('epochs', 'every'), [(1, 1), (3, 1), (12, 2), (100, 16)])
def test_metrics_of_preset_photos_are_computed_six_times(epochs, every, photographs):
    """Also if --max_epochs is given: with 100 they were computed 50 times."""
    assert choose(photographs, max_epochs=epochs).knn_every == every


def test_preset_photos_works_for_small_images(drawn):
    args = choose(drawn, preset='photos')
    assert (args.preset, args.image_size) == ('photos', 64)


def test_preset_auto_without_image_path_is_unchanged():
    args = get_config()
    assert (args.preset_from_images, args.preset) == (False, 'demo')


@pytest.mark.parametrize(
    ('count', 'gigabytes', 'batch', 'epochs'),
    [
        (10, 0, 2, 100),
        (300, 0, 64, 100),
        (3000, 0, 64, 13),
        (3000, 80, 64, 26),
        (6000, 80, 128, 26),
        (50_000, 80, 256, 6),
    ],
)
def test_preset_photos_has_constant_number_of_steps(count, gigabytes, batch, epochs, monkeypatch):
    """On a CPU (0 gigabytes) and on GPUs; epochs have a least and a most."""
    device = torch.device('cuda' if gigabytes else 'cpu')
    monkeypatch.setattr(auto_preset, 'get_device', lambda args: device)
    about = types.SimpleNamespace(total_memory=gigabytes * 2**30)
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda device: about)
    part = types.SimpleNamespace(labels=torch.zeros(count), classes=['a', 'b'])
    args = get_config(preset='imagenet')
    network = auto_preset.choose_network(args, count, device)
    options = auto_preset.choose_photo_options(args, part, [(400, 300)], part, network)
    assert (options['batch_size'], options['max_epochs']) == (batch, epochs)
    assert options['image_size'] == (224 if gigabytes else 160)
    assert options['backbone'] == 'resnet50' if gigabytes else 'timm/tf_efficientnet_lite0'


@pytest.mark.parametrize(
    ('count', 'given', 'epochs'),
    [
        (auto_preset.FROM_SCRATCH, {}, 100),
        (50_000, {'init_from': 'none'}, 100),
        (3000, {'init_from': 'none'}, 800),
        (3000, {'backbone': 'small'}, 800),
        (3000, {'backbone': 'resnet18', 'stem': 'cifar'}, 800),
        (3000, {'backbone': 'timm/resnetblur18'}, 800),
    ],
)
def test_preset_photos_from_random_weights_has_the_papers_rate(count, given, epochs):
    """A million images, weights that were declined, or a network without any."""
    part = types.SimpleNamespace(labels=torch.zeros(count), classes=[])
    args = get_config(preset='imagenet', device='cpu', **given)
    network = auto_preset.choose_network(args, count, torch.device('cpu'))
    options = auto_preset.choose_photo_options(args, part, [(400, 300)], part, network)
    assert (options['init_from'], options['learning_rate'], options['proj_layers']) == ('', 0.05, 3)
    assert options['max_epochs'] == epochs


def test_init_from_none_trains_from_random_weights(photographs, tmp_path, capsys):
    short = ['--max_epochs=1', '--image_size=32', '--proj_dim=32', '--pred_dim=8', '--labels=1', '--num_workers=0']
    argv = ['train', f'--image_path={photographs}', '--init_from=none', *short, '--amp=off', *own_paths(tmp_path)]
    assert cli.main(argv) == 0
    assert 'resnet18, random weights' in capsys.readouterr().out
    (run,) = (tmp_path / 'ckpt').iterdir()
    args = read_json(run / 'run.json')['args']
    assert (args['init_from'], args['freeze_bn'], args['learning_rate']) == ('', False, 0.05)


def test_train_and_check_dataloader_log_chosen_options(photographs, tmp_path, capsys):
    assert cli.main(['check_dataloader', f'--image_path={photographs}', '--num_workers=0', *own_paths(tmp_path)]) == 0
    assert 'photos           72 images of about 150 x 150 px, 3 classes, on cpu' in capsys.readouterr().out


def test_train_on_folder_uses_pretrained_weights_and_compares(photographs, tmp_path, monkeypatch, capsys):
    """As a beginner types it, with the weights where torchvision would have put them; --resume=auto finds it again."""
    import torchvision

    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setattr(auto_preset.importlib.util, 'find_spec', lambda name: None)  # without timm
    (tmp_path / 'hub/checkpoints').mkdir(parents=True)
    url = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / 'hub/checkpoints' / url.rsplit('/', 1)[1])
    short = ['--max_epochs=2', '--image_size=32', '--proj_dim=32', '--pred_dim=8', '--labels=1', '--num_workers=0']
    argv = ['train', f'--image_path={photographs}', *short, '--amp=off', *own_paths(tmp_path), '--resume=auto']
    assert cli.main(argv) == 0
    said = capsys.readouterr().out
    for words in (
        "backbone       resnet18, torchvision's ImageNet weights",
        'from pretrained weights: --freeze_bn=True',
        'epoch 0/2',
        'start: imagenet',
        'gain of ',
    ):
        assert words in said, words
    (run,) = (tmp_path / 'ckpt').iterdir()
    args = read_json(run / 'run.json')['args']
    assert (args['preset'], args['init_from'], args['freeze_bn']) == (
        'photos',
        'imagenet',
        INIT_FROM_DEFAULTS['freeze_bn'],
    )
    assert cli.main(argv) == 0
    assert 'has all of its 2 epochs' in capsys.readouterr().out
    assert len([*(tmp_path / 'ckpt').iterdir()]) == 1


def test_view_size_of_a_run_to_start_from_is_not_promised(photographs, drawn, tmp_path, capsys):
    given = ['--preset=imagenet', '--backbone=resnet18', '--image_size=64', '--batch_size=24', '--max_epochs=1']
    given += ['--proj_dim=32', '--pred_dim=8', '--knn_every=0', '--num_workers=0', '--amp=off']
    assert cli.main(['train', *given, f'--image_path={drawn}', *own_paths(tmp_path)]) == 0
    capsys.readouterr()
    run, short = 'model_name_simsiam_ckpt_0', ['--max_epochs=1', '--labels=1', '--num_workers=0', '--amp=off']
    given = [f'--init_from={run}', f'--image_path={photographs}', *short]
    assert cli.main(['train', *given, *own_paths(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert f'view size      that of {run}' in said
    assert '64 px views' in said


def test_train_without_network_access_warns_and_uses_random_weights(photographs, tmp_path, monkeypatch, capsys):
    def offline(*given, **more):
        raise OSError('no network')

    monkeypatch.setattr(auto_preset.importlib.util, 'find_spec', lambda name: None)
    monkeypatch.setattr(torch.hub, 'load_state_dict_from_url', offline)
    monkeypatch.setattr('torchvision.models._api.load_state_dict_from_url', offline)
    short = ['--max_epochs=1', '--image_size=32', '--proj_dim=32', '--pred_dim=8', '--num_workers=0', '--labels=1']
    assert cli.main(['train', f'--image_path={photographs}', *short, '--amp=off', *own_paths(tmp_path)]) == 0
    said = capsys.readouterr()
    assert 'could not be downloaded: no network' in said.err
    assert 'training begins with random weights' in said.err
    assert 'untrained' in said.out
    assert (
        cli.main(['train', f'--image_path={photographs}', *short, '--amp=off', *own_paths(tmp_path), '--resume=auto'])
        == 0
    )
    assert 'began with random weights, because the pretrained ones could not be had' in capsys.readouterr().err
    given = ['train', f'--image_path={photographs}', *short, '--init_from=imagenet', *own_paths(tmp_path)]
    assert cli.main(given) == 1  # asked for by name: nothing else is taken in their place


def test_two_ranks_without_network_begin_with_random_weights(photographs, tmp_path):
    """The first rank cannot download; the other one waited for it for ever."""
    short = ['--max_epochs=1', '--image_size=32', '--proj_dim=32', '--pred_dim=8', '--labels=1', '--num_workers=0']
    given = [f'--image_path={photographs}', '--batch_size=8', *short, '--amp=off', *own_paths(tmp_path)]
    nowhere = dict.fromkeys(('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY'), 'http://127.0.0.1:9')
    nowhere |= {'TORCH_HOME': str(tmp_path), 'HF_HOME': str(tmp_path), 'HF_HUB_OFFLINE': '1'}
    done = begin(*TORCHRUN, CODE / 'cli.py', 'train', *given, **nowhere).done()
    assert done.returncode == 0, done.stderr
    assert done.stderr.count('training begins with random weights') == 1
    (run,) = (tmp_path / 'ckpt').iterdir()
    assert read_json(run / 'run.json')['args']['init_from'] == ''
