"""The tables of README.md's Results and of results/README.md, made of the files under results/.

    python3 bench/tables.py

Writes each between its two marks, `<!-- figures: NAME -->` and `<!-- end -->`; tests/test_figures.py sees that they are
what the files say, and that no other number stands in Results.
"""

import json
import re
from statistics import mean

import numpy as np
from common import CODE
from evidence import correlations, spearman

import plots
from protocols.collapse_verdict import MEASURES, judge_collapse
from runtime.atomic_write import save_png
from runtime.checkpoints.best_epoch import FEW_LABELS, SIMILARITY
from runtime.files import read_metrics

RESULTS = CODE / 'results'
PAGES = (CODE.parent / 'README.md', RESULTS / 'README.md', RESULTS / 'LOG.md')
MARK = re.compile(r'(<!-- figures: (\w+) -->\n)(.*?)(<!-- end -->)', re.S)
GAINS = ((FEW_LABELS, 1), (SIMILARITY, 3))  # tags of metrics.jsonl, digits
NAMES = {'demo': 'demo', 'cifar10': 'CIFAR-10', 'clothing': 'clothing'}


def markdown(head, rows):
    """head: the titles; rows: lists of cells. A table, aligned by nothing."""
    lines = [head, ['---'] * len(head), *rows]
    return ''.join(f'| {" | ".join(str(cell) for cell in line)} |\n' for line in lines)


def percent(value):
    return f'{value:.1f}'


def result(name, protocol, **settings):
    """The one result of a protocol in results/<name>."""
    results = [json.loads(path.read_text()) for path in sorted((RESULTS / name).glob(f'evaluate_{protocol}*.json'))]
    (one,) = [each for each in results if all(each['settings'].get(key) == value for key, value in settings.items())]
    return one


def curve(name, tag):
    """{epoch: value} of results/<name>/metrics.jsonl."""
    lines = read_metrics(RESULTS / name / 'metrics.jsonl')
    return {line['epoch']: line[f'pretraining/{tag}'] for line in lines if f'pretraining/{tag}' in line}


def last_value(name, tag):
    return [*curve(name, tag).values()][-1]


def load_evidence(kind):
    return json.loads((RESULTS / f'evidence_{kind}.json').read_text())


def demo():
    """Five seeds in both precisions."""
    rows, sums = [], []
    for seed in range(5):
        names = f'demo_bf16_{seed}', f'demo_off_{seed}'
        numbers = [
            number for name in names for number in (last_value(name, 'knn_top1'), result(name, 'linear')['top1'])
        ]
        sums.append([curve(names[0], 'knn_top1')[0], *numbers])
        rows.append([seed, *map(percent, sums[-1])])
    rows.append(['mean', *(percent(mean(column)) for column in zip(*sums, strict=True))])
    return markdown(['seed', 'kNN, untrained', 'kNN', 'linear', 'kNN, float32', 'linear, float32'], rows)


def summary():
    """A row for each kind of run."""
    seeds = [f'demo_bf16_{seed}' for seed in range(5)]

    def mean_of(numbers):
        return percent(mean(numbers))

    rows = [
        [
            'the demo, 15 epochs, bfloat16, mean of five seeds',
            mean_of(curve(name, 'knn_top1')[0] for name in seeds),
            mean_of(last_value(name, 'knn_top1') for name in seeds),
            mean_of(result(name, 'linear')['top1'] for name in seeds),
        ],
        [
            'CIFAR-10 JPEGs, small network, 10 epochs',
            percent(curve('cifar10_small_bf16', 'knn_top1')[0]),
            percent(last_value('cifar10_small_bf16', 'knn_top1')),
            '',
        ],
        [
            "CIFAR-10 JPEGs, ResNet-18, the first 99 of the recipe's 800 epochs, on an H100",
            percent(curve('recipe_recorded', 'knn_top1')[0]),
            percent(result('recipe_recorded', 'knn')['top1']),
            '',
        ],
        [
            '3,068 photographs of clothes, ResNet-18 at 96 px, 60 epochs',
            percent(curve('clothing', 'knn_top1')[0]),
            percent(last_value('clothing', 'knn_top1')),
            percent(result('clothing', 'linear')['top1']),
        ],
    ]
    return markdown(['run', 'kNN, untrained', 'kNN', 'linear'], rows)


