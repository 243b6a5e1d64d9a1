_base_ = [
    'mmpretrain::_base_/models/resnet50_label_smooth.py',
    'mmpretrain::_base_/datasets/imagenet_bs32.py',
    'mmpretrain::_base_/schedules/imagenet_bs2048_coslr.py',
    'mmpretrain::_base_/default_runtime.py',
]

custom_imports = dict(imports=['mmcls_involution.models'], allow_failed_imports=False)

model = dict(backbone=dict(type='RedNet'))

# 130 epochs behind a warm-up of 3130 iterations from a quarter of the rate.
param_scheduler = [
    dict(type='LinearLR', start_factor=0.25, by_epoch=False, begin=0, end=3130),
    dict(type='CosineAnnealingLR', T_max=130, by_epoch=True, begin=0, end=130),
]
train_cfg = dict(max_epochs=130)
