# Semantic FPN with ResNet-50, trained from scratch on CamVid: the twin that
# fpn_rednet50_1xb2-8k_camvid-240x320.py is compared with.
_base_ = [
    'mmseg::_base_/models/fpn_r50.py',
    '../_base_/datasets/camvid.py',
    '../_base_/schedules/adamw_8k.py',
    'mmseg::_base_/default_runtime.py',
]

norm_cfg = dict(type='BN')  # SyncBN, upstream's default, needs a GPU
crop_size = (240, 320)
model = dict(
    data_preprocessor=dict(size=crop_size),
    pretrained=None,
    backbone=dict(type='ResNet', norm_cfg=norm_cfg),
    neck=dict(norm_cfg=norm_cfg),
    decode_head=dict(num_classes=11, norm_cfg=norm_cfg),
)
