# BCCD blood cells, written by tools/dataset_converters/bccd.py. The environment
# variable BCCD_ROOT names another folder.
#
# Another data set in COCO format takes a config of these lines, say configs/mine.py:
#   _base_ = './bccd/faster-rcnn_rednet50_fpn_bccd.py'
#   mine = dict(data_root='data/mine', metainfo=dict(classes=('cat', 'dog')))
#   train_dataloader = dict(dataset=dict(ann_file='train.json', **mine))
#   val_dataloader = dict(dataset=dict(ann_file='val.json', **mine))
#   test_dataloader = val_dataloader
#   val_evaluator = dict(ann_file='data/mine/val.json')
#   test_evaluator = val_evaluator
#   model = dict(roi_head=dict(bbox_head=dict(num_classes=2)))
# classes are the categories of the annotation file, in its order; photos are looked
# for in data_root/images (data_prefix=dict(img=...)). The same keys can be given to
# tools/train.py with --cfg-options.
#
# Photos are scaled to 320x240. Small objects in larger ones want more:
#   train_dataloader.dataset.pipeline.2.scale, val_dataloader.dataset.pipeline.1.scale
# and the test data loader's. Training starts from scratch; from ImageNet weights over
#   _base_ = './bccd/faster-rcnn_rednet50-in1k-pre_fpn_1x_bccd.py'
# and from a detector of the same config with load_from='FILE'.
dataset_type = 'CocoDataset'
data_root = '{{$BCCD_ROOT:data/bccd}}'
metainfo = dict(classes=('RBC', 'WBC', 'Platelets'))
image_scale = (320, 240)  # half of the photos' 640x480, for training on a CPU

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=image_scale, keep_ratio=True),
    dict(
        type='RandomFlip',
        prob=[0.25, 0.25, 0.25],
        direction=['horizontal', 'vertical', 'diagonal'],
    ),
    dict(type='PhotoMetricDistortion', hue_delta=9),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=image_scale, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]
train_dataloader = dict(
    batch_size=2,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    batch_sampler=dict(type='AspectRatioBatchSampler'),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        ann_file='annotations/train.json',
        data_prefix=dict(img='images/'),
        metainfo=metainfo,
        filter_cfg=dict(filter_empty_gt=True),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        ann_file='annotations/val.json',
        data_prefix=dict(img='images/'),
        metainfo=metainfo,
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = dict(
    batch_size=1,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        ann_file='annotations/test.json',
        data_prefix=dict(img='images/'),
        metainfo=metainfo,
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
val_evaluator = dict(
    type='CocoMetric', ann_file=data_root + '/annotations/val.json', metric='bbox'
)
test_evaluator = dict(
    type='CocoMetric', ann_file=data_root + '/annotations/test.json', metric='bbox'
)