def cifar10():
    rows = [
        [name, *(percent(value) for value in curve(f'cifar10_small_{amp}', 'knn_top1').values())]
        for name, amp in (('bfloat16', 'bf16'), ('float32', 'off'))
    ]
    return markdown(['epochs', *curve('cifar10_small_off', 'knn_top1')], rows)


def clothing():
    semi = result('clothing', 'semi')
    rows = [
        ['kNN', percent(last_value('clothing', 'knn_top1')), f'untrained {percent(curve("clothing", "knn_top1")[0])}'],
        ['linear', percent(result('clothing', 'linear')['top1']), ''],
        [
            'fine-tuned on a tenth of the labels',
            percent(semi['top1']),
            f'from scratch {percent(semi["top1_from_scratch"])}',
        ],
    ]
    return markdown(['photographs of clothes', 'top-1', 'beside it'], rows)


def channels():
    """bench/channels.py: a row for what the network sees, percent on val, each seed."""
    results = json.loads((RESULTS / 'channels.json').read_text())['rows']
    rows = [
        [name, *(', '.join(percent(seed[protocol]) for seed in seeds) for protocol in ('knn', 'linear'))]
        for name, seeds in results.items()
    ]
    return markdown(['the network sees', 'kNN', 'linear'], rows)


def detection():
    rows = []
    for path in sorted((RESULTS / 'clothing').glob('evaluate_detection_*.json')):
        result = json.loads(path.read_text())
        rows.append(
            [
                result['init'],
                result['settings']['random_seed'],
                *(percent(result[name]) for name in ('AP', 'AP50', 'AP75')),
            ]
        )
    return markdown(['blood cells, from', 'seed', 'AP', 'AP50', 'AP75'], sorted(rows))


def rows_by_variant(table, kind='demo'):
    """[(variant, its rows, one a seed)] of one of ablation_tables.TABLES; a row of another table is found there."""
    groups = {}
    for row in load_evidence(kind):
        if row['variant'].startswith(table):
            groups.setdefault(row['variant'].partition(': ')[2], []).append(row)
    return groups.items()


def collapse():
    """Every variant of the demo with all seeds."""
    rows = []
    for table in ('collapse', 'predictor', 'bn'):
        for variant, seeds in rows_by_variant(table):
            columns = (('knn_untrained', 1), ('knn', 1), ('rank', 0), ('loss', 3), ('std', 2))
            rows.append(
                [
                    variant if table == 'collapse' else f'{table}: {variant}',
                    ', '.join(percent(row['linear']) for row in seeds),
                    *(f'{mean(row[name] for row in seeds):.{digits}f}' for name, digits in columns),
                    ', '.join(count_verdicts(seeds)),
                ]
            )
    return markdown(['variant', 'linear', 'kNN, untrained', 'kNN', 'rank', 'loss', 'std', 'verdict'], rows)


def count_verdicts(rows):
    """The verdicts on these runs, the same ones together."""
    verdicts = [judge_collapse(row, row['untrained'])[0] for row in rows]
    return [
        f'{word} ({verdicts.count(word)} of {len(verdicts)})' if len({*verdicts}) > 1 else word
        for word in dict.fromkeys(verdicts)
    ]


