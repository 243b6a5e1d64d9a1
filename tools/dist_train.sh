#!/usr/bin/env bash
# Train in several processes, one per GPU, on one machine or several.
#
#   tools/dist_train.sh CONFIG GPUS [flags of train.py ...]
#
# On several machines run it on each, with the same NNODES, MASTER_ADDR and PORT and
# its own NODE_RANK (0, 1, ...):
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 PORT=29500 tools/dist_train.sh CONFIG 8
# Without a GPU the processes train on the CPU.
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "usage: [NNODES= NODE_RANK= MASTER_ADDR= PORT=] $0 CONFIG GPUS [flags ...]" >&2
    exit 2
fi
TOOLS=$(cd "$(dirname "$0")" && pwd)

exec python -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" \
    --nproc_per_node="$2" \
    "$TOOLS/train.py" "$1" --launcher pytorch "${@:3}"
