# RedNet-50 as detectors and segmenters start with it. Its weights are the file that the
# environment variable REDNET50 names, else what
# configs/imagenet/rednet50-stem7_64xb32-warmup-coslr_in1k.py leaves behind.
custom_imports = dict(imports=['mmcls_involution.models'], allow_failed_imports=False)

weights = (
    '{{$REDNET50:work_dirs/rednet50-stem7_64xb32-warmup-coslr_in1k/epoch_130.pth}}'
)
rednet50 = dict(
    type='RedNet',
    depth=50,
    out_indices=(0, 1, 2, 3),
    stem_kernel_size=7,
    init_cfg=dict(type='Pretrained', checkpoint=weights, prefix='backbone.'),
)
# As a segmenter's: SyncBN as upstream's configs have it, and plain BN in the kernel
# generators, as the official models have it.
rednet50_syncbn = dict(
    norm_cfg=dict(type='SyncBN'),
    involution_cfg=dict(norm_cfg=dict(type='BN')),
    **rednet50,
)