def measures(number=None):
    """Spearman's correlation of each measure with linear top-1, within each set, and of all runs together; the best
    `number`, or all."""
    sets = {kind: load_evidence(kind) for kind in NAMES}
    by_set = {kind: correlations(rows) for kind, rows in sets.items()}
    pooled = correlations([row for rows in sets.values() for row in rows])
    names = sorted(pooled, key=lambda name: -abs(mean(by_set[kind][name][0] for kind in NAMES)))[:number]
    rows = [[MEASURES.get(name, name), *(interval(*of[name]) for of in (*by_set.values(), pooled))] for name in names]
    return markdown(
        ['measure', *(f'{NAMES[kind]}, {len(rows)} runs' for kind, rows in sets.items()), 'all together'], rows
    )


def best_measures():
    return measures(8)


def interval(rho, low, high):
    return f'{rho:.2f} ({low:.2f} to {high:.2f})'


def held_out():
    """The verdict on runs that chose nothing, and whether it was right: see `right`."""
    rows = []
    for kind in NAMES:
        for row in load_evidence(f'{kind}_held_out'):
            of = f'{NAMES[kind]}, {row["variant"].removeprefix("held_out_")}'
            word = judge_collapse(row, row['untrained'])[0]
            numbers = [
                *(percent(row[name]) for name in ('knn_untrained', 'knn', 'linear')),
                f'{row["std"]:.2f}',
                f'{row["rank"]:.0f}',
                f'{row["untrained"]["rank"]:.0f}',
            ]
            rows.append([of, *numbers, word, 'right' if right(word, row, kind) else 'wrong'])
    head = ['run', 'kNN, untrained', 'kNN', 'linear', 'std', 'rank', 'rank, untrained', 'verdict', '']
    return markdown(head, rows)


JUDGED_ON = {'demo': 1000, 'cifar10': 5000, 'clothing': 713}  # images of val


def right(word, row, kind):
    """Healthy and partly collapsed are right where kNN is above the untrained network's by more than two standard
    errors of their difference, the other verdicts where it is not."""
    share = row['knn_untrained'] / 100
    error = 100 * (2 * share * (1 - share) / JUDGED_ON[kind]) ** 0.5
    return (word in ('healthy', 'partly collapsed')) == (row['knn'] - row['knn_untrained'] > 2 * error)


def verdicts():
    """How often the verdict was right, on the runs that its thresholds were chosen by and on others."""
    rows = []
    for kind in NAMES:
        counts = []
        for name in (kind, f'{kind}_held_out'):
            of = [right(judge_collapse(row, row['untrained'])[0], row, kind) for row in load_evidence(name)]
            counts.append(f'{sum(of)} of {len(of)}')
        rows.append([NAMES[kind], *counts])
    return markdown(['', 'chosen by', 'others'], rows)


def runs_with_views(n):
    return sorted(path.name for path in RESULTS.glob(f'views_{n}_?'))


def views():
    """kNN after equal work of two, three and four views: as many views through the network."""
    rows = []
    for n in (2, 3, 4):
        names = runs_with_views(n)
        epochs, finals = max(curve(names[0], 'loss')), [last_value(name, 'knn_top1') for name in names]
        rows.append(
            [
                n,
                epochs,
                f'{n * epochs * 15_000:,}',
                ', '.join(map(percent, finals)),
                percent(mean(finals)),
                percent(mean(last_value(name, 'rank') for name in names)),
            ]
        )
    return markdown(['views', 'epochs', 'views in all', 'kNN, a seed each', 'mean', 'rank'], rows)


def views_by_augmentation():
    """The same with SimCLR's augmentation beside MoCo's, seed 0."""
    rows = []
    for name, run in (('MoCo', 'views_{}_0'), ('SimCLR', 'views_simclr_{}_0')):
        rows.append([name, *(percent(last_value(run.format(n), 'knn_top1')) for n in (2, 3, 4))])
    return markdown(['augmentation', '2 views', '3 views', '4 views'], rows)


