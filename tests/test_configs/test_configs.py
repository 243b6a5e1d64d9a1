"""Every config loads, builds and trains every parameter that it does not freeze."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import PixelData

from mmcls_involution import compat

# As the tools do: the ResNet twins do not import this package.
compat.apply()

CONFIGS = Path(__file__).parents[2] / 'configs'
FILES = sorted(file for file in CONFIGS.glob('*/*.py') if file.parent.name != '_base_')
every_config = pytest.mark.parametrize(
    'file', FILES, ids=lambda file: str(file.relative_to(CONFIGS))
)


def detection_inputs(cfg):
    from mmdet.testing import demo_mm_inputs

    head = cfg.model.get('roi_head', cfg.model)
    return demo_mm_inputs(
        image_shapes=[(3, 128, 96)] * 2,
        num_items=[3, 2],
        num_classes=head['bbox_head']['num_classes'],
        with_mask='mask_head' in head,
    )


def segmentation_inputs(cfg):
    from mmseg.structures import SegDataSample

    labels = torch.arange(64 * 128).view(1, 64, 128) % cfg.model.decode_head.num_classes
    sample = SegDataSample(gt_sem_seg=PixelData(data=labels))
    # Two images: a pooling branch of UPerNet normalizes one pixel per image.
    images = [torch.randint(256, (3, 64, 128), dtype=torch.uint8) for _ in range(2)]
    return dict(inputs=images, data_samples=[sample, sample.clone()])


def classification_inputs(cfg):
    from mmpretrain.structures import DataSample

    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    return dict(
        inputs=images, data_samples=[DataSample().set_gt_label(i) for i in range(2)]
    )


INPUTS = dict(
    mmdet=detection_inputs, mmseg=segmentation_inputs, mmpretrain=classification_inputs
)


@every_config
def test_a_step_reaches_every_trainable_parameter(file):
    cfg = Config.fromfile(file)
    init_default_scope(cfg.default_scope)
    cfg.model.setdefault('data_preprocessor', cfg.get('data_preprocessor'))
    if cfg.default_scope == 'mmseg':
        cfg.model.data_preprocessor.size = (64, 128)
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).train()

    batch = model.data_preprocessor(INPUTS[cfg.default_scope](cfg), training=True)
    losses = model(**batch, mode='loss')
    total, _ = model.parse_losses(losses)
    assert torch.isfinite(total)
    total.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) > 50
    without = [name for name, p in trained.items() if p.grad is None]
    assert without == []


@every_config
def test_pretrained_weights_are_those_of_an_own_config(file):
    """The default checkpoint is where one of our ImageNet configs leaves it."""
    cfg = Config.fromfile(file)
    backbone = cfg.model.backbone
    init_cfg = backbone.get('init_cfg') or {}
    if file.parent.name not in ('coco', 'cityscapes'):
        assert 'checkpoint' not in init_cfg and not cfg.get('load_from')
        return
    checkpoint = Path(init_cfg['checkpoint'])
    source = Config.fromfile(CONFIGS / 'imagenet' / f'{checkpoint.parent.name}.py')
    assert checkpoint.name == f'epoch_{source.train_cfg.max_epochs}.pth'
    assert checkpoint.parts[0] == 'work_dirs'
    theirs = source.model.backbone
    assert theirs.stem_kernel_size == backbone.stem_kernel_size == 7
    assert theirs.depth == backbone.depth


@pytest.mark.parametrize(
    'ours, theirs',
    [
        ('bccd/faster-rcnn_rednet50_fpn_bccd', 'bccd/faster-rcnn_r50_fpn_bccd'),
        (
            'camvid/fpn_rednet50_1xb2-8k_camvid-240x320',
            'camvid/fpn_r50_1xb2-8k_camvid-240x320',
        ),
    ],
)
def test_twins_differ_in_the_backbone_alone(ours, theirs):
    ours, theirs = (
        Config.fromfile(CONFIGS / f'{name}.py').to_dict() for name in (ours, theirs)
    )
    assert ours.pop('custom_imports')['imports'] == ['mmcls_involution.models']
    assert ours['model'].pop('backbone')['type'] == 'RedNet'
    assert 'ResNet' in theirs['model'].pop('backbone')['type']
    assert ours == theirs


def test_imagenet_schedule_is_the_papers():
    cfg = Config.fromfile(CONFIGS / 'imagenet/rednet50_64xb32-warmup-coslr_in1k.py')
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.lr, optimizer.momentum, optimizer.nesterov) == (0.8, 0.9, True)
    assert optimizer.weight_decay == 1e-4
    assert cfg.train_cfg.max_epochs == 130
    warmup, cosine = cfg.param_scheduler
    assert (warmup.start_factor, warmup.end, warmup.by_epoch) == (0.25, 3130, False)
    assert (cosine.type, cosine.T_max) == ('CosineAnnealingLR', 130)
    assert cosine.get('eta_min', 0) == 0
    assert cfg.train_dataloader.batch_size == 32
    assert cfg.model.head.loss.label_smooth_val == 0.1
    assert cfg.auto_scale_lr.base_batch_size == 64 * 32


@pytest.mark.parametrize(
    'name, lr, warmup',
    [
        ('faster-rcnn_rednet50_fpn_1x_coco', 0.02, 500),
        ('mask-rcnn_rednet50_fpn_1x_coco', 0.02, 500),
        ('retinanet_rednet50_fpn_1x_coco', 0.01, 2000),
    ],
)
def test_coco_schedules_are_the_papers(name, lr, warmup):
    cfg = Config.fromfile(CONFIGS / f'coco/{name}.py')
    linear, steps = cfg.param_scheduler
    assert cfg.optim_wrapper.optimizer.lr == lr
    assert (linear.start_factor, linear.end) == (0.001, warmup)
    assert steps.milestones == [8, 11] and cfg.train_cfg.max_epochs == 12
    backbone = cfg.model.backbone
    assert backbone.frozen_stages == 1 and backbone.norm_eval
