# RedNet-26 classifies single blood cells, trained from scratch.
_base_ = [
    '../_base_/datasets/bccd_cells.py',
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

max_epochs = 10
train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=1)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=5),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(
        type='CosineAnnealingLR',
        T_max=max_epochs,
        end=max_epochs,
        convert_to_iter_based=True,
    ),
]
default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(
        interval=1,
        max_keep_ckpts=2,
        save_best='single-label/f1-score',
        rule='greater',
    ),
)
