# Faster R-CNN with ResNet-50, trained from scratch on BCCD: the twin that
# faster-rcnn_rednet50_fpn_bccd.py is compared with.
_base_ = [
    'mmdet::_base_/models/faster-rcnn_r50_fpn.py',
    '../_base_/datasets/bccd_detection.py',
    'mmdet::_base_/default_runtime.py',
]

model = dict(
    # nothing is pre-trained: nothing is frozen, and every part is normalised
    backbone=dict(frozen_stages=-1, norm_eval=False, init_cfg=None),
    neck=dict(norm_cfg=dict(type='BN')),
    roi_head=dict(bbox_head=dict(num_classes=3)),
    train_cfg=dict(rcnn=dict(sampler=dict(num=64))),
)

max_epochs = 24
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=3e-4, weight_decay=0.05),
    clip_grad=dict(max_norm=10),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(
        type='CosineAnnealingLR',
        T_max=max_epochs,
        end=max_epochs,
        eta_min_ratio=0.01,
        convert_to_iter_based=True,
    ),
]
default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(interval=1, max_keep_ckpts=2, save_best='coco/bbox_mAP'),
)
