"""mmcv's RoI pooling and NMS without a compiled mmcv, against single values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from mmcv_cases import both_lanes, boxes, normal, random_rois, with_gradients

from mmcls_involution import compat

compat.apply()
ops = pytest.importorskip('mmcv.ops')

pytestmark = pytest.mark.usefixtures('operators')


def bilinear(plane, y, x):
    """One sample of RoIAlign: features end at their last pixel, not at zero."""
    height, width = plane.shape
    if y < -1 or y > height or x < -1 or x > width:
        return 0.0
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    y0, x0 = int(y), int(x)
    y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
    fy, fx = y - y0, x - x0
    upper = (1 - fx) * plane[y0, x0] + fx * plane[y0, x1]
    lower = (1 - fx) * plane[y1, x0] + fx * plane[y1, x1]
    return float((1 - fy) * upper + fy * lower)


def slow_roi_align(x, rois, bins, scale, sampling_ratio, mode, aligned):
    output = torch.zeros(len(rois), x.shape[1], *bins, dtype=torch.float64)
    shift = 0.5 if aligned else 0.0
    for n, (index, *box) in enumerate(rois.double().tolist()):
        x1, y1, x2, y2 = (value * scale - shift for value in box)
        height, width = y2 - y1, x2 - x1
        if not aligned:
            height, width = max(height, 1.0), max(width, 1.0)
        step_y, step_x = height / bins[0], width / bins[1]
        ny = sampling_ratio or math.ceil(step_y)
        nx = sampling_ratio or math.ceil(step_x)
        for c in range(x.shape[1]):
            for py in range(bins[0]):
                for px in range(bins[1]):
                    values = [
                        bilinear(
                            x[int(index), c],
                            y1 + py * step_y + (iy + 0.5) * step_y / ny,
                            x1 + px * step_x + (ix + 0.5) * step_x / nx,
                        )
                        for iy in range(ny)
                        for ix in range(nx)
                    ]
                    best = max(values) if mode == 'max' else np.mean(values)
                    output[n, c, py, px] = best
    return output


@both_lanes
@pytest.mark.parametrize('mode', ['avg', 'max'])
@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('sampling_ratio', [0, 1, 3])
def test_roi_align(mode, aligned, sampling_ratio, rng):
    x, rois = normal(rng, 2, 2, 9, 13).double(), random_rois(rng, 5, 24).double()
    arguments = ((3, 2), 0.5, sampling_ratio, mode, aligned)
    expected = slow_roi_align(x, rois, *arguments)
    torch.testing.assert_close(ops.roi_align(x, rois, *arguments), expected)
    last = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ops.roi_align(last, rois, *arguments), expected)


@pytest.mark.parametrize('mode', ['avg', 'max'])
def test_gradient_of_roi_align(mode, rng):
    x = normal(rng, 2, 2, 6, 5).double().requires_grad_()
    rois = random_rois(rng, 4, 6).double()
    torch.autograd.gradcheck(
        lambda x: ops.roi_align(x, rois, (3, 2), 1.0, 2, mode, True), x
    )


def slow_roi_pool(x, rois, bins, scale):
    """Differentiable; the largest feature of each bin, bins rounded outwards."""
    height, width = x.shape[2:]
    rows = []
    for index, x1, y1, x2, y2 in rois.tolist():
        x1, y1, x2, y2 = x1 * scale, y1 * scale, (x2 + 1) * scale, (y2 + 1) * scale
        for py in range(bins[0]):
            for px in range(bins[1]):
                step_y, step_x = (y2 - y1) / bins[0], (x2 - x1) / bins[1]
                top = min(max(math.floor(py * step_y + y1), 0), height)
                bottom = min(max(math.ceil((py + 1) * step_y + y1), 0), height)
                left = min(max(math.floor(px * step_x + x1), 0), width)
                right = min(max(math.ceil((px + 1) * step_x + x1), 0), width)
                part = x[int(index), :, top:bottom, left:right]
                rows.append(
                    part.amax((1, 2)) if part.numel() else x.new_zeros(len(x[0]))
                )
    return torch.stack(rows).view(len(rois), *bins, -1).permute(0, 3, 1, 2)


def test_roi_pool(rng):
    x, rois = normal(rng, 2, 3, 9, 7).double(), random_rois(rng, 6, 30).double()
    for ours, theirs in zip(
        with_gradients(lambda x: ops.roi_pool(x, rois, (3, 2), 0.25), x),
        with_gradients(lambda x: slow_roi_pool(x, rois, (3, 2), 0.25), x),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_equal_features_are_pooled_from_the_first():
    x, rois = torch.zeros(1, 1, 4, 4), torch.tensor([[0.0, 0, 0, 3, 3]])
    expected = torch.zeros(1, 1, 4, 4)
    expected[0, 0, 0, 0] = 1
    x.requires_grad_()
    ops.roi_pool(x, rois, 1, 1.0).sum().backward()
    assert torch.equal(x.grad, expected)


@both_lanes
@pytest.mark.parametrize('offset', [0, 1])
def test_nms_keeps_what_no_kept_box_overlaps(offset, rng):
    dets, scores = boxes(rng, 300, 60), torch.from_numpy(rng.uniform(size=300)).float()
    kept = []
    for i in scores.argsort(descending=True).tolist():
        ious = ops.bbox_overlaps(dets[i, None], dets[kept], offset=offset)
        if not kept or (ious <= 0.4).all():
            kept.append(i)
    assert ops.nms(dets, scores, 0.4, offset=offset)[1].tolist() == kept


@both_lanes
def test_an_overlap_of_just_the_threshold_is_kept():
    """Both of mmcv's kernels compare in float32, where 0.3 is a little more."""
    dets = torch.tensor([[0.0, 0, 10, 1], [0, 0, 3, 1]])
    assert ops.bbox_overlaps(dets[:1], dets[1:]).item() == np.float32(0.3)
    assert len(ops.nms(dets, torch.tensor([1.0, 0.5]), 0.3)[1]) == 2
    assert len(ops.nms_match(torch.cat([dets, torch.ones(2, 1)], 1), 0.3)) == 1
