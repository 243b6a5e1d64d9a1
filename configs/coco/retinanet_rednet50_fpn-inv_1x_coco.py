_base_ = './retinanet_rednet50_fpn_1x_coco.py'

model = dict(neck=dict(type='InvolutionFPN'))
optim_wrapper = dict(clip_grad=dict(max_norm=40))
