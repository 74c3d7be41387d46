"""The recipes of augmentation: how strong and how often each operation is."""

# The distortions. `scale` is the share of the area that a crop covers; `jitter` the strengths of brightness, contrast,
# saturation and hue; the rest are probabilities, and `sigma` the blur's range in pixels of the view.
MOCO = {  # MoCo v2, the paper's (section 3)
    'scale': (0.2, 1.0),
    'ratio': (3 / 4, 4 / 3),
    'flip': 0.5,
    'jitter': (0.4, 0.4, 0.4, 0.1),
    'jitter_prob': 0.8,
    'gray_prob': 0.2,
    'sigma': (0.1, 2.0),
}
AUGMENTATIONS = {
    'moco': MOCO,
    # With labels (paper, appendix A): a random resized crop, from --crop_scale on, and a flip.
    'crop': {**MOCO, 'scale': (None, 1.0), 'jitter': (0.0, 0.0, 0.0, 0.0), 'jitter_prob': 0.0, 'gray_prob': 0.0},
    # SimCLR (arXiv 2002.05709, appendix A) at strength 1.
    'simclr': {**MOCO, 'scale': (0.08, 1.0), 'jitter': (0.8, 0.8, 0.8, 0.2)},
}


def distortion(args, name):
    """The row `name` of AUGMENTATIONS, with the views' size (px), the share of them that is blurred, and how their
    pixels are resized and normalized."""
    row = {**AUGMENTATIONS[name], 'size': args.image_size, 'blur_prob': args.blur_prob}
    row |= {'mean': args.mean, 'std': args.std, 'interpolation': args.interpolation}
    return {**row, 'scale': (args.crop_scale, 1.0), 'blur_prob': 0.0} if name == 'crop' else row
