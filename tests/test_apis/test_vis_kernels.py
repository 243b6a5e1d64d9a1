"""The kernels that are drawn are those of the model, at the right place."""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config

from mmcls_involution.apis import build_inferencer, vis_kernels
from mmcls_involution.apis.inferencer import preprocess
from mmcls_involution.engine.errors import UserError
from mmcls_involution.ops import Involution2d, record_kernels

TINY = Path(__file__).parents[1] / 'tiny'


def tiny(kind: str, root: Path, monkeypatch, **options) -> Config:
    monkeypatch.setenv('TINY_DATA', str(root))
    cfg = Config.fromfile(TINY / f'{kind}.py')
    cfg.merge_from_dict(options)
    return cfg


@pytest.fixture
def image() -> np.ndarray:
    """Dark, with a bright square in the upper right."""
    image = np.random.randint(0, 40, (50, 70, 3), dtype=np.uint8)
    image[5:20, 45:60] = 230
    return image


def test_kernels_are_those_of_the_layers(image, coco_root, monkeypatch):
    cfg = tiny('detector', coco_root, monkeypatch)
    cfg.model.neck.type = 'InvolutionFPN'
    inferencer = build_inferencer(cfg)
    inputs = {}
    for name in vis_kernels.involutions(inferencer.model):
        layer = inferencer.model.get_submodule(name)
        layer.register_forward_pre_hook(
            lambda layer, args, name=name: inputs.setdefault(name, args[0])
        )
    names = vis_kernels.involutions(inferencer.model)
    view = vis_kernels.look(inferencer, image, names)
    assert [layer.name for layer in view.layers] == names
    assert any(name.startswith('neck.') for name in names)
    for layer in view.layers:
        with torch.no_grad():
            expected = layer.layer.kernels(inputs[layer.name])[0]
        torch.testing.assert_close(layer.kernels, expected)
        np.testing.assert_allclose(
            layer.heat, expected.sum((1, 2)), rtol=1e-4, atol=1e-4
        )
        assert len(set(view.stride(layer))) == 1
    # a stride of 2 inside, and the feature maps of the levels
    strides = {layer.name: view.stride(layer)[0] for layer in view.layers}
    assert strides['backbone.stem.1'] == 2
    assert strides['backbone.layer2.0.conv2'] == 8
    assert [s for name, s in strides.items() if 'neck' in name] == [8, 16, 32]


def test_default_layers_and_shared_heads(image, coco_root, monkeypatch):
    cfg = tiny('detector', coco_root, monkeypatch)
    cfg.model.bbox_head.conv_cfg = dict(type='InvolutionConv')
    cfg.test_dataloader.dataset.pipeline[1].scale = (256, 256)
    view = vis_kernels.look(build_inferencer(cfg), image)
    names = [layer.name for layer in view.layers]
    assert names[:5] == [
        'backbone.stem.1',
        *(f'backbone.layer{i}.{n - 1}.conv2' for i, n in enumerate((1, 2, 4, 1), 1)),
    ]
    head = 'bbox_head.reg_convs.0.conv.involution'
    assert names[5:] == [f'{head}, call {i}' for i in range(1, 6)]


def test_roi_heads_are_recorded_and_not_drawn(image):
    config = Path(__file__).parents[2] / 'configs/demo'
    cfg = Config.fromfile(config / 'mask-rcnn_rednet26-slim_fpn_shapes.py')
    head = dict(type='InvolutionFCNMaskHead', conv_out_channels=64)
    cfg.model.roi_head.mask_head.update(head)
    inferencer = build_inferencer(cfg)
    data = inferencer.model.data_preprocessor(preprocess(inferencer, [image]), False)
    with torch.no_grad(), record_kernels(inferencer.model) as recorded:
        (sample,) = inferencer.model(**data, mode='predict')
    layer = inferencer.model.roi_head.mask_head.convs[1][0]
    found = recorded['roi_head.mask_head.convs.1.0'][0]
    size, number = layer.kernel_size, len(sample.pred_instances)
    groups = layer.channels // layer.group_channels
    assert found.shape == (number, groups, size, size, 14, 14) and number > 0
    drawn = vis_kernels.involutions(inferencer.model)
    assert drawn and not any('roi_head' in name for name in drawn)


@pytest.mark.parametrize(
    'kind, backend',
    [
        *((kind, 'cv2') for kind in ('detector', 'segmenter', 'classifier')),
        ('classifier', 'pillow'),
        ('classifier', 'pillow, inside'),
    ],
)
def test_points_are_found_after_resizing_and_cutting(
    kind, backend, image, coco_root, monkeypatch
):
    cfg = tiny(kind, coco_root, monkeypatch)
    if kind == 'classifier':
        resize = dict(type='ResizeEdge', scale=128, edge='short')
        resize['backend'], _, inside = backend.partition(', ')
        if inside:
            resize = dict(type='RandomChoice', transforms=[[resize]])
            resize = dict(type='RandomApply', transforms=[resize], prob=1.0)
        cut = dict(type='CenterCrop', crop_size=112)
        cfg.test_dataloader.dataset.pipeline[1:1] = [resize, cut]
    inferencer = build_inferencer(cfg)
    view = vis_kernels.look(inferencer, image)
    for x, y in ((46, 7), (54, 18), (30, 30)):
        column, row = view.find(x, y)
        assert np.abs(view.source[row, column] - (x, y)).max() <= 1
        # the picture is what the model sees
        gray = view.image[row, column].mean()
        assert (gray > 200) == (image[y, x].mean() > 200)
    inputs = preprocess(inferencer, [image])['inputs'][0].numpy()
    seen = np.moveaxis(inputs, 0, 2)[..., ::-1]
    part = view.image[: seen.shape[0], : seen.shape[1]]
    assert np.abs(part.astype(int) - seen).mean() < 3
    if kind == 'classifier':
        with pytest.raises(UserError, match='The point 1,25 is outside.*x from 1'):
            view.find(1, 25)
    with pytest.raises(UserError, match='is outside'):
        view.find(300, 25)


