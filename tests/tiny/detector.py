# RetinaNet with a slim RedNet-26. The data, of the fixture coco_root: $TINY_DATA.
_base_ = [
    'mmdet::_base_/models/retinanet_r50_fpn.py',
    'mmdet::_base_/default_runtime.py',
]
custom_imports = dict(imports=['mmcls_involution.models'], allow_failed_imports=False)
model = dict(
    data_preprocessor=dict(mean=[128.0] * 3, std=[60.0] * 3),
    backbone=dict(
        _delete_=True,
        type='RedNet',
        depth=26,
        base_channels=16,
        stem_channels=32,
        out_indices=(0, 1, 2, 3),
    ),
    neck=dict(in_channels=[64, 128, 256, 512], out_channels=16),
    bbox_head=dict(num_classes=2, in_channels=16, feat_channels=16, stacked_convs=1),
    test_cfg=dict(score_thr=0),
)
pack = dict(
    type='PackDetInputs',
    meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
)
dataset = dict(
    type='CocoDataset',
    data_root='{{$TINY_DATA:data/tiny}}',
    ann_file='ann.json',
    data_prefix=dict(img=''),
    metainfo=dict(classes=('square', 'bar')),
)
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations', with_bbox=True),
            dict(type='Resize', scale=(64, 64)),
            pack,
        ],
        **dataset,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        test_mode=True,
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='Resize', scale=(64, 64)),
            pack,
        ],
        **dataset,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(
    type='CocoMetric', ann_file='{{$TINY_DATA:data/tiny}}/ann.json', metric='bbox'
)
test_evaluator = val_evaluator
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01, momentum=0.9)
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=3),
    dict(type='MultiStepLR', milestones=[1], gamma=0.5, by_epoch=True),
]
default_hooks = dict(logger=dict(interval=1))
env_cfg = dict(mp_cfg=dict(opencv_num_threads=1))
randomness = dict(seed=0)
auto_scale_lr = dict(enable=False, base_batch_size=16)
