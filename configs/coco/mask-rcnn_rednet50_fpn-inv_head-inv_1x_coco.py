_base_ = './mask-rcnn_rednet50_fpn-inv_1x_coco.py'

model = dict(
    rpn_head=dict(type='InvolutionRPNHead'),
    roi_head=dict(mask_head=dict(type='InvolutionFCNMaskHead')),
)
optim_wrapper = dict(clip_grad=dict(max_norm=5))
