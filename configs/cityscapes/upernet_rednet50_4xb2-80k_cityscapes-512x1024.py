_base_ = [
    'mmseg::upernet/upernet_r50_4xb2-80k_cityscapes-512x1024.py',
    '../_base_/rednet50.py',
]

model = dict(
    pretrained=None,
    backbone=dict(
        _delete_=True,
        norm_cfg=dict(type='SyncBN'),
        # Plain BN in the kernel generators, as the official models have it.
        involution_cfg=dict(norm_cfg=dict(type='BN')),
        **_base_.rednet50,
    ),
)

# 4 GPUs x 2 images, what the learning rate is for.
auto_scale_lr = dict(base_batch_size=8)
