_base_ = '../imagenet/rednet50_64xb32-warmup-coslr_in1k.py'

model = dict(backbone=dict(stem_kernel_size=None))
