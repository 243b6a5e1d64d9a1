# RedNet-26 classifies single blood cells, trained from scratch.
_base_ = [
    '../_base_/datasets/bccd_cells.py',
    '../_base_/schedules/adamw_10e.py',
    'mmpretrain::_base_/default_runtime.py',
]
custom_imports = dict(imports=['mmcls_involution.models'], allow_failed_imports=False)

model = dict(
    type='ImageClassifier',
    backbone=dict(type='RedNet', depth=26),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=3,
        in_channels=2048,
        loss=dict(type='CrossEntropyLoss'),
        topk=(1,),
    ),
)

default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(
        interval=1,
        max_keep_ckpts=2,
        save_best='single-label/f1-score',
        rule='greater',
    ),
)
