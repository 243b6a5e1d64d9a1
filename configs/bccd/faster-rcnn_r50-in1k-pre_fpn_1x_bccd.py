# Faster R-CNN with ResNet-50, fine-tuned on BCCD from ImageNet weights: the twin that
# faster-rcnn_rednet50-in1k-pre_fpn_1x_bccd.py is compared with.
_base_ = './faster-rcnn_r50_fpn_bccd.py'

model = dict(
    # frozen as upstream's and the paper's detectors are, and no batch norm in the neck
    backbone=dict(
        frozen_stages=1,
        norm_eval=True,
        init_cfg=dict(
            _delete_=True, type='Pretrained', checkpoint='torchvision://resnet50'
        ),
    ),
    neck=dict(norm_cfg=None),
)

train_cfg = dict(max_epochs=12)
optim_wrapper = dict(optimizer=dict(lr=1e-4))
param_scheduler = _base_.param_scheduler
param_scheduler[1].update(T_max=12, end=12)
