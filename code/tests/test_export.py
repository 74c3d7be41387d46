"""To and from other tools: their checkpoints here, our backbone there, features as files, neighbors as a picture."""

import csv
import json
import pickle
import re
import shlex
import shutil
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

import cli
from ckpt import get_model_ckpt, save_checkpoint
from commands import embed as embedding
from conftest import TINY, one_line, own_paths
from engine.train_state import TrainState
from metric.knn import topk_neighbors
from model.foreign_checkpoints import to_detectron2
from optimizer.sgd import make_sgd
from protocols import compare
from runtime.checkpoints.best_epoch import FEW_LABELS
from runtime.checkpoints.load_state import build_model
from runtime.errors import UserError, WorkError
from runtime.files import read_metrics
from runtime.options import get_config, replace_args

RUN = 'model_name_simsiam_ckpt_0'


class Official(nn.Module):
    """The official release's model as its layout describes it: the encoder's fc is the projector, whose last bias is
    frozen and whose last BN has no affine. Written anew from that description, with ResNet-18 and narrow heads."""

    def __init__(self, width=24, hidden=8):
        super().__init__()
        self.encoder = torchvision.models.resnet18()
        d = self.encoder.fc.in_features
        self.encoder.fc = nn.Sequential(
            nn.Linear(d, d, bias=False),
            nn.BatchNorm1d(d),
            nn.ReLU(),
            nn.Linear(d, d, bias=False),
            nn.BatchNorm1d(d),
            nn.ReLU(),
            nn.Linear(d, width),
            nn.BatchNorm1d(width, affine=False),
        )
        self.predictor = nn.Sequential(
            nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, width)
        )