def starts():
    """The demo from its usual start, from weights divided by three, with a rate that rises first, and other blocks."""
    rows = []
    for title, name in (
        ('unchanged', 'demo_bf16'),
        ('weights of layers / 3 at the start', 'cut'),
        ('unchanged, float32', 'start_off'),
        ('three warm-up epochs, float32', 'start_slow'),
        ('residual blocks start at one, float32', 'start_ones'),
    ):
        runs = [f'{name}_{seed}' for seed in range(3)]
        early = [curve(run, 'loss')[1] for run in runs]
        finals = [last_value(run, 'knn_top1') for run in runs]
        rows.append([title, f'{mean(early):.3f}', ', '.join(map(percent, finals)), percent(mean(finals))])
    return markdown(['start', 'loss after an epoch', 'kNN after 15, seeds 0 to 2', 'mean'], rows)


PUBLISHED = {  # read from their repositories, November 2026; kNN of the 800-epoch recipe after so many epochs
    'PatrickHua/SimSiam, 10 warm-up epochs': {
        1: 35.1,
        2: 36.7,
        3: 37.4,
        5: 40.0,
        10: 43.6,
        15: 48.3,
        20: 53.4,
        25: 55.8,
        50: 66.7,
        75: 72.1,
        100: 75.8,
    },
    'ahmdtaha/simsiam, one GPU, none': {1: 33.1, 2: 32.6, 3: 33.7},
    'ahmdtaha/simsiam, four GPUs with BN of their own, none': {25: 39.0, 50: 55.6, 75: 63.8, 100: 70.6},
}


def recipe():
    """kNN over the first epochs of the paper's CIFAR-10 recipe, ours beside the published ones."""
    epochs = (0, 1, 2, 3, 5, 10, 15, 20, 25, 50, 54, 75, 99, 100)
    recorded = curve('recipe_recorded', 'knn_top1')
    ours = {
        'this code, JPEGs, no warm-up': curve('recipe', 'knn_top1'),
        'the same, with a CUDA graph': {**recorded, 99: result('recipe_recorded', 'knn')['top1']},
        'the same on a CPU': curve('recipe_cpu', 'knn_top1'),
    }
    rows = [
        [name, *(percent(of[epoch]) if epoch in of else '' for epoch in epochs)]
        for name, of in {**ours, **PUBLISHED}.items()
    ]
    return markdown(['epochs', *epochs], rows)


def warm():
    """The recipe's first epochs with the small network, with and without warm-up."""
    epochs = (0, 1, 2, 3, 5, 10, 15, 20)
    rows = []
    for title, name in (
        ('no warm-up', 'warm_none'),
        ('10 warm-up epochs', 'warm_warmup'),
        ('no warm-up, BN of a quarter of the batch', 'warm_quarter'),
        ('no warm-up, last BN of residual blocks at one', 'zero_ones'),
    ):
        of = curve(name, 'knn_top1')
        rows.append([title, *(percent(of[epoch]) if epoch in of else '' for epoch in epochs)])
    return markdown(['epochs', *epochs], rows)


def backbones():
    """Networks beyond ResNets, before and after; of runs that followed one another, before the first."""
    rows, first, further = [], 'backbone_convnext_cifar10', 'backbone_convnext_further'
    for title, *names in (
        ('ConvNeXt (timm/convnext_atto), demo, 32 px, AdamW', 'backbone_convnext'),
        ('the same, 15,000 CIFAR-10 JPEGs, SGD', first),
        ('gone on with by `--init_from`, at twice the rate', first, further),
        ('ViT (timm/vit_tiny_patch16_224), demo, 64 px, AdamW', 'backbone_vit'),
    ):
        epochs = sum(max(curve(name, 'knn_top1')) for name in names)
        measured = (
            percent(of) for tag in ('knn_top1', 'rank') for of in (curve(names[0], tag)[0], last_value(names[-1], tag))
        )
        rows.append([title, epochs, *measured])
    return markdown(['backbone', 'epochs', 'kNN, untrained', 'kNN', 'rank, untrained', 'rank'], rows)


