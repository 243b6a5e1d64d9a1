#!/usr/bin/env bash
# Train or test in several processes, one per GPU, on one machine or several.
#
#   tools/dist.sh train CONFIG GPUS [flags of train.py ...]
#   tools/dist.sh test CONFIG CHECKPOINT GPUS [flags of test.py ...]
#
# On several machines run it on each, with the same NNODES, MASTER_ADDR and PORT and
# its own NODE_RANK (0, 1, ...):
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 PORT=29500 tools/dist.sh train CONFIG 8
# Without a GPU the processes run on the CPU.
set -euo pipefail

case ${1-} in
    train) what='CONFIG' n=2 ;;  # n: where the number of GPUs is, after the verb
    test) what='CONFIG CHECKPOINT' n=3 ;;
    *) what='CONFIG [CHECKPOINT]' n=99 ;;
esac
if [ $# -le $n ]; then
    echo "usage: [NNODES= NODE_RANK= MASTER_ADDR= PORT=] $0 train|test $what GPUS [flags ...]" >&2
    exit 2
fi
TOOLS=$(cd "$(dirname "$0")" && pwd)
tool=$1
shift

exec python -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" \
    --nproc_per_node="${!n}" \
    "$TOOLS/$tool.py" "${@:1:n-1}" --launcher pytorch "${@:n+1}"
