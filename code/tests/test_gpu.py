"""What runs on a GPU, tested without one, as far as that goes.

Tensors without content (FakeTensorMode) say that they are on a GPU: a wrong device, a wrong type, and anything that
would wait for a GPU's answer (item, a choice by a value, a shape by a value) is an error. torch.compile with
fullgraph=True raises where it would fall back. Not shown: values and speed of kernels, cuDNN, NCCL, the way back
through the network on a GPU (autograd needs a real one). Tests of these want a GPU, and are skipped without.
"""

import shutil

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conftest import TINY, own_paths, run
from dataloader import load_dataset, vision
from dataloader.augment.augmentations import get_augmentation
from dataloader.loading.dataset import ImageDataset
from dataloader.loading.loader import resolve_num_workers
from dataloader.readers.memory import Memory
from engine import cuda_graph, memory_estimate, set_up
from loss.negative_cosine import simsiam_loss
from metric.feature_std import feature_std
from metric.knn import TopKSearch, weighted_vote
from model.simsiam import SimSiam
from optimizer.sgd import make_sgd, set_learning_rates
from protocols.linear import train_probe
from runtime import device, distributed
from runtime.checkpoints.load_state import build_model
from runtime.device import compile_unavailable_reason, get_device, use_compile
from runtime.errors import UserError
from runtime.options import get_config, replace_args
from runtime.precision import MixedPrecision, precision
from runtime.seeding import generator_for
from runtime.tensors import channels_last
from train import train_step

MOCO = get_augmentation(get_config(image_size=32, blur_prob=0.5), 'moco')
GPU = torch.device('cuda', 0)
SMALL = {'preset': 'demo', 'proj_dim': 32, 'pred_dim': 8}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA GPU here')


@pytest.fixture
def no_content(monkeypatch):
    """A FakeTensorMode in which autocast to bfloat16 on CUDA is what it is there."""
    monkeypatch.setattr(torch.cuda.amp.common, 'amp_definitely_not_available', lambda: False)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda *_, **__: True)
    vision.mean_and_std.cache_clear()
    with FakeTensorMode() as mode:
        yield mode
    vision.mean_and_std.cache_clear()


def images_of(device, crops):
    shape = (16, 2, 3, 32, 32) if crops else (16, 3, 40, 48)
    return torch.zeros(shape, dtype=torch.uint8, device=device)


@pytest.mark.parametrize('crops', [False, True])
def test_random_views_do_not_synchronize(crops, no_content):
    table, moments = torch.zeros(32, 15, device=GPU), torch.zeros(2, 3, 1, 1, device=GPU)
    views = vision.augment_gpu(images_of(GPU, crops), table, MOCO, moments, 2)
    for view in views:
        assert (view.shape, view.device, view.dtype) == ((16, 3, 32, 32), GPU, torch.float32)
        assert view.is_contiguous(memory_format=torch.channels_last)


def test_forward_and_loss_do_not_synchronize(no_content):
    with GPU:
        model = SimSiam(get_config(**SMALL)).train()
        views = [torch.zeros(16, 3, 32, 32) for _ in range(2)]
    with torch.autocast('cuda', torch.bfloat16):
        outputs = model(*(channels_last(view) for view in views))
    assert {(x.device, x.dtype) for x in outputs} == {(GPU, torch.bfloat16)}
    outputs = [x.float() for x in outputs]
    for value in (simsiam_loss(*outputs), feature_std(outputs[2]), feature_std(outputs[2].detach())):
        assert (value.device, value.dtype, value.shape) == (GPU, torch.float32, ())


@pytest.mark.parametrize('parts', [1, 2])
def test_train_step_does_not_synchronize(parts, no_content):
    """Forward, loss, way back and update; that the test can fail is the last line."""
    model = SimSiam(get_config(**SMALL)).train()
    optimizer, views = make_sgd(model, 0.9, 1e-4), [torch.zeros(16, 3, 32, 32) for _ in range(2)]
    train_step(model, optimizer, views, micro_batches=parts)
    with pytest.raises(DataDependentOutputException):
        train_step(model, optimizer, views, lambda *outputs: simsiam_loss(*outputs) * simsiam_loss(*outputs).item())


