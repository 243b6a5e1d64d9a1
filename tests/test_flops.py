"""Parameters and FLOPs, and that our models are the paper's."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path

import pytest
import yaml
from mmengine.config import Config

from mmcls_involution import __main__ as commands
from mmcls_involution.console import console
from mmcls_involution.flops import build_model
from mmcls_involution.flops import measure as measure_model

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / 'configs'
PAPER = yaml.safe_load((CONFIGS / 'paper.yml').read_text())


@pytest.fixture
def tool(monkeypatch):
    """Import a module of tools/analysis_tools."""
    monkeypatch.syspath_prepend(ROOT / 'tools' / 'analysis_tools')
    monkeypatch.setattr(console, 'width', 1000)  # whatever the terminal, and any path
    return importlib.import_module


@pytest.fixture
def flops():
    """Measure a config of ours, or one inherited from elsewhere, with changes."""

    def measure(config, shape, *parts, **options):
        cfg = Config.fromfile(config)
        cfg.merge_from_dict({k.replace('__', '.'): v for k, v in options.items()})
        return measure_model(build_model(cfg), shape, parts)

    return measure


# -------------------------------------------------------------------------- the paper's


def test_paper_table_has_every_config_of_the_paper():
    folders = ('imagenet', 'coco', 'cityscapes')
    stems = {file.stem for name in folders for file in (CONFIGS / name).glob('*.py')}
    # the same network with the stem that detectors start from; not in the paper
    assert stems - {'rednet50-stem7_64xb32-warmup-coslr_in1k'} == set(PAPER)
    assert len(PAPER) == 16


@pytest.mark.parametrize('name', PAPER)
def test_model_is_the_papers(name, tool):
    row = tool('paper_table').compare(name, PAPER[name])
    assert row.parameters[1] == pytest.approx(PAPER[name]['params'], rel=0.01)
    assert row.flops[1] == pytest.approx(PAPER[name]['flops'], rel=0.03)
    assert row.outside() == []
    if 'flops_conv_inv' in PAPER[name]:
        assert round(row.multiply_adds, 3) == PAPER[name]['flops_conv_inv']


@pytest.mark.parametrize(
    ('key', 'factor', 'expected'),
    [
        ('params', 1, ''),
        ('params', 1.02, r'rednet26.*\(parameters\)'),
        ('flops', 1.05, r'rednet26.*\(flops\)'),
    ],
)
def test_paper_table_ends_with_an_error_outside(
    key, factor, expected, tool, monkeypatch, capsys
):
    table = tool('paper_table')
    (name, figures), *_ = PAPER.items()
    figures = {**figures, key: figures[key] * factor}
    monkeypatch.setattr(table, 'load', lambda file: {name: figures})
    monkeypatch.setattr(sys, 'argv', ['paper_table.py'])
    if not expected:
        table.main()
    else:
        with pytest.raises(SystemExit, match=expected):
            table.main()
    assert name in capsys.readouterr().out


def test_what_the_paper_leaves_out_of_mask_rcnn(flops):
    """The paper's own figures say so: see LEFT_OUT of paper_table.py."""
    head = 'roi_head.mask_head'
    parts = (head, f'{head}.upsample', f'{head}.conv_logits')
    for neck in ('fpn', 'fpn-inv'):
        name = f'_rednet50_{neck}_1x_coco'
        paper = (
            PAPER[f'mask-rcnn{name}']['flops'] - PAPER[f'faster-rcnn{name}']['flops']
        )
        found = flops(CONFIGS / f'coco/mask-rcnn{name}.py', (800, 1280), *parts)
        whole, upsample, logits = (found[part].flops / 1e9 for part in parts)
        assert whole - upsample - logits == pytest.approx(paper, rel=0.005)
        assert upsample + logits == pytest.approx(6.8, rel=0.02)
    name = '_rednet50_fpn-inv_head-inv_1x_coco'
    paper = PAPER[f'mask-rcnn{name}']['flops'] - PAPER[f'faster-rcnn{name}']['flops']
    found = flops(CONFIGS / f'coco/mask-rcnn{name}.py', (800, 1280), head)
    assert found[head].flops / 1e9 == pytest.approx(paper, rel=0.01)


# ------------------------------------------------------------------------ how it counts


@pytest.mark.parametrize(
    ('base', 'shape', 'millions', 'giga'),
    [
        # resnet/metafile.yml of MMPretrain
        ('mmpretrain::resnet/resnet50_8xb32_in1k.py', (224, 224), 25.56, 4.12),
        # what MMDetection 2.x gives for these, quoted by many papers
        ('mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', None, 41.53, 207.07),
        ('mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', None, 44.17, 260.14),
        ('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py', None, 37.74, 239.32),
    ],
)
def test_stock_models_have_the_known_figures(
    base, shape, millions, giga, flops, tmp_path
):
    file = tmp_path / 'stock.py'
    file.write_text(f'_base_ = {base!r}\n')
    whole = flops(file, shape or (800, 1280))['']
    assert whole.trained / 1e6 == pytest.approx(millions, abs=0.01)
    assert whole.flops / 1e9 == pytest.approx(giga, rel=1e-3)


