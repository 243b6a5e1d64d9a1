"""Exported models against PyTorch, at odd and changing sizes."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from deployment_cases import (
    SLIM,
    around,
    command,
    needs_library,
    needs_onnx,
    needs_onnxscript,
    slim,
)
from mmengine.config import Config
from op_cases import needs_pooling_of_any_size
from torch import nn

from mmcls_involution.deployment import detections, export
from mmcls_involution.deployment.wrappers import Exported
from mmcls_involution.engine.errors import UserError
from mmcls_involution.ops import Involution2d, standard
from mmcls_involution.paths import ROOT

# Batches and odd sizes that the example is not of.
OTHERS = [(1, 3, 65, 97), (3, 3, 77, 64), (1, 3, 91, 129)]


each_exporter = pytest.mark.parametrize(
    'exporter', ['torchscript', pytest.param('dynamo', marks=needs_onnxscript)]
)
of_models_each_exporter = pytest.mark.parametrize(
    'exporter',
    [
        'torchscript',
        pytest.param('dynamo', marks=[needs_onnxscript, pytest.mark.long]),
    ],
)


def check(
    model: nn.Module, file: Path, exporter: str, operator: str = 'standard', **kept
) -> None:
    image = torch.randn(2, 3, 70, 83)
    exported = Exported(model, **kept)
    options = dict(exporter=exporter, operator=operator)
    export.export_onnx(exported, image, file, dynamic=True, **options)
    run = export.load(file, 'onnx', threads=1, operator=operator)
    reference = Exported(model, fold=False, **kept)
    assert export.compare(reference, run, [tuple(image.shape), *OTHERS]) <= 1e-5


@needs_onnx
@pytest.mark.parametrize(
    'exporter, operator',
    [
        ('torchscript', 'standard'),
        ('torchscript', 'custom'),
        pytest.param('dynamo', 'standard', marks=needs_onnxscript),
        pytest.param('dynamo', 'custom', marks=[needs_onnxscript, pytest.mark.long]),
    ],
)
def test_backbone_of_any_size(exporter, operator, tmp_path):
    import onnx

    needs_library(operator)
    model = slim('imagenet/rednet26_64xb32-warmup-coslr_in1k.py')
    check(model, tmp_path / 'model.onnx', exporter, operator, backbone=True)
    nodes = onnx.load(tmp_path / 'model.onnx').graph.node
    domains = {node.domain for node in nodes}
    assert ('mmcls_involution' in domains) == (operator == 'custom')


@needs_onnx
@each_exporter
@pytest.mark.parametrize('generator', ['linear', 'attention'])
def test_other_generators(generator, exporter, tmp_path):
    """Attention exports for the size of its example."""
    layer = Involution2d(16, 3, stride=2, generator=generator)
    model = Exported(around(layer), backbone=True)
    image = torch.randn(2, 16, 19, 23)
    file = tmp_path / 'model.onnx'
    export.export_onnx(model, image, file, exporter=exporter)
    run = export.load(file, 'onnx', threads=1)
    export.compare(model, run, [tuple(image.shape)])


@needs_onnx
@pytest.mark.parametrize('fused', [True, False])
@pytest.mark.parametrize('batch, parts, strips', [(1, 1, 3), (5, 2, 11 + 6)])
def test_fixed_sizes_are_written_in_strips(
    batch, parts, strips, fused, tmp_path, monkeypatch
):
    """11 rows: 4, 4 and 3; of three images one at a time, of two images two."""
    import onnx

    row_of_an_image = 2 * 2 * 63 * (8 + 7)  # groups, tiles, windows, their channels
    monkeypatch.setattr(standard, 'STRIP', 4 * row_of_an_image)
    monkeypatch.setattr(standard, 'PARTS', 2)
    layer = Involution2d(16, 3, stride=2, fused=fused, group_channels=8)
    model = Exported(around(layer), backbone=True)
    image, file = torch.randn(batch, 16, 21, 23), tmp_path / 'model.onnx'
    export.export_onnx(model, image, file)
    export.compare(model, export.load(file, 'onnx', threads=1), [tuple(image.shape)])
    nodes = [node.op_type for node in onnx.load(file).graph.node]
    # A product of windows and kernels, and where these are generated one before it; in
    # each part pixels are transposed by two.
    assert nodes.count('MatMul') == strips * (2 if fused else 1) + 2 * parts
    assert nodes.count('Gather') == strips


@needs_onnx
@each_exporter
@pytest.mark.parametrize(
    'arguments', [dict(fused=False), dict(generator='attention')], ids=str
)
def test_custom_operator_with_kernels_as_an_input(arguments, exporter, tmp_path):
    import onnx

    needs_library()
    model = Exported(around(Involution2d(16, 3, stride=2, **arguments)), backbone=True)
    image, file = torch.randn(2, 16, 19, 23), tmp_path / 'model.onnx'
    export.export_onnx(model, image, file, exporter=exporter, operator='custom')
    run = export.load(file, 'onnx', threads=1, operator='custom')
    export.compare(model, run, [tuple(image.shape)])
    types = {node.op_type for node in onnx.load(file).graph.node if node.domain}
    assert types == {'Involution2d'}


@needs_onnx
@each_exporter
def test_sizes_behind_custom_operators_are_known(exporter, tmp_path):
    """Without them ONNX Runtime does not put the addition behind into a convolution."""
    import onnx

    model = Exported(around(Involution2d(16, stride=2)), backbone=True)
    file = tmp_path / 'model.onnx'
    options = dict(exporter=exporter, operator='custom')
    export.export_onnx(model, torch.randn(2, 16, 19, 23), file, **options)
    graph = onnx.load(file).graph
    (node,) = (node for node in graph.node if node.domain == 'mmcls_involution')
    values = {value.name: value for value in [*graph.value_info, *graph.output]}
    dims = values[node.output[0]].type.tensor_type.shape.dim
    assert [dim.dim_value for dim in dims] == [2, 16, 10, 12]


@needs_onnx
def test_custom_operators_say_what_fails(tmp_path):
    """Here the window of a pixel is larger than any memory."""
    import onnx

    needs_library()
    model = Exported(around(Involution2d(16, 3)), backbone=True)
    image, file = torch.randn(1, 16, 5, 7), tmp_path / 'model.onnx'
    export.export_onnx(model, image, file, operator='custom')
    content = onnx.load(file)
    (node,) = (n for n in content.graph.node if n.domain == 'mmcls_involution')
    for attribute in node.attribute:
        if attribute.name in ('dilations', 'pads'):
            attribute.ints[:] = [10**7] * 2
    onnx.save(content, file)
    run = export.load(file, 'onnx', threads=1, operator='custom')
    with pytest.raises(Exception, match='no memory for an involution'):
        run(image)


@needs_onnx
@of_models_each_exporter
def test_semantic_fpn(exporter, tmp_path):
    changes = {
        'model.neck.in_channels': [64, 128, 256, 512],
        'model.neck.out_channels': 16,
        'model.decode_head.in_channels': [16] * 4,
        'model.decode_head.channels': 16,
        'model.decode_head.norm_cfg.type': 'BN',
    }
    name = 'cityscapes/fpn-inv_rednet50_4xb2-80k_cityscapes-512x1024.py'
    check(slim(name, **changes), tmp_path / 'model.onnx', exporter)


@needs_onnx
@of_models_each_exporter
def test_upernet(exporter, tmp_path):
    changes = {
        'model.decode_head.in_channels': [64, 128, 256, 512],
        'model.decode_head.channels': 16,
        'model.decode_head.norm_cfg.type': 'BN',
        'model.auxiliary_head': None,
    }
    name = 'cityscapes/upernet_rednet50_4xb2-80k_cityscapes-512x1024.py'
    check(slim(name, **changes), tmp_path / 'model.onnx', exporter)


@needs_onnx
@of_models_each_exporter
@pytest.mark.parametrize('name', ['retinanet', 'faster-rcnn'])
def test_detectors_and_their_boxes(name, exporter, tmp_path):
    changes = {'model.neck.in_channels': [64, 128, 256, 512]}
    detector = slim(f'coco/{name}_rednet50_fpn_1x_coco.py', **changes)
    detector.eval()
    head = detector.bbox_head if name == 'retinanet' else detector.roi_head
    head.test_cfg.score_thr = 0.0  # what is not trained is sure of nothing
    check(detector, tmp_path / 'model.onnx', exporter)
    image = torch.randn(1, 3, 96, 128)
    outputs = export.load(tmp_path / 'model.onnx', 'onnx', threads=1)(image)
    (found,) = detections(detector, outputs, (96, 128))
    from mmdet.structures import DetDataSample

    meta = dict.fromkeys(('img_shape', 'ori_shape', 'pad_shape'), (96, 128))
    sample = DetDataSample(metainfo=dict(meta, scale_factor=(1.0, 1.0)))
    with torch.no_grad():
        (expected,) = detector.predict(image, [sample])
    expected = expected.pred_instances
    assert len(found.scores) == len(expected.scores) > 0
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('dynamic', [True, False])
@pytest.mark.parametrize('decompose', [True, False])
def test_pt2(decompose, dynamic, tmp_path):
    if dynamic:
        needs_pooling_of_any_size()
    layer = nn.Sequential(
        Involution2d(16, stride=2, fused=True, init='identity'),
        Involution2d(16, 3, generator='attention'),
    )
    # Near the identity, lest rounding grow.
    nn.init.normal_(layer[0].conv2.conv.weight, std=0.05)
    model = Exported(around(layer), backbone=True)
    file = tmp_path / 'model.pt2'
    image = torch.randn(2, 16, 19, 23)
    export.export_pt2(model, image, file, dynamic=dynamic, decompose=decompose)
    # Of 12 columns, of 21 and 7, which are tiles of the form for one size, and of 22.
    others = [(3, 16, 31, 42), (1, 16, 5, 14), (1, 16, 9, 44)] if dynamic else []
    shapes = [tuple(image.shape), *others]
    export.compare(model, export.load(file, 'pt2'), shapes)
    targets = {str(node.target) for node in torch.export.load(file).graph.nodes}
    assert any('mmcls_involution' in name for name in targets) != decompose


@needs_onnx
@pytest.mark.parametrize('shape', [[65, 71], None])
def test_command_writes_classes_and_preprocessing(shape, tmp_path):
    import onnxruntime

    config = tmp_path / 'slim.py'
    base = ROOT / 'configs/imagenet/rednet26_64xb32-warmup-coslr_in1k.py'
    config.write_text(
        f'_base_ = {str(base)!r}\n'
        f'model = dict(backbone=dict({", ".join(f"{k}={v}" for k, v in SLIM.items())}),'
        ' head=dict(in_channels=512, num_classes=1000))\n'
    )
    out = tmp_path / 'model.onnx'
    parser = argparse.ArgumentParser()
    export.add_arguments(parser)
    given = ['--shape', *map(str, shape)] if shape else []
    export.main(parser.parse_args([str(config), '--out', str(out), *given]))
    session = onnxruntime.InferenceSession(str(out))
    about = session.get_modelmeta().custom_metadata_map
    about = {key: json.loads(value) for key, value in about.items()}
    assert about['size'] == (shape or [224, 224]) and about['channel_order'] == 'RGB'
    assert about['mean'] == pytest.approx([123.675, 116.28, 103.53])
    assert len(about['classes']) == 1000 and session.get_inputs()[0].name == 'image'
    assert not (tmp_path / '.model.onnx').exists()


@pytest.mark.parametrize(
    'config, size',
    [
        ('imagenet/rednet50_64xb32-warmup-coslr_in1k.py', (224, 224)),
        ('coco/faster-rcnn_rednet50_fpn_1x_coco.py', (800, 1333)),
        ('cityscapes/fpn_rednet50_4xb2-80k_cityscapes-512x1024.py', (1024, 2048)),
        ('bccd/faster-rcnn_rednet50_fpn_bccd.py', (240, 320)),
        ('camvid/fpn_rednet50_1xb2-8k_camvid-240x320.py', (360, 480)),
    ],
)
def test_size_is_that_of_the_test_pipeline(config, size):
    cfg = Config.fromfile(ROOT / 'configs' / config)
    assert export.tested_size(cfg) == size
    cfg.pop('test_dataloader')
    paper = {'coco': (800, 1280), 'bccd': (800, 1280), 'imagenet': (224, 224)}
    assert export.tested_size(cfg) == paper.get(config.split('/')[0], (1024, 2048))


class _Norms(nn.Module):
    """One convolution before either of two norms, as RetinaSepBNHead has it."""

    def __init__(self) -> None:
        super().__init__()
        convolution = nn.Conv2d(3, 4, 1)
        self.paths = nn.ModuleList(
            nn.Sequential(convolution, nn.BatchNorm2d(4)) for _ in range(2)
        )
        for path in self.paths:
            path[1].running_var.uniform_(2, 3)

    def forward(self, x):
        return tuple(path(x) for path in self.paths)


def test_command_compares_with_the_model_as_it_was(monkeypatch, tmp_path):
    monkeypatch.setattr(Exported, '_unfold_where_wrong', lambda *_: None)
    out = tmp_path / 'model.pt2'
    model = nn.ModuleDict({'backbone': _Norms()})
    with pytest.raises(UserError, match='differs from PyTorch: feature0'):
        command(monkeypatch, model, '--out', out, '--format', 'pt2')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('form', ['pt2', pytest.param('onnx', marks=needs_onnx)])
def test_norms_stay_where_folding_is_wrong(form, monkeypatch, tmp_path, capsys):
    """MMCV folds the second norm into what the first was folded into."""
    out = tmp_path / f'model.{form}'
    model = nn.ModuleDict({'backbone': _Norms()})
    command(monkeypatch, model, '--out', out, '--format', form)
    assert 'would change the outputs of this model' in capsys.readouterr().out
    image = torch.randn(1, 3, 5, 7)
    model.eval()
    for found, path in zip(
        export.load(out, form)(image), model.backbone.paths, strict=True
    ):
        torch.testing.assert_close(found, path(image))


@pytest.mark.parametrize('name', ['model.pt2', 'model'])
def test_pt2_has_classes_and_preprocessing_too(name, monkeypatch, tmp_path):
    out = tmp_path / name
    model = around(nn.Conv2d(3, 4, 1))
    command(monkeypatch, model, '--out', out, '--format', 'pt2')
    about = {'classes': '', 'size': ''}
    torch.export.load(out, extra_files=about)
    assert json.loads(about['classes']) == ['a', 'b']
    assert json.loads(about['size']) == [5, 7]


@needs_onnx
@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--shape', '0', '7'], '--shape: .* at least 1'),
        (['--opset', '12'], '--opset 12: --exporter torchscript writes 13 to 20'),
        (['--opset', '24'], '--opset 24: --exporter torchscript writes 13 to 20'),
        (['--opset', '15', '--boxes'], 'writes 16 to 20 with --boxes'),
        (['--opset', '0'], '--opset 0: --exporter torchscript writes 13 to 20'),
        (['--boxes'], '--boxes and --backbone: a backbone has no boxes'),
        (['--format', 'pt2', '--opset', '18'], '--opset is for --format onnx'),
        (['--format', 'pt2', '--exporter', 'dynamo'], '--exporter is for --format onn'),
        (['--format', 'pt2', '--boxes'], '--boxes is for --format onnx'),
        (['--out', ''], '--out: . is a folder'),
        (['--out', '.'], '--out: . is a folder'),
        (['--out', 'there'], '--out: there is a folder'),
        (['--out', 'nowhere/model.onnx'], '--out: the folder nowhere does not exist'),
    ],
)
def test_what_cannot_work_is_refused_first(arguments, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path('there').mkdir()
    model = nn.ModuleDict()  # nothing is asked of it
    with pytest.raises(UserError, match=message):
        command(monkeypatch, model, '--out', 'model.onnx', *arguments)


@needs_onnx
def test_only_custom_operators_need_the_kernels(monkeypatch, tmp_path):
    def missing(options):
        raise UserError('The C++ kernels of involution were not built')

    monkeypatch.setattr(export, 'register_custom_operators', missing)
    out = tmp_path / 'model.onnx'
    model = around(nn.Conv2d(3, 4, 1))
    command(monkeypatch, model, '--out', out)
    assert out.is_file()
    with pytest.raises(UserError, match='were not built'):
        command(monkeypatch, nn.ModuleDict(), '--out', out, '--operator', 'custom')


@needs_onnx
def test_what_torch_cannot_write_ends_in_one_message(tmp_path):
    class Unknown(nn.Module):
        def forward(self, x):
            return (torch.linalg.lu(x)[0],)

    model = Exported(nn.ModuleDict({'backbone': Unknown()}), backbone=True)
    with pytest.raises(UserError, match='torch cannot write this model by .*linalg'):
        export.export_onnx(model, torch.randn(1, 3, 4, 4), tmp_path / 'model.onnx')


class _Halves(nn.Module):
    """What takes even sides alone, and says so as MMSegmentation's U-Net does."""

    def forward(self, x):
        assert x.shape[2] % 2 == 0, 'should be divisible'
        return x


