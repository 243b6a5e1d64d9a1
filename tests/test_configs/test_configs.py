"""Every config loads, builds and is what the paper, or its folder, says."""

import copy
import functools
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import PixelData

from mmcls_involution.models import RedNet
from mmcls_involution.ops import Involution2d

# As the tools do: the ResNet twins do not import this package.

CONFIGS = Path(__file__).parents[2] / 'configs'
FILES = sorted(file for file in CONFIGS.glob('*/*.py') if file.parent.name != '_base_')
COCO = {
    # name: learning rate, warm-up iterations, largest norm of the gradient
    'faster-rcnn_rednet50_fpn_1x_coco': (0.02, 500, None),
    'faster-rcnn_rednet50_fpn-inv_1x_coco': (0.02, 2000, None),
    'faster-rcnn_rednet50_fpn-inv_head-inv_1x_coco': (0.02, 2000, 5),
    'mask-rcnn_rednet50_fpn_1x_coco': (0.02, 500, None),
    'mask-rcnn_rednet50_fpn-inv_1x_coco': (0.02, 2000, None),
    'mask-rcnn_rednet50_fpn-inv_head-inv_1x_coco': (0.02, 2000, 5),
    'retinanet_rednet50_fpn_1x_coco': (0.01, 2000, None),
    'retinanet_rednet50_fpn-inv_1x_coco': (0.01, 2000, 40),
}
every_config = pytest.mark.parametrize(
    'file', FILES, ids=lambda file: str(file.relative_to(CONFIGS))
)


@functools.cache
def _read(file):
    return Config.fromfile(file)


def read(name):
    """A config by file, or by folder and stem; may be changed."""
    return copy.deepcopy(
        _read(CONFIGS / f'{name}.py' if isinstance(name, str) else name)
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


@pytest.mark.long
@every_config
def test_a_step_reaches_every_trainable_parameter(file):
    """At full width; test_train.py trains all configs at a quarter of it."""
    cfg = read(file)
    init_default_scope(cfg.default_scope)
    cfg.model.setdefault('data_preprocessor', cfg.get('data_preprocessor'))
    if cfg.default_scope == 'mmseg':
        cfg.model.data_preprocessor.size = (64, 128)
    if 'roi_head' in cfg.model:
        cfg.model.train_cfg.rcnn.sampler.num = 16
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
def test_where_training_starts(file):
    """From the authors' weights, at their depth, or from scratch."""
    cfg = read(file)
    backbone = cfg.model.backbone
    init_cfg = backbone.get('init_cfg') or {}
    fine_tuned = 'in1k-pre' in file.stem
    if not fine_tuned and file.parent.name not in ('coco', 'cityscapes'):
        assert 'checkpoint' not in init_cfg and not cfg.get('load_from')
    elif backbone.type == 'ResNet':
        assert init_cfg['checkpoint'] == 'torchvision://resnet50'
    else:
        assert init_cfg['checkpoint'] == f'paddleclas://RedNet{backbone.depth}'
        assert init_cfg['prefix'] == 'backbone.'
        assert backbone.stem_kernel_size == 7  # the paper's


@pytest.mark.parametrize(
    'ours, theirs',
    [
        ('bccd/faster-rcnn_rednet50_fpn_bccd', 'bccd/faster-rcnn_r50_fpn_bccd'),
        (
            'bccd/faster-rcnn_rednet50-in1k-pre_fpn_1x_bccd',
            'bccd/faster-rcnn_r50-in1k-pre_fpn_1x_bccd',
        ),
        (
            'camvid/fpn_rednet50-in1k-pre_1xb2-4k_camvid-240x320',
            'camvid/fpn_r50-in1k-pre_1xb2-4k_camvid-240x320',
        ),
        (
            'camvid/fpn_rednet50_1xb2-8k_camvid-240x320',
            'camvid/fpn_r50_1xb2-8k_camvid-240x320',
        ),
    ],
)
def test_twins_differ_in_the_backbone_alone(ours, theirs):
    ours, theirs = (read(name).to_dict() for name in (ours, theirs))
    assert ours.pop('custom_imports')['imports'] == ['mmcls_involution.models']
    assert ours['model'].pop('backbone')['type'] == 'RedNet'
    assert 'ResNet' in theirs['model'].pop('backbone')['type']
    for variable in ('weights', 'rednet50', 'rednet50_syncbn'):  # of the base
        ours.pop(variable, None)
    assert ours == theirs


def test_imagenet_schedule_is_the_papers():
    cfg = read('imagenet/rednet50_64xb32-warmup-coslr_in1k')
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


@pytest.mark.parametrize('name', [26, 38, 101, 152, '50-stem7'])
def test_imagenet_configs_differ_in_depth_or_stem_alone(name):
    base = read('imagenet/rednet50_64xb32-warmup-coslr_in1k').to_dict()
    cfg = read(f'imagenet/rednet{name}_64xb32-warmup-coslr_in1k').to_dict()
    change = dict(stem_kernel_size=7) if name == '50-stem7' else dict(depth=name)
    assert 'stem_kernel_size' not in base['model']['backbone']  # 3
    base['model']['backbone'].update(change)
    assert cfg == base


ABLATIONS = {
    **{f'k{size}': dict(kernel_size=size) for size in (3, 5, 9)},
    **{f'g{channels}': dict(group_channels=channels) for channels in (1, 4, 32)},
    **{f'r{ratio}': dict(reduction_ratio=ratio) for ratio in (1, 16)},
    'linear': dict(generator='linear'),
    'dot-product': dict(generator='dot_product'),
    'attention': dict(generator='attention'),
}
ABLATIONS = {name: dict(involution_cfg=cfg) for name, cfg in ABLATIONS.items()}
ABLATIONS['stem-conv'] = dict(stem_kernel_size=None)
ABLATIONS = {f'rednet50-{n}_64xb32-warmup-coslr_in1k': c for n, c in ABLATIONS.items()}


def test_every_ablation_is_listed():
    folder = {file.stem for file in FILES if file.parent.name == 'ablations'}
    assert folder == set(ABLATIONS)


@pytest.mark.parametrize('name', ABLATIONS)
def test_ablations_differ_in_one_argument_alone(name):
    base = read('imagenet/rednet50_64xb32-warmup-coslr_in1k').to_dict()
    assert not ABLATIONS[name].keys() & base['model']['backbone'].keys()
    base['model']['backbone'].update(ABLATIONS[name])
    assert read(f'ablations/{name}').to_dict() == base


@pytest.mark.parametrize('name', COCO)
def test_coco_schedules_are_the_papers(name):
    lr, warmup, max_norm = COCO[name]
    cfg = read(f'coco/{name}')
    linear, steps = cfg.param_scheduler
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.momentum) == ('SGD', lr, 0.9)
    assert optimizer.weight_decay == 1e-4
    assert cfg.optim_wrapper.get('clip_grad') == (
        None if max_norm is None else dict(max_norm=max_norm)
    )
    assert (linear.type, linear.by_epoch) == ('LinearLR', False)
    assert (linear.start_factor, linear.begin, linear.end) == (0.001, 0, warmup)
    assert steps.milestones == [8, 11] and cfg.train_cfg.max_epochs == 12
    assert cfg.train_dataloader.batch_size == 2  # on each of 8 GPUs
    assert cfg.auto_scale_lr.base_batch_size == 16
    backbone = cfg.model.backbone
    assert backbone.frozen_stages == 1 and backbone.norm_eval