def trust():
    """Linear top-1 of the last checkpoint of runs, of the one that the rank names, and of the best of all epochs."""
    rows = []
    for title, seeds in json.loads((RESULTS / 'trust.json').read_text())['runs'].items():
        for seed, epochs in seeds.items():
            named = min(epochs, key=lambda epoch: epoch['rank'])
            best = max(epochs, key=lambda epoch: epoch['linear'])
            found = [f'{percent(of["linear"])} ({of["epoch"]})' for of in (epochs[-1], named, best)]
            both = np.array([[epoch[name] for epoch in epochs] for name in ('rank', 'linear')])
            rows.append([title, seed, *found, percent(best['linear'] - named['linear']), f'{spearman(both):.2f}'])
    return markdown(['run', 'seed', 'last (epoch)', 'named', 'best', 'what trust cost', 'rank and linear'], rows)


def choice():
    """Accuracy after labelling the chosen images."""
    rows = []
    for kind in ('demo', 'clothing'):
        found = json.loads((RESULTS / f'choice_{kind}.json').read_text())['top1']
        for way, counts in found.items():
            cells = [f'{mean(values):.1f} ({min(values):.1f} to {max(values):.1f})' for values in counts.values()]
            rows.append([f'{NAMES[kind]}, {way.replace("kcentre", "kcenter")}', *cells])
    return markdown(['labeled', *(f'{count}' for count in (10, 20, 50, 100))], rows)


def maps():
    """How well a plane keeps the neighbors that images have in feature space."""
    rows = []
    for kind in ('demo', 'clothing'):
        found = json.loads((RESULTS / f'map_{kind}.json').read_text())
        for way, of in found['methods'].items():
            numbers = f'{of["trustworthiness"]:.3f}', percent(of['kept']), percent(of['knn']), f'{of["seconds"]:.0f}'
            rows.append([f'{NAMES[kind]}, {found["images"]:,} images, {way}', *numbers])
    return markdown(['', 'trustworthiness', 'of 15 neighbors kept, %', 'kNN on the map, %', 'seconds'], rows)


def draw_recipe():
    """results/recipe.png: the curves of `recipe` and `warm` over one another."""
    ours = {
        'here, ResNet-18, JPEGs, no warm-up': curve('recipe', 'knn_top1'),
        'the same, with a CUDA graph': curve('recipe_recorded', 'knn_top1'),
        'here, small network, JPEGs, no warm-up': curve('warm_none', 'knn_top1'),
        'here, small network, JPEGs, 10 warm-up epochs': curve('warm_warmup', 'knn_top1'),
        'here, small network, JPEGs, last BN of residual blocks at one': curve('zero_ones', 'knn_top1'),
    }
    lines = [(name, [*of.items()]) for name, of in {**PUBLISHED, **ours}.items()]
    panel = plots.LineChart("CIFAR-10's recipe, kNN top-1 on val, %", lines)
    save_png(plots.figure_to_pil(plots.draw_curves([panel], (720, 420)), 2), RESULTS / 'recipe.png')


def draw_views():
    """results/views.png: kNN over work, the mean of the seeds, with two, three and four views."""
    lines = []
    for n in (2, 3, 4):
        found = [curve(name, 'knn_top1') for name in runs_with_views(n)]
        lines.append((f'{n} views', [(epoch * n / 2, mean(of[epoch] for of in found)) for epoch in found[0]]))
    panel = plots.LineChart(
        'kNN top-1 on val, %, after equal work', lines, x_label='epochs of two views, or their work'
    )
    save_png(plots.figure_to_pil(plots.draw_curves([panel], (560, 320)), 2), RESULTS / 'views.png')


