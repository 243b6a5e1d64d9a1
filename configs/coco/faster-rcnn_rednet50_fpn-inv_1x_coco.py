_base_ = './faster-rcnn_rednet50_fpn_1x_coco.py'

model = dict(neck=dict(type='InvolutionFPN'))

# The paper's longer warm-up: 2000 iterations.
param_scheduler = _base_.param_scheduler
param_scheduler[0].end = 2000
