"""Augmentation: every operation against torchvision's or PIL's, every random parameter against its distribution."""

import math
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch.nn import functional
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as reference

from dataloader import vision
from dataloader.augment import blur, color, crop
from dataloader.augment.augmentations import AUGMENTATIONS, get_augmentation
from runtime.options import get_config
from runtime.seeding import generator_for

MOCO = get_augmentation(get_config(image_size=24, blur_prob=0.5), 'moco')


def photos(n, height, width, seed=0):
    """Images with structure at every scale, N x 3 x H x W in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 3, height, width, generator=generator)
    smooth = functional.interpolate(torch.rand(n, 3, 4, 4, generator=generator), (height, width), mode='bicubic')
    return (0.5 * x + 0.5 * smooth).clamp(0, 1)


@pytest.mark.parametrize(('height', 'width', 'size'), [(32, 32, 32), (48, 40, 32), (30, 64, 12), (20, 20, 50)])
def test_crop_resize_equals_torchvision_and_pil(height, width, size):
    x = (photos(16, height, width) * 255).round() / 255
    boxes, flips = MOCO.crop.sample(16, height, width, generator_for('boxes')).split([4, 1], 1)
    ours = crop.crop_resize(x, boxes, flips[:, 0], size)
    for image, box, flip, result in zip(x, boxes.int().tolist(), flips, ours, strict=True):
        top, left, h, w = box
        wanted = reference.resized_crop(image, top, left, h, w, [size, size], antialias=True)
        torch.testing.assert_close(result, wanted.flip(2) if flip else wanted, atol=2e-5, rtol=0)
        pil = reference.to_pil_image(image).crop((left, top, left + w, top + h))
        pil = reference.pil_to_tensor(pil.resize((size, size), Image.Resampling.BILINEAR)).float() / 255
        torch.testing.assert_close(result, pil.flip(2) if flip else pil, atol=1.6 / 255, rtol=0)


@pytest.mark.parametrize(('height', 'width', 'size', 'ratio'), [(48, 48, 32, 1.0), (60, 44, 28, 0.875), (8, 9, 16, 1)])
def test_eval_view_equals_pil_center_crop(height, width, size, ratio):
    """As PIL resizes a part of an image: whole and cropped batches agree with it."""
    images = (photos(3, height, width) * 255).round().to(torch.uint8)
    args = get_config(image_size=size, crop_ratio=ratio)
    ours = vision.denormalize(vision.eval_view(images, args), args)
    side = min(height, width) * ratio
    left, top = (width - side) / 2, (height - side) / 2
    for image, result in zip(images, ours, strict=True):
        pil = reference.to_pil_image(image).resize(
            (size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side)
        )
        torch.testing.assert_close(result, reference.pil_to_tensor(pil) / 255, atol=1.6 / 255, rtol=0)


def test_normalize_equals_torchvision():
    x = photos(2, 8, 8)
    wanted = v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(x)
    moments = vision.mean_std_of_args(get_config(), x.device)
    torch.testing.assert_close(vision.normalize(x.clone(), moments), wanted)
    torch.testing.assert_close(vision.denormalize(vision.normalize(x.clone(), moments), get_config()), x)


OPERATIONS = (
    (color.brightness, reference.adjust_brightness, (0.3, 1.0, 1.7)),
    (color.contrast, reference.adjust_contrast, (0.3, 1.0, 1.7)),
    (color.saturation, reference.adjust_saturation, (0.3, 1.0, 1.7)),
    (color.hue, reference.adjust_hue, (-0.2, 0.0, 0.1, 0.2)),
)


@pytest.mark.parametrize(('ours', 'theirs', 'factors'), OPERATIONS)
def test_color_operations_equal_torchvision(ours, theirs, factors):
    x = photos(4, 9, 7)
    x[0] = x[0, :1]  # a gray image has no hue
    x[1] = torch.eye(3)[torch.arange(63) % 3].T.view(3, 9, 7)  # pure colors
    for factor in factors:
        result = ours(x.clone(), torch.full((4, 1, 1, 1), factor))
        wanted = torch.stack([theirs(image, factor) for image in x])
        # torchvision weighs luma by 0.2989, 0.587, 0.114, which sum to 0.9999
        torch.testing.assert_close(result, wanted, atol=5e-4, rtol=0)


def test_blur_equals_convolution_with_gaussian():
    """A separate derivation: the border mirrored, then a convolution with the outer product of two Gaussians."""
    x, sigma = photos(5, 20, 20), torch.tensor([0.1, 0.4, 1.0, 1.7, 2.0])
    offsets = torch.arange(-6.0, 7.0)
    for image, s, result in zip(x, sigma, blur.blur(x.clone(), sigma), strict=True):
        line = torch.exp(-(offsets**2) / (2 * s**2))
        kernel = torch.outer(line, line) / line.sum() ** 2
        padded = functional.pad(image[:, None], (6, 6, 6, 6), mode='reflect')
        torch.testing.assert_close(result, functional.conv2d(padded, kernel[None, None])[:, 0], atol=1e-5, rtol=0)
    inside = (slice(None), slice(None), slice(6, -6), slice(6, -6))
    wanted = reference.gaussian_blur(x[3:4], [13, 13], [1.7, 1.7])
    torch.testing.assert_close(blur.blur(x.clone(), sigma)[3:4][inside], wanted[inside], atol=1e-5, rtol=0)


def test_blur_of_tiny_image_is_finite():
    x = photos(2, 4, 4)
    blurred = blur.blur(x.clone(), torch.tensor([0.1, 2.0]))
    torch.testing.assert_close(blurred[0], x[0], atol=1e-5, rtol=0)
    assert blurred[1].std() < x[1].std()


def draws_of(augmentation, n, generator):
    """Of each operation after the crop."""
    return [operation.sample(n, generator) for operation in augmentation.operations]


def on_cpu(augmentation, x, draws):
    for operation, part in zip(augmentation.operations, draws, strict=True):
        x = operation.on_cpu(x, part)
    return x


def test_augmentation_applies_each_images_parameters():
    """Against a loop over the images, with torchvision's operations in the order that was drawn."""
    x, draws = photos(40, 12, 12), draws_of(MOCO, 40, generator_for('colours'))
    ours = on_cpu(MOCO, x.clone(), draws)
    jitter, gray, sigma = draws[0], draws[1][:, 0], draws[2][:, 0]
    untouched = 0
    for i, image in enumerate(x):
        wanted = image[None]
        for place in range(4):
            for kind, (_, operation, _) in enumerate(OPERATIONS):
                if jitter[i, 4 + kind] == place:
                    wanted = operation(wanted, jitter[i, kind].item())
        if gray[i]:
            wanted = reference.rgb_to_grayscale(wanted, 3)
        if sigma[i] > 0:
            wanted = blur.blur(wanted.clone(), sigma[i : i + 1])
        torch.testing.assert_close(ours[i : i + 1], wanted, atol=2e-3, rtol=0)
        untouched += torch.equal(ours[i], image)
    assert 0 < untouched < 20  # none of it applies to 0.2 x 0.8 x 0.5 of the images


