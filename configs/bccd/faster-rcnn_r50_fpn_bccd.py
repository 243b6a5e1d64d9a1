# Faster R-CNN with ResNet-50, trained from scratch on BCCD: the twin that
# faster-rcnn_rednet50_fpn_bccd.py is compared with.
_base_ = [
    'mmdet::_base_/models/faster-rcnn_r50_fpn.py',
    '../_base_/datasets/bccd_detection.py',
    '../_base_/schedules/adamw_24e.py',
    'mmdet::_base_/default_runtime.py',
]

model = dict(
    # nothing is pre-trained: nothing is frozen, and every part is normalised
    backbone=dict(frozen_stages=-1, norm_eval=False, init_cfg=None),
    neck=dict(norm_cfg=dict(type='BN')),
    roi_head=dict(bbox_head=dict(num_classes=3)),
    train_cfg=dict(rcnn=dict(sampler=dict(num=64))),
)

optim_wrapper = dict(optimizer=dict(lr=1e-3))  # docs/initialization.md

default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(interval=1, max_keep_ckpts=2, save_best='coco/bbox_mAP'),
)
