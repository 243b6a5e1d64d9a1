#!/usr/bin/env bash
# ResNet-50, RedNet-50, and RedNet-50 with an involution neck, three seeds each, by the
# same recipe from scratch: docs/results.md. For 3 epochs or 400 iterations, for a CPU;
# LENGTH=full trains the configs as they stand. START=in1k compares the first two
# fine-tuned from ImageNet weights, at full length.
START=${START:-scratch}
if [ "$START" = in1k ]; then LENGTH=${LENGTH:-full}; else LENGTH=${LENGTH:-short}; fi
if [[ $# -ne 1 || ! "$1 $START $LENGTH" =~ ^(bccd|camvid)\ (scratch\ short|(scratch|in1k)\ full)$ ]]
then
    echo "usage: [START=scratch|in1k] [LENGTH=short|full] [SEEDS='0 1 2'] $0 bccd|camvid" >&2
    exit 2
fi
set -euo pipefail
cd "$(dirname "$0")/../.."

if [ "$1" = bccd ]; then
    configs=(configs/bccd/faster-rcnn_{r50_fpn,rednet50_fpn,rednet50_fpn-inv}_bccd.py)
    short=(
        train_cfg.max_epochs=3 train_cfg.val_interval=3
        param_scheduler.1.T_max=3 param_scheduler.1.end=3
    )
else
    configs=(configs/camvid/{fpn_r50,fpn_rednet50,fpn-inv_rednet50}_1xb2-8k_camvid-240x320.py)
    short=(train_cfg.max_iters=400 param_scheduler.1.end=400)
fi
options=(--cfg-options "${short[@]}")
if [ "$LENGTH" = full ]; then options=(); fi
if [ "$START" = in1k ]; then
    configs=(configs/"$1"/*_r50-in1k-pre* configs/"$1"/*_rednet50-in1k-pre*)
    LENGTH=in1k
fi

runs=work_dirs/$1-$LENGTH
for seed in ${SEEDS:-0 1 2}; do
    python tools/reproduce.py "${configs[@]}" --seed "$seed" --work-dir "$runs/$seed" \
        ${options[@]+"${options[@]}"}
done
work_dirs=()
for config in "${configs[@]}"; do  # ResNet-50 first: the others are compared with it
    for seed in ${SEEDS:-0 1 2}; do
        work_dirs+=("$runs/$seed/$(basename "$config" .py)")
    done
done
python tools/analysis_tools/compare_seeds.py "${work_dirs[@]}" --out "$runs/comparison.png"
