#!/usr/bin/env bash
# Build the Dockerfile's image without docker and without a registry of images, and train the demo in it as a user
# without a name, as setup-docker.sh would: data/ alone is theirs.
#     sudo code/tests/support/build_image.sh [options of buildah build, such as --volume /etc/ssl/certs:/etc/ssl/certs:ro]
# Wants buildah and debootstrap, 25 GB in STORE (a new folder of /tmp by default) and some ten minutes. In place of
# PyTorch's image it starts from Debian with torch from PyPI. Not shown: docker's own engine, a GPU in a container.
set -euo pipefail
cd "$(dirname "$0")/../../.."
store=${STORE:-$(mktemp -d)}
data=$(mktemp -d)
chmod 755 "$store" # the user without a name goes through it
buildah() { command buildah --root "$store/images" --runroot "$store/run" --storage-driver "${DRIVER:-vfs}" "$@"; }
build() { buildah build --isolation chroot --network host "$@"; }

[ -e "$store/debian.tar" ] || {
    debootstrap --variant=minbase --include=python3,python3-pip,ca-certificates bookworm "$store/debian"
    tar -C "$store/debian" -cf "$store/debian.tar" .
    rm -rf "$store/debian"
}
printf '%s\n' 'FROM scratch' 'ADD debian.tar /' 'RUN ln -s pip3 /usr/bin/pip || true' \
    'RUN pip install --break-system-packages --no-cache-dir torch torchvision' >"$store/Dockerfile"
build "$@" --tag base --file "$store/Dockerfile" "$store"
build "$@" --build-arg BASE=localhost/base --tag simsiam .

container=$(buildah from simsiam)
chown 12345:12345 "$data"
inside() {
    buildah run --isolation chroot --user 12345:12345 --env HOME=/tmp --env USER=simsiam \
        --volume "$data:/home/data" "$container" -- "$@"
}
inside python3 cli.py train --max_epochs=1 --device=cpu
inside python3 cli.py evaluate --ckpt_name=model_name_simsiam_ckpt_0 --protocol=knn --device=cpu
inside sh -c 'id -u && gcc --version | head -n 1 && python3 -c "import sysconfig, os; print(os.path.exists(
    sysconfig.get_path(\"include\") + \"/Python.h\"))"'
ls -ln "$data"
