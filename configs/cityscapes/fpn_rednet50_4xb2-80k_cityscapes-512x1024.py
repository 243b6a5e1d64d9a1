_base_ = [
    'mmseg::sem_fpn/fpn_r50_4xb2-80k_cityscapes-512x1024.py',
    '../_base_/models/rednet50.py',
]

model = dict(pretrained=None, backbone=dict(_delete_=True, **_base_.rednet50_syncbn))

# 4 GPUs x 2 images, what the learning rate is for.
auto_scale_lr = dict(base_batch_size=8)