def test_on_gpu_equals_on_cpu():
    """on_gpu, which works on every image whatever was drawn, against on_cpu."""
    x, draws = photos(60, 24, 24), draws_of(MOCO, 60, generator_for('gpu'))
    for blurred, atol in ((1, 4e-3), (0, 1e-5)):
        drawn, ours = [*draws[:2], draws[2] * blurred], x.clone()
        for operation, part in zip(MOCO.operations, drawn, strict=True):
            ours = operation.on_gpu(ours, part)
        torch.testing.assert_close(ours, on_cpu(MOCO, x.clone(), drawn), atol=atol, rtol=0)


def gap(ours, theirs):
    """The Kolmogorov-Smirnov distance of two samples."""
    both = torch.cat((ours, theirs)).sort().values
    ours, theirs = ours.sort().values, theirs.sort().values
    share = [torch.searchsorted(t, both, right=True) / len(t) for t in (ours, theirs)]
    return (share[0] - share[1]).abs().max().item()


@pytest.mark.parametrize(('height', 'width', 'name'), [(32, 32, 'moco'), (96, 24, 'moco'), (30, 40, 'simclr')])
def test_crops_have_distribution_of_torchvision(height, width, name):
    """With 6,000 draws each, two samples of one distribution are further apart than 0.04 once in ten thousand times."""
    drawn, n = AUGMENTATIONS[name][0], 6000
    boxes, flips = drawn.sample(n, height, width, generator_for('crops')).split([4, 1], 1)
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = v2.RandomResizedCrop(8, scale=drawn.scale, ratio=drawn.ratio)
    params = [theirs.make_params([image]) for _ in range(n)]
    theirs = torch.tensor([[p[key] for key in ('top', 'left', 'height', 'width')] for p in params]).float()
    for ours, others in zip(boxes.unbind(1), theirs.unbind(1), strict=True):
        assert gap(ours, others) < 0.04
    assert gap(boxes[:, 2] * boxes[:, 3], theirs[:, 2] * theirs[:, 3]) < 0.04
    assert gap(boxes[:, 3] / boxes[:, 2], theirs[:, 3] / theirs[:, 2]) < 0.04
    assert abs(flips.float().mean() - 0.5) < 0.03


