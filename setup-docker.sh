#!/usr/bin/env bash
# Build the image and run one command of cli.py in it, with this folder's data/ at /home/data:
#     sudo ./setup-docker.sh                                           train, with the default preset
#     sudo ./setup-docker.sh train --preset=cifar10 --download=True
#     sudo ./setup-docker.sh torchrun --nproc_per_node=8 cli.py train  several GPUs
#     sudo ./setup-docker.sh tensorboard                               the logs, on http://localhost:6006
# Settings stand before it, as in: sudo REGISTRY=registry.example/me ./setup-docker.sh evaluate --ckpt_name=RUN
#     REGISTRY  push the image there too, before it runs
#     IMAGE     its name, simsiam by default
#     DATA      another folder in place of data/
#     PORT      TensorBoard's, 6006 by default
# What a command writes lands in data/ and belongs to you, not to root. Exit codes: those of cli.py, and of docker run
# (125 to 127 where it fails); 1 where docker cannot be reached or does not build, 2 for a setting that cannot be.
set -euo pipefail

fail() {
    echo "error: $*" >&2
    exit "${code:-1}"
}

image=${REGISTRY:+${REGISTRY%/}/}${IMAGE:-simsiam}
data=
if [ -n "${DATA:-}" ]; then
    data=$(CDPATH='' cd -- "$DATA" 2>/dev/null && pwd) || code=2 fail "DATA=$DATA is not a folder"
    [[ $data != *:* ]] || code=2 fail "DATA=$DATA: docker takes no folder with a colon in its name"
fi
here=$(readlink -f "$0" 2>/dev/null || echo "$0") # the script may be called by a link
CDPATH='' cd -- "$(dirname "$here")" >/dev/null
user=${SUDO_UID:-$(id -u)}:${SUDO_GID:-$(id -g)}
[ $# -gt 0 ] || set -- train

command -v docker >/dev/null || fail "docker is not installed: https://docs.docker.com/engine/install"
if ! said=$(docker version 2>&1 >/dev/null); then
    case $said in
        *"permission denied"*) fail "docker may only be used by root and the group docker: sudo ./setup-docker.sh" ;;
        *) fail "the docker daemon does not answer: sudo systemctl start docker, or start Docker Desktop" ;;
    esac
fi
if [ -z "$data" ]; then
    data=$PWD/data
    [ -d data ] || install -d -o "${user%:*}" -g "${user#*:}" data
fi

options=(--rm --init --stop-timeout 120 --ipc=host) # host's shared memory, for the loaders; time to save when stopped
options+=(--user "$user" --env HOME=/tmp --env USER=simsiam --volume "$data:/home/data")
commit=$(git -c safe.directory='*' describe --always --dirty --abbrev=40 --exclude='*' 2>/dev/null) || commit=
options+=(--env "SIMSIAM_COMMIT=$commit")
if [ -t 0 ] && [ -t 1 ]; then
    options+=(--interactive --tty)
fi

# All GPUs, where there are any and docker can reach them: through NVIDIA's runtime, or as CDI devices.
if PATH=$PATH:/usr/lib/wsl/lib nvidia-smi -L >/dev/null 2>&1 && [[ " $* " != *" --device"[=\ ]"cpu "* ]]; then
    if [[ $(docker info --format '{{json .Runtimes}}') == *nvidia* ]]; then
        options+=(--gpus all)
    elif [[ $(docker info --format '{{json .DiscoveredDevices}}' 2>/dev/null) == *nvidia.com/gpu* ]]; then
        options+=(--device nvidia.com/gpu=all)
    elif [[ ! $1 =~ ^(tensorboard|runs|pack|help)$ && " $*" != *" --help"* && " $*" != *" -h" ]]; then # they need none
        fail "there is a GPU, but docker cannot reach it; install NVIDIA's container toolkit" \
            "(https://docs.nvidia.com/datacenter/cloud-native/container-toolkit), or go on without: --device=cpu"
    fi
fi

docker build --tag "$image" . || fail "the image was not built"
if [ -n "${REGISTRY:-}" ]; then
    docker push "$image" || fail "$image was not pushed: docker login ${REGISTRY%%/*}?"
fi
case $1 in
    torchrun)
        shift
        set -- --entrypoint torchrun "$image" "$@"
        ;;
    tensorboard)
        shift
        port=${PORT:-6006}
        [[ $port =~ ^[0-9]+$ ]] || code=2 fail "PORT=$port is no number"
        echo "TensorBoard: http://localhost:$port"
        set -- --publish "127.0.0.1:$port:6006" --entrypoint tensorboard "$image" \
            --logdir /home/data/logs "$@" --host 0.0.0.0 --port 6006
        ;;
    *) set -- "$image" "$@" ;;
esac
exec docker run "${options[@]}" "$@"
