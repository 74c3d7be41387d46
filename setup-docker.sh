#!/usr/bin/env bash
# Build the image and run one command in it, on this folder's data/:
#     ./setup-docker.sh                                        train with the default preset
#     ./setup-docker.sh train --preset=cifar10 --download=True
#     ./setup-docker.sh evaluate --ckpt_name=<run>
#     IMAGE=registry.example/simsiam ./setup-docker.sh push    build and push the image
# All that a command writes lands in data/ (checkpoints, logs); it belongs to you, not to root, also under sudo.
set -euo pipefail
cd "$(dirname "$0")"

image=${IMAGE:-simsiam}
docker build --tag "$image" .
if [ "${1:-}" = push ]; then
    exec docker push "$image"
fi

mkdir -p data
options=(--rm --init --ipc=host --volume "$PWD/data:/home/data" --user "${SUDO_UID:-$(id -u)}:${SUDO_GID:-$(id -g)}")
options+=(--env HOME=/tmp)
# GPUs where the NVIDIA container toolkit offers them, else the CPU; colours and bars only on a terminal.
if docker info --format '{{json .Runtimes}}' | grep -q nvidia; then
    options+=(--gpus all)
fi
if [ -t 0 ] && [ -t 1 ]; then
    options+=(--interactive --tty)
fi
exec docker run "${options[@]}" "$image" "${@:-train}"
