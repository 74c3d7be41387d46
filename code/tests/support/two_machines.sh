#!/usr/bin/env bash
# The README's line for several machines, tried on one: two network namespaces, each with a name and an address of its
# own, train the demo together over a virtual cable; one process is killed on the way and torchrun starts all again.
#     sudo tests/support/two_machines.sh [PYTHON]        in code/; wants iproute2; exit code 0 where the run ends well
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${1:-python3}
folder=$(mktemp -d)
pids=()
# shellcheck disable=SC2317 # it is called by the trap
clean() {
    [ ${#pids[@]} -eq 0 ] || kill "${pids[@]}" 2>/dev/null || true
    ip netns del machine1 2>/dev/null || true
    ip netns del machine2 2>/dev/null || true
    rm -rf "$folder"
}
trap clean EXIT

ip netns add machine1
ip netns add machine2
ip link add cable1 netns machine1 type veth peer name cable2 netns machine2
printf '127.0.0.1 localhost\n10.9.0.1 machine1\n10.9.0.2 machine2\n' >"$folder/hosts"
for i in 1 2; do
    ip -n "machine$i" addr add "10.9.0.$i/24" dev "cable$i"
    ip -n "machine$i" link set "cable$i" up
    ip -n "machine$i" link set lo up
    # shellcheck disable=SC2016
    OMP_NUM_THREADS=1 ip netns exec "machine$i" unshare --uts --mount bash -c '
        hostname "$1" && mount --bind "$2/hosts" /etc/hosts && shift 2 && exec "$@"' - "machine$i" "$folder" \
        "$python" -m torch.distributed.run --nnodes=2 --nproc_per_node=1 --rdzv_backend=c10d \
        --rdzv_endpoint=machine1:29400 --max-restarts=3 cli.py train --preset=demo --max_epochs=3 --knn_every=0 \
        --save_every_minutes=0.05 --resume=auto --ckpt_path="$folder/ckpt" --log_path="$folder/log" \
        --cache_path="$folder/cache" >"$folder/machine$i.txt" 2>&1 &
    pids+=($!)
done

until grep -q 'epoch 1/3' "$folder"/ckpt/*/log.txt 2>/dev/null; do
    sleep 0.2
    kill -0 "${pids[0]}" "${pids[1]}" || { cat "$folder"/machine?.txt && exit 1; }
done
victim=$(pgrep -P "${pids[1]}" -f 'cli.py train' | head -n 1)
echo "epoch 1 is over: kill -9 of the process on machine2 ($victim)"
kill -9 "$victim"
code=0
wait "${pids[0]}" || code=$?
wait "${pids[1]}" || code=$?
pids=()
echo "--- machine1, exit code $code"
grep -v '^ *$' "$folder/machine1.txt" | grep -E '^(run|going|epoch|error|saved|pretraining)' || true
echo '--- machine2'
grep -E '^(error|saved)|restart' "$folder/machine2.txt" | cut -c 1-200 || true
ls "$folder"/ckpt/*/
exit "$code"