def test_stride_of_sizes_that_it_does_not_divide(image, cls_root, monkeypatch):
    inferencer = build_inferencer(tiny('classifier', cls_root, monkeypatch))
    names = [f'backbone.layer{i}.0.conv2' for i in range(1, 5)]
    view = vis_kernels.look(inferencer, np.ascontiguousarray(image[:45, :67]), names)
    assert [view.stride(layer) for layer in view.layers] == [
        (s, s) for s in (4, 8, 16, 32)
    ]


def one_layer(kernel: torch.Tensor, stride: int, dilation: int) -> vis_kernels.View:
    """A picture of 32x32 pixels, and a layer that takes every fourth of them."""
    image = np.full((32, 32, 3), 128, dtype=np.uint8)
    source = np.stack(np.meshgrid(np.arange(32.0), np.arange(32.0)), axis=2)
    layer = Involution2d(16, kernel_size=3, stride=stride, dilation=dilation)
    kernels = kernel[None, :, :, None, None].expand(1, 3, 3, 8, 8)
    return vis_kernels.View(
        image, source, (vis_kernels.LayerKernels('layer', kernels, layer),)
    )


@pytest.mark.parametrize(
    ('stride', 'dilation', 'step'), [(1, 1, 4), (2, 1, 2), (1, 2, 8)]
)
def test_kernels_are_drawn_over_their_windows(stride, dilation, step):
    kernel = torch.tensor([[1.0, -1, 0], [0, 5, 0], [0, 0, 0.5]])
    view = one_layer(kernel, stride, dilation)
    figure = vis_kernels.draw_kernels(view, [(13, 22)])
    ax = figure.subfigs[1].axes[0]
    left, right, bottom, top = ax.images[1].get_extent()
    # the output pixel of column 3 and row 5, in the middle; a tap has the size of a
    # pixel of the layer's input
    size = 4 / stride
    assert (left, top) == (12 - step, 20 - step)
    assert (right, bottom) == (12 + step + size, 20 + step + size)
    taps = np.asarray(ax.images[1].get_array())[::dilation, ::dilation]
    red, blue = taps[..., 0], taps[..., 2]
    assert red[0, 0] > blue[0, 0] and blue[0, 1] > red[0, 1]
    assert taps[0, 0, 3] == taps[0, 1, 3] > taps[2, 2, 3] > taps[2, 1, 3]
    assert ax.get_title() == 'group 0: middle 5, others to 1'
    heat = figure.subfigs[0].axes[0].images[1]
    assert heat.get_extent() == [0, 32, 32, 0]
    assert (heat.get_array() == 5.5).all()


def test_a_strip_of_an_image_takes_no_more_room():
    """It took 1.8 inches for each of its widths, in memory too."""
    image = np.zeros((4000, 2, 3), dtype=np.uint8)
    kernels, layer = torch.rand(1, 3, 3, 1000, 1), Involution2d(16, kernel_size=3)
    layers = (vis_kernels.LayerKernels('layer', kernels, layer),)
    view = vis_kernels.View(image, np.zeros((4000, 2, 2), np.float32), layers)
    figure = vis_kernels.draw_kernels(view)
    assert figure.get_figheight() < 10
    assert vis_kernels.as_image(figure).shape == (616, 576, 3)


@pytest.fixture
def command(weights, coco_root, monkeypatch):
    monkeypatch.setenv('TINY_DATA', str(coco_root))

    def run(*args: object, kind: str = 'detector') -> None:
        parser = argparse.ArgumentParser()
        vis_kernels.add_arguments(parser)
        model = ['--config', str(TINY / f'{kind}.py'), '--weights', weights[kind]]
        vis_kernels.main(parser.parse_args([*map(str, args), *model]))

    return run


@pytest.mark.parametrize('kind', ['detector', 'segmenter', 'classifier'])
def test_command(kind, command, image, tmp_path, capsys):
    cv2.imwrite(str(tmp_path / 'photo.png'), image)
    out = tmp_path / 'new' / 'kernels.png'
    layers = ['backbone.layer1.0.conv2', 'backbone.layer2.1.conv2']
    args = ['--layers', *layers, '--points', '50,10', '20,30', '--out', out]
    command(tmp_path / 'photo.png', *args, kind=kind)
    picture = cv2.imread(str(out))
    assert picture.shape[0] > picture.shape[1] / 2 and picture.std() > 30
    assert f'Kernels: {out}' in capsys.readouterr().out.replace('\n', '')


def test_what_the_command_refuses(command, image, tmp_path, capsys):
    photo, torn = tmp_path / 'photo.png', tmp_path / 'torn.png'
    cv2.imwrite(str(photo), image)
    torn.write_bytes(photo.read_bytes()[:100])
    for args, message in (
        ([photo], '--out must be a file of .*.png'),
        ([photo, '--out', tmp_path / 'k.txt'], '--out must be a file of'),
        ([torn, '--out', tmp_path / 'k.png'], 'torn.png cannot be decoded'),
        ([tmp_path / 'gone.png', '--out', tmp_path / 'k.png'], 'gone.png is missing'),
        (
            [photo, '--out', tmp_path / 'k.png', '--layers', 'backbone.layer1.0.conv1'],
            'no involution of that name.*mean backbone.layer1.0.conv2',
        ),
    ):
        with pytest.raises(UserError, match=message):
            command(*args)
    command(photo, '--list-layers')
    assert 'backbone.layer4.0.conv2  Involution2d(' in capsys.readouterr().out
