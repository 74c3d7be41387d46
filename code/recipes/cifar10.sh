#!/bin/sh
# CIFAR-10 on one GPU (paper, appendix D): 800 epochs, then kNN and linear evaluation. Downloads the dataset.
set -eu
cd "$(dirname "$0")/.."
python3 cli.py train --preset=cifar10 --download=True --model_name=cifar10 --resume=auto "$@"
for protocol in knn linear; do
    python3 cli.py evaluate --ckpt_name=model_name_cifar10_ckpt_0 --protocol=$protocol
done
