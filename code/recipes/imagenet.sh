#!/bin/sh
# ImageNet on eight GPUs of one machine (paper, section 3): sh recipes/imagenet.sh FOLDER, which holds train/ and val/,
# or the archives as they are downloaded. 100 epochs at batch 512, then linear evaluation.
set -eu
folder=$(realpath "${1:?give the folder of ImageNet: sh recipes/imagenet.sh FOLDER}")
shift
cd "$(dirname "$0")/.."
torchrun --nproc_per_node=8 cli.py train --preset=imagenet --image_path="$folder" --model_name=imagenet --resume=auto "$@"
torchrun --nproc_per_node=8 cli.py evaluate --ckpt_name=model_name_imagenet_ckpt_0 --protocol=linear