@pytest.mark.parametrize(
    'layer, options',
    [
        (_Halves(), []),
        (_Halves(), ['--shape', '6', '7', '--dynamic']),
        (nn.Conv2d(3, 4, (6, 1)), []),
        (nn.Conv2d(3, 4, (4, 1)), ['--dynamic']),
        (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.GroupNorm(3, 3)), []),
    ],
)
def test_an_image_that_is_too_small_is_named(layer, options, monkeypatch, tmp_path):
    model = around(layer)
    message = '(?s)not take an image of .x.*larger --shape'
    with pytest.raises(UserError, match=message):
        command(
            *(monkeypatch, model, '--out', tmp_path / 'model.pt2'),
            *('--format', 'pt2', *options),
        )
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize('dynamic', [False, True])
def test_what_torch_cannot_write_as_pt2_ends_in_one_message(dynamic, tmp_path):
    class Unknown(nn.Module):
        def forward(self, x):
            if dynamic:
                return (x.reshape(4, 12),)  # one size alone
            return (x if x.sum() > 0 else x + 1,)

    model = Exported(nn.ModuleDict({'backbone': Unknown()}), backbone=True)
    with pytest.raises(UserError, match='as pt2: .* --format onnx, it may do'):
        export.export_pt2(
            *(model, torch.randn(1, 3, 4, 4), tmp_path / 'model.pt2'),
            dynamic=dynamic,
            decompose=False,
        )


