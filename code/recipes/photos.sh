#!/bin/sh
# Your own photographs: sh recipes/photos.sh FOLDER. FOLDER holds train/<class>/ and perhaps val/<class>/, or images.
# Started again after a stop, it continues where it stopped.
set -eu
folder=$(realpath "${1:?give the folder of images: sh recipes/photos.sh FOLDER}")
shift
cd "$(dirname "$0")/.."
python3 cli.py check_dataloader --image_path="$folder"
python3 cli.py train --image_path="$folder" --model_name=photos --resume=auto "$@"
python3 cli.py report --ckpt_name=model_name_photos_ckpt_0
python3 cli.py export --ckpt_name=model_name_photos_ckpt_0 --format=timm
