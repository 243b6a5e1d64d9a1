_base_ = './faster-rcnn_rednet50_fpn-inv_1x_coco.py'

model = dict(rpn_head=dict(type='InvolutionRPNHead'))
optim_wrapper = dict(clip_grad=dict(max_norm=5))