@pytest.mark.parametrize('name', ['moco', 'simclr'])
def test_color_parameters_have_stated_distribution(name):
    augmentation, n = get_augmentation(get_config(blur_prob=0.5), name), 24000
    jitter, gray, sigma = draws_of(augmentation, n, generator_for('colours'))
    gray, sigma, jittering = gray[:, 0], sigma[:, 0], augmentation.operations[0]
    even = (torch.arange(n) + 0.5) / n
    for kind, strength in enumerate((jittering.brightness, jittering.contrast, jittering.saturation, jittering.hue)):
        middle = 0 if kind == 3 else 1
        assert gap(jitter[:, kind], middle - strength + 2 * strength * even) < 0.02
    jittered = jitter[:, 4] < 4
    assert abs(jittered.float().mean() - 0.8) < 0.012
    assert abs(gray.mean() - 0.2) < 0.012
    blurred = sigma > 0
    assert abs(blurred.float().mean() - 0.5) < 0.015
    assert gap(sigma[blurred], 0.1 + 1.9 * even) < 0.025
    # All 24 orders, equally often.
    orders, counts = jitter[jittered, 4:].unique(dim=0, return_counts=True)
    assert len(orders) == math.factorial(4)
    share = counts / counts.sum()
    assert (share - 1 / 24).abs().max() < 0.007
    # Which images are jittered, gray or blurred has nothing to do with one another.
    table = torch.stack((jittered, gray, blurred)).float()
    assert (torch.corrcoef(table) - torch.eye(3)).abs().max() < 0.03


def test_random_views_depend_on_generator_and_differ():
    images = (photos(6, 40, 40) * 255).to(torch.uint8)
    first, again, other = (vision.random_views(images, MOCO, generator_for(seed)) for seed in (1, 1, 2))
    for a, b, c in zip(first, again, other, strict=True):
        assert a.shape == (6, 3, 24, 24)
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
    assert ((first[0] - first[1]).abs().amax((1, 2, 3)) > 0.1).all()


def test_views_without_operations_equal_image():
    plain = replace(
        get_augmentation(get_config(image_size=16), 'moco'),
        crop=crop.RandomResizedCrop(scale=(1, 1), ratio=(1, 1), flip=0),
        operations=(color.ColorJitter(0, 0, 0, 0, prob=1), color.RandomGrayscale(0), blur.GaussianBlur(prob=0)),
    )
    images = (photos(6, 16, 16) * 255).to(torch.uint8)
    for view in vision.random_views(images, plain, generator_for(0)):
        torch.testing.assert_close(vision.denormalize(view, get_config()), images / 255, atol=1e-4, rtol=0)
    crops = torch.stack((images, 255 - images), 1)  # as workers send them, for a GPU to distort or distorted already
    for view1, view2 in (
        vision.random_views(crops, plain, generator_for(0)),
        vision.normalize_worker_views(crops, get_config()),
    ):
        torch.testing.assert_close(vision.denormalize(view1, get_config()), images / 255, atol=1e-4, rtol=0)
        torch.testing.assert_close(vision.denormalize(view2, get_config()), 1 - images / 255, atol=1e-4, rtol=0)


@pytest.mark.parametrize('name', ['moco', 'simclr', 'mild', 'crop'])
@pytest.mark.parametrize('interpolation', ['bilinear', 'bicubic'])
def test_views_from_memory_gpu_and_crops_agree(interpolation, name):
    """The three ways to a view: whole images on a CPU, on a GPU (its operations, here on the CPU), and crops by
    torchvision's resize, as a dataloader worker cuts them."""
    images = (photos(12, 40, 48) * 255).round().to(torch.uint8)
    augmentation = get_augmentation(get_config(image_size=24, interpolation=interpolation, blur_prob=0.5), name)
    draws = vision.sample(24, augmentation, generator_for('ways'), (40, 48))
    ours = torch.cat(vision.apply_params(images, draws, augmentation, 2))
    mean_std = vision.mean_and_std('imagenet', 'imagenet', images.device)
    other = torch.cat(vision.augment_gpu(images, draws, augmentation, mean_std, 2))
    torch.testing.assert_close(ours, other, atol=2e-2, rtol=0)
    cut = torch.empty(24, 3, 24, 24, dtype=torch.uint8)
    for i, (top, left, height, width, flip) in enumerate(draws[:, :5].int().tolist()):
        how = reference.InterpolationMode(interpolation)
        x = reference.resized_crop(images[i % 12], top, left, height, width, [24, 24], how, True)
        cut[i] = x.flip(2) if flip else x
    draws[:, :5] = 0  # cropped already
    workers = vision.augment_cpu(cut, draws, augmentation, lambda x: vision.normalize(x, mean_std))
    assert (workers - ours).abs().mean() < 0.03


def test_simclr_augmentation_is_stronger_than_moco_and_mild_weaker():
    mild, moco, simclr = (AUGMENTATIONS[name] for name in ('mild', 'moco', 'simclr'))
    assert simclr[0].scale[0] < moco[0].scale[0] < mild[0].scale[0]
    for name in ('brightness', 'contrast', 'saturation', 'hue'):
        assert getattr(simclr[1], name) == 2 * getattr(moco[1], name) > 2 * getattr(mild[1], name)
    assert len(mild) == 2  # neither grayscale nor blur
