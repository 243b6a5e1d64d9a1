_base_ = [
    './fpn_r50-in1k-pre_1xb2-4k_camvid-240x320.py',
    '../_base_/models/rednet50.py',
]

model = dict(backbone=dict(_delete_=True, **_base_.rednet50))
