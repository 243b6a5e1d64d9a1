_base_ = [
    'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
    '../_base_/models/rednet50.py',
]

model = dict(backbone=_base_.rednet50)

# The paper's longer warm-up: 2000 iterations.
param_scheduler = _base_.param_scheduler
param_scheduler[0].end = 2000