# What a run from ImageNet's weights changes: (title, end of its name, share of the start; None: not averaged).
DISTILLED_ROWS = [
    ('SimSiam and distillation, the default', 'neighbors_s0', None),
    ("the same with MoCo's augmentation", 'neighbors_moco_s0', None),
    ('the same in 3 epochs', 'neighbors_e3_s0', None),
    ('the same in 30 epochs', 'neighbors_e30_s0', None),
    ('the same in 100 epochs', 'neighbors_e100_s0', None),
    ('the same, the backbone at 0.03 of the learning rate', 'neighbors_b003_s0', None),
    ('the same, the backbone at 0.3 of the learning rate', 'neighbors_b03_s0', None),
    ('the same without the loss of SimSiam', 'neighbors_only_s0', None),
    ('the same, targets of the image alone (`--distill_neighbors=0`)', 'neighbors_nn0_s0', None),
    ('the same with EfficientNet-Lite2', 'neighbors_lite2_s0', None),
    ('the same, only the last layers trained (`--trained_share=0.79`)', 'neighbors_last_s0', None),
    ('an earlier distillation: targets of the image alone, MoCo', 'distilled_s0', None),
    ('the earlier one, targets of 160 px, without the loss of SimSiam', 'distilled_160_only_s0', None),
]
SIMSIAM_ROWS = [  # without distillation
    ("SimSiam alone, MoCo's augmentation (`--distill_weight=0`)", 'lr04_e12_s0', None),
    ('the same, half averaged with the start (`--start_share=0.5`)', 'lr04_e12_s0', 0.5),
    ('BN trained (`--freeze_bn=False`)', 'lr04_e12_s0_bnfree', 0.5),
    ('BN trained, from the first step, at the full learning rate', 'lr04_e12_s0_asbefore', 0.5),
]
PRETRAINED_SETS = {
    'clothing': 'clothing at 96 px',
    'clothing_160': 'clothing at 160 px',
    'grocery': 'groceries at 96 px',
    'grocery_160': 'groceries at 160 px',
    'grocery_224': 'groceries at 224 px',
    'cifar50': 'CIFAR-10 at 96 px, 50 per class',
}
CHANGED_SETS = {
    'clothing': 'clothing',
    'grocery': 'groceries',
    'grocery_160': 'groceries, 160 px',
    'cifar50': 'CIFAR-10, 50 per class',
}
# Runs on another selection of the set than those in its column.
OTHER_IMAGES = {('cifar50', 'distilled_s0')}
# Runs with seeds 0, 1 and 2: {title: (name, with set and seed, share of the start)}.
PRETRAINED_SEEDS = {
    'SimSiam alone': ('{}_lr04_e12_s{}', 0.5),
    'SimSiam and distillation': ('{}_neighbors_s{}', None),
}


def pretrained_runs():
    """{run: its rows} of bench/from_pretrained.py."""
    files = sorted(RESULTS.glob('pretrained*.json'))
    return {name: run['rows'] for file in files for name, run in json.loads(file.read_text()).items()}


def pretrained_row(rows, share):
    """The columns on test of a run's last checkpoint, averaged with the start by `share` (None: not)."""
    last_epoch = [name for name in rows if name.startswith('epoch') and 'start' not in name][-1]
    return rows[last_epoch if share is None else f'{last_epoch}, {share:g} of the start']['test']


def runs_with_seeds(runs, kind, title):
    """[(seed, rows of its start, columns at its end)] of the runs `title` on a set."""
    name, share = PRETRAINED_SEEDS[title]
    found = [(seed, runs.get(name.format(kind, seed))) for seed in (0, 1, 2)]
    return [(seed, rows['start']['test'], pretrained_row(rows, share)) for seed, rows in found if rows]


def pretrained():
    """Gain over ImageNet's weights on test, with three seeds."""
    runs, lines = pretrained_runs(), []
    for kind, name in PRETRAINED_SETS.items():
        by_title = {title: found for title in PRETRAINED_SEEDS if (found := runs_with_seeds(runs, kind, title))}
        _, start, _ = [*by_title.values()][0][0]  # the same for each run of a set
        columns = [*start]
        lines.append([f"{name}: ImageNet's weights", *(percent(start[column]['top1']) for column in columns)])
        for title, found in by_title.items():
            cells = [gain_cell([end[column] for _, _, end in found]) for column in columns]
            seeds = ', '.join(str(seed) for seed, _, _ in found)
            lines.append([f'{title}, seed{"s" * (len(found) > 1)} {seeds}', *cells])
    return markdown(['top-1 on test, %', *columns], lines)


