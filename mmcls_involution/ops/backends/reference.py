"""Involution as the paper's pseudo-code writes it: unfold, multiply, sum.

It holds a K*K-fold copy of the input and is slow. It is the oracle of the tests
and never chosen unless named.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..geometry import Pair, Shape, outside
from .contract import Problem


def _unfold(input: Tensor, weight: Tensor, stride, padding, dilation) -> Tensor:
    n, c = input.shape[:2]
    g, kh, kw, ho, wo = weight.shape[1:]
    columns = F.unfold(input, (kh, kw), dilation, padding, stride)
    return columns.view(n, g, c // g, kh, kw, ho, wo)


def supports(problem: Problem) -> None:
    """Everything."""


def forward(
    input: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    """Algorithm 1 of arXiv 2103.06255; arguments as in :func:`involution2d`.

    But for taps outside the image, which add nothing: there the paper's zero padding
    times an infinite kernel value would be NaN.
    """
    arguments = (stride, padding, dilation)
    weight = weight.masked_fill(outside(input, weight.shape[2:], *arguments), 0)
    columns = _unfold(input, weight, stride, padding, dilation)
    return (columns * weight.unsqueeze(2)).sum((3, 4)).flatten(1, 2)


def grad_input(
    grad: Tensor,
    weight: Tensor,
    input_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Tensor:
    """Gradient of :func:`forward` in ``input``, of spatial size ``input_size``."""
    g, kh, kw = weight.shape[1:4]
    columns = grad.unflatten(1, (g, grad.size(1) // g))[:, :, :, None, None]
    columns = (columns * weight.unsqueeze(2)).flatten(5).flatten(1, 4)
    return F.fold(columns, input_size, (kh, kw), dilation, padding, stride)


def grad_weight(
    grad: Tensor,
    input: Tensor,
    weight_shape: Shape,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Tensor:
    """Gradient of :func:`forward` in ``weight``, of shape ``weight_shape``."""
    arguments = (stride, padding, dilation)
    out = grad.new_empty(weight_shape)
    columns, g = _unfold(input, out, *arguments), weight_shape[1]
    grad = grad.unflatten(1, (g, grad.size(1) // g))[:, :, :, None, None]
    mask = outside(input, out.shape[2:], *arguments)
    return (columns * grad).sum(2).masked_fill(mask, 0)
