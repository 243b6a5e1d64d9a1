"""Calls of mmcv's operators whose results by compiled mmcv are kept.

``python tests/test_compat/mmcv_cases.py`` in an environment with compiled mmcv and
pytest writes ``tests/golden/mmcv.npz`` anew. It was made by mmcv 2.1.0, compiled for
torch 2.13 on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / 'golden' / 'mmcv.npz'
Call = Callable[[], list[Tensor]]
# For tests with the fixture `operators`.
both_lanes = pytest.mark.parametrize(
    'operators', ['torch', 'torchvision'], indirect=True
)


def boxes(rng: np.random.Generator, n: int, size: float) -> Tensor:
    """x1 <= x2 and y1 <= y2 in a square from -size / 10 to 1.1 size: ``[n, 4]``."""
    corners = np.sort(rng.uniform(-size / 10, 1.1 * size, (n, 2, 2)), axis=1)
    return torch.from_numpy(corners.reshape(n, 4).astype(np.float32))


def normal(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(rng.normal(size=shape).astype(np.float32))


def random_rois(rng: np.random.Generator, n: int, size: float) -> Tensor:
    """Boxes of two images, after the number of the image: ``[n, 5]``."""
    index = torch.from_numpy(rng.integers(0, 2, (n, 1))).float()
    return torch.cat([index, boxes(rng, n, size)], 1)


def with_gradients(
    function: Callable[..., Tensor], *tensors: Tensor, seed: int = 0
) -> list[Tensor]:
    """The result of a function and its gradients by all tensors."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    output = function(*leaves)
    weight = normal(np.random.default_rng(seed), *output.shape).to(output)
    output.backward(weight)
    return [output.detach(), *[leaf.grad for leaf in leaves]]


def cases() -> Iterator[tuple[str, Call]]:
    """Names and calls; the same inputs wherever they are made."""
    from mmcv import ops

    rng = np.random.default_rng(2103_06255)
    for n in (0, 1, 12, 200):
        dets, scores = (
            boxes(rng, n, 50),
            torch.from_numpy(rng.permutation(n) / 200 + 0.001),
        )
        scores = scores.float()
        for offset in (0, 1):
            for threshold in (0.3, 0.7):
                name = f'{n} boxes, threshold {threshold}, offset {offset}'

                def nms(d=dets, s=scores, t=threshold, o=offset, **more):
                    return list(ops.nms(d, s, t, offset=o, **more))

                yield f'nms, {name}', nms
                yield (
                    f'nms, {name}, score threshold, max_num',
                    lambda nms=nms: nms(score_threshold=0.3, max_num=7),
                )
                for method in ('naive', 'linear', 'gaussian'):

                    def soft_nms(d=dets, s=scores, t=threshold, m=method, o=offset):
                        return list(ops.soft_nms(d, s, t, 0.5, 0.02, m, o))

                    yield f'soft_nms {method}, {name}', soft_nms
        for threshold in (0.3, 0.7):

            def match(d=dets, s=scores, t=threshold):
                groups = ops.nms_match(torch.cat([d, s[:, None]], 1), t)
                ends = torch.tensor([len(group) for group in groups])
                return [ends.long(), torch.cat([torch.zeros(0).long(), *groups])]

            yield f'nms_match, {n} boxes, threshold {threshold}', match

    features = normal(rng, 2, 3, 11, 14)
    for n in (0, 6):
        for scale, sampling_ratio, size in (
            (1.0, 0, 3),
            (0.25, 2, (5, 1)),
            (0.25, 0, 4),
        ):
            index = torch.from_numpy(rng.integers(0, 2, (n, 1))).float()
            rois = torch.cat([index, boxes(rng, n, 12 / scale)], 1)
            for mode in ('avg', 'max'):
                for aligned in (True, False):

                    def roi_align(
                        x, r=rois, a=(size, scale, sampling_ratio, mode, aligned)
                    ):
                        return ops.roi_align(x, r, *a)

                    yield (
                        f'roi_align {mode}, {n} RoIs, {size} bins, scale {scale}, '
                        f'{sampling_ratio} samples, aligned {aligned}',
                        lambda f=roi_align, x=features: with_gradients(f, x),
                    )
    flat = torch.tensor([[0, 3, 3, 3, 8], [1, 2, 2, 2, 2], [0, 20, 20, 30, 30.0]])
    for mode in ('avg', 'max'):
        for aligned in (True, False):
            for sampling_ratio in (0, 2):

                def edge(x, r=flat, a=(2, 1.0, sampling_ratio, mode, aligned)):
                    return ops.roi_align(x, r, *a)

                yield (
                    f'roi_align {mode}, flat and outer RoIs, {sampling_ratio} samples, '
                    f'aligned {aligned}',
                    lambda f=edge, x=features: with_gradients(f, x),
                )
    for groups, deform_groups, kernel, stride, padding, dilation in (
        (1, 1, (3, 3), 1, 1, 1),
        (2, 2, (3, 1), (2, 1), (1, 0), (1, 2)),
        (1, 2, (2, 3), 2, 2, 1),
    ):
        x, weight = normal(rng, 3, 4, 7, 6), normal(rng, 6, 4 // groups, *kernel)
        stride, padding, dilation = (
            value if isinstance(value, tuple) else (value, value)
            for value in (stride, padding, dilation)
        )
        out = [
            (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1)
            // stride[i]
            + 1
            for i in range(2)
        ]
        taps = deform_groups * kernel[0] * kernel[1]
        offset = 2 * normal(rng, 3, 2 * taps, *out)
        offset[1:2] = 0  # at whole positions the derivative is the one to the right
        mask, bias = normal(rng, 3, taps, *out), normal(rng, 6)
        options = (stride, padding, dilation, groups, deform_groups)

        def deform_conv(x, offset, weight, o=options):
            return ops.deform_conv2d(x, offset, weight, *o, False, 3)

        def modulated(x, offset, mask, weight, bias, o=options):
            return ops.modulated_deform_conv2d(x, offset, mask, weight, bias, *o)

        name = f'kernel {kernel}, stride {stride}, groups {groups}, {deform_groups}'
        tensors = (x, offset, weight)
        yield (
            f'deform_conv2d, {name}',
            lambda f=deform_conv, t=tensors: with_gradients(f, *t),
        )
        tensors = (x, offset, mask, weight, bias)
        yield (
            f'modulated_deform_conv2d, {name}',
            lambda f=modulated, t=tensors: with_gradients(f, *t),
        )
    for kind in (0, 1):
        masks = normal(rng, 2, 15, 4, 6)

        def psa_mask(x, k=kind):
            from mmcv.ops.psa_mask import psa_mask

            return psa_mask(x, k, (3, 5))

        yield f'psa_mask {kind}', lambda f=psa_mask, x=masks: with_gradients(f, x)
    first, second = boxes(rng, 5, 20), boxes(rng, 5, 20)
    for mode in ('iou', 'iof'):
        for aligned in (True, False):
            for offset in (0, 1):

                def overlaps(a=(first, second, mode, aligned, offset)):
                    return [ops.bbox_overlaps(*a)]

                yield (
                    f'bbox_overlaps {mode}, aligned {aligned}, offset {offset}',
                    overlaps,
                )


if __name__ == '__main__':
    from mmcls_involution.compat import mmcv_ops

    assert not mmcv_ops.is_provided(), 'this mmcv is not compiled'
    arrays = {}
    for name, call in cases():
        for i, tensor in enumerate(call()):
            arrays[f'{name} [{i}]'] = tensor.numpy()
    np.savez_compressed(GOLDEN, **arrays)
    print(f'{len(arrays)} arrays in {GOLDEN}')
