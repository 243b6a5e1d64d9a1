_base_ = './faster-rcnn_rednet50_fpn_bccd.py'

# Batch norm stays in the lateral layers: the neck's involutions take none.
model = dict(neck=dict(type='InvolutionFPN', involution_cfg=dict(init='identity')))