def gain_cell(cells):
    """The gains of some seeds as mean (range), of one seed with its standard error."""
    gains = [cell['gain'] for cell in cells]
    if len(gains) == 1:
        return f'{gains[0]:+.1f} ± {cells[0]["gain_error"]:.1f}'
    return f'{mean(gains):+.1f} ({min(gains):+.1f} to {max(gains):+.1f})'


# Runs from ImageNet's weights at 96 px: what is not the default.
BN_TRAINED = '--freeze_bn=False --heads_epochs=0 --backbone_lr_scale=1'
SIMILARITY_RUNS = {
    'similarity_grocery': 'groceries, the defaults',
    'similarity_grocery_bn_trained': f'groceries, `--distill_weight=0.25 {BN_TRAINED}`',
    'similarity_clothing_bn_trained': f'clothing, `--distill_weight=0.5 {BN_TRAINED}`',
    'similarity_grocery_rate_16': 'groceries, `--learning_rate=6.4`',
    'similarity_grocery_moco': 'groceries, `--learning_rate=1.6 --backbone_lr_scale=1 --distill_weight=1`, MoCo',
}


def similarity():
    """The similarity to the targets of the distillation beside the accuracy with labels, epoch by epoch."""
    rows = []
    for name, title in SIMILARITY_RUNS.items():
        lines = read_metrics(RESULTS / name / 'metrics.jsonl') if (RESULTS / name).is_dir() else []
        for line in lines:
            if line.get(SIMILARITY.gain):
                cells = [f'{line[tags.gain]:+.{digits}f} ± {line[tags.error]:.{digits}f}' for tags, digits in GAINS]
                rows.append([title, line['epoch'], *cells])
    return markdown(['run', 'epoch', 'ten labels per class on val, points', 'similarity to the targets'], rows)


def pretrained_changes():
    """Gain over the start with ten labels per class on test, seed 0, of runs that change one thing each."""
    runs, lines = pretrained_runs(), []
    for title, end, share in DISTILLED_ROWS + SIMSIAM_ROWS:
        cells = []
        for kind in CHANGED_SETS:
            found = runs.get(f'{kind}_{end}') if (kind, end) not in OTHER_IMAGES else None
            cell = found and pretrained_row(found, share)['10 per class']
            cells.append(f'{cell["gain"]:+.1f} ± {cell["gain_error"]:.1f}' if cell else '')
        if any(cells):
            lines.append([title, *cells])
    return markdown(['top-1 with ten labels per class, test: change in points', *CHANGED_SETS.values()], lines)


def draw_pretrained():
    """results/pretrained.png: gain over ImageNet's weights by the number of labels, mean of the seeds."""
    runs, lines = pretrained_runs(), []
    for kind, name in PRETRAINED_SETS.items():
        for title in PRETRAINED_SEEDS:
            ends = [end for _, _, end in runs_with_seeds(runs, kind, title)]
            points = [(n, mean(end[f'{n} per class']['gain'] for end in ends)) for n in (1, 5, 10, 30) if ends]
            if points:
                lines.append((f'{name}, {title}', points))
    title = "gain over ImageNet's weights on test, points"
    panel = plots.LineChart(title, lines, (0, 1), ('no gain', 0), x_label='labels per class')
    save_png(plots.figure_to_pil(plots.draw_curves([panel], (640, 400)), 2), RESULTS / 'pretrained.png')


def write():
    for page in PAGES:
        text = page.read_text()
        page.write_text(MARK.sub(lambda found: f'{found[1]}{globals()[found[2]]()}{found[4]}', text))


if __name__ == '__main__':
    write()
    draw_recipe()
    draw_views()
    draw_pretrained()
