_base_ = './faster-rcnn_r50_fpn_bccd.py'
custom_imports = dict(imports=['mmcls_involution.models'], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type='RedNet',
        depth=50,
        out_indices=(0, 1, 2, 3),
        stem_kernel_size=7,
        involution_cfg=dict(init='identity'),  # docs/initialization.md
    )
)
