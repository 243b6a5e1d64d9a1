#!/usr/bin/env bash
# ResNet-50, RedNet-50, and RedNet-50 with an involution neck, three seeds each, by the
# same recipe from scratch: docs/results.md. At half the size, for a CPU; SIZE=full
# trains the configs as they stand. START=in1k compares the first two fine-tuned from
# ImageNet weights, which are of the full size.
START=${START:-scratch}
if [ "$START" = in1k ]; then SIZE=${SIZE:-full}; else SIZE=${SIZE:-half}; fi
if [[ $# -ne 1 || ! "$1 $START $SIZE" =~ ^(bccd|camvid)\ (scratch\ half|(scratch|in1k)\ full)$ ]]
then
    echo "usage: [START=scratch|in1k] [SIZE=half|full] [SEEDS='0 1 2'] $0 bccd|camvid" >&2
    exit 2
fi
set -euo pipefail
cd "$(dirname "$0")/../.."

if [ "$1" = bccd ]; then
    configs=(configs/bccd/faster-rcnn_{r50_fpn,rednet50_fpn,rednet50_fpn-inv}_bccd.py)
    half=(
        model.rpn_head.in_channels=128 model.rpn_head.feat_channels=128
        'model.rpn_head.anchor_generator.scales=[4]'
        model.roi_head.bbox_roi_extractor.out_channels=128
        model.roi_head.bbox_head.in_channels=128
        model.roi_head.bbox_head.fc_out_channels=512
        'train_dataloader.dataset.pipeline.2.scale=(160,120)'
        'val_dataloader.dataset.pipeline.1.scale=(160,120)'
        'test_dataloader.dataset.pipeline.1.scale=(160,120)'
        train_cfg.max_epochs=8 train_cfg.val_interval=2
        param_scheduler.1.T_max=8 param_scheduler.1.end=8
    )
else
    configs=(configs/camvid/{fpn_r50,fpn_rednet50,fpn-inv_rednet50}_1xb2-8k_camvid-240x320.py)
    half=(
        'data_preprocessor.size=(120,160)' 'model.data_preprocessor.size=(120,160)'
        'model.decode_head.in_channels=[128,128,128,128]' model.decode_head.channels=64
        'train_dataloader.dataset.pipeline.2.scale=(240,180)'
        'train_dataloader.dataset.pipeline.3.crop_size=(120,160)'
        'val_dataloader.dataset.pipeline.1.scale=(240,180)'
        'test_dataloader.dataset.pipeline.1.scale=(240,180)'
        train_cfg.max_iters=1000 train_cfg.val_interval=250 param_scheduler.1.end=1000
    )
fi
half+=(
    model.backbone.base_channels=32 model.backbone.stem_channels=32
    'model.neck.in_channels=[128,256,512,1024]' model.neck.out_channels=128
)
options=(--cfg-options "${half[@]}")
if [ "$SIZE" = full ]; then options=(); fi
if [ "$START" = in1k ]; then
    configs=(configs/"$1"/*_r50-in1k-pre* configs/"$1"/*_rednet50-in1k-pre*)
    SIZE=in1k
fi

runs=work_dirs/$1-$SIZE
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
