# The classifier, trained so that it does not matter how many processes share a batch:
# batch norms keep their statistics, as in the paper's detectors.
_base_ = 'classifier.py'
custom_imports = dict(
    imports=['mmcls_involution.models', 'mean_loss'], allow_failed_imports=False
)
custom_hooks = [dict(type='MeanLoss')]
model = dict(backbone=dict(norm_eval=True))
optim_wrapper = dict(optimizer=dict(lr=0.01, momentum=0.9))
train_cfg = dict(max_epochs=2)
log_processor = dict(window_size=1)
randomness = dict(seed=0)
