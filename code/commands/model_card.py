"""The model card of an exported backbone: training data, initial weights, license, results, usage."""

import json
import shlex
from pathlib import Path

from config import INIT_FROM_DEFAULTS, PREPROCESSING
from model.weights import is_off_the_shelf, timm_config
from protocols import collapse_verdict, results
from protocols.compare import format_cell, format_gain
from protocols.protocol import find_protocol
from runtime.checkpoints.pretrained import describe_preprocessing
from runtime.checkpoints.run_folder import checkpoints, name_run
from runtime.files import is_number, read_json, read_metrics
from runtime.options import channel_numbers, expand_channel_values, repeat_ckpt_name, replace_args


def find_license(source, backbone):
    """Return the license of a run's initial weights, as stated by timm; '' if unknown. source: --init_from."""
    if source.startswith('timm') and is_off_the_shelf(source):
        name = source.removeprefix('timm').removeprefix('/') or backbone.removeprefix('timm/')
        config = timm_config(name)
        return (config and config.license) or ''
    return ''


def weights_source(args):
    """Return the name of the weights that were trained on, or exported without training."""
    return args.ckpt_name if is_off_the_shelf(args.ckpt_name) else args.init_from


def render_model_card(args, checkpoint, name, features):
    """Render the model card as Markdown. name: of the network in timm; features: number of features."""
    run = checkpoint['run']
    run_info = read_json(run / 'run.json')
    license_name = find_license(weights_source(args), args.backbone)
    trained = was_trained(args, checkpoint)
    head = ['---', 'library_name: timm', f'tags: [image-feature-extraction{", simsiam" * trained}]']
    head += [f'license: {license_name}'] if license_name else []
    lines = [
        *head,
        '---',
        '',
        f'# {name}{", SimSiam" * trained}',
        '',
        *describe_model(args, checkpoint, run_info, features, license_name),
        '',
    ]
    lines += ['## Evaluation', '', *describe_results(args, checkpoint), '']
    lines += ['## Use', '', '```python', 'import timm', '']
    lines += ["backbone = timm.create_model('local-dir:<this folder>', pretrained=True).eval()"]
    if not channel_numbers(args.channels):  # RGB
        lines += ['transform = timm.data.create_transform(**timm.data.resolve_model_data_config(backbone))']
        call = f'features = backbone(transform(image).unsqueeze(0))    # 1 x {features}; image: PIL, RGB'
    else:
        shape = f'1 x {args.num_channels} x {args.image_size} x {args.image_size}'
        call = f'features = backbone(image)    # 1 x {features}; image: {shape}, normalized as above'
    lines += [call, '```']
    if not channel_numbers(args.channels):
        lines += [
            '',
            'timm resizes to whole pixels, then crops. The features of the table were computed from crops that are',
        ]
        lines += ['resized once, so these differ from them, the more the smaller the images are.']
    return '\n'.join(lines) + '\n'


def describe_model(args, checkpoint, run_info, features, license_name):
    """Describe the model: a list of lines."""
    images = run_info.get('images', {})
    if not was_trained(args, checkpoint):
        return [
            f'A backbone with {features} features per image. Its weights are those of '
            f'{describe_origin(args, checkpoint)}, not trained further'
            + (f'; license {license_name}.' if license_name else '; their license is unknown.'),
            '',
            *describe_pixels(args),
        ]
    lines = [
        f'A backbone with {features} features per image, trained without labels by SimSiam (arXiv 2011.10566)'
        + (
            f' and distillation from its initial weights at {args.distill_size} px.'
            if is_distilled(args, checkpoint)
            else '.'
        ),
        '',
        f'- images: {images.get("number", "unknown")}, whose names and classes have the digest '
        f'{images.get("digest", "unknown")}; they are not part of this folder',
        f'- initial weights: {describe_start(args)}'
        + (f', license {license_name}' if license_name else ', whose license is unknown' if args.init_from else ''),
        *([describe_start_options(args, checkpoint)] if args.init_from else []),
        f'- epoch {checkpoint["epoch"]} of {args.max_epochs}'
        + (f' and {checkpoint["images"]} images of the next' if checkpoint.get('images') else '')
        + f', batch {args.batch_size}, learning rate '
        f'{args.learning_rate:g} x batch / 256, augmentation {args.augmentation}',
        *describe_pixels(args),
    ]
    # The last resumption may have come after an earlier checkpoint.
    is_newest = checkpoints(checkpoint['run'])[-1:] == [checkpoint['path']]
    for name, title in (('command', 'command'), ('resume_command', 'resumed last by')):
        if run_info.get(name) and (is_newest or name == 'command'):
            lines.append(f'- {title}: `python3 {shlex.join(run_info[name])}`')
    if commit := run_info.get('versions', {}).get('commit'):
        lines.append(f'- code: commit {commit}, torch {run_info["versions"].get("torch")}')
    return lines


