# A detector from scratch in 24 epochs, with upstream's runtime of MMDetection. The
# length of the last scheduler is that of the training: a config that trains for
# another number of epochs sets both, as configs/demo does.
_base_ = 'adamw.py'

max_epochs = 24
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=1)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(
        type='CosineAnnealingLR',
        T_max=max_epochs,
        end=max_epochs,
        eta_min_ratio=0.01,
        convert_to_iter_based=True,
    ),
]
