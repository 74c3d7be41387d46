#!/bin/sh
# The built-in drawings: pretraining, linear evaluation and kNN, in minutes on two CPU cores.
set -eu
cd "$(dirname "$0")/.."
python3 cli.py train --preset=demo --evaluate_after=True --knn_raw_pixels=True "$@"