def describe_pixels(args):
    """Describe preprocessing and channels: a list of lines of Markdown."""
    lines = [f'- preprocessing: {describe_preprocessing(args)}']
    if channel_numbers(args.channels):
        lines.append(f'- channels {args.channels}, each from black to white at white_level {args.white_level}')
    return lines


def describe_start_options(args, checkpoint):
    """Describe how a run trained its initial weights: a line of Markdown."""
    names = (*INIT_FROM_DEFAULTS, *(['distill_size', 'distill_neighbors'] if is_distilled(args, checkpoint) else []))
    options = ' '.join(f'--{name}={getattr(args, name)}' for name in names)
    return f'- options of training from them: `{options}`; start_share is the share of the initial weights in these'


def is_distilled(args, checkpoint):
    """Whether the run had the distillation loss, for which its checkpoints keep the initial weights."""
    return bool(args.distill_weight and checkpoint.get('start'))


def was_trained(args, checkpoint):
    """Whether the weights are of a training with this code: not those of another tool, nor a run's unchanged start."""
    if checkpoint['layout'] != 'ours' or not args.init_from:
        return checkpoint['layout'] == 'ours'
    epochs = checkpoint['epoch'] + bool(checkpoint.get('images'))
    only_heads = epochs <= args.heads_epochs and args.freeze_bn
    return bool(epochs) and not only_heads and args.start_share < 1


def describe_origin(args, checkpoint):
    """Name the origin of weights that were not trained further."""
    return describe_start(args) if checkpoint['layout'] == 'ours' else checkpoint['path'].name


def describe_start(args):
    """Name the initial weights of a run."""
    names = {
        '': 'random weights',
        'imagenet': f"torchvision's ImageNet weights of {args.backbone}",
        'timm': args.backbone,
    }
    return names.get(args.init_from, args.init_from)


def describe_results(args, checkpoint):
    """Describe the verdict and the results of evaluate: a list of lines."""
    run, lines = checkpoint['run'], []
    if run.is_dir() and (verdict := collapse_verdict.judge_checkpoint(checkpoint, args)):
        word = verdict[0] if was_trained(args, checkpoint) else f'a training from these weights was {verdict[0]}'
        lines += [f'**{word}**: {verdict[1]}', '']
    of_checkpoint = results.load_results(run, checkpoint=checkpoint['path'].name)
    own_results = [result for result in of_checkpoint if results.is_of_weights(result, args, checkpoint)]
    single = [line for result in own_results if not result.get('rows') for line in describe_result(result, args)]
    tables = [format_compare_table(result, args) for result in own_results if result.get('rows')]
    lines += [line for part in (single, *tables) if part for line in (*part, '')]
    if not (single or tables):
        lines += [f'Not evaluated: `python3 cli.py {evaluate_command(args, checkpoint)}` writes a table.', '']
    if others := len(of_checkpoint) - len(own_results):
        lines += [f'Not listed: results with another --start_share ({others}).']
    return lines[:-1] if lines and not lines[-1] else lines


def evaluate_command(args, checkpoint):
    """Return the command that evaluates the exported weights: by labels, unless training found none."""
    run, is_ours = checkpoint['run'], checkpoint['layout'] == 'ours'
    measured = [line for line in read_metrics(run / 'metrics.jsonl') if args.knn_every] if is_ours else []
    name = f'{name_run(args, run)}/{checkpoint["path"].name}' if is_ours else args.ckpt_name
    command = f'evaluate {repeat_ckpt_name(replace_args(args, ckpt_name=name), "evaluate")}'
    if measured and not any('pretraining/knn_top1' in line for line in measured):
        return f'{command} --protocol=label_free'
    beside = 'untrained,start' if args.init_from else 'untrained'
    images = '' if is_ours else ' --image_path=<labeled images>'
    return f'{command} --protocol=compare --beside={beside}{images}'


