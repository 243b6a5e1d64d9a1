_base_ = './rednet50_64xb32-warmup-coslr_in1k.py'

model = dict(backbone=dict(depth=38))
