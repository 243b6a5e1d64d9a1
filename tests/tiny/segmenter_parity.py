# The segmenter, trained so that it does not matter how many processes share a batch:
# no batch statistics, and losses over equally many pixels of every picture. A frozen
# stage, because the paper's detectors have one.
_base_ = 'segmenter.py'
custom_imports = dict(
    imports=['mmcls_involution.models', 'mean_loss'], allow_failed_imports=False
)
custom_hooks = [dict(type='MeanLoss')]
norm_cfg = dict(type='GN', num_groups=2)
model = dict(
    backbone=dict(frozen_stages=1, norm_cfg=norm_cfg),
    decode_head=dict(norm_cfg=norm_cfg),
)
optim_wrapper = dict(optimizer=dict(lr=0.1))
train_cfg = dict(max_iters=6, val_interval=3)
log_processor = dict(window_size=1)
