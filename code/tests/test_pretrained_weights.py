"""Pretrained weights of any network: fetched by torchvision and timm, or from files in the network's own layout."""

import hashlib
import http.server
import json
import math
import os
import re
import subprocess
import sys
import threading

import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torchvision.transforms import functional as reference

import cli
from ckpt import get_model_ckpt
from commands.model_card import timm_crop_ratio
from conftest import CODE, one_line, own_paths
from dataloader import vision
from dataloader.augment import crop
from dataloader.load_dataset import eval_loader, load_splits
from dataloader.loading import crops
from model.backbone import make_backbone
from model.weights import average_weights, find_preprocessing, match_keys
from protocols.features import extract_features
from runtime.checkpoints.load_state import build_model
from runtime.errors import UserError
from runtime.options import channel_values, get_config, replace_args
from runtime.seeding import generator_for
from test_augmentation import photos
from test_export import randomised

timm = pytest.importorskip('timm')
LITE = 'tf_efficientnet_lite0'


def network_of(backbone, size=32):
    """(the whole network at random with its classifier, features of a batch as its own code computes them)."""
    torch.manual_seed(3)
    x = torch.randn(2, 3, size, size)
    if backbone.startswith('timm/'):
        network = timm.create_model(backbone.removeprefix('timm/'), num_classes=7).eval()
        with torch.no_grad():
            return network, x, network.forward_head(network.forward_features(x), pre_logits=True)
    network = torchvision.models.get_model(backbone, num_classes=7).eval()
    last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    kept = []
    last.register_forward_pre_hook(lambda module, given: kept.append(given[0]))
    with torch.no_grad():
        network(x)
    return network, x, kept[0]


# How a file holds the weights: what torch.save, or safetensors, is given.
HOLDERS = {
    'plain': lambda state: state,
    'model': lambda state: {'state_dict': {f'model.{name}': value for name, value in state.items()}, 'epoch': 3},
    'backbone': lambda state: {f'module.backbone.{name}': value for name, value in state.items()},
    'beside a head': lambda state: {
        **{f'net.{n}': v for n, v in state.items()},
        'projector.0.weight': torch.ones(2, 2),
    },
    'teacher and student': lambda state: {
        **{f'student.backbone.{name}': torch.zeros_like(value) for name, value in state.items()},
        **{f'teacher.backbone.{name}': value for name, value in state.items()},
    },
    'without counters': lambda state: {n: v for n, v in state.items() if not n.endswith('num_batches_tracked')},
}
NETWORKS = ('timm/tf_efficientnet_lite0', 'timm/convnext_atto', 'timm/vit_tiny_patch16_224', 'mobilenet_v3_small')


@pytest.mark.parametrize('backbone', [*NETWORKS, 'convnext_tiny', 'timm/resnet18', 'timm/regnetx_002', 'squeezenet1_1'])
def test_match_keys_accepts_any_prefix(backbone, tmp_path):
    """With --backbone; the features are those of the network that the file was made from."""
    if backbone.startswith('timm/vit'):
        network, x, wanted = network_of(backbone, 224)
    elif backbone == 'squeezenet1_1':
        torch.manual_seed(3)
        network, x = torchvision.models.squeezenet1_1(num_classes=7).eval(), torch.randn(2, 3, 32, 32)
        wanted = network.features(x).mean((2, 3)).detach()
    else:
        network, x, wanted = network_of(backbone)
    for holder, hold in HOLDERS.items():
        torch.save(hold(network.state_dict()), tmp_path / 'file.pth')
        args, model, checkpoint = get_model_ckpt(
            get_config(preset='imagenet', backbone=backbone, ckpt_name=f'{tmp_path}/file.pth', image_size=x.shape[-1])
        )
        with torch.no_grad():
            torch.testing.assert_close(model.backbone.eval()(x), wanted, atol=1e-4, rtol=1e-4, msg=holder)
        assert not model.has_heads
        expected = find_preprocessing(backbone)
        assert (args.mean, args.std, args.interpolation) == tuple(expected[n] for n in ('mean', 'std', 'interpolation'))


