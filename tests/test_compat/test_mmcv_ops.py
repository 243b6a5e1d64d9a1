"""mmcv's operators without a compiled mmcv, against references:

golden values of compiled mmcv 2.1.0 (how they were made: mmcv_cases.py), loops over
single values in float64 (of RoIs and boxes: test_mmcv_rois.py), PyTorch's own
gradients, and numerical ones.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import sys
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmcv_cases import (
    GOLDEN,
    both_lanes,
    boxes,
    cases,
    normal,
    random_rois,
    with_gradients,
)

from mmcls_involution import compat

compat.apply()
ops = pytest.importorskip('mmcv.ops')

from mmcls_involution.compat import mmcv_ops  # noqa: E402
from mmcls_involution.compat.mmcv_ops import lane  # noqa: E402
from mmcls_involution.compat.mmcv_ops.operators import OPERATORS  # noqa: E402

pytestmark = pytest.mark.usefixtures('operators')


# ------------------------------------------------------------------ against mmcv itself


@functools.cache
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as file:
        return dict(file)


def check_against_golden(name, call):
    kept = golden()
    for i, tensor in enumerate(call()):
        expected = torch.from_numpy(kept[f'{name} [{i}]'])
        assert tensor.dtype == expected.dtype, name
        # float32, sums in another order: a few units in the last place of the scale
        scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
        torch.testing.assert_close(
            tensor, expected, rtol=0, atol=2e-6 * scale, msg=lambda m: f'{name}: {m}'
        )


@both_lanes
@pytest.mark.parametrize(
    'kind',
    [
        'nms',
        'soft_nms',
        'roi_align',
        'deform',
        'modulated',
        'psa_mask',
        'bbox_overlaps',
    ],
)
def test_same_values_as_compiled_mmcv(kind):
    chosen = [(name, call) for name, call in cases() if name.startswith(kind)]
    assert chosen
    for name, call in chosen:
        check_against_golden(name, call)


def test_every_golden_value_is_compared():
    names = {name.rpartition(' [')[0] for name in golden()}
    assert names == {name for name, _ in cases()}


# -------------------------------------------------------------------- against PyTorch


@pytest.mark.parametrize('gamma, alpha', [(2.0, 0.25), (1.5, 0.7)])
@pytest.mark.parametrize('weighted', [False, True])
def test_sigmoid_focal_loss(gamma, alpha, weighted, rng):
    x = 3 * normal(rng, 9, 4).double()
    labels = torch.tensor([0, 1, 2, 3, 4, 4, 1, 0, 2])  # 4 is the background
    weight = normal(rng, 4).abs().double() if weighted else None

    def loss(x):
        one_hot = F.one_hot(labels, 5)[:, :4]
        p = x.sigmoid()
        hit = one_hot * p + (1 - one_hot) * (1 - p)
        balance = one_hot * alpha + (1 - one_hot) * (1 - alpha)
        value = -balance * (1 - hit) ** gamma * hit.log()
        if weighted:
            value = value * torch.cat([weight, weight.new_ones(1)])[labels, None]
        return value

    for reduction in ('none', 'sum', 'mean'):
        expected = {
            'none': loss,
            'sum': lambda x: loss(x).sum(),
            'mean': lambda x: loss(x).sum() / len(x),
        }[reduction]
        for ours, theirs in zip(
            with_gradients(
                lambda x, r=reduction: ops.sigmoid_focal_loss(
                    x, labels, gamma, alpha, weight, r
                ),
                x,
            ),
            with_gradients(expected, x),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize('weighted', [False, True])
def test_softmax_focal_loss(weighted, rng):
    x = normal(rng, 7, 4).double()
    labels = torch.tensor([0, 1, 2, 3, -1, 1, 2])
    weight = normal(rng, 4).abs().double() if weighted else None

    def loss(x):
        p = x.softmax(1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
        value = -0.25 * (1 - p) ** 2 * p.log()
        if weighted:
            value = value * weight[labels.clamp(min=0)]
        return torch.where(labels < 0, 0, value).sum()

    for ours, theirs in zip(
        with_gradients(
            lambda x: ops.softmax_focal_loss(x, labels, 2.0, 0.25, weight, 'sum'), x
        ),
        with_gradients(loss, x),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_certain_logits_give_finite_losses():
    x = torch.tensor([[200.0, -200.0]], requires_grad=True)
    for label in (0, 1, 2):
        loss = ops.sigmoid_focal_loss(x, torch.tensor([label]), 2.0, 0.25, None, 'sum')
        (slope,) = torch.autograd.grad(loss, x)
        assert loss.isfinite() and slope.isfinite().all()


@both_lanes
def test_deformable_convolution_at_rest_is_a_convolution(rng):
    x, weight = normal(rng, 2, 4, 7, 8), normal(rng, 6, 2, 3, 3)
    offset, mask = torch.zeros(2, 36, 4, 4), torch.full((2, 18, 4, 4), 0.5)
    expected = F.conv2d(x, weight, None, 2, 1, 1, 2)
    ours = ops.deform_conv2d(x, offset, weight, 2, 1, 1, 2, 2)
    torch.testing.assert_close(ours, expected)
    ours = ops.modulated_deform_conv2d(x, offset, mask, weight, None, 2, 1, 1, 2, 2)
    torch.testing.assert_close(ours, expected / 2)


@both_lanes
def test_deformable_convolution_in_channels_last_memory(rng):
    x, offset, mask, weight = (
        normal(rng, *shape)
        for shape in ((2, 4, 7, 8), (2, 36, 7, 8), (2, 18, 7, 8), (6, 4, 3, 3))
    )

    def modulated(x, offset, mask, weight):
        return ops.modulated_deform_conv2d(x, offset, mask, weight, None, 1, 1, 1, 1, 2)

    tensors = [x, offset, mask, weight]
    last = [t.contiguous(memory_format=torch.channels_last) for t in tensors]
    for ours, theirs in zip(
        with_gradients(modulated, *last),
        with_gradients(modulated, *tensors),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_gradients_of_deformable_convolution(rng):
    shapes = [(2, 2, 3, 4), (2, 12, 3, 4), (2, 6, 3, 4), (3, 2, 3, 2), (3,)]
    x, offset, mask, weight, bias = (
        normal(rng, *shape).double().requires_grad_() for shape in shapes
    )

    def modulated(x, offset, mask, weight, bias):
        return ops.modulated_deform_conv2d(x, offset, mask, weight, bias, 1, (1, 0))

    offset = offset[..., :3].detach().requires_grad_()
    mask = mask[..., :3].detach().requires_grad_()
    leaves = (x, offset, mask, weight, bias)
    assert torch.autograd.gradcheck(modulated, leaves, fast_mode=True)
    assert torch.autograd.gradcheck(
        lambda x, offset, weight: ops.deform_conv2d(x, offset, weight, 1, (1, 0)),
        (x, offset, weight),
        fast_mode=True,
    )


def slow_carafe(x, masks, kernel_size, groups, scale):
    n, c, h, w = x.shape
    half = kernel_size // 2
    padded = F.pad(x, [half] * 4)
    rows = []
    for i in range(h * scale):
        for j in range(w * scale):
            y0, x0 = i // scale, j // scale
            window = padded[:, :, y0 : y0 + kernel_size, x0 : x0 + kernel_size]
            window = window.reshape(n, groups, c // groups, -1)
            mask = masks[:, :, i, j].reshape(n, groups, 1, -1)
            rows.append((window * mask).sum(3).view(n, c))
    return torch.stack(rows, 2).view(n, c, h * scale, w * scale)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize('naive', [True, False])
def test_carafe(naive, dtype, rng):
    """Under autocast, which must leave float32 as it is."""
    x, masks = normal(rng, 2, 4, 3, 5).to(dtype), normal(rng, 2, 18, 6, 10).to(dtype)
    function = OPERATORS['carafe_naive_forward' if naive else 'carafe_forward']
    output, kept = torch.empty(2, 4, 6, 10, dtype=dtype), torch.empty_like(x)
    scratch = () if naive else (kept, None, None)
    options = {'kernel_size': 3, 'group_size': 2, 'scale_factor': 2}
    with torch.autocast('cpu', dtype=torch.bfloat16):
        function(x, masks, *scratch, output, **options)
    slow = with_gradients(lambda *t: slow_carafe(*t, 3, 2, 2), x, masks)
    torch.testing.assert_close(output, slow[0])
    weight = normal(np.random.default_rng(0), *output.shape).to(output)
    gradients = torch.empty_like(x), torch.empty_like(masks)
    if naive:
        arguments = (weight, x, masks, *gradients)
    else:
        arguments = (weight, kept, masks, None, None, None, None, *gradients)
    backward = OPERATORS[function.__name__.replace('forward', 'backward')]
    with torch.autocast('cpu', dtype=torch.bfloat16):
        backward(*arguments, **options)
    torch.testing.assert_close(gradients, tuple(slow[1:]))


def test_masked_convolution(rng):
    x, weight, bias = normal(rng, 1, 3, 6, 7), normal(rng, 4, 3, 3, 3), normal(rng, 4)
    mask = torch.from_numpy(rng.uniform(size=(1, 6, 7)) > 0.5).float()
    expected = F.conv2d(x, weight, bias, padding=1) * mask
    torch.testing.assert_close(ops.masked_conv2d(x, mask, weight, bias, 1), expected)


def test_deformable_attention(rng):
    from mmcv.ops.multi_scale_deform_attn import (
        MultiScaleDeformableAttnFunction,
        multi_scale_deformable_attn_pytorch,
    )

    shapes = torch.tensor([[3, 4], [2, 2]])
    value = normal(rng, 2, 16, 2, 4)
    places = torch.from_numpy(rng.uniform(size=(2, 5, 2, 2, 3, 2))).float()
    shares = normal(rng, 2, 5, 2, 2, 3).softmax(-1)
    start = torch.tensor([0, 12])
    for ours, theirs in zip(
        with_gradients(
            lambda v, p, s: MultiScaleDeformableAttnFunction.apply(
                v, shapes, start, p, s, 64
            ),
            *(value, places, shares),
        ),
        with_gradients(
            lambda v, p, s: multi_scale_deformable_attn_pytorch(v, shapes, p, s),
            *(value, places, shares),
        ),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


# -------------------------------------------------------------------------- all of them


@both_lanes
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_float32_rounded(dtype, rng):
    """As autocast brings it; the sums themselves are of float32."""
    x, rois = normal(rng, 2, 3, 9, 8).to(dtype), random_rois(rng, 5, 8).to(dtype)
    for mode in ('avg', 'max'):

        def pool(x, mode=mode):
            return ops.roi_align(x, rois.to(x), 3, 1.0, 2, mode)

        low, high = with_gradients(pool, x), with_gradients(pool, x.float())
        assert low[0].dtype == low[1].dtype == dtype
        torch.testing.assert_close(low[0], high[0].to(dtype))
        # the same weights of the sum as with_gradients, rounded
        weight = normal(np.random.default_rng(0), *low[0].shape).to(dtype).float()
        leaf = x.float().requires_grad_()
        (gradient,) = torch.autograd.grad(pool(leaf), leaf, weight)
        torch.testing.assert_close(low[1], gradient.to(dtype))
    call, *tensors = differentiable(rng)['attention']
    tensors = [tensor.to(dtype) for tensor in tensors]
    high = call(*(tensor.float() for tensor in tensors))
    torch.testing.assert_close(call(*tensors), high.to(dtype), rtol=0, atol=0)
    dets = boxes(rng, 50, 20).to(dtype)
    scores = torch.from_numpy(rng.permutation(50) / 64).to(dtype)
    kept = ops.nms(dets, scores, 0.5)[1]
    assert torch.equal(kept, ops.nms(dets.float(), scores.float(), 0.5)[1])
    logits, labels = normal(rng, 6, 3).to(dtype), torch.tensor([0, 1, 2, 3, 1, 0])
    torch.testing.assert_close(
        ops.sigmoid_focal_loss(logits, labels, 2.0, 0.25, None, 'none'),
        ops.sigmoid_focal_loss(logits.float(), labels, 2.0, 0.25, None, 'none').to(
            dtype
        ),
    )
    x, offset, weight = (
        normal(rng, *shape).to(dtype)
        for shape in ((1, 2, 5, 5), (1, 18, 5, 5), (3, 2, 3, 3))
    )
    torch.testing.assert_close(
        ops.deform_conv2d(x, offset, weight, 1, 1),
        ops.deform_conv2d(x.float(), offset.float(), weight.float(), 1, 1).to(dtype),
    )


def differentiable(rng):
    """Calls of the differentiable operators, and float32 tensors for them."""
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction
    from mmcv.ops.psa_mask import psa_mask

    rois, labels = random_rois(rng, 5, 8), torch.tensor([0, 1, 2, 3, 1, 0])
    x, logits, shapes = normal(rng, 2, 4, 6, 7), normal(rng, 6, 3), [[3, 4], [2, 2]]
    levels = torch.tensor(shapes), torch.tensor([0, 12])
    weight = normal(rng, 6, 4, 3, 3)
    moves, mask = normal(rng, 2, 18, 6, 7), normal(rng, 2, 9, 6, 7)
    places = torch.from_numpy(rng.uniform(size=(2, 5, 2, 2, 3, 2))).float()
    return {
        'roi_align avg': (lambda x: ops.roi_align(x, rois, 3), x),
        'roi_align max': (lambda x: ops.roi_align(x, rois, 3, 1.0, 2, 'max'), x),
        'roi_pool': (lambda x: ops.roi_pool(x, rois, 3), x),
        'sigmoid': (lambda x: ops.sigmoid_focal_loss(x, labels), logits),
        'softmax': (lambda x: ops.softmax_focal_loss(x, labels.clamp(max=2)), logits),
        'deform': (lambda *t: ops.deform_conv2d(*t, 1, 1), x, moves, weight),
        'modulated': (
            lambda *t: ops.modulated_deform_conv2d(*t, 1, 1),
            *(x, moves, mask, weight, normal(rng, 6)),
        ),
        'psa_mask': (lambda x: psa_mask(x, 0, (3, 5)), normal(rng, 2, 15, 4, 6)),
        'attention': (
            lambda v, p, s: MultiScaleDeformableAttnFunction.apply(
                v, *levels, p, s, 64
            ),
            *(normal(rng, 2, 16, 2, 4), places, normal(rng, 2, 5, 2, 2, 3)),
        ),
    }


@both_lanes
def test_autocast_changes_nothing(rng):
    """As with compiled kernels: float32 stays so, in a backward pass inside too."""
    for name, (call, *tensors) in differentiable(rng).items():
        expected = with_gradients(call, *tensors)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            ours = with_gradients(call, *tensors)
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b, msg=lambda m, name=name: f'{name}: {m}')


@both_lanes
def test_nothing_in_gives_nothing_out():
    assert ops.nms(torch.empty(0, 4), torch.empty(0), 0.5)[0].shape == (0, 5)
    assert ops.soft_nms(torch.empty(0, 4), torch.empty(0))[0].shape == (0, 5)
    assert ops.nms_match(torch.empty(0, 5), 0.5) == []
    for pool in (
        lambda x, rois: ops.roi_align(x, rois, 7),
        lambda x, rois: ops.roi_pool(x, rois, 7),
    ):
        for shape in ((2, 3, 8, 8), (0, 3, 8, 8)):
            x = torch.rand(shape, requires_grad=True)
            y = pool(x, torch.empty(0, 5))
            assert y.shape == (0, 3, 7, 7)
            y.sum().backward()
            assert not x.grad.any()
    logits = torch.empty(0, 3, requires_grad=True)
    loss = ops.sigmoid_focal_loss(logits, torch.empty(0).long(), 2.0, 0.25, None, 'sum')
    loss.backward()
    assert loss == 0


@pytest.mark.parametrize(
    'roi',
    [[2, 0, 0, 4, 4], [-1, 0, 0, 4, 4], [0, 4, 0, 0, 4], [0, 0, 0, math.nan, 4]],
    ids=['image', 'negative image', 'x2 < x1', 'nan'],
)
def test_wrong_rois_are_refused(roi):
    """Compiled mmcv reads out of bounds for some of them."""
    rois = torch.tensor([[0.0, 0, 0, 4, 4], roi])
    with pytest.raises(ValueError, match='RoI 1 is'):
        ops.roi_align(torch.rand(2, 1, 8, 8), rois, 2)


@both_lanes
def test_wrong_offsets_are_refused():
    x, weight = torch.rand(1, 2, 5, 5), torch.rand(3, 2, 3, 3)
    with pytest.raises(ValueError, match=r'offset is \(1, 9, 5, 5\)'):
        ops.deform_conv2d(x, torch.rand(1, 9, 5, 5), weight, 1, 1)
    with pytest.raises(ValueError, match=r'mask is \(1, 9, 4, 5\)'):
        ops.modulated_deform_conv2d(
            x, torch.rand(1, 18, 5, 5), torch.rand(1, 9, 4, 5), weight, None, 1, 1
        )


@both_lanes
def test_repeatable_and_the_threads_stay(rng):
    x, rois = normal(rng, 2, 16, 40, 40), random_rois(rng, 50, 40)
    threads = torch.get_num_threads()
    first, second = (
        with_gradients(lambda x: ops.roi_align(x, rois, 7), x) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.get_num_threads() == threads


# --------------------------------------------------------------------------- the module


def test_what_is_missing_says_so_when_it_is_called():
    spec = mmcv_ops._Finder().find_spec('mmcv._ext')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.nms is OPERATORS['nms']
    assert not hasattr(module, '__path__')
    with pytest.raises(NotImplementedError, match='box_iou_rotated') as caught:
        module.box_iou_rotated(torch.rand(2, 5), torch.rand(2, 5))
    assert mmcv_ops.COMPILE_MMCV in str(caught.value)


@pytest.mark.parametrize('compiled', [False, True])
def test_a_compiled_module_comes_first(compiled, tmp_path, monkeypatch):
    """Also for the functions of MMEngine that look for it."""
    from mmengine.utils.dl_utils import mmcv_full_available

    package = tmp_path / 'mmcv'
    package.mkdir()
    (package / '__init__.py').touch()
    if compiled:
        (package / '_ext.py').write_text('nms = None\n')
    monkeypatch.syspath_prepend(tmp_path)
    compat.apply()
    with mock.patch.dict(sys.modules):
        for name in [*sys.modules]:
            if name.partition('.')[0] == 'mmcv':
                del sys.modules[name]
        assert mmcv_full_available()
        extension = importlib.import_module('mmcv._ext')
        assert (extension.nms is None) is compiled
        assert mmcv_ops.is_provided() is not compiled


def test_lanes_are_told(monkeypatch):
    monkeypatch.setattr(lane, 'runs_on', lambda device: device == 'cpu')
    assert set(mmcv_ops.lanes('cuda').values()) == {'torch'}
    told = mmcv_ops.lanes('cpu')
    assert told.keys() == OPERATORS.keys()
    assert told['roi_pool_forward'] == 'torch'  # torchvision's rounds the RoIs
    assert told['roi_align_forward'] == told['nms'] == 'torchvision'
    assert set(lane.TORCHVISION) < OPERATORS.keys()
