_base_ = 'mmseg::upernet/upernet_r50_4xb2-80k_cityscapes-512x1024.py'

custom_imports = dict(imports=['mmcls_involution.models'], allow_failed_imports=False)

# Backbone weights: the file that the environment variable REDNET50 names, else what
# configs/imagenet/rednet50-stem7_64xb32-warmup-coslr_in1k.py leaves behind.
weights = (
    '{{$REDNET50:work_dirs/rednet50-stem7_64xb32-warmup-coslr_in1k/epoch_130.pth}}'
)
model = dict(
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type='RedNet',
        depth=50,
        out_indices=(0, 1, 2, 3),
        stem_kernel_size=7,
        norm_cfg=dict(type='SyncBN', requires_grad=True),
        # Plain BN in the kernel generators, as the official models have it.
        involution_cfg=dict(norm_cfg=dict(type='BN')),
        init_cfg=dict(type='Pretrained', checkpoint=weights, prefix='backbone.'),
    ),
)