def _preprocessors() -> dict[str, tuple[type, str]]:
    from mmdet.models import DetDataPreprocessor
    from mmpretrain.models import ClsDataPreprocessor
    from mmseg.models import SegDataPreProcessor

    return dict(
        mmdet=(DetDataPreprocessor, 'bgr_to_rgb'),
        mmseg=(SegDataPreProcessor, 'bgr_to_rgb'),
        mmpretrain=(ClsDataPreprocessor, 'to_rgb'),
    )


@pytest.mark.parametrize('toolbox', ['mmdet', 'mmseg', 'mmpretrain'])
def test_metadata_is_that_of_the_preprocessor(toolbox):
    kind, swap = _preprocessors()[toolbox]
    model = nn.Module()
    for given, swaps, mean, std in (
        (dict(mean=[1, 2, 3], std=[4, 5, 6]), True, [1, 2, 3], [4, 5, 6]),
        ({}, False, [0, 0, 0], [1, 1, 1]),
    ):
        model.data_preprocessor = kind(**given, **{swap: swaps})
        about = export.metadata(model, ['a'], (5, 7))
        about = {key: json.loads(value) for key, value in about.items()}
        assert about['channel_order'] == ('RGB' if swaps else 'BGR')
        assert (about['mean'], about['std']) == (mean, std)


