_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'

custom_imports = dict(imports=['mmcls_involution.models'], allow_failed_imports=False)

# Backbone weights: the file that the environment variable REDNET50 names, else what
# configs/imagenet/rednet50-stem7_64xb32-warmup-coslr_in1k.py leaves behind.
weights = (
    '{{$REDNET50:work_dirs/rednet50-stem7_64xb32-warmup-coslr_in1k/epoch_130.pth}}'
)
model = dict(
    backbone=dict(
        type='RedNet',
        stem_kernel_size=7,
        init_cfg=dict(type='Pretrained', checkpoint=weights, prefix='backbone.'),
    )
)

# The paper's longer warm-up: 2000 iterations.
param_scheduler = _base_.param_scheduler
param_scheduler[0].end = 2000
