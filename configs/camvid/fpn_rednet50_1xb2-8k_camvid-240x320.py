_base_ = './fpn_r50_1xb2-8k_camvid-240x320.py'
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
