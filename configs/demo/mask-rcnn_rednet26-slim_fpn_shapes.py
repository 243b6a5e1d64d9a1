# Mask R-CNN with a RedNet-26 of a quarter of the channels, on drawings
# (tools/dataset_converters/shapes.py). Small enough to train on a CPU in minutes.
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    '../_base_/schedules/adamw_24e.py',
    'mmdet::_base_/default_runtime.py',
]
custom_imports = dict(imports=['mmcls_involution.models'], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type='RedNet',
        depth=26,
        base_channels=16,
        stem_channels=32,
        out_indices=(0, 1, 2, 3),
        norm_cfg=dict(type='BN'),
    ),
    neck=dict(
        in_channels=[64, 128, 256, 512],
        out_channels=64,
        num_outs=4,
        norm_cfg=dict(type='BN'),
    ),
    rpn_head=dict(
        in_channels=64,
        feat_channels=64,
        anchor_generator=dict(scales=[6], strides=[4, 8, 16, 32]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(
            out_channels=64, finest_scale=28, roi_layer=dict(sampling_ratio=1)
        ),
        bbox_head=dict(in_channels=64, fc_out_channels=256, num_classes=4),
        mask_roi_extractor=dict(
            out_channels=64, finest_scale=28, roi_layer=dict(sampling_ratio=1)
        ),
        mask_head=dict(
            num_convs=2, in_channels=64, conv_out_channels=32, num_classes=4
        ),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=200, max_per_img=100),
        rcnn=dict(sampler=dict(num=32, pos_fraction=0.5)),
    ),
    test_cfg=dict(
        rpn=dict(nms_pre=200, max_per_img=100),
        rcnn=dict(nms=dict(class_agnostic=True)),
    ),
)

data_root = '{{$SHAPES_ROOT:data/shapes}}'
metainfo = dict(
    classes=('circle', 'square', 'triangle', 'star'),
    palette=[(66, 133, 244), (234, 67, 53), (251, 188, 5), (52, 168, 83)],
)
image_scale = (128, 128)

train_dataloader = dict(
    batch_size=4,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='CocoDataset',
        data_root=data_root,
        ann_file='annotations/train.json',
        data_prefix=dict(img='images/'),
        metainfo=metainfo,
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
            dict(type='Resize', scale=image_scale),
            dict(type='RandomFlip', prob=0.5),
            dict(type='PackDetInputs'),
        ],
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='CocoDataset',
        data_root=data_root,
        ann_file='annotations/val.json',
        data_prefix=dict(img='images/'),
        metainfo=metainfo,
        test_mode=True,
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='Resize', scale=image_scale),
            dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
            dict(type='PackDetInputs'),
        ],
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(
    type='CocoMetric',
    ann_file=data_root + '/annotations/val.json',
    metric=['bbox', 'segm'],
)
test_evaluator = val_evaluator

randomness = dict(seed=0)
max_epochs = 6
train_cfg = dict(max_epochs=max_epochs, val_interval=3)
optim_wrapper = dict(optimizer=dict(lr=2e-3))
param_scheduler = _base_.param_scheduler
param_scheduler[0].start_factor = 0.05
param_scheduler[1].update(T_max=max_epochs, end=max_epochs)
default_hooks = dict(
    logger=dict(interval=25),
    checkpoint=dict(interval=1, max_keep_ckpts=2),
    visualization=dict(score_thr=0.5),
)