CITYSCAPES = [
    f'{name}_4xb2-80k_cityscapes-512x1024'
    for name in ('fpn_rednet50', 'fpn-inv_rednet50', 'upernet_rednet50')
]


@pytest.mark.parametrize('name', CITYSCAPES)
def test_cityscapes_schedules_are_the_papers(name):
    cfg = read(f'cityscapes/{name}')
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.momentum) == ('SGD', 0.01, 0.9)
    (poly,) = cfg.param_scheduler
    assert (poly.type, poly.end, poly.power) == ('PolyLR', 80000, 0.9)
    assert cfg.train_cfg.max_iters == 80000
    assert cfg.train_dataloader.batch_size == 2  # on each of 4 GPUs
    assert cfg.crop_size == (512, 1024) and cfg.model.test_cfg.mode == 'whole'
    backbone = cfg.model.backbone
    assert 'frozen_stages' not in backbone and 'norm_eval' not in backbone
    assert backbone.norm_cfg.type == cfg.model.decode_head.norm_cfg.type == 'SyncBN'
    # as in the official code
    assert backbone.involution_cfg == dict(norm_cfg=dict(type='BN'))


NECK = {f'neck.fpn_convs.{level}' for level in range(4)}
OUTSIDE_THE_BACKBONE = {
    'faster-rcnn_rednet50_fpn-inv_1x_coco': NECK,
    'faster-rcnn_rednet50_fpn-inv_head-inv_1x_coco': NECK | {'rpn_head.rpn_conv'},
    'mask-rcnn_rednet50_fpn-inv_1x_coco': NECK,
    'mask-rcnn_rednet50_fpn-inv_head-inv_1x_coco': NECK
    | {'rpn_head.rpn_conv', *(f'roi_head.mask_head.convs.{i}.0' for i in range(4))},
    # its two extra levels stay convolutions
    'retinanet_rednet50_fpn-inv_1x_coco': NECK - {'neck.fpn_convs.3'},
    'fpn-inv_rednet50_4xb2-80k_cityscapes-512x1024': NECK,
}


@pytest.mark.parametrize(
    'file',
    [f for f in FILES if f.parent.name in ('imagenet', 'coco', 'cityscapes')],
    ids=lambda file: file.stem,
)
def test_involutions_are_where_the_paper_has_them(file):
    cfg = read(file)
    with MODELS.switch_scope_and_registry(cfg.default_scope) as registry:
        model = registry.build(cfg.model)
    found = {n: m for n, m in model.named_modules() if isinstance(m, Involution2d)}
    in_backbone = {name for name in found if name.startswith('backbone.')}
    assert found.keys() - in_backbone == OUTSIDE_THE_BACKBONE.get(file.stem, set())
    blocks = RedNet.arch_settings[model.backbone.depth]
    assert in_backbone == {'backbone.stem.1'} | {
        f'backbone.layer{stage + 1}.{i}.conv2'
        for stage, number in enumerate(blocks)
        for i in range(number)
    }
    # The official ImageNet models have 3 there, the official detectors 7.
    stem = found.pop('backbone.stem.1')
    official = file.parent.name == 'imagenet' and 'stem7' not in file.stem
    assert stem.kernel_size == (3 if official else 7)
    keys = {f'conv1.bn.{key}' for key in torch.nn.BatchNorm2d(1).state_dict()}
    keys |= {'conv1.conv.weight', 'conv2.conv.weight', 'conv2.conv.bias'}
    for name, involution in found.items():
        assert involution.kernel_size == 7, name
        assert involution.group_channels == 16 and involution.reduction_ratio == 4
        assert involution.state_dict().keys() == keys, name
