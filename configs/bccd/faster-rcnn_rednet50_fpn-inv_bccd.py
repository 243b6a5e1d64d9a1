_base_ = './faster-rcnn_rednet50_fpn_bccd.py'

# The neck's involutions take no norm; its lateral layers go without one, too.
model = dict(neck=dict(type='InvolutionFPN', norm_cfg=None))