def test_knn_does_not_synchronize(no_content):
    found = TopKSearch(torch.zeros(30, 8, device=GPU), 5)
    for first in (0, 40):
        found.update(torch.zeros(40, 8, device=GPU), first)
    labels = torch.zeros(80, dtype=torch.int64, device=GPU)
    scores = weighted_vote(found.cosine, labels[found.rows], 7, 0.1)
    assert (scores.shape, scores.device) == ((30, 7), GPU)


@pytest.mark.parametrize(('side', 'device', 'many'), [(32, GPU, 3136), (224, GPU, 64), (4000, GPU, 1), (32, 'cpu', 0)])
def test_gpu_eval_batch_of_small_images_is_large(side, device, many, no_content):
    pixels = torch.zeros(2, 3, side, side, dtype=torch.uint8, device=device)
    images = ImageDataset(get_config(image_size=32), None, Memory([], pixels), torch.zeros(2), [])
    assert load_dataset.gpu_eval_batch(images) == many
    at_224 = ImageDataset(get_config(image_size=224), None, Memory([], pixels), torch.zeros(2), [])
    assert load_dataset.gpu_eval_batch(at_224) == min(many, 64)  # they are enlarged


def test_train_probe_does_not_synchronize(no_content):
    def pairs_of(_):
        for _ in range(3):
            yield torch.zeros(16, 8), torch.zeros(16, dtype=torch.int64)

    args = get_config(preset='demo', probe_epochs=2, device='cpu')
    weight, bias = train_probe(args, pairs_of, 48, 20, 5)
    assert (weight.shape, bias.shape) == ((5, 8), (5,))


@pytest.mark.parametrize('crops', [False, True])
def test_augmentation_compiles_to_one_graph_equal_to_cpu(crops):
    """All of it, from bytes to normalized views, without a break; and what the CPU's path makes of the same table."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, images_of('cpu', crops).shape, dtype=torch.uint8, generator=generator)
    table = vision.sample(32, MOCO, generator_for(1), None if crops else images.shape[-2:])
    given = (images, table, MOCO, vision.mean_std_of_args(get_config(), images.device), 2)
    whole = torch.compile(vision.augment_gpu, backend='eager', fullgraph=True)(*given)
    for ours, plain, wanted in zip(
        whole, vision.augment_gpu(*given), vision.random_views(images, MOCO, generator_for(1)), strict=True
    ):
        torch.testing.assert_close(ours, plain, atol=1e-6, rtol=0)
        # Of a blur the CPU leaves out what lies beyond the largest sigma of the batch.
        torch.testing.assert_close(
            vision.denormalize(ours, get_config()), vision.denormalize(wanted, get_config()), atol=4e-3, rtol=0
        )


@pytest.mark.parametrize(('backbone', 'shared'), [('small', True), ('resnet50', False)])
def test_network_compiles_to_one_graph(backbone, shared):
    """With the BN of several processes, too, there and back."""
    torch._dynamo.reset()
    model = build_model(get_config(**SMALL, backbone=backbone)).train()
    if shared:
        dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    try:
        if shared:
            distributed.convert_sync_batchnorm(model)
        backend = 'aot_eager' if shared else 'eager'  # the way back is a graph of its own where it is ours
        outputs = torch.compile(model, backend=backend, fullgraph=True)(*torch.randn(2, 4, 3, 32, 32))
        simsiam_loss(*outputs).backward()
        assert all(value.grad is not None for value in model.parameters() if value.requires_grad)
    finally:
        if shared:
            dist.destroy_process_group()


@pytest.mark.parametrize(('dtype', 'shared'), [(None, True), (torch.bfloat16, True), (None, False)])
def test_compiled_network_has_all_gradients(dtype, shared):
    """In float32 torch 2.11 lost those of shared BN and of all before it: what trained was the last layer."""
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    try:
        plain, found = (gradients(dtype, shared, backend) for backend in ('', 'aot_eager'))
    finally:
        dist.destroy_process_group()
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, atol=1e-6 if dtype is None else 1e-2, rtol=0.05, msg=name)


def gradients(dtype, shared, backend):
    """Of every weight of a small network; shared: with the BN of several processes; backend: of torch.compile, ''
    without."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = build_model(get_config(**SMALL)).train()
    if shared:
        distributed.convert_sync_batchnorm(model)
    if backend:
        model.compile(backend=backend, fullgraph=True)
    with torch.autocast('cpu', dtype or torch.bfloat16, enabled=dtype is not None):
        outputs = model(*torch.randn(2, 8, 3, 32, 32))
    simsiam_loss(*(x.float() for x in outputs)).backward()
    return {name: value.grad for name, value in model.named_parameters() if value.requires_grad}


