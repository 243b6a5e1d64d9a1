_base_ = [
    './faster-rcnn_r50-in1k-pre_fpn_1x_bccd.py',
    '../_base_/models/rednet50.py',
]

model = dict(backbone=_base_.rednet50)
