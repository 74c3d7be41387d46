#!/usr/bin/env bash
# All that is to be measured where there is a GPU, in one command: the tests that want one, a step and an epoch beside the
# bare loop, the loader, each switch off and on, and a piece of the paper's CIFAR-10 run.
#     bench/gpu.sh OUTPUT [IMAGES [OPTIONS]]    in code/; OUTPUT: folder for what each prints; IMAGES: CIFAR-10 as files;
#                                               OPTIONS: of bench/cifar10.py, such as --epochs=60
# Goes on where one fails, and says which; about half an hour, none of them longer than LIMIT seconds (600).
set -uo pipefail
cd "$(dirname "$0")/.." || exit
# Absolute: to the commands a relative path starts at the repository's root.
output=$(realpath -m "${1:?bench/gpu.sh OUTPUT [IMAGES [OPTIONS]]}") || exit
limit=${LIMIT:-600}
images=${2:+$(realpath -m "$2")}
mkdir -p "$output"
failed=0
measure() {
    name=$1
    shift
    echo "--- $name: $*"
    # --foreground: in a process group of its own Ctrl-C would not reach it. -i: tee stays for what is said at the end.
    timeout --foreground --signal=INT --kill-after=30 "$limit" "$@" 2>&1 | tee -i "$output/$name.txt" || { echo "$name failed" && failed=1; }
}
trap 'echo stopped; exit 130' INT

python3 -c 'import torch; torch.cuda.is_available() or exit("torch sees no CUDA GPU here")' || exit 1
nvidia-smi >"$output/nvidia-smi.txt" 2>&1 || true
measure tests python3 -m pytest -q -n 4 tests/test_gpu.py
measure step python3 bench/step.py
measure epoch python3 bench/epoch.py
measure loader python3 bench/loader.py
measure switches python3 bench/switches.py ${images:+--image_path="$images"}
[ -z "$images" ] || measure cifar10 python3 bench/cifar10.py --image_path="$images" --output="$output/cifar10" \
    --minutes="$((limit * 9 / 600))" "${@:3}"
exit "$failed"
