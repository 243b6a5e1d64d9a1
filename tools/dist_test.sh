#!/usr/bin/env bash
# Test in several processes, one per GPU; the variables are those of dist_train.sh.
#
#   tools/dist_test.sh CONFIG CHECKPOINT GPUS [flags of test.py ...]
set -euo pipefail

if [ $# -lt 3 ]; then
    echo "usage: [NNODES= NODE_RANK= MASTER_ADDR= PORT=] $0 CONFIG CHECKPOINT GPUS [flags ...]" >&2
    exit 2
fi
TOOLS=$(cd "$(dirname "$0")" && pwd)

exec python -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" \
    --nproc_per_node="$3" \
    "$TOOLS/test.py" "$1" "$2" --launcher pytorch "${@:4}"
