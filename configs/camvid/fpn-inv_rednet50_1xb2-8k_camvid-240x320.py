_base_ = './fpn_rednet50_1xb2-8k_camvid-240x320.py'

# The neck's involutions take no norm; its lateral layers go without one, too.
model = dict(neck=dict(type='InvolutionFPN', norm_cfg=None))
