"""Which map of features keeps neighbors together? Main axes, t-SNE, and UMAP where umap-learn is installed.

    python3 bench/maps.py --output=results/map_demo.json --ckpt_name=RUN [--preset=... --image_path=... ...]

Trustworthiness (Venna and Kaski, ICANN 2001) of 15 neighbors; the share of each image's 15 nearest that are among its
15 nearest on the map; how well kNN (k = 15) on the map tells the classes; seconds.
"""

import argparse
import json
import time

import numpy as np
from common import CODE
from sklearn.decomposition import PCA
from sklearn.manifold import trustworthiness
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from ckpt import get_model_ckpt
from dataloader.load_dataset import eval_loader, load_splits
from metric.projection_2d import tsne_2d
from metric.subset_selection import center_and_normalize
from protocols.features import extract_features
from runtime.device import init_device
from runtime.options import get_config
from runtime.tensors import evenly_spaced

K, MOST = 15, 3000


def near(points):
    """Row numbers of each row's K nearest others."""
    return NearestNeighbors(n_neighbors=K).fit(points).kneighbors(return_distance=False)


def umap(x):
    from umap import UMAP

    return UMAP(random_state=0).fit_transform(center_and_normalize(x).numpy())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--output', required=True)
    mine, given = parser.parse_known_args()
    args = get_config(**dict(option.removeprefix('--').split('=', 1) for option in given))
    init_device(args)
    args, model, _ = get_model_ckpt(args)
    images = load_splits(args)['train']
    x, labels = extract_features(args, model.backbone, eval_loader(args, images), 'features')
    rows = evenly_spaced(len(x), MOST)
    x, labels, results = x[rows].cpu(), labels[rows].cpu(), {}
    whole = center_and_normalize(x).numpy()
    methods = {
        'main axes': lambda x: PCA(2).fit_transform(center_and_normalize(x).numpy()),
        't-SNE': tsne_2d,
        'UMAP': umap,
    }
    for name, method in methods.items():
        started = time.time()
        try:
            points = method(x)
        except ImportError:
            continue
        seconds = time.time() - started
        share_kept = np.mean([len({*a} & {*b}) / K for a, b in zip(near(whole), near(points), strict=True)])
        results[name] = {
            'trustworthiness': float(trustworthiness(whole, points, n_neighbors=K)),
            'kept': float(100 * share_kept),
            'knn': float(100 * cross_val_score(KNeighborsClassifier(K), points, labels.numpy(), cv=5).mean()),
            'seconds': seconds,
        }
        print(name, results[name], flush=True)
    result = {'images': len(x), 'methods': results}
    (CODE / mine.output).write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__':
    main()
