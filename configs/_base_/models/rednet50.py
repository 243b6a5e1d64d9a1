# RedNet-50 as detectors and segmenters start with it: from the authors' ImageNet
# weights, as PaddleClas keeps them, or from the file that the environment variable
# REDNET50 names. The stem of those weights has an involution of 3x3; the one of 7x7
# here computes the same with them, and learns from there where it is not frozen.
custom_imports = dict(imports=['mmcls_involution.models'], allow_failed_imports=False)

weights = '{{$REDNET50:paddleclas://RedNet50}}'
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
