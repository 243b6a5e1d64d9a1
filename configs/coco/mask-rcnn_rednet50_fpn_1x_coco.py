_base_ = [
    'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
    '../_base_/models/rednet50.py',
]

model = dict(backbone=_base_.rednet50)