@pytest.mark.parametrize('holder', ['plain', 'teacher and student', 'decoder'])
def test_position_embeddings_are_interpolated_by_timm(holder, tmp_path, capsys):
    network, _, _ = network_of('timm/vit_tiny_patch16_224', 224)
    state, added = network.state_dict(), {'decoder_blocks.0.norm1.weight': torch.ones(8), 'mask_token': torch.ones(8)}
    torch.save(HOLDERS.get(holder, lambda state: state | added)(state), tmp_path / 'file.pth')
    args = get_config(backbone='timm/vit_tiny_patch16_224', ckpt_name=f'{tmp_path}/file.pth', image_size=96)
    _, model, _ = get_model_ckpt(args)
    wanted = timm.create_model(
        'vit_tiny_patch16_224',
        num_classes=0,
        img_size=96,
        pretrained=True,
        pretrained_cfg_overlay={'state_dict': network.state_dict(), 'num_classes': 7},
    )
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(model.backbone.eval()(x), wanted.eval()(x))
    unused = capsys.readouterr().out.partition('not used: ')[2].partition(';')[0].split(', ')
    assert 'head' in unused
    assert ('decoder_blocks' in unused) == ('mask_token' in unused) == (holder == 'decoder')


def test_unused_part_of_a_used_layer_is_named(tmp_path, capsys):
    torch.save(timm.create_model('convnext_atto').state_dict(), tmp_path / 'file.pth')
    get_model_ckpt(get_config(ckpt_name=f'{tmp_path}/file.pth', backbone='timm/convnext_atto', device='cpu'))
    assert 'not used: head.fc;' in capsys.readouterr().out


MISFITS = {
    'another network': (lambda state: timm.create_model('convnext_atto').state_dict(), 'begin with stem.0.weight'),
    'a weight missing': (
        lambda state: {n: v for n, v in state.items() if n != 'bn2.weight'},
        'weights are missing, such as bn2.weight',
    ),
    'another shape': (
        lambda state: {**state, 'conv_head.weight': torch.zeros(3, 3)},
        'such as conv_head.weight: (3, 3) in place of',
    ),
    'nothing': (lambda state: {}, 'its keys begin with none'),
}


@pytest.mark.parametrize('misfit', MISFITS)
@pytest.mark.parametrize('option', ['ckpt_name', 'init_from'])
def test_weights_that_do_not_fit_name_keys_of_both_sides(misfit, option, drawn, tmp_path, capsys):
    make, said = MISFITS[misfit]
    torch.save(make(timm.create_model(LITE).state_dict()), tmp_path / 'file.pth')
    command = ['evaluate', '--protocol=knn'] if option == 'ckpt_name' else ['train', '--batch_size=8']
    given = [f'--{option}={tmp_path}/file.pth', f'--backbone=timm/{LITE}', f'--image_path={drawn}', '--image_size=32']
    assert cli.main([*command, *given, '--preset=imagenet', *own_paths(tmp_path)]) == 2
    error = one_line(capsys.readouterr().err)
    assert said in error
    assert f'has no weights of --backbone=timm/{LITE}' in error
    assert 'conv_stem.weight' in error
    assert not list(tmp_path.rglob('run.json'))


@pytest.mark.parametrize(
    ('options', 'said'),
    [
        (['--ckpt_name=timm/no_such_network'], 'timm has no such network'),
        (['--ckpt_name=timm'], 'names the weights of --backbone=timm/<network>'),
        (['--ckpt_name=timm/resnet18', '--backbone=resnet50'], 'name two networks'),
        (['--ckpt_name=imagenet', f'--backbone=timm/{LITE}'], "torchvision's networks, not of --backbone=timm"),
        (['--ckpt_name=timm/test_vit.no_such_tag'], 'timm has no'),
    ],
)
def test_unknown_pretrained_weights_exit_2(options, said, drawn, tmp_path, capsys):
    assert cli.main(['evaluate', *options, f'--image_path={drawn}', *own_paths(tmp_path)]) == 2
    assert said in one_line(capsys.readouterr().err)


