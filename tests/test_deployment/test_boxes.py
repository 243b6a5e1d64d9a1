"""Detectors exported with their boxes, against MMDetection."""

from __future__ import annotations

import re

import pytest
import torch
from deployment_cases import command, needs_onnx, needs_onnxscript, slim
from mmdet.models.dense_heads import EmbeddingRPNHead
from mmdet.models.losses import SeesawLoss
from torch import nn

from mmcls_involution.deployment import detections
from mmcls_involution.deployment.boxes import WithBoxes, check_boxes
from mmcls_involution.engine.errors import UserError

DETECTORS = ['retinanet', 'faster-rcnn', 'mask-rcnn']


def detector(name: str, score_thr: float = 0.0) -> nn.Module:
    """A small one, that is not sure of what it finds."""
    cfg = {
        'model.neck.in_channels': [64, 128, 256, 512],
        'model.neck.out_channels': 32,
    }
    if name == 'retinanet':
        head = {'num_classes': 3, 'in_channels': 32, 'feat_channels': 16}
        cfg |= {f'model.bbox_head.{key}': v for key, v in head.items()}
        cfg |= {'model.test_cfg.nms_pre': 60, 'model.test_cfg.score_thr': score_thr}
    else:
        head = {'num_classes': 3, 'in_channels': 32, 'fc_out_channels': 64}
        cfg |= {f'model.roi_head.bbox_head.{key}': v for key, v in head.items()}
        cfg |= {
            'model.rpn_head.in_channels': 32,
            'model.rpn_head.feat_channels': 16,
            'model.roi_head.bbox_roi_extractor.out_channels': 32,
            'model.test_cfg.rpn.nms_pre': 60,
            'model.test_cfg.rpn.max_per_img': 50,
            'model.test_cfg.rcnn.score_thr': score_thr,
        }
    if name == 'mask-rcnn':
        head = {'num_classes': 3, 'in_channels': 32, 'conv_out_channels': 16}
        cfg |= {f'model.roi_head.mask_head.{key}': v for key, v in head.items()}
        cfg['model.roi_head.mask_roi_extractor.out_channels'] = 32
    model = slim(f'coco/{name}_rednet50_fpn_1x_coco.py', **cfg).eval()
    head = model.bbox_head if name == 'retinanet' else model.rpn_head
    last = head.retina_cls if name == 'retinanet' else head.rpn_cls
    with torch.no_grad():  # scores of 1 are alike: which box is the best is by chance
        maps, _ = head(model.extract_feat(torch.randn(1, 3, 96, 128)))
        last.weight *= 4 / max(scores.abs().max() for scores in maps)
    return model


@pytest.mark.parametrize(
    'name, change',
    [
        *((name, None) for name in DETECTORS),
        ('retinanet', 'nms for all classes'),
        ('faster-rcnn', 'nms for all classes'),
        ('faster-rcnn', 'a box for all classes'),
        ('faster-rcnn', 'a threshold of proposals, which MMDetection ignores'),
    ],
)
def test_boxes_are_those_of_mmdetection(name, change):
    model = detector(name)
    if change == 'nms for all classes':
        head = model.bbox_head if name == 'retinanet' else model.roi_head
        head.test_cfg.nms.class_agnostic = True
    elif change and 'threshold' in change:
        model.rpn_head.test_cfg.score_thr = 1
    elif change:
        head = model.roi_head.bbox_head
        head.reg_class_agnostic = True
        head.fc_reg = nn.Linear(64, 4)
    exported = WithBoxes(model)
    with torch.no_grad():
        outputs = exported(torch.randn(4, 3, 96, 128))
    count = 3 if name == 'mask-rcnn' else 2
    boxes, maps = outputs[:count], outputs[count:]
    assert check_boxes(model, boxes, maps, (96, 128)) > 20
    dets, labels = boxes[:2]
    assert dets.shape[:2] == labels.shape == (4, 100)
    assert (dets[..., 4].diff() <= 0).all()
    assert ((labels < 0) == (dets[..., 4] == 0)).all()


@needs_onnx
@pytest.mark.parametrize(
    'score_thr, exporter',
    [
        (0, 'torchscript'),
        (1, 'torchscript'),
        pytest.param(0, 'dynamo', marks=[needs_onnxscript, pytest.mark.long]),
    ],
)
@pytest.mark.parametrize('name', DETECTORS)
def test_boxes_in_the_graph(name, score_thr, exporter, monkeypatch, tmp_path, capsys):
    """Scores above 1 has no box."""
    import onnxruntime

    out = tmp_path / 'model.onnx'
    arguments = ['--out', out, '--boxes', '--dynamic', '--shape', '64', '96']
    arguments += ['--exporter', exporter]
    command(monkeypatch, detector(name, score_thr), *arguments, backbone=False)
    said = capsys.readouterr().out.replace('\n', ' ')
    if score_thr:
        assert 'no box was compared' in said
    else:
        assert int(re.search(r'its (\d+) boxes', said)[1]) > 50
    session = onnxruntime.InferenceSession(str(out))
    masks = ['masks'] if name == 'mask-rcnn' else []
    assert [o.name for o in session.get_outputs()] == ['dets', 'labels', *masks]
    dets, labels, *masks = session.run(
        None, {'image': torch.randn(3, 3, 71, 65).numpy()}
    )
    assert dets.shape == (3, 100, 5) and labels.shape == (3, 100)
    assert (labels >= 0).any() == (score_thr == 0)
    assert [mask.shape for mask in masks] == [(3, 100, 28, 28)] * len(masks)