def test_missing_compiler_is_named(monkeypatch, tmp_path):
    """--compile=auto goes on without; --compile=True says why not."""
    cases = {
        'there is no C compiler (apt install gcc)': lambda m: m.setenv('PATH', str(tmp_path)),
        "Python's headers are missing (apt install python3-dev)": lambda m: m.setattr(
            device.sysconfig, 'get_path', lambda _: str(tmp_path)
        ),
        'torch.compile fails: InductorError: nothing works': lambda m: m.setattr(torch, 'compile', broken),
    }

    def broken(_):
        raise RuntimeError('InductorError: nothing works\nand a hundred lines')

    monkeypatch.delenv('CC', raising=False)
    monkeypatch.setattr(device, 'get_device', lambda _: torch.device('cpu'))
    for said, breaks in cases.items():
        compile_unavailable_reason.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(shutil, 'which', shutil.which if 'gcc' in said else lambda name: f'/usr/bin/{name}')
            if 'fails' in said:
                patch.setattr(device.os.path, 'exists', lambda _: True)
            breaks(patch)
            assert compile_unavailable_reason(torch.device('cpu')) == said
            with pytest.raises(UserError, match='--compile=False turns it off'):
                use_compile(get_config(compile='True'))
            patch.setattr(device, 'get_device', lambda _: GPU)
            monkeypatch.setattr(device, 'compile_unavailable_reason', lambda _, said=said: said)
            assert use_compile(get_config(compile='auto')) is False
        monkeypatch.setattr(device, 'compile_unavailable_reason', compile_unavailable_reason)
    compile_unavailable_reason.cache_clear()


def test_short_run_is_not_compiled(monkeypatch):
    """To compile takes longer than the demo."""
    monkeypatch.setattr(set_up, 'get_device', lambda _: GPU)
    monkeypatch.setattr(set_up, 'compile_unavailable_reason', lambda _: 'no compiler')
    assert set_up.why_not_compile(get_config(), 15 * 62) == '930 steps are too few for it'
    assert set_up.why_not_compile(get_config(), 800 * 97) == 'no compiler'
    assert set_up.why_not_compile(get_config(compile='True'), 930) == ''
    monkeypatch.setattr(set_up, 'get_device', lambda _: torch.device('cpu'))
    assert set_up.why_not_compile(get_config(), 930) == ''


@pytest.mark.parametrize(
    ('capability', 'bf16', 'found'),
    [
        ((9, 0), True, torch.bfloat16),
        ((8, 0), True, torch.bfloat16),
        ((7, 5), False, torch.float16),
        ((7, 0), False, torch.float16),
        ((6, 1), False, None),
    ],
)
def test_amp_auto_follows_gpu_capability(capability, bf16, found, monkeypatch):
    """V100, T4 and RTX 20 have no bfloat16, but cores for float16."""
    monkeypatch.setattr('runtime.precision.get_device', lambda _: GPU)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda **_: bf16)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda _: capability)
    assert precision(get_config(amp='auto')) == found