def describe_result(result, args):
    """Describe a result of any protocol but compare by its first number, in a line of Markdown: a list of one line, or
    of none for label_free, whose numbers are in the verdict."""
    names = find_protocol(result['protocol']).numbers
    numbers = [f'{name} {result[key]:.2f} %' for key, name in names.items() if is_number(result.get(key))]
    return [f'- {describe_settings(result, args)}: {numbers[0]}; {describe_dataset(result)}'] if numbers else []


def describe_settings(result, args):
    """Name the protocol of a result, its explicit options, and the preprocessing that is not the exported one."""
    settings = result.get('settings', {})  # not in early versions
    options = results.list_options(result)
    others = [name for name in PREPROCESSING if name in settings and differs(name, settings[name], args)]
    options += [option for name in others if (option := f'--{name}={settings[name]}') not in options]
    return f'{result["protocol"]}{f" ({shlex.join(options)})" if options else ""}'


def differs(name, value, args):
    """Whether an option of preprocessing is not that of args. Words of mean and std are compared as numbers."""
    if name not in ('mean', 'std'):
        return value != getattr(args, name)
    one, other = (expand_channel_values(name, text, args.num_channels) for text in (value, getattr(args, name)))
    return any(abs(a - b) > 1e-5 for a, b in zip(one, other, strict=False))


def describe_dataset(result):
    """Name the images of a result: the folder's name, number and digest; never the images themselves."""
    images = result.get('images', {})  # not in early versions
    split = next((name for name in images if name in ('val', 'test')), '')
    digest = f', digest {images[split]["digest"]}' if split else ''
    digest += results.selection_note(result)
    return f'{result["num_val"]} images of {Path(images.get("path", "an unnamed dataset")).name} {split}{digest}'


def format_compare_table(result, args):
    """Format the rows of --protocol=compare as a Markdown table: a list of lines."""
    columns = [*result['rows'][0]['columns']]
    lines = [
        f'{describe_settings(result, args)}: top-1 in percent ± standard error, in brackets the gain of this '
        f'backbone over the row, paired by image; {describe_dataset(result)}.',
        '',
    ]
    lines += [f'| backbone | {" | ".join(columns)} |', '|---' * (len(columns) + 1) + '|']
    for row in result['rows']:
        cells = [row['columns'][column] for column in columns]
        texts = [format_cell(cell) + (f' ({gain})' if (gain := format_gain(cell)) else '') for cell in cells]
        lines.append(f'| {row["name"]} | {" | ".join(texts)} |')
    return lines


def make_timm_config(args, name, features):
    """Return the content of config.json for timm."""
    config = timm_config(name)
    traits = config.to_dict() if config else {}
    copied = {
        key: traits[key] for key in ('first_conv', 'classifier', 'pool_size', 'fixed_input_size') if key in traits
    }
    cfg = {
        **copied,
        'tag': 'simsiam',
        'custom_load': False,
        'input_size': [args.num_channels, args.image_size, args.image_size],
        'interpolation': args.interpolation,
        'crop_pct': timm_crop_ratio(args),
        'crop_mode': 'center',
        'mean': expand_channel_values('mean', args.mean, args.num_channels),
        'std': expand_channel_values('std', args.std, args.num_channels),
        'num_classes': 0,
        'license': find_license(weights_source(args), args.backbone) or None,
    }
    pixels = {'crop_ratio': args.crop_ratio, 'channels': args.channels, 'white_level': args.white_level}
    return {
        **{'architecture': name, 'num_classes': 0, 'num_features': features},
        **{'pretrained_cfg': cfg, 'simsiam': pixels},
    }


def timm_crop_ratio(args):
    """Return the crop_pct that gives nearly our center crop: timm resizes the shorter side to size / crop_pct, rounded
    down, and crops; ours needs no whole number."""
    side = round(args.image_size / args.crop_ratio)
    return args.image_size / (side + 0.01)


def to_json_text(value):
    return json.dumps(value, indent=2) + '\n'
