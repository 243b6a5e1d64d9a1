# A slim RedNet-26. The data, of the fixture cls_root: $TINY_DATA.
_base_ = [
    'mmpretrain::_base_/models/resnet18.py',
    'mmpretrain::_base_/default_runtime.py',
]
custom_imports = dict(imports=['mmcls_involution.models'], allow_failed_imports=False)
model = dict(
    backbone=dict(
        _delete_=True,
        type='RedNet',
        depth=26,
        base_channels=16,
        stem_channels=32,
    ),
    head=dict(num_classes=2, in_channels=512, topk=(1,)),
)
data_preprocessor = dict(mean=[128.0] * 3, std=[60.0] * 3, num_classes=2)
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='CustomDataset',
        data_prefix='{{$TINY_DATA:data/tiny}}',
        pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')],
    ),
)
val_dataloader = {**train_dataloader, 'sampler': dict(type='DefaultSampler')}
val_dataloader['sampler']['shuffle'] = False
test_dataloader = val_dataloader
val_evaluator = dict(type='Accuracy', topk=(1,))
test_evaluator = val_evaluator
train_cfg = dict(by_epoch=True, max_epochs=1)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.01))
default_hooks = dict(logger=dict(interval=1))
auto_scale_lr = dict(base_batch_size=256)