@pytest.mark.parametrize('mode', ['slide', 'whole'])
def test_windows_of_a_segmenter_are_not_in_the_file(
    mode, monkeypatch, tmp_path, capsys
):
    model = nn.ModuleDict({'decode_head': nn.Conv2d(3, 2, 1)})
    model.extract_feat, model.align_corners = (lambda image: image), False
    model.test_cfg = dict(mode=mode, crop_size=(64, 96), stride=(32, 48))
    options = ['--shape', '8', '9', '--format', 'pt2']
    out = tmp_path / 'model.pt2'
    command(monkeypatch, model, '--out', out, *options, backbone=False)
    printed = ' '.join(capsys.readouterr().out.split())
    assert ('tests images in windows' in printed) == (mode == 'slide')
    assert ('windows of --shape 64 96' in printed) == (mode == 'slide')


@pytest.mark.parametrize('semantic', [True, False])
def test_a_semantic_head_is_not_in_the_file(semantic, monkeypatch, tmp_path, capsys):
    class Head(nn.Module):
        def forward(self, features):
            return features, features

    model = nn.ModuleDict({'rpn_head': Head()})
    model.extract_feat = lambda image: (image,)
    model.semantic_head = nn.Conv2d(3, 2, 1) if semantic else None
    options = ['--shape', '8', '9', '--format', 'pt2']
    command(monkeypatch, model, '--out', tmp_path / 'm.pt2', *options, backbone=False)
    printed = ' '.join(capsys.readouterr().out.split())
    assert ('ModuleDict has a semantic_head too' in printed) == semantic


def test_zeros_equal_zeros():
    model = Exported(around(nn.Conv2d(3, 4, 1, bias=False)), backbone=True)
    nn.init.zeros_(model.model.layer.weight)
    assert export.compare(model, model, [(1, 3, 5, 7)]) == 0


def test_a_file_that_differs_is_refused():
    model = Exported(around(Involution2d(16)), backbone=True)
    with pytest.raises(UserError, match='feature0 for an image .* by .*1e-05 is'):
        export.compare(
            model, lambda image: [model(image)[0] * (1 + 2e-5)], [(1, 16, 9, 9)]
        )
    with pytest.raises(UserError, match='gives feature0'):
        export.compare(model, lambda image: [model(image)[0][..., 1:]], [(1, 16, 9, 9)])


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match='onnx, onnxruntime, which is not installed'):
        export.need('onnx', 'onnxruntime')
