#!/bin/sh
# Train until it is done: sh recipes/keep_training.sh --image_path=FOLDER ... A run that was killed, or ended by a
# signal, is started again and continues where it stopped. Bad use (exit code 2) and failed work (1) are not tried again.
set -eu
cd "$(dirname "$0")/.."
code=137
while [ "$code" -gt 130 ]; do
    code=0
    python3 cli.py train --resume=auto "$@" || code=$?
done
exit "$code"