class Hub(http.server.BaseHTTPRequestHandler):
    """Stands for the Hugging Face hub: files of repositories, as its client asks for them."""

    files = {}

    def do_HEAD(self, body=False):
        content = self.files.get(self.path)
        if content is None:
            self.send_response(404)
            self.send_header('X-Error-Code', 'EntryNotFound')
            self.send_header('Content-Length', '0')
            self.end_headers()
            return
        self.send_response(200)
        for name, value in {
            'ETag': f'"{hashlib.sha256(content).hexdigest()}"',
            'X-Repo-Commit': 'a' * 40,
            'Content-Length': str(len(content)),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def do_GET(self):
        self.do_HEAD(body=True)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
    Hub.files.clear()


def cli_with_hub(tmp_path, address, *argv):
    """address: '' where there is no network."""
    env = {
        **os.environ,
        'HF_ENDPOINT': address or 'http://127.0.0.1:9',
        'HF_HUB_OFFLINE': str(int(not address)),
        'HF_HOME': str(tmp_path / 'hf'),
        'HF_HUB_DISABLE_XET': '1',
    }
    env |= {'HF_HUB_DOWNLOAD_TIMEOUT': '5', 'OMP_NUM_THREADS': '1'}
    return subprocess.run(
        [sys.executable, 'cli.py', *argv], cwd=CODE, env=env, capture_output=True, text=True, check=False, timeout=240
    )


def test_timm_weights_are_downloaded_and_evaluated(hub, drawn, tmp_path):
    """`timm/<name>` as --ckpt_name; a second call finds them on the disk, without the hub."""
    from safetensors.torch import save

    torch.manual_seed(3)
    network = timm.create_model(LITE)
    Hub.files[f'/timm/{LITE}.in1k/resolve/main/model.safetensors'] = save(network.state_dict())
    argv = ['evaluate', f'--ckpt_name=timm/{LITE}', f'--image_path={drawn}', '--image_size=32', '--protocol=knn']
    argv += ['--num_workers=0', '--amp=off', *own_paths(tmp_path)]
    done = cli_with_hub(tmp_path, f'http://127.0.0.1:{hub.server_port}', *argv)
    assert done.returncode == 0, done.stderr
    assert f'weights timm/{LITE}.in1k; 32 px, mean 0.5,0.5,0.5' in done.stdout
    again = cli_with_hub(tmp_path, '', *argv)
    assert again.returncode == 0, again.stderr
    top1 = [re.search(r'top-1 +([\d.]+) %', one.stdout)[1] for one in (done, again)]
    torch.save(network.state_dict(), tmp_path / 'file.pth')
    args = get_config(backbone=f'timm/{LITE}', ckpt_name=f'{tmp_path}/file.pth', image_size=32, image_path=str(drawn))
    args, model, _ = get_model_ckpt(args)
    result = json.loads(next((tmp_path / 'ckpt').rglob('evaluate_knn*.json')).read_text())
    assert top1 == [f'{result["top1"]:.2f}'] * 2
    assert result['settings']['mean'] == args.mean == '0.5,0.5,0.5'


def test_failed_download_of_weights_is_one_line(drawn, tmp_path):
    argv = [f'--image_path={drawn}', '--image_size=32', *own_paths(tmp_path)]
    done = cli_with_hub(tmp_path, '', 'evaluate', f'--ckpt_name=timm/{LITE}', *argv)
    assert done.returncode == 1
    error = one_line(done.stderr)
    assert f'the weights timm/{LITE} of timm/{LITE} could not be downloaded' in error
    assert f'--ckpt_name=FILE --backbone=timm/{LITE}' in error


@pytest.mark.parametrize('name', ['resnet18', 'mobilenet_v3_small', 'squeezenet1_1'])
def test_torchvision_weights_are_evaluated(name, drawn, tmp_path, monkeypatch, capsys):
    """From where torchvision would have put them."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    (tmp_path / 'hub/checkpoints').mkdir(parents=True)
    weights = torchvision.models.get_model_weights(name).IMAGENET1K_V1
    monkeypatch.setattr(torch.hub, 'HASH_REGEX', re.compile('(?!)'))
    network = (
        randomised(torchvision.models.get_model(name), 4) if name == 'resnet18' else torchvision.models.get_model(name)
    )
    torch.save(network.state_dict(), tmp_path / 'hub/checkpoints' / weights.url.rsplit('/', 1)[1])
    argv = ['evaluate', '--ckpt_name=imagenet', f'--backbone={name}', f'--image_path={drawn}', '--image_size=32']
    assert cli.main([*argv, '--protocol=knn', '--amp=off', *own_paths(tmp_path)]) == 0
    assert f'weights torchvision {weights}' in capsys.readouterr().out


def test_weights_are_exported_without_images(tmp_path, monkeypatch, capsys):
    """Without --image_path the preset would be the demo's, with its stem and view size."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    (tmp_path / 'hub/checkpoints').mkdir(parents=True)
    monkeypatch.setattr(torch.hub, 'HASH_REGEX', re.compile('(?!)'))
    weights = torchvision.models.get_model_weights('resnet18').IMAGENET1K_V1
    cached = tmp_path / 'hub/checkpoints' / weights.url.rsplit('/', 1)[1]
    torch.save(torchvision.models.resnet18().state_dict(), cached)
    given = ['export', '--ckpt_name=imagenet', '--backbone=resnet18', '--format=timm', f'--output={tmp_path}/x']
    assert cli.main(given) == 0
    assert 'preprocessing: 224 px' in capsys.readouterr().out
    card = (tmp_path / 'x/README.md').read_text()
    assert 'ResNet18_Weights.IMAGENET1K_V1, not trained further' in card
    assert 'simsiam' not in card.lower().split('# use')[0].replace('simsiam_', '')
    cached.write_bytes(cached.read_bytes()[:9000])
    assert cli.main(given) == 1
    assert 'are damaged' in (error := one_line(capsys.readouterr().err))
    assert 'hub/checkpoints' in error


@pytest.mark.parametrize(
    ('text', 'values'),
    [
        ('imagenet', (0.485, 0.456, 0.406)),
        ('0.5', (0.5,)),
        ('0.1,0.2', (0.1, 0.2)),
        ('0.1,0.2,0.3', (0.1, 0.2, 0.3)),
        ('(0.1, 0.2, 0.3)', (0.1, 0.2, 0.3)),
        ('[0,0,0]', (0, 0, 0)),
    ],
)
def test_mean_accepts_words_and_numbers(text, values):
    assert channel_values('mean', text) == values


@pytest.mark.parametrize('text', ['half', '124,116,104', '0.1,0.2,nan', '-0.1', 'inf', ',', '1e-9,x'])
@pytest.mark.parametrize('name', ['mean', 'std'])
def test_invalid_mean_exits_2(name, text):
    with pytest.raises(UserError, match=f'--{name} is auto, imagenet, weights, dataset, or numbers'):
        get_config(**{name: text})


def test_std_of_zero_exits_2():
    with pytest.raises(UserError, match='--std is auto, imagenet'):
        get_config(std='0,0.5,0.5')


def test_all_views_use_mean_and_std(drawn):
    """Plain views, random views of whole images and of crops: mean 0.5, std 0.25 in place of ImageNet's."""
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    usual = get_config(image_size=32, crop_ratio=1.0)
    other = replace_args(usual, mean='0.5', std='0.25')
    pixels = vision.denormalize(vision.eval_view(images, usual), usual)
    torch.testing.assert_close(vision.eval_view(images, other), (pixels - 0.5) / 0.25, atol=1e-5, rtol=0)
    from dataloader.augment.augmentations import get_augmentation

    for batch in (images, torch.stack((images, images), 1)):
        for one, two in zip(
            vision.random_views(batch, get_augmentation(usual, 'moco'), generator_for(1)),
            vision.random_views(batch, get_augmentation(other, 'moco'), generator_for(1)),
            strict=True,
        ):
            torch.testing.assert_close(two, (vision.denormalize(one, usual) - 0.5) / 0.25, atol=1e-4, rtol=0)
    x = vision.normalize_worker_views(torch.stack((images, images), 1), other)[0]
    torch.testing.assert_close(x, (images / 255 - 0.5) / 0.25, atol=1e-5, rtol=0)


@pytest.mark.parametrize(('height', 'width', 'size'), [(48, 48, 32), (60, 44, 28), (33, 70, 16), (20, 20, 32)])
def test_bicubic_crops_equal_pil(height, width, size):
    """Whole images on the device, and crops in a dataloader worker."""
    images = (photos(3, height, width) * 255).round().to(torch.uint8)
    args = get_config(image_size=size, crop_ratio=0.875, interpolation='bicubic')
    ours = vision.denormalize(vision.eval_view(images, args), args)
    left, top, side = *crop.center_box(height, width, 0.875)[1::-1], min(height, width) * 0.875
    for image, result in zip(images, ours, strict=True):
        pil = reference.to_pil_image(image)
        wanted = pil.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
        wanted = reference.pil_to_tensor(wanted)
        torch.testing.assert_close(result, wanted / 255, atol=2.6 / 255, rtol=0)  # PIL rounds and clips in between
        assert torch.equal(crops.center_crop(pil, size, 0.875, how='bicubic')[0], wanted)
    boxes = torch.tensor([[2.0, 3.0, 15.0, 12.0]]).expand(3, 4)
    ours = crop.crop_resize(images / 255, boxes, torch.zeros(3), size, cubic=True)
    wanted = reference.resized_crop(images / 255, 2, 3, 15, 12, [size, size], reference.InterpolationMode.BICUBIC, True)
    torch.testing.assert_close(ours, wanted.clamp(0, 1), atol=2e-3, rtol=0)


def test_checkpoint_keeps_preprocessing_of_weights(drawn, tmp_path, capsys):
    """train from a file that needs another mean; every command uses it without being told, --mean overrules."""
    torch.manual_seed(1)
    torch.save(timm.create_model(LITE).state_dict(), tmp_path / 'file.pth')
    argv = ['train', '--preset=imagenet', f'--init_from={tmp_path}/file.pth', f'--backbone=timm/{LITE}', '--amp=off']
    argv += [f'--image_path={drawn}', '--image_size=32', '--batch_size=16', '--max_epochs=1', '--proj_dim=16']
    argv += ['--pred_dim=4', '--num_workers=0', *own_paths(tmp_path)]
    assert cli.main(argv) == 0
    run = next((tmp_path / 'ckpt').glob('model_name*'))
    args, _, _ = get_model_ckpt(get_config(ckpt_name=str(run)))
    assert (args.mean, args.std, args.interpolation, args.crop_ratio) == (
        '0.5,0.5,0.5',
        '0.5,0.5,0.5',
        'bicubic',
        0.875,
    )
    other, _, _ = get_model_ckpt(get_config(ckpt_name=str(run), mean='imagenet'))
    assert (other.mean, other.std) == ('imagenet', '0.5,0.5,0.5')


def test_features_use_given_mean_and_std(drawn):
    args = get_config(preset='demo', image_path=str(drawn), mean='0.2,0.3,0.4', std='0.5', device='cpu')
    val = load_splits(args)['val']
    x, _ = extract_features(args, nn.Flatten(), eval_loader(args, val), '')
    plain = replace_args(args, mean='0', std='1')
    raw, _ = extract_features(plain, nn.Flatten(), eval_loader(plain, load_splits(plain)['val']), '')
    mean = torch.tensor((0.2, 0.3, 0.4)).repeat_interleave(raw.shape[1] // 3)
    torch.testing.assert_close(x, (raw - mean) / 0.5, atol=1e-5, rtol=0)


def test_average_weights_equals_formula():
    args = get_config(preset='demo')
    one, two = (
        build_model(args).backbone.state_dict(),
        build_model(replace_args(args, random_seed=1)).backbone.state_dict(),
    )
    for share in (0.0, 0.25, 1.0):
        for name, value in average_weights(one, two, share).items():
            if value.is_floating_point():
                torch.testing.assert_close(value, share * one[name] + (1 - share) * two[name])


DEEPER = {
    'timm/resnet18': lambda: timm.create_model('resnet34'),
    'timm/convnext_atto': lambda: timm.create_model('convnext_atto', depths=(2, 2, 9, 2)),
    'timm/vit_tiny_patch16_224': lambda: timm.create_model('vit_tiny_patch16_224', depth=14),
}


@pytest.mark.parametrize('backbone', DEEPER)
def test_weights_of_deeper_network_are_refused(backbone, tmp_path, capsys):
    torch.save(DEEPER[backbone]().state_dict(), tmp_path / 'file.pth')
    given = [f'--ckpt_name={tmp_path}/file.pth', f'--backbone={backbone}', f'--output={tmp_path}/x', '--format=timm']
    assert cli.main(['export', *given]) == 2
    assert 'it is of a deeper network: it has ' in one_line(capsys.readouterr().err)


OTHERS = {  # tensors added to a file of the network, and whether the features without them would be others
    'squeeze and excitation': ('timm/tf_efficientnet_lite0', {'blocks.0.0.se.conv_reduce.weight': torch.ones(8)}, True),
    'layer scale': ('timm/vit_tiny_patch16_224', {'blocks.0.ls1.gamma': torch.ones(192)}, True),
    'norm of queries': ('timm/vit_tiny_patch16_224', {'blocks.3.attn.q_norm.weight': torch.ones(64)}, True),
    'registers': ('timm/vit_tiny_patch16_224', {'reg_token': torch.ones(1, 4, 192)}, True),
    'mask token': ('timm/vit_tiny_patch16_224', {'mask_token': torch.ones(1, 192)}, False),
    'decoder': ('timm/vit_tiny_patch16_224', {'decoder_blocks.0.norm1.weight': torch.ones(8)}, False),
    'buffers': (
        'timm/resnet10t',
        {'layer1.0.index': torch.ones(4, dtype=torch.int64), 'layer1.0.attn_mask': torch.ones(4)},
        False,
    ),
}


@pytest.mark.parametrize('form', ['timm', 'safetensors'])
def test_options_of_exported_weights_are_not_said_to_be_given(form, drawn, tmp_path, capsys):
    """Their preprocessing is used, but nobody gave it: no warnings about it, and results do not name it."""
    torch.save(timm.create_model('resnet10t').state_dict(), tmp_path / 'file.pth')
    given = [f'--ckpt_name={tmp_path}/file.pth', '--backbone=timm/resnet10t', '--image_size=40', '--mean=0.3']
    output = tmp_path / ('w' if form == 'timm' else 'w.safetensors')
    assert cli.main(['export', *given, f'--format={form}', f'--output={output}']) == 0
    capsys.readouterr()
    evaluated = ['evaluate', f'--ckpt_name={output}', '--protocol=knn', f'--image_path={drawn}', '--num_workers=0']
    assert cli.main([*evaluated, *own_paths(tmp_path)]) == 0
    assert 'has no effect' not in capsys.readouterr().err
    (path,) = (tmp_path / 'ckpt').glob('*/evaluate_knn_*.json')
    result = json.loads(path.read_text())
    assert result['given'] == []
    assert (result['settings']['image_size'], result['settings']['mean'][:3]) == (40, '0.3')


@pytest.mark.parametrize(
    ('case', 'size'),
    [(case, size) for case in OTHERS for size in ((224, 96) if '/vit' in OTHERS[case][0] else (224,))],
)  # a ViT's position embedding is interpolated
def test_file_of_other_network_with_the_same_names_is_refused(case, size, tmp_path, capsys):
    backbone, added, refused = OTHERS[case]
    network = timm.create_model(backbone.removeprefix('timm/'))
    torch.save({**network.state_dict(), **added}, tmp_path / 'file.pth')
    given = [f'--ckpt_name={tmp_path}/file.pth', f'--backbone={backbone}', f'--output={tmp_path}/x', '--format=timm']
    assert cli.main(['export', *given, f'--image_size={size}']) == (2 if refused else 0)
    if refused:
        assert f'it is of another network: it has {[*added][0]}' in one_line(capsys.readouterr().err)


def wrap_as_training_script(state):
    return {'model': state, 'optimizer': {'state': {}}, 'epoch': 3, 'loss': 0.5, 'args': {'lr': 0.1, 'seed': 1}}


@pytest.mark.parametrize(
    'wrap',
    [
        wrap_as_training_script,
        *(lambda state, key=key: {key: state, 'epoch': 1} for key in ('module', 'params', 'params_ema', 'ema')),
        lambda state: {'model_ema': {'module': state}, 'epoch': 1},
        lambda state: {'online_encoder': state, 'target_encoder': state},
    ],
)
def test_files_of_training_scripts_are_read(wrap, tmp_path):
    network = torchvision.models.resnet18()
    torch.save(wrap(network.state_dict()), tmp_path / 'file.pth')
    _, model, _ = get_model_ckpt(get_config(ckpt_name=f'{tmp_path}/file.pth', device='cpu'))
    own = model.backbone.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in network.state_dict().items() if 'fc.' not in name)


@pytest.mark.parametrize('name', ['resnet18', 'resnet50', 'vgg11', 'mobilenet_v3_small', 'convnext_tiny', 'swin_t'])
def test_classifier_is_no_block_of_a_deeper_network(name):
    network = torchvision.models.get_model(name)
    with torch.device('meta'):
        backbone, _ = make_backbone(name, 'imagenet', 224)
    _, unused = match_keys(backbone.state_dict(), network.state_dict())
    assert len(unused) <= 1


@pytest.mark.parametrize('wrap', [dict, lambda state: {'module': state, 'updates': 7}])
def test_other_state_dict_of_file_is_said(wrap, tmp_path, capsys):
    state = timm.create_model('resnet10t').state_dict()
    optimizer = {'state': {0: {'momentum_buffer': torch.ones(2, 2)}}, 'param_groups': [{'params': [0]}]}
    torch.save({'state_dict': state, 'state_dict_ema': wrap(state), 'optimizer': optimizer}, tmp_path / 'file.pth')
    get_model_ckpt(get_config(ckpt_name=f'{tmp_path}/file.pth', backbone='timm/resnet10t', device='cpu'))
    assert 'not used: state_dict_ema, fc' in capsys.readouterr().out


# Options of an export whose folder must give the same network, channels, size and normalization when it is read again.
FOLDERS = {
    'size': ('--image_size=64',),
    'one channel': ('--image_size=64', '--channels=1', '--mean=0.5', '--std=0.25'),
    'five channels': ('--channels=1-5', '--image_size=96', '--mean=0.1,0.2,0.3,0.4,0.5', '--std=0.25'),
    'picked channels': ('--channels=4,2', '--image_size=96', '--mean=0.1,0.2', '--std=0.25', '--white_level=4095'),
    'crop': ('--image_size=160', '--crop_ratio=0.875'),
}


@pytest.mark.parametrize('case', FOLDERS)
def test_timm_folder_is_read_without_further_options(case, tmp_path, capsys):
    torch.save(timm.create_model('resnet10t').state_dict(), tmp_path / 'file.pth')
    given = [f'--ckpt_name={tmp_path}/file.pth', '--backbone=timm/resnet10t', '--format=timm', *FOLDERS[case]]
    assert cli.main(['export', *given, f'--output={tmp_path}/folder']) == 0
    assert cli.main(['export', f'--ckpt_name={tmp_path}/folder', '--format=timm', f'--output={tmp_path}/again']) == 0
    assert 'auto' not in capsys.readouterr().out
    configs = [json.loads((tmp_path / name / 'config.json').read_text()) for name in ('folder', 'again')]
    assert configs[0] == configs[1]
    assert len(configs[0]['pretrained_cfg']['mean']) == configs[0]['pretrained_cfg']['input_size'][0]
    card = (tmp_path / 'folder/README.md').read_text()
    assert 'not trained further' in card
    assert 'trained without labels by SimSiam' not in card
    assert ('PIL' in card) == ('channels' not in case.replace('one channel', 'channels'))


@pytest.mark.parametrize('size', [64, 96, 160, 224, 256])
@pytest.mark.parametrize('ratio', [0.875, 0.9, 0.95, 1.0])
def test_timm_resizes_shorter_side_to_nearest_whole_number(size, ratio):
    args = get_config(preset='imagenet', image_size=size, crop_ratio=ratio)
    assert math.floor(size / timm_crop_ratio(args)) == round(size / ratio)


@pytest.mark.parametrize(
    'cfg', [{}, {'mean': [0.5] * 3, 'std': [0.5] * 3}, {'crop_pct': None, 'mean': [0.4] * 3}, None]
)
def test_config_of_other_makers_takes_the_rest_from_timm(cfg, tmp_path):
    torch.save(timm.create_model('resnet10t').state_dict(), tmp_path / 'model.safetensors')  # a file of torch.save
    config = {'architecture': 'resnet10t', 'pretrained_cfg': cfg}
    (tmp_path / 'config.json').write_text(json.dumps(config))
    args, _, _ = get_model_ckpt(get_config(ckpt_name=str(tmp_path), device='cpu'))
    assert (args.image_size, args.crop_ratio) == (176, 0.875)
    assert channel_values('mean', args.mean)[0] == pytest.approx((cfg or {}).get('mean', [0.485])[0])


@pytest.mark.parametrize('size', [160, 224])
def test_torchvision_vit_file_is_read_at_another_size(size, tmp_path):
    network = torchvision.models.vit_b_32(num_classes=3)
    torch.save(network.state_dict(), tmp_path / 'file.pth')
    given = {'ckpt_name': f'{tmp_path}/file.pth', 'backbone': 'vit_b_32', 'image_size': size, 'device': 'cpu'}
    _, model, _ = get_model_ckpt(get_config(preset='imagenet', **given))
    assert model.backbone.encoder.pos_embedding.shape[1] == (size // 32) ** 2 + 1
    assert torch.equal(model.backbone.conv_proj.weight, network.conv_proj.weight)


@pytest.mark.parametrize('channels', ['1', '1-5'])
def test_weights_for_three_channels_are_evaluated_with_others(channels, tmp_path):
    torch.save(timm.create_model('resnet10t').state_dict(), tmp_path / 'file.pth')
    args, _, _ = get_model_ckpt(
        get_config(ckpt_name=f'{tmp_path}/file.pth', backbone='timm/resnet10t', channels=channels, device='cpu')
    )
    assert channel_values('mean', args.mean) == pytest.approx((0.449,))


def test_key_outside_the_prefix_is_unused_though_the_network_has_its_name():
    state = timm.create_model('resnet10t', num_classes=0).state_dict()
    first = next(iter(state))
    tensors = {**{f'backbone.{name}': value for name, value in state.items()}, first: torch.zeros(1)}
    matched, unused = match_keys(state, tensors)
    assert unused == [first]
    assert torch.equal(matched[first], state[first])


@pytest.mark.parametrize('backbone', ['mnasnet0_5', 'densenet121', 'googlenet', 'inception_v3'])
def test_torchvision_networks_with_rules_of_their_own_train_and_load(backbone, drawn, tmp_path, monkeypatch):
    """MNASNet's version number, DenseNet's old names, the input of networks that come from TensorFlow."""
    network = randomised(torchvision.models.get_model(backbone, num_classes=1000, **INIT.get(backbone, {})))
    state = network.state_dict()
    if backbone == 'densenet121':  # as torchvision publishes them
        state = {re.sub(r'(denselayer\d+\.(?:norm|conv))([12]\.)', r'\1.\2', name): x for name, x in state.items()}
        assert any('norm.1.weight' in name for name in state)
    versions = torchvision.models.get_model_weights(backbone)
    place = tmp_path / 'hub/checkpoints' / versions.DEFAULT.url.rsplit('/', 1)[1]
    place.parent.mkdir(parents=True)
    torch.save(state, place)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setattr(type(versions.DEFAULT), 'get_state_dict', lambda *_, **__: torch.load(place, weights_only=True))
    size = 96 if backbone == 'inception_v3' else 32
    given = [f'--backbone={backbone}', f'--image_size={size}', '--batch_size=8', '--amp=off', '--num_workers=0']
    given += [f'--image_path={drawn}', '--proj_dim=32', '--pred_dim=8', *own_paths(tmp_path), '--preset=imagenet']
    if backbone == 'mnasnet0_5':
        assert cli.main(['train', *given, '--init_from=imagenet', '--max_epochs=1', '--knn_every=1']) == 0
        run = ['--ckpt_name=model_name_simsiam_ckpt_0', '--num_workers=0', *own_paths(tmp_path)]
        assert cli.main(['evaluate', *run, '--protocol=knn']) == 0
    args, model, _ = get_model_ckpt(get_config(ckpt_name='imagenet', backbone=backbone, image_size=size, device='cpu'))
    x = torch.rand(2, 3, size, size)
    if hasattr(network, 'transform_input'):
        network.transform_input = True  # as torchvision sets it with these weights
        assert args.mean == '0.5,0.5,0.5'
    last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    kept = []
    last.register_forward_pre_hook(lambda module, given: kept.append(given[0]))
    imagenet = [torch.tensor(channel_values(name, 'imagenet')).view(1, 3, 1, 1) for name in ('mean', 'std')]
    own = [torch.tensor(channel_values(name, getattr(args, name))).view(1, 3, 1, 1) for name in ('mean', 'std')]
    with torch.no_grad():
        network.eval()((x - imagenet[0]) / imagenet[1])
        found = model.backbone.eval()((x - own[0]) / own[1])
    torch.testing.assert_close(found, kept[0], rtol=1e-3, atol=1e-3)


INIT = {name: {'init_weights': False, 'aux_logits': False} for name in ('googlenet', 'inception_v3')}
