# Semantic FPN with a slim RedNet-26. The data, of the fixture seg_root: $TINY_DATA.
_base_ = ['mmseg::_base_/models/fpn_r50.py', 'mmseg::_base_/default_runtime.py']
custom_imports = dict(imports=['mmcls_involution.models'], allow_failed_imports=False)
model = dict(
    data_preprocessor=dict(mean=[128.0] * 3, std=[60.0] * 3, size=(64, 64)),
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type='RedNet',
        depth=26,
        base_channels=16,
        stem_channels=32,
        out_indices=(0, 1, 2, 3),
    ),
    neck=dict(in_channels=[64, 128, 256, 512], out_channels=16),
    decode_head=dict(in_channels=[16] * 4, channels=16, num_classes=2, dropout_ratio=0),
)
dataset = dict(
    type='BaseSegDataset',
    data_root='{{$TINY_DATA:data/tiny}}',
    data_prefix=dict(img_path='images', seg_map_path='labels'),
    img_suffix='.png',
    metainfo=dict(classes=('top', 'bottom'), palette=[[0, 0, 0], [255, 0, 0]]),
    pipeline=[
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations'),
        dict(type='PackSegInputs'),
    ],
)
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dataset,
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dataset,
)
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator
train_cfg = dict(type='IterBasedTrainLoop', max_iters=2, val_interval=2)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01, momentum=0.9)
)
param_scheduler = [
    dict(type='PolyLR', eta_min=1e-4, power=0.9, begin=0, end=8, by_epoch=False)
]
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=1),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1),
    visualization=dict(type='SegVisualizationHook'),
)
randomness = dict(seed=0)
