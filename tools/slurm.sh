#!/usr/bin/env bash
# Train or test on a Slurm cluster.
#
#   GPUS=8 GPUS_PER_NODE=8 CPUS_PER_TASK=5 SRUN_ARGS="--qos=high" \
#       tools/slurm.sh train PARTITION JOB_NAME CONFIG WORK_DIR [flags of train.py ...]
#   tools/slurm.sh test PARTITION JOB_NAME CONFIG CHECKPOINT [flags of test.py ...]
#
# The variables are optional; shown are the defaults, apart from SRUN_ARGS (none).
set -euo pipefail

if [ $# -lt 5 ] || [[ ! $1 =~ ^(train|test)$ ]]; then
    echo "usage: [GPUS= GPUS_PER_NODE= CPUS_PER_TASK= SRUN_ARGS=] $0 train|test PARTITION JOB_NAME CONFIG WORK_DIR|CHECKPOINT [flags ...]" >&2
    exit 2
fi
TOOLS=$(cd "$(dirname "$0")" && pwd)
GPUS=${GPUS:-8}
GPUS_PER_NODE=${GPUS_PER_NODE:-$((GPUS < 8 ? GPUS : 8))}
folder=()
if [ "$1" = train ]; then folder=(--work-dir); fi

# SRUN_ARGS is split into words on purpose.
# shellcheck disable=SC2086
exec srun -p "$2" \
    --job-name="$3" \
    --gres="gpu:$GPUS_PER_NODE" \
    --ntasks="$GPUS" \
    --ntasks-per-node="$GPUS_PER_NODE" \
    --cpus-per-task="${CPUS_PER_TASK:-5}" \
    --kill-on-bad-exit=1 \
    ${SRUN_ARGS:-} \
    python -u "$TOOLS/$1.py" "$4" ${folder[@]+"${folder[@]}"} "$5" --launcher slurm "${@:6}"
