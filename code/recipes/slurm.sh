#!/bin/bash
#SBATCH --nodes=4 --gpus-per-node=8 --ntasks-per-node=1 --cpus-per-task=64 --time=24:00:00
#SBATCH --signal=TERM@120 --requeue --open-mode=append
# A SLURM job: sbatch recipes/slurm.sh FOLDER, from code/. SIGTERM comes two minutes before the time is up; the run is
# saved, and continues where it stopped when the job starts again.
set -eu
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes="$SLURM_NNODES" --nproc_per_node=8 --rdzv_id="$SLURM_JOB_ID" --rdzv_backend=c10d \
    --rdzv_endpoint="$head:29400" cli.py train --preset=imagenet --image_path="$1" --model_name=slurm --resume=auto
