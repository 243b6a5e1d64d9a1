# Semantic FPN with ResNet-50, fine-tuned on CamVid from ImageNet weights: the twin
# that fpn_rednet50-in1k-pre_1xb2-4k_camvid-240x320.py is compared with. Nothing is
# frozen, as in the paper's segmenters.
_base_ = './fpn_r50_1xb2-8k_camvid-240x320.py'

model = dict(
    backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet50'))
)

train_cfg = dict(max_iters=4000)
optim_wrapper = dict(optimizer=dict(lr=1e-4))
param_scheduler = _base_.param_scheduler
param_scheduler[1].update(end=4000)