def test_ranks_get_own_gpu_and_share_of_cores(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(device, 'unsupported_gpu', lambda index: '')
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr('dataloader.loading.loader.cpu_count', lambda: 128)
    assert (get_device(get_config()).type, resolve_num_workers(-1)) == ('cuda', 128)
    assert get_device(get_config(device='cuda:1')) == torch.device('cuda', 1)
    for name, value in {'WORLD_SIZE': 16, 'LOCAL_WORLD_SIZE': 8, 'RANK': 9, 'LOCAL_RANK': 1}.items():
        monkeypatch.setenv(name, str(value))
    assert (get_device(get_config()), resolve_num_workers(-1), resolve_num_workers(3)) == (
        torch.device('cuda', 1),
        16,
        3,
    )
    with pytest.raises(UserError, match='would put all 16 processes on one GPU'):
        get_device(get_config(device='cuda:0'))
    monkeypatch.setenv('LOCAL_RANK', '2')
    with pytest.raises(UserError, match='--nproc_per_node=2'):
        get_device(get_config())


def test_estimate_step_bytes_equals_measured_memory():
    """For the paper's ResNet-50 at 224 px in bfloat16 12, 24 and 47 GB at 128, 256 and 512 images were counted."""
    args = get_config(preset='imagenet', device='cpu')
    model = build_model(args)
    counted = [memory_estimate.estimate_step_bytes(model, images, 2, 224, torch.bfloat16) for images in (128, 256, 512)]
    assert counted == pytest.approx([12e9, 24e9, 47e9], rel=0.04)
    assert counted[2] - counted[1] == 2 * (counted[1] - counted[0])
    full = memory_estimate.estimate_step_bytes(model, 128, 2, 224, None)
    assert full / 2 < counted[0] < 0.6 * full
    line, helps = memory_estimate.describe_step_memory(args, model, torch.bfloat16, 25e9)
    assert helps == '--grad_accum_steps=4 takes 13.6 GB'
    assert line == f'a step takes about 50.6 GB, 25.0 GB are free: {helps}'
    line, helps = memory_estimate.describe_step_memory(args, model, torch.bfloat16, 80e9)
    assert line == 'a step takes about 50.6 GB, 80.0 GB are free'
    assert helps == 'try a smaller --batch_size, or --grad_accum_steps=2'
    assert (
        'a smaller --image_size'
        in memory_estimate.describe_step_memory(replace_args(args, batch_size=4), model, torch.bfloat16, 1e8)[0]
    )


@pytest.mark.parametrize(
    ('options', 'said'),
    [
        ({}, '--grad_accum_steps=16 takes 5.0 GB'),
        ({'num_views': 4}, 'the views alone are too large'),  # seven times 1.2 GB
        ({'loss_symmetry': '2x'}, 'the views alone are too large'),
        ({'num_views': 4, 'augment_backend': 'worker'}, '--grad_accum_steps=32 takes 4.9 GB'),
        ({'num_views': 4, 'grad_accum_steps': 16}, 'the views alone are too large'),
        ({'batch_size': 510}, '--grad_accum_steps=15 takes'),  # 8 would cut no equal parts
    ],
)
def test_memory_estimate_includes_views(options, said):
    """ResNet-50 at 224 px on a card with 8.4 GB free: views are made all at once, before the parts of a step."""
    args = get_config(preset='imagenet', device='cpu', **options)
    line, helps = memory_estimate.describe_step_memory(args, build_model(args), torch.bfloat16, 6e9)
    assert said in line
    assert said in helps


def losses_of(steps, rates, call):
    """The losses of a small network's steps at these rates, on views that take turns; call: makes of a step what
    is called."""
    torch.manual_seed(0)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    model = SimSiam(get_config(**SMALL)).to(device).train()
    optimizer = make_sgd(model, 0.9, 1e-4)
    views = torch.randn(3, 2, 16, 3, 32, 32, device=device)
    step = call(lambda views: train_step(model, optimizer, views)[0], model, optimizer)
    losses = []
    for i in range(steps):
        set_learning_rates(optimizer, rates(i)[0], *rates(i))
        losses.append(step([channels_last(view) for view in views[i % 3]]).item())
        assert [group['lr'] for group in optimizer.param_groups] == [rates(i)[0], *rates(i)]  # numbers again
    return losses, step


def rising(i):
    return 0.002 * i, 0.004 * i


def plainly(step, *_):
    return step


def recorded(*given):
    return cuda_graph.CudaGraphStep(*given, force=True)


def test_cuda_graph_capture_failure_continues_eagerly(capsys, monkeypatch):
    """In one line, with the same numbers."""
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda: None)
    monkeypatch.setattr(torch.cuda, 'CUDAGraph', lambda: None)
    monkeypatch.setattr(torch.cuda, 'graph', broken_graph)
    found, step = losses_of(12, rising, recorded)
    assert (step.graph, step.disabled) == (None, True)
    assert found == pytest.approx(losses_of(12, rising, plainly)[0], abs=1e-4)
    assert capsys.readouterr().err.splitlines() == [
        'warning: the step cannot be captured as a CUDA graph, and runs as before: not here'
    ]