@pytest.mark.parametrize('change', ['box', 'score', 'label', 'mask', 'less', 'more'])
def test_other_boxes_are_noticed(change):
    model = detector('mask-rcnn')
    with torch.no_grad():
        outputs = list(WithBoxes(model)(torch.randn(1, 3, 96, 128)))
    (dets, labels, masks), maps = outputs[:3], outputs[3:]
    if change == 'box':
        dets[:, :3, :4] += 2
    elif change == 'score':
        dets[:, :3, 4] += 2e-4
    elif change == 'label':
        labels[:, :3] = (labels[:, :3] + 1) % 3
    elif change == 'mask':
        sides = dets[0, :, 2:4] - dets[0, :, :2]
        large = sides.prod(1).topk(3).indices  # in others there may be no pixel
        masks[:, large] = 1 - masks[:, large]
    elif change == 'less':
        labels[:, :3] = -1
    else:
        dets, labels, masks = (
            torch.cat([part, part[:, :3]], 1) for part in (dets, labels, masks)
        )
        dets[:, -3:, :4] += 2  # twins of none
    with pytest.raises(UserError, match='differs from MMDetection: 3 of .* boxes'):
        check_boxes(model, [dets, labels, masks], maps, (96, 128))


def own(part: nn.Module, method: str) -> None:
    """Give a part of a model a method of its own."""
    kind = type(part)
    part.__class__ = type(f'Own{kind.__name__}', (kind,), {method: lambda self: None})


@pytest.mark.parametrize(
    'name, change, message',
    [
        ('retinanet', lambda m: own(m.bbox_head, '_predict_by_feat_single'), 'OwnRet'),
        ('retinanet', lambda m: own(m.bbox_head, '_bbox_post_process'), 'OwnRetinaH'),
        ('faster-rcnn', lambda m: own(m.rpn_head, 'predict_by_feat'), 'OwnRPNHead mak'),
        ('faster-rcnn', lambda m: own(m.roi_head, '_bbox_forward'), 'OwnStandardRoIHe'),
        ('mask-rcnn', lambda m: own(m.roi_head, 'predict_mask'), 'OwnStandardRoIHead'),
        ('mask-rcnn', lambda m: own(m, 'predict'), 'OwnMaskRCNN makes boxes in a way'),
        (
            'faster-rcnn',
            lambda m: own(m.roi_head.bbox_roi_extractor, 'map_roi_levels'),
            'OwnSingleRoIExtractor crops by other than averaging RoIAlign',
        ),
        (
            'mask-rcnn',
            lambda m: vars(m.roi_head.mask_roi_extractor.roi_layers[3]).update(
                pool_mode='max'
            ),
            'SingleRoIExtractor crops by other than averaging RoIAlign',
        ),
        (
            'faster-rcnn',
            lambda m: setattr(m, 'rpn_head', EmbeddingRPNHead(5)),
            'EmbeddingRPNHead has no anchors',
        ),
        (
            'faster-rcnn',
            lambda m: setattr(m.roi_head.bbox_head, 'loss_cls', SeesawLoss()),
            'SeesawLoss has an activation of its own',
        ),
        (
            'retinanet',
            lambda m: setattr(m.bbox_head.bbox_coder, 'use_box_type', True),
            'DeltaXYWHBBoxCoder codes boxes in a way of its own',
        ),
        (
            'retinanet',
            lambda m: m.bbox_head.test_cfg.pop('nms_pre'),
            'its test_cfg sets no nms_pre',
        ),
        (
            'faster-rcnn',
            lambda m: m.roi_head.test_cfg.update(max_per_img=-1),
            'its test_cfg sets no max_per_img',
        ),
        *(
            (
                'faster-rcnn',
                lambda m, nms=nms: m.roi_head.test_cfg.update(nms=nms),
                'its test_cfg suppresses boxes by ',
            )
            for nms in (
                dict(type='soft_nms', iou_threshold=0.5),
                dict(type='nms', iou_threshold=0.5, offset=1),
                dict(type='nms', iou_thr=0.5),
                None,
            )
        ),
    ],
)
def test_other_ways_to_boxes_are_refused(name, change, message):
    model = detector(name)
    change(model)
    with pytest.raises(UserError, match=f'--boxes: {message}'):
        WithBoxes(model)


def test_boxes_are_those_of_detectors():
    classifier = nn.ModuleDict({'backbone': nn.Identity(), 'head': nn.Identity()})
    with pytest.raises(UserError, match='--boxes: ModuleDict is no detector'):
        WithBoxes(classifier)


@needs_onnx
def test_detectors_that_are_not_exported_at_all_are_not_sent_to_maps(
    monkeypatch, tmp_path
):
    """FCOS, for one, has no anchors and a third map."""

    class Head(nn.Module):
        def forward(self, features):
            return features, features, features

    model = nn.ModuleDict({'bbox_head': Head()})
    model.extract_feat = lambda image: (image,)
    options = ['--out', tmp_path / 'model.onnx', '--boxes', '--shape', '8', '9']
    with pytest.raises(UserError, match='Head gives 3 kinds .* --backbone exports'):
        command(monkeypatch, model, *options, backbone=False)


@pytest.mark.parametrize('name, count', [('retinanet', 10), ('faster-rcnn', 15)])
def test_detections_take_arrays_and_all_outputs_alone(name, count):
    model = detector(name)
    with torch.no_grad():
        dets, labels, *maps = WithBoxes(model)(torch.randn(1, 3, 96, 128))
    (expected,) = detections(model, maps, (96, 128))
    (found,) = detections(model, [value.numpy() for value in maps], (96, 128))
    torch.testing.assert_close(found.bboxes, expected.bboxes)
    for outputs in ([dets, labels], maps[1:], [*maps, labels]):
        with pytest.raises(UserError, match=f'{len(outputs)} outputs: .* has {count}'):
            detections(model, outputs, (96, 128))
