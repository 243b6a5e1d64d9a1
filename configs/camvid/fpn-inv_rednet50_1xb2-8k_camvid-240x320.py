_base_ = './fpn_rednet50_1xb2-8k_camvid-240x320.py'

# Batch norm stays in the lateral layers: the neck's involutions take none.
model = dict(neck=dict(type='InvolutionFPN', involution_cfg=dict(init='identity')))