class Tape(TorchDispatchMode):
    """What torch.cuda.graph records, on a CPU: every operation with the memory that it works on, numbers as they are.
    As there, nothing is done yet: what an operation overwrites is put back at the end."""

    def __init__(self):
        super().__init__()
        self.done, self.before = [], []

    def __torch_dispatch__(self, function, _, given=(), named=None):
        for place, value in zip(function._schema.arguments, given, strict=False):
            if place.alias_info and place.alias_info.is_write:
                self.before += [(x, x.clone()) for x in tree_leaves(value)]
        outputs = function(*given, **(named or {}))
        self.done.append((function, given, named or {}, outputs))
        return outputs

    @torch.no_grad()
    def __exit__(self, *error):
        super().__exit__(*error)
        for overwritten, value in reversed(self.before):
            overwritten.copy_(value)

    @torch.no_grad()
    def replay(self):
        for function, given, named, outputs in self.done:
            again, before = (tree_leaves(x) for x in (function(*given, **named), outputs))
            for new, old in zip(again, before, strict=True):
                if isinstance(old, torch.Tensor) and new.data_ptr() != old.data_ptr():
                    old.copy_(new)


@pytest.fixture
def on_tape(monkeypatch):
    """A tape for a graph."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda: None)
    monkeypatch.setattr(torch.cuda, 'CUDAGraph', Tape)
    monkeypatch.setattr(torch.cuda, 'graph', lambda tape, **_: tape)


@pytest.mark.usefixtures('on_tape')
def test_cuda_graph_replay_uses_current_views_and_rates():
    """On a CPU; views and rates are those of each step."""
    plain, _ = losses_of(20, rising, plainly)
    found, step = losses_of(20, rising, recorded)
    assert step.graph
    assert step.calls == 20
    assert found == pytest.approx(plain, abs=1e-4)
    still, _ = losses_of(20, lambda i: rising(min(i, 7)), plainly)
    assert still[-1] != pytest.approx(plain[-1], abs=1e-3)  # rates count


@pytest.mark.usefixtures('on_tape')
def test_cuda_graph_with_wrong_replay_is_not_used(monkeypatch, capsys):
    """As with rates that are part of the record; and what was tried leaves no trace."""
    with_rates = cuda_graph.CudaGraphStep.run_with_tensor_lr
    monkeypatch.setattr(
        cuda_graph.CudaGraphStep,
        'run_with_tensor_lr',
        lambda self, rates: self.copy_inputs(self.inputs) or with_rates(self, rates),
    )
    found, step = losses_of(12, rising, recorded)
    assert (step.graph, step.disabled) == (None, True)
    assert 'a replay gives another result' in capsys.readouterr().err
    assert found == pytest.approx(losses_of(12, rising, plainly)[0], abs=1e-4)


def broken_graph(*_, **__):
    raise RuntimeError('not here\nand a hundred lines')


def test_cuda_graph_auto_is_used_if_possible(monkeypatch):
    assert not cuda_graph.should_use_graph(get_config(device='cpu'))
    with pytest.raises(UserError, match='--cuda_graph=True: it needs a CUDA GPU; --cuda_graph=False turns it off'):
        cuda_graph.should_use_graph(get_config(device='cpu', cuda_graph='True'))
    monkeypatch.setattr(cuda_graph, 'get_device', lambda _: GPU)
    monkeypatch.setattr(cuda_graph, 'precision', lambda args: {'fp16': torch.float16}.get(args.amp))
    assert cuda_graph.should_use_graph(get_config(cuda_graph='True'))
    assert not cuda_graph.should_use_graph(get_config(cuda_graph='False'))
    for options, said in (({'amp': 'fp16'}, 'float16'), ({}, 'several processes')):
        monkeypatch.setenv('WORLD_SIZE', '1' if options else '2')
        assert not cuda_graph.should_use_graph(get_config(**options))
        with pytest.raises(UserError, match=said):
            cuda_graph.should_use_graph(get_config(cuda_graph='True', **options))


@needs_gpu
@pytest.mark.parametrize('compiled', [False, True])
def test_cuda_graph_step_equals_eager_step(compiled, monkeypatch):
    """Loss by loss, at rates that change."""
    if compiled:
        monkeypatch.setattr(SimSiam, 'train', lambda model: model.compile() or torch.nn.Module.train(model))
    found, step = losses_of(20, rising, recorded)
    assert step.graph
    plain, _ = losses_of(20, rising, plainly)
    assert found == pytest.approx(plain, abs=5e-3)


@needs_gpu
def test_views_on_gpu_equal_cpu():
    images = torch.randint(0, 256, (16, 3, 40, 48), dtype=torch.uint8)
    for compiled in (False, use_compile(get_config())):
        ours = vision.random_views(images.cuda(), MOCO, generator_for(1), compiled=compiled)
        for view, wanted in zip(ours, vision.random_views(images, MOCO, generator_for(1)), strict=True):
            assert (
                vision.denormalize(view, get_config()).cpu() - vision.denormalize(wanted, get_config())
            ).abs().max() < 0.01


@needs_gpu
@pytest.mark.parametrize('compiled', [False, True])
def test_sync_batchnorm_with_nccl_equals_bn(compiled):
    """One process among itself, in float32: what NCCL sums in a step, in one compiled graph or not, is what it was."""

    def shared(step, model, _):
        distributed.convert_sync_batchnorm(model)
        if compiled:
            model.compile(fullgraph=True)
        return step

    torch._dynamo.reset()
    plain, _ = losses_of(6, rising, plainly)
    dist.init_process_group('nccl', store=dist.HashStore(), rank=0, world_size=1, device_id=GPU)
    try:
        found, _ = losses_of(6, rising, shared)
    finally:
        dist.destroy_process_group()
    assert found == pytest.approx(plain, abs=5e-3)


@needs_gpu
@pytest.mark.parametrize('dtype', [torch.bfloat16, None])
def test_memory_estimate_equals_peak_on_gpu(dtype):
    """The paper's ResNet-50 at 224 px, not compiled; what is said has a tenth more."""
    args = get_config(preset='imagenet')
    model = build_model(args).cuda().to(memory_format=torch.channels_last).train()
    optimizer, views = make_sgd(model, 0.9, 1e-4), torch.randn(2, 32, 3, 224, 224, device=GPU)
    views = [channels_last(view) for view in views]
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        train_step(model, optimizer, views, amp=MixedPrecision(dtype))
    assert torch.cuda.max_memory_allocated() == pytest.approx(
        memory_estimate.estimate_step_bytes(model, 32, 2, 224, dtype), rel=0.12
    )


@needs_gpu
@pytest.mark.parametrize(
    'options',
    [
        ('--cuda_graph=True',),
        ('--compile=False', '--amp=fp16'),
        ('--grad_accum_steps=2', '--amp=off'),
        ('--num_views=4', '--optimizer=adamw', '--learning_rate=0.001'),
        ('--loss_symmetry=2x', '--cuda_graph=True'),
        ('--augment_backend=worker', '--num_workers=2'),
        ('--cache_images=off', '--num_workers=2', '--compile=True'),
    ],
)
def test_train_on_gpu_learns(options, drawn, tmp_path):
    done = run('train', *TINY, f'--image_path={drawn}', '--device=cuda', *options, *own_paths(tmp_path))
    assert (done.returncode, done.stderr) == (0, '')
    assert 'cuda' in done.stdout
    assert 'nan' not in done.stdout
