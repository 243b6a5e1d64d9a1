"""Whole models under the names of mmdet 2.x and mmseg 0.x."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mmcls_involution.engine.errors import UserError
from mmcls_involution.models import RedNet
from mmcls_involution.weights.convert import load_strictly

ROOT = Path(__file__).parents[2]


def conv(name: str, after: int, before: int, size: int = 3, bias: bool = True) -> dict:
    shapes = {f'{name}.weight': (after, before, size, size)}
    return shapes | ({f'{name}.bias': (after,)} if bias else {})


def norm(name: str, channels: int) -> dict:
    names = ('weight', 'bias', 'running_mean', 'running_var')
    shapes = {f'{name}.{n}': (channels,) for n in names}
    return shapes | {f'{name}.num_batches_tracked': ()}


def block(name: str, after: int, before: int, size: int = 3) -> dict:
    """A ConvModule with norm."""
    return conv(f'{name}.conv', after, before, size, bias=False) | norm(
        f'{name}.bn', after
    )


def involution(name: str, channels: int = 256) -> dict:
    return {
        **conv(f'{name}.conv1.conv', channels // 4, channels, 1, bias=False),
        **norm(f'{name}.conv1.bn', channels // 4),
        **conv(f'{name}.conv2.conv', 49 * channels // 16, channels // 4, 1),
    }


def linear(name: str, after: int, before: int) -> dict:
    return {f'{name}.weight': (after, before), f'{name}.bias': (after,)}


def merge(parts: Iterator[dict]) -> dict:
    return {name: shape for part in parts for name, shape in part.items()}


LEVELS = (256, 512, 1024, 2048)


def fpn(inv: bool, levels=LEVELS, extra: bool = False) -> dict:
    out = [
        involution(f'neck.fpn_convs.{i}')
        if inv
        else conv(f'neck.fpn_convs.{i}.conv', 256, 256)
        for i in range(len(levels))
    ]
    if extra:
        out += [
            conv(f'neck.fpn_convs.{3 + i}.conv', 256, c)
            for i, c in ((0, 2048), (1, 256))
        ]
    laterals = [
        conv(f'neck.lateral_convs.{i}.conv', 256, c, 1) for i, c in enumerate(levels)
    ]
    return merge([*laterals, *out])


def faster_rcnn(inv_neck: bool, inv_head: bool) -> dict:
    rpn = 'rpn_head.rpn_'
    box = 'roi_head.bbox_head.'
    return {
        **fpn(inv_neck),
        **(involution(f'{rpn}conv') if inv_head else conv(f'{rpn}conv', 256, 256)),
        **conv(f'{rpn}cls', 3, 256, 1),
        **conv(f'{rpn}reg', 12, 256, 1),
        **linear(f'{box}shared_fcs.0', 1024, 256 * 49),
        **linear(f'{box}shared_fcs.1', 1024, 1024),
        **linear(f'{box}fc_cls', 81, 1024),
        **linear(f'{box}fc_reg', 320, 1024),
    }


def mask_rcnn(inv_neck: bool, inv_head: bool) -> dict:
    mask = 'roi_head.mask_head.'
    convs = [
        involution(f'{mask}convs.{i}.0')
        if inv_head
        else conv(f'{mask}convs.{i}.conv', 256, 256)
        for i in range(4)
    ]
    return {
        **faster_rcnn(inv_neck, inv_head),
        **merge(convs),
        **conv(f'{mask}upsample', 256, 256, 2),
        **conv(f'{mask}conv_logits', 80, 256, 1),
    }


def retinanet(inv_neck: bool) -> dict:
    towers = [
        conv(f'bbox_head.{tower}_convs.{i}.conv', 256, 256)
        for tower in ('cls', 'reg')
        for i in range(4)
    ]
    return {
        **fpn(inv_neck, LEVELS[1:], extra=True),
        **merge(towers),
        **conv('bbox_head.retina_cls', 720, 256),
        **conv('bbox_head.retina_reg', 36, 256),
    }


def semantic_fpn(inv_neck: bool) -> dict:
    places = ('0.0', '1.0', '2.0', '2.2', '3.0', '3.2', '3.4')
    heads = [
        block(f'decode_head.scale_heads.{p}', 128, 256 if p[-1] == '0' else 128)
        for p in places
    ]
    return {
        **fpn(inv_neck),
        **merge(heads),
        **conv('decode_head.conv_seg', 19, 128, 1),
    }


def upernet() -> dict:
    head = 'decode_head.'
    return {
        **merge(block(f'{head}psp_modules.{i}.1', 512, 2048, 1) for i in range(4)),
        **block(f'{head}bottleneck', 512, 2048 + 4 * 512),
        **merge(block(f'{head}lateral_convs.{i}', 512, LEVELS[i], 1) for i in range(3)),
        **merge(block(f'{head}fpn_convs.{i}', 512, 512) for i in range(3)),
        **block(f'{head}fpn_bottleneck', 512, 2048),
        **conv(f'{head}conv_seg', 19, 512, 1),
        **block('auxiliary_head.convs.0', 256, 1024),
        **conv('auxiliary_head.conv_seg', 19, 256, 1),
    }


INVOLUTION_NECK = {'model.neck.type': 'InvolutionFPN'}


INVOLUTION_HEAD = {'model.rpn_head.type': 'InvolutionRPNHead'}


@pytest.mark.parametrize(
    'name, options, shapes',
    [
        ('coco/faster-rcnn_rednet50_fpn_1x_coco', {}, faster_rcnn(False, False)),
        (
            'coco/mask-rcnn_rednet50_fpn_1x_coco',
            {
                **INVOLUTION_NECK,
                **INVOLUTION_HEAD,
                'model.roi_head.mask_head.type': 'InvolutionFCNMaskHead',
            },
            mask_rcnn(True, True),
        ),
        ('coco/retinanet_rednet50_fpn_1x_coco', INVOLUTION_NECK, retinanet(True)),
        (
            'cityscapes/fpn_rednet50_4xb2-80k_cityscapes-512x1024',
            INVOLUTION_NECK,
            semantic_fpn(True),
        ),
        ('cityscapes/upernet_rednet50_4xb2-80k_cityscapes-512x1024', {}, upernet()),
    ],
)
def test_models_of_the_paper_take_the_official_names(name, options, shapes):
    """The names that mmdet 2.x and mmseg 0.x give to all but the backbone."""
    cfg = Config.fromfile(ROOT / 'configs' / f'{name}.py')
    cfg.merge_from_dict(options)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    backbone = RedNet(50, stem_kernel_size=7).state_dict()
    shapes = shapes | {f'backbone.{n}': tuple(v.shape) for n, v in backbone.items()}
    # One number each, however large: only names and shapes matter here.
    weights = {n: torch.tensor(0.5).expand(shape) for n, shape in shapes.items()}
    assert load_strictly(model, weights, '') == 0
    assert all(p.eq(0.5).all() for p in model.parameters())

    part = next(iter(shapes))
    with pytest.raises(UserError, match=f'1 missing:\n  {part}'):
        load_strictly(model, {n: v for n, v in weights.items() if n != part}, '')