REDNET26 = CONFIGS / 'imagenet/rednet26_64xb32-warmup-coslr_in1k.py'


@pytest.mark.parametrize('fused', ['0', '1'])
def test_involution_counts_its_kernels_and_their_generation(fused, flops, monkeypatch):
    """Larger kernels cost what the formula says, whichever operator computes them."""
    monkeypatch.setenv('MMCLS_INVOLUTION_FUSED', fused)
    seven, three = (
        flops(
            REDNET26,
            (224, 224),
            **{'model__backbone__involution_cfg': dict(kernel_size=k)},
        )['']
        for k in (7, 3)
    )
    blocks = zip((1, 2, 4, 1), (64, 128, 256, 512), (56, 28, 14, 7), strict=True)
    taps = sum(
        # of every block, per output pixel: the sum over a window of all channels, and
        # the 1x1 convolution from a quarter of them to one kernel per 16
        number * size**2 * (channels + channels // 4 * channels // 16)
        for number, channels, size in blocks
    )
    assert seven.multiply_adds - three.multiply_adds == (49 - 9) * taps
    assert seven.elementwise == three.elementwise


def test_shape_options_and_odd_sizes(flops):
    small, large = (
        flops(REDNET26, size, 'backbone', 'head') for size in ((64, 96), (128, 192))
    )
    ratio = large['backbone'].flops / small['backbone'].flops
    assert ratio == pytest.approx(4)
    assert large['head'].multiply_adds == small['head'].multiply_adds == 2048 * 1000
    # every level's size is rounded up
    assert flops(REDNET26, (63, 95))[''] == small['']


def test_frozen_and_training_only_parts(flops):
    file = CONFIGS / 'coco/faster-rcnn_rednet50_fpn_1x_coco.py'
    parts = ('backbone', 'backbone.stem', 'backbone.layer1', 'roi_head.bbox_head')
    whole, backbone, *frozen, head = flops(file, (64, 64), *parts).values()
    assert [part.trained for part in frozen] == [0, 0]
    hidden = sum(part.parameters for part in frozen)
    assert backbone.parameters - backbone.trained == hidden > 0
    assert whole.parameters - whole.trained == hidden
    sizes = (256 * 7 * 7, 1024, 1024, 81 + 4 * 80)
    pairs = zip(sizes[:2], sizes[1:3], strict=True)
    per_box = sum(math.prod(pair) for pair in pairs) + sizes[2] * sizes[3]
    assert head.multiply_adds == 1000 * per_box

    file = CONFIGS / 'cityscapes/upernet_rednet50_4xb2-80k_cityscapes-512x1024.py'
    parts = ('backbone', 'decode_head', 'auxiliary_head')
    whole, *others, auxiliary = flops(file, (64, 128), *parts).values()
    assert auxiliary.parameters > 1e6 and auxiliary.flops == 0
    assert sum(part.flops for part in others) == whole.flops


# ------------------------------------------------------------------------- command line


@pytest.fixture
def get_flops(monkeypatch):
    """Run the command ``flops``."""

    def run(*arguments):
        monkeypatch.setattr(sys, 'argv', ['flops', *map(str, arguments)])
        commands.run('flops')

    return run


def test_get_flops_prints_every_part(get_flops, capsys):
    get_flops(
        CONFIGS / 'demo/mask-rcnn_rednet26-slim_fpn_shapes.py', '--shape', 128, 96,
        '--cfg-options', 'model.roi_head.mask_head.num_convs=1',
    )  # fmt: skip
    out = capsys.readouterr().out
    rows = [line.split('\u2502')[1:-1] for line in out.splitlines() if '\u2502' in line]
    table = {row[0].strip(): [float(cell) for cell in row[1:]] for row in rows}
    *parts, whole = table
    assert parts == [
        *('backbone', 'neck', 'rpn_head', 'roi_head.bbox_head', 'roi_head.mask_head')
    ]
    assert whole == 'all' and '128 x 96' in out
    for column in zip(*table.values(), strict=True):
        assert sum(column[:-1]) == pytest.approx(column[-1], abs=0.004)


@pytest.mark.parametrize(
    ('arguments', 'expected'),
    [
        (['imagenet/rednet26.py'], 'Config not found.*Did you mean'),
        (['_base_/datasets/camvid.py'], 'no image size.*--shape'),
        ([REDNET26, '--shape', 0, 9], 'Cannot count ImageClassifier .* 0 x 9'),
        ([REDNET26, '--cfg-options', 'modle.x=1'], "no 'modle'.*model"),
    ],
)
def test_get_flops_error_is_one_message(arguments, expected, get_flops):
    with pytest.raises(SystemExit, match=f'(?is)^Error: .*{expected}'):
        get_flops(CONFIGS / arguments[0], *arguments[1:])