def randomised(model, seed=0):
    """Every parameter and running statistic at random, so that none can be lost unseen."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator)
            value.copy_(
                noise.abs() + 0.5
                if 'running_var' in name or value.ndim == 1
                else noise / max(1, value[0].numel()) ** 0.5
            )
    return model


def save_official(path, model):
    state = OrderedDict((f'module.{name}', value) for name, value in model.state_dict().items())
    torch.save({'epoch': 100, 'arch': 'resnet18', 'state_dict': state, 'optimizer': {'state': {}}}, path)
    return path


def views(n=6, size=64):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def load(path, **options):
    return get_model_ckpt(get_config(preset='imagenet', ckpt_name=str(path), **options))


def test_official_checkpoint_gives_equal_p_and_z(tmp_path):
    """In both modes of BN. The release's projector is as wide as d inside; ours is as wide throughout; the test takes
    the paper's own case, where both are equal."""
    official = randomised(Official(width=512))
    path = save_official(tmp_path / 'checkpoint_0099.pth.tar', official)
    args, model, checkpoint = load(path)
    assert (args.backbone, args.stem, args.proj_layers, args.proj_dim, args.pred_dim) == (
        'resnet18',
        'imagenet',
        3,
        512,
        8,
    )
    assert (checkpoint['layout'], checkpoint['epoch']) == ('official', 0)
    for training in (False, True):
        official.train(training)
        model.train(training)
        with torch.no_grad():
            z = official.encoder(views())
            p = official.predictor(z)
            ours_z = model.projector(model.backbone(views()))
            ours_p = model.predictor(ours_z)
        torch.testing.assert_close(ours_z, z, atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(ours_p, p, atol=2e-4, rtol=1e-4)


def moco_file(path, backbone):
    state = {}
    for encoder in ('encoder_q', 'encoder_k'):
        state |= {f'module.{encoder}.{name}': value for name, value in backbone.state_dict().items()}
        state[f'module.{encoder}.fc.0.weight'] = torch.zeros(8, 512)
    torch.save(
        {
            'arch': 'resnet18',
            'state_dict': {**state, 'module.queue': torch.zeros(8, 16), 'module.queue_ptr': torch.zeros(1)},
        },
        path,
    )


def test_moco_and_torchvision_layouts_give_equal_features(tmp_path):
    plain = randomised(torchvision.models.resnet18(), 2)
    torch.save(plain.state_dict(), tmp_path / 'resnet.pth')
    plain.fc = nn.Identity()
    moco_file(tmp_path / 'moco.pth.tar', plain)
    for name, layout in (('resnet.pth', 'torchvision'), ('moco.pth.tar', 'moco')):
        args, model, checkpoint = load(tmp_path / name)
        assert (args.backbone, checkpoint['layout']) == ('resnet18', layout)
        with torch.no_grad():
            torch.testing.assert_close(model.backbone.eval()(views()), plain.eval()(views()))


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


@pytest.mark.parametrize('command', ['evaluate', 'infer', 'export', 'embed', 'train'])
def test_incomplete_checkpoint_is_refused(command, drawn, tmp_path, capsys):
    """One key renamed, one shape changed, one key too many, a pickle that would run code: nothing is loaded loosely."""
    state = save_official(tmp_path / 'good', Official(width=512))
    state = torch.load(state, weights_only=True)['state_dict']
    bias, ours = 'module.encoder.layer3.0.bn1.bias', 'backbone.layer3.0.bn1'
    renamed = {name.replace('layer3.0.bn1.bias', 'layer3.0.bn1.bais'): value for name, value in state.items()}
    reshaped = {**state, bias: torch.zeros(7)}
    more = {**state, 'module.encoder.layer3.0.extra': torch.zeros(1)}
    moco = {name.replace('encoder.', 'encoder_q.'): value for name, value in state.items() if 'predictor' not in name}
    moco.pop('module.encoder_q.bn1.weight')
    for name, content, code, said in (
        ('renamed', {'state_dict': renamed}, 2, f'missing: {ours}.bias; unexpected: {ours}.bais'),
        ('reshaped', {'state_dict': reshaped}, 2, f'size mismatch: {ours}.bias is (7,) in place of (256,)'),
        ('more', {'state_dict': more}, 2, 'unexpected: backbone.layer3.0.extra'),
        ('moco', {'state_dict': moco}, 2, 'missing: backbone.bn1.weight'),
        ('harmful', {'state_dict': state, 'extra': Harmful(tmp_path / 'harm')}, 1, 'it would run io.open'),
        ('other', {'elsewhere': state}, 1, 'its first keys: elsewhere'),
    ):
        torch.save(content, tmp_path / name)
        option = '--init_from' if command == 'train' else '--ckpt_name'
        options = ('--preset=imagenet', f'--image_path={drawn}', *own_paths(tmp_path / 'out', 'ckpt', 'cache'))
        assert cli.main([command, f'{option}={tmp_path / name}', *options]) == code, name
        assert said in one_line(
            '\n'.join(line for line in capsys.readouterr().err.splitlines() if not line.startswith('warning'))
        )
    assert not (tmp_path / 'harm').exists()
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('start', [[], ['--from_run=model_name_before_ckpt_0']])
def test_backbone_without_heads_trains_new_heads(start, drawn, tmp_path, capsys):
    """Its heads are new, as the call or --from_run has them; and trained, so that they are judged."""
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / 'backbone.pth')
    sizes = {'proj_layers': 2, 'proj_dim': 24, 'pred_dim': 6}
    given = [*TINY[:2], '--batch_size=24', '--max_epochs=1', '--knn_every=0', '--amp=off', f'--image_path={drawn}']
    given += [f'--{name}={value}' for name, value in sizes.items() if name != 'proj_layers']
    if start:
        assert cli.main(['train', *given, '--model_name=before', *own_paths(tmp_path)]) == 0
        given = start
    weights = ['--model_name=simsiam', f'--init_from={tmp_path}/backbone.pth', '--evaluate_after=True']
    weights.append('--protocol=label_free')
    assert cli.main(['train', *given, *weights, *own_paths(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert 'the settings of --preset=demo' in said
    assert 'no verdict' not in said
    saved = torch.load(next((tmp_path / 'ckpt' / RUN).glob('loss_*')), weights_only=True)['args']
    assert {name: saved[name] for name in sizes} == sizes
    assert (saved['preset'], saved['backbone'], saved['stem'], saved['image_size']) == (
        'demo',
        'resnet18',
        'imagenet',
        16,
    )


def test_init_from_other_tools_weights_trains(drawn, tmp_path, capsys):
    path = save_official(tmp_path / 'official.pth.tar', randomised(Official(width=512)))
    images = ('--preset=imagenet', f'--image_path={drawn}', '--image_size=32', '--batch_size=16')
    still = ('--max_epochs=1', '--learning_rate=0', '--weight_decay=0', '--knn_every=0', *own_paths(tmp_path))
    assert cli.main(['train', f'--init_from={path}', *images, *still]) == 0
    _, wanted, _ = load(path)
    saved = torch.load(next((tmp_path / 'ckpt' / RUN).glob('loss_*')), weights_only=True)
    assert saved['args']['backbone'] == 'resnet18'
    for name, parameter in wanted.named_parameters():
        torch.testing.assert_close(saved['model'][name], parameter.detach())
    assert cli.main(['train', f'--init_from={path}', '--backbone=resnet50', *images]) == 2
    assert '--backbone=resnet50 contradicts the checkpoint' in capsys.readouterr().err
    assert (
        cli.main(
            [
                'train',
                f'--ckpt_name={path}',
                '--preset=imagenet',
                f'--image_path={drawn}',
                '--batch_size=16',
                *own_paths(tmp_path),
            ]
        )
        == 2
    )
    assert (
        'is not a run of this project and cannot be resumed; start a new run from its weights: --init_from='
        in capsys.readouterr().err
    )


@pytest.fixture(scope='module')
def ours(tmp_path_factory):
    """(path, model) of a checkpoint of ours: ResNet-18 with the ImageNet stem, everything random."""
    folder = tmp_path_factory.mktemp('ours') / 'run'
    folder.mkdir()
    args = get_config(preset='imagenet', backbone='resnet18', proj_dim=16, pred_dim=8, image_size=64)
    model = randomised(build_model(args), 3)
    return saved(folder, args, model), model


def saved(folder, args, model):
    """The path of a checkpoint of `model` after an epoch."""
    state = TrainState(model, make_sgd(model, 0.9, 0))
    state.finish_epoch((-0.5, 1.0, 0.0))
    return save_checkpoint(folder, args, state)


def export(path, form, output):
    assert cli.main(['export', f'--ckpt_name={path}', f'--format={form}', f'--output={output}']) == 0


def features(model):
    with torch.no_grad():
        return model.backbone.eval()(views())


def test_export_torchvision_loads_there(ours, tmp_path):
    export(ours[0], 'torchvision', tmp_path / 'b.pth')
    there = torchvision.models.resnet18()
    there.fc = nn.Identity()
    there.load_state_dict(torch.load(tmp_path / 'b.pth', weights_only=True), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(there.eval()(views()), features(ours[1]))
    _, back, _ = load(tmp_path / 'b.pth')  # and home again
    torch.testing.assert_close(features(back), features(ours[1]))


def test_export_timm_loads_there(ours, tmp_path):
    timm = pytest.importorskip('timm')
    export(ours[0], 'timm', tmp_path / 'b')
    there = timm.create_model(f'local-dir:{tmp_path}/b', pretrained=True)
    with torch.no_grad():
        torch.testing.assert_close(there.eval()(views()), features(ours[1]), atol=1e-4, rtol=1e-4)


def test_export_safetensors_loads_there(ours, tmp_path):
    from safetensors.torch import load_file

    export(ours[0], 'safetensors', tmp_path / 'b.safetensors')
    there = load_file(tmp_path / 'b.safetensors')
    wanted = ours[1].backbone.state_dict()
    assert there.keys() == wanted.keys()
    assert all(torch.equal(there[name], value) for name, value in wanted.items())


@pytest.mark.parametrize('backbone', ['resnet18', 'small', 'mobilenet_v3_small'])
def test_exported_safetensors_are_read_with_their_options(backbone, tmp_path):
    """Its metadata has the network and its preprocessing; --image_size is stronger."""
    args = get_config(preset='imagenet', backbone=backbone, image_size=64, mean='0.1,0.2,0.3', std='0.5')
    args = replace_args(args, interpolation='bicubic', crop_ratio=0.9)
    model = randomised(build_model(args), 5)
    export(saved(tmp_path, args, model), 'safetensors', tmp_path / 'b.safetensors')
    back_args, back, _ = load(tmp_path / 'b.safetensors')
    assert (back_args.backbone, back_args.image_size, back_args.crop_ratio) == (backbone, 64, 0.9)
    assert (back_args.mean, back_args.std, back_args.interpolation) == ('0.1,0.2,0.3', '0.5,0.5,0.5', 'bicubic')
    torch.testing.assert_close(features(back), features(model))
    assert load(tmp_path / 'b.safetensors', image_size=96)[0].image_size == 96


@pytest.mark.parametrize('form', ['safetensors', 'onnx'])
def test_export_has_numbers_for_words(form, tmp_path, capsys):
    """Of weights in torchvision's layout, which state no mean and std."""
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / 'w.pth')
    export(tmp_path / 'w.pth', form, tmp_path / f'b.{form}')
    assert 'mean 0.485,0.456,0.406, std 0.229,0.224,0.225' in capsys.readouterr().out
    content = (tmp_path / f'b.{form}').read_bytes()
    assert b'0.485,0.456,0.406' in content
    assert not re.search(rb'(mean|std|channels|white_level)[^a-z]{1,5}auto', content)


@pytest.mark.parametrize('kind', ['resnet18', 'small'])
def test_export_onnx_runs_for_any_batch_size(kind, ours, tmp_path):
    """For any number of images, not only the example's."""
    onnxruntime = pytest.importorskip('onnxruntime')
    path, model = ours
    if kind == 'small':
        args = get_config(preset='demo', image_size=64)
        model = randomised(build_model(args), 4)
        path = saved(tmp_path, args, model)
    export(path, 'onnx', tmp_path / 'b.onnx')
    assert [file.name for file in tmp_path.glob('b.onnx*')] == ['b.onnx']
    there = onnxruntime.InferenceSession(str(tmp_path / 'b.onnx'))
    for n in (1, 6):
        (found,) = there.run(None, {'images': views()[:n].numpy()})
        np.testing.assert_allclose(found, features(model)[:n].numpy(), atol=1e-3, rtol=1e-3)


def detectron2_names():
    """The names of detectron2's ResNet-50, written out from its documented layout: a stem, then res2 to res5 with 3, 4,
    6 and 3 blocks of three convolutions, a shortcut on the first of each; every convolution has a norm."""
    convolutions = ['stem.conv1']
    for stage, blocks in (('res2', 3), ('res3', 4), ('res4', 6), ('res5', 3)):
        for block in range(blocks):
            convolutions += [f'{stage}.{block}.conv{i}' for i in (1, 2, 3)]
            convolutions += [f'{stage}.0.shortcut'] if block == 0 else []
    norm = ('norm.weight', 'norm.bias', 'norm.running_mean', 'norm.running_var')
    return {f'{name}.{part}' for name in convolutions for part in ('weight', *norm)}


def test_export_detectron2_has_its_names(ours, tmp_path):
    state = torchvision.models.resnet50().state_dict()
    names = {
        name
        for name in to_detectron2({k: v for k, v in state.items() if not k.startswith('fc.')})
        if 'num_batches' not in name
    }
    assert names == detectron2_names()
    export(ours[0], 'detectron2', tmp_path / 'b.pkl')
    content = pickle.loads((tmp_path / 'b.pkl').read_bytes())
    assert content['matching_heuristics'] is True
    assert len(content['model']) == 5 * 20
    backbone = ours[1].backbone
    for name, tensor in (
        ('stem.conv1.weight', backbone.conv1.weight),
        ('res2.1.conv2.norm.running_var', backbone.layer1[1].bn2.running_var),
        ('res4.0.shortcut.weight', backbone.layer3[0].downsample[0].weight),
        ('res5.0.shortcut.norm.bias', backbone.layer4[0].downsample[1].bias),
    ):
        np.testing.assert_array_equal(content['model'][name], tensor.detach().numpy())


@pytest.mark.parametrize('form', ['torchvision', 'timm', 'detectron2'])
def test_export_of_unsupported_backbone_exits_2(form, tmp_path, capsys):
    for options, said in (
        ({'preset': 'demo'}, '--backbone=small'),
        ({'preset': 'cifar10', 'proj_dim': 8}, '--stem=cifar'),
    ):
        args = get_config(**options)
        model = build_model(args)
        path = saved(tmp_path, args, model)
        assert cli.main(['export', f'--ckpt_name={path}', f'--format={form}', f'--output={tmp_path}/b']) == 2
        error = one_line(capsys.readouterr().err)
        assert f'--format={form} does not support --backbone=' in error
        assert said in error
    assert not (tmp_path / 'b').exists()


def test_embed_parquet_has_viewer_columns(ours, drawn, tmp_path):
    parquet = pytest.importorskip('pyarrow.parquet')
    options = [f'--ckpt_name={ours[0]}', f'--image_path={drawn}', *own_paths(tmp_path, 'log', 'cache')]
    for file in ('f.parquet', 'f.npz'):
        assert cli.main(['embed', f'--output={tmp_path / file}', '--projector_images=0', *options]) == 0
    table = parquet.read_table(tmp_path / 'f.parquet').to_pydict()
    with np.load(tmp_path / 'f.npz') as content:
        features, names = content['features'], content['names']
    assert table['file'] == names.tolist()
    assert table['label'] == [name.split('/')[0] for name in names]
    np.testing.assert_array_equal(np.array(table['features'], np.float32), features)
    assert np.isfinite(table['x']).all()
    assert np.std(table['y']) > 0
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    for row, near in enumerate(table['neighbors']):
        assert len(near['ids']) == 16
        np.testing.assert_allclose(near['distances'], np.sort(1 - unit @ unit[row])[:16].clip(0), atol=1e-5)


def test_embed_npz_and_csv_have_features_and_names(ours, drawn, tmp_path, monkeypatch):
    name = f'--ckpt_name={ours[0]}'
    options = [name, f'--image_path={drawn}', *own_paths(tmp_path, 'log', 'cache')]
    for file in ('f.npz', 'f.csv'):
        assert cli.main(['embed', f'--output={tmp_path / file}', '--projector_images=10', *options]) == 0
    with np.load(tmp_path / 'f.npz') as content:
        found, names = content['features'], content['names']
    assert (found.shape, found.dtype) == ((24, 512), np.float32)
    assert sorted(names) == sorted(str(path.relative_to(drawn / 'val')) for path in (drawn / 'val').rglob('*.png'))
    with open(tmp_path / 'f.csv', newline='') as file:
        rows = list(csv.reader(file))
    assert (rows[0][:2], len(rows[0])) == (['file', 'feature_0'], 513)
    assert [row[0] for row in rows[1:]] == names.tolist()
    np.testing.assert_allclose(np.array([row[1:] for row in rows[1:]], float), found, rtol=1e-6)
    image = (
        Image.open(drawn / 'val' / names[3])
        .convert('RGB')
        .resize((64, 64), Image.Resampling.BILINEAR, box=(3, 3, 45, 45))
    )
    view = torchvision.transforms.functional.to_tensor(image)[None]
    view = torchvision.transforms.functional.normalize(view, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with torch.no_grad():
        wanted = ours[1].backbone.eval()(view)[0]
    assert torch.nn.functional.cosine_similarity(wanted, torch.from_numpy(found[3]), dim=0) > 0.999
    projector = tmp_path / 'log' / ours[0].parent.name / 'projector'
    assert (projector / 'projector_config.pbtxt').is_file()
    (table,) = projector.rglob('metadata.tsv')
    assert len(table.read_text().splitlines()) == 10
    (sprite,) = projector.rglob('sprite.png')
    with Image.open(sprite) as picture:
        assert picture.size == (4 * 32, 4 * 32)
    with pytest.raises(UserError, match='ends in .npz, .csv or .parquet'):
        embedding.embed(get_config(output='f.txt', ckpt_name=str(ours[0])))


def test_topk_neighbors_equals_brute_force():
    generator = torch.Generator().manual_seed(5)
    queries, bank = torch.randn(4, 6, generator=generator), torch.randn(30, 6, generator=generator)
    cosine, rows = topk_neighbors(queries, bank, 3)
    for query, values, found in zip(queries, cosine, rows, strict=True):
        every = [(query @ other / query.norm() / other.norm()).item() for other in bank]
        wanted = sorted(range(30), key=lambda i: -every[i])[:3]
        assert found.tolist() == wanted
        assert values.tolist() == pytest.approx([every[i] for i in wanted], abs=1e-6)


def test_infer_neighbors_saves_picture(drawn, tmp_path):
    options = (f'--image_path={drawn}', *own_paths(tmp_path))
    assert cli.main(['train', *TINY, '--max_epochs=1', '--knn_every=0', *options]) == 0
    output = tmp_path / 'out.csv'
    options = (f'--output={output}', '--neighbors=3', f'--image_path={drawn}/train/dots')
    assert cli.main(['infer', f'--ckpt_name={RUN}', *options, *own_paths(tmp_path, 'ckpt', 'cache')]) == 0
    with Image.open(tmp_path / 'out_neighbors.png') as picture:
        image = np.asarray(picture)
    # The queries are training images: the nearest of each is itself, so the first two pictures of a row are the same.
    for row in range(12):
        top = 6 + row * (96 + 18 + 6) + 18
        query, first = image[top : top + 96, 6:102], image[top : top + 96, 120:216]
        assert query.std() > 3
        np.testing.assert_array_equal(query, first)


def test_damaged_classifier_fails_in_one_line(ours, drawn, tmp_path, capsys):
    (ours[0].parent / 'classifier_1').write_text('text')
    code = cli.main(
        [
            'infer',
            f'--ckpt_name={ours[0]}',
            f'--image_path={drawn}',
            f'--output={tmp_path}/o.csv',
            *own_paths(tmp_path, 'cache'),
        ]
    )
    (ours[0].parent / 'classifier_1').unlink()
    assert code == 1
    assert 'classifier_1 is damaged' in one_line(capsys.readouterr().err)
    with pytest.raises(WorkError):
        load(ours[0].parent / 'nothing' if (ours[0].parent / 'nothing').exists() else save_text(tmp_path))


def save_text(folder):
    (folder / 'text').write_text('text')
    return folder / 'text'


@pytest.mark.parametrize('change', ['nothing', 'a class is gone', 'an image is in another class'])
def test_infer_warns_of_classifier_of_another_state_of_the_dataset(change, ours, drawn, tmp_path, capsys):
    shutil.copytree(drawn, tmp_path / 'set')
    shutil.copytree(ours[0].parent, tmp_path / 'ckpt/run')
    given = [f'--ckpt_name=run/{ours[0].name}', f'--image_path={tmp_path}/set', '--num_workers=0', '--image_size=32']
    given += own_paths(tmp_path)
    assert cli.main(['evaluate', *given, '--probe_optimizer=lbfgs', '--device=cpu']) == 0
    folders = sorted((tmp_path / 'set/train').iterdir())
    if change == 'a class is gone':
        for part in ('train', 'val'):
            shutil.rmtree(tmp_path / 'set' / part / folders[0].name)
    elif change == 'an image is in another class':
        moved = next(folders[0].iterdir())
        moved.rename(folders[1] / 'moved.png')
    capsys.readouterr()
    output = f'--output={tmp_path}/o.csv'
    assert cli.main(['infer', *[one for one in given if '--log_path' not in one], output, '--device=cpu']) == 0
    assert ('other images or classes than when the classifier' in capsys.readouterr().err) == (change != 'nothing')


@pytest.mark.parametrize('shares', [(0.5, 0.5), (0.5, 0.0)])
def test_model_card_names_images_and_options_of_results(shares, drawn, tmp_path, capsys):
    """Of other images than the run's, and of another average with the start than is exported."""
    pytest.importorskip('timm')
    weights = tmp_path / 'start.pth'
    torch.save(
        build_model(get_config(preset='imagenet', backbone='timm/resnet10t', image_size=32)).backbone.state_dict(),
        weights,
    )
    given = ['--num_workers=0', *own_paths(tmp_path)]
    train = [f'--init_from={weights}', '--backbone=timm/resnet10t', '--image_size=32', '--batch_size=24', '--amp=off']
    train += ['--preset=imagenet', '--proj_dim=32', '--pred_dim=8', '--max_epochs=1', f'--image_path={drawn}']
    train += ['--start_share=0.5', '--distill_size=32']
    assert cli.main(['train', *train, '--heads_epochs=0', '--knn_every=0', *given]) == 0
    (last,) = (tmp_path / 'ckpt/model_name_simsiam_ckpt_0').glob('loss_*_epoch_1')
    run = f'--ckpt_name={last}'
    shutil.copytree(drawn, tmp_path / 'others')
    evaluated = ['evaluate', run, f'--image_path={tmp_path}/others', f'--start_share={shares[1]}', *given]
    assert cli.main([*evaluated, '--protocol=knn', '--knn_k=3']) == 0
    assert cli.main([*evaluated, '--beside=untrained', '--labels=1']) == 0
    assert cli.main(['export', run, '--format=timm', f'--output={tmp_path}/x', *own_paths(tmp_path, 'ckpt')]) == 0
    card = (tmp_path / 'x/README.md').read_text()
    assert 'freeze_bn=True --heads_epochs=0 --backbone_lr_scale=0.1 --start_share=0.5 --distill_weight=8.0' in card
    assert '--distill_weight=8.0 --augmentation=mild --distill_size=32 --distill_neighbors=10' in card
    assert 'All results are on the images named above' not in card
    if shares[0] == shares[1]:
        assert 'knn (--knn_k=3' in card
        assert re.search(r'\n- knn [^\n]*\n\ncompare ', card)  # a paragraph of its own, not of the list's item
        assert card.count('24 images of others val, digest') == 2
    else:
        assert card.count('Not listed: results with another --start_share (2).') == 1
        assert '\n\n\n' not in card
        assert 'Not evaluated' in card


@pytest.mark.parametrize(
    ('option', 'trained'), [('--quiet=False', True), ('--start_share=1', False), ('--image_size=48', True)]
)
def test_model_card_tells_what_the_weights_are(option, trained, drawn, tmp_path):
    """Weights that are the start again are not trained, and results at another image size have it."""
    pytest.importorskip('timm')
    given = [*own_paths(tmp_path), '--num_workers=0']
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / 'start.pth')
    train = [f'--init_from={tmp_path}/start.pth', '--image_size=32', '--batch_size=24', '--amp=off', '--knn_every=1']
    train += ['--preset=imagenet', '--proj_dim=32', '--pred_dim=8', '--max_epochs=1', f'--image_path={drawn}']
    assert cli.main(['train', *train, '--heads_epochs=0', '--distill_size=32', *given]) == 0
    (last,) = (tmp_path / 'ckpt' / RUN).glob('loss_*_epoch_1')
    lines = read_metrics(last.parent / 'metrics.jsonl')
    lines[1] |= {FEW_LABELS.gain: 20.0, FEW_LABELS.error: 1.0}
    (last.parent / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    assert cli.main(['evaluate', f'--ckpt_name={last}', '--protocol=knn', *given]) == 0
    name = f'--ckpt_name={RUN}/{last.name}'
    assert cli.main(['export', name, '--format=timm', f'--output={tmp_path}/x', option, *own_paths(tmp_path)]) == 0
    card = (tmp_path / 'x/README.md').read_text()
    assert ('trained without labels by SimSiam' in card) == trained
    assert ('better than the start' in card) == (option == '--quiet=False')  # measured at 32 px, of the trained weights
    assert ('- knn (--image_size=32): ' in card) == (option == '--image_size=48')
    assert ('- knn: ' in card) == (option == '--quiet=False')


def test_command_of_model_card_writes_its_table(drawn, tmp_path, capsys):
    pytest.importorskip('timm')
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / 'w.pth')
    given = [f'--ckpt_name={tmp_path}/w.pth', *own_paths(tmp_path, 'ckpt')]
    assert cli.main(['export', *given, '--format=timm', f'--output={tmp_path}/x']) == 0
    (command,) = re.findall(r'`python3 cli.py (.*)` writes a table', (tmp_path / 'x/README.md').read_text())
    command = command.replace('<labeled images>', str(drawn))
    more = ['--image_size=32', '--labels=1', '--draws=1', '--num_workers=0']
    assert cli.main([*shlex.split(command), *more, *own_paths(tmp_path)]) == 0
    assert 'untrained' in capsys.readouterr().out


def test_command_of_model_card_of_a_run_elsewhere_names_its_path(drawn, tmp_path, capsys):
    pytest.importorskip('timm')
    given = [*own_paths(tmp_path), '--num_workers=0']
    train = [
        *TINY,
        '--stem=imagenet',
        '--backbone=resnet18',
        '--max_epochs=1',
        '--knn_every=0',
        f'--image_path={drawn}',
    ]
    assert cli.main(['train', *train, *given]) == 0
    run = tmp_path / 'ckpt' / RUN
    assert cli.main(['export', f'--ckpt_name={run}', '--format=timm', f'--output={tmp_path}/x']) == 0
    (command,) = re.findall(r'`python3 cli.py (.*)` writes a table', (tmp_path / 'x/README.md').read_text())
    assert cli.main([*shlex.split(command), '--labels=1', '--draws=1', *own_paths(tmp_path, 'log', 'cache')]) == 0


@pytest.mark.parametrize('error', [None, float('nan')])
def test_compare_cell_without_error_is_formatted(error):
    """One image has no standard error; JSON writes it as null."""
    cell = {'top1': 100.0, 'error': error, 'gain': 0.0, 'gain_error': error}
    assert (compare.format_cell(cell), compare.format_gain(cell)) == ('100.0', '+0.0')
