"""Sigmoid and softmax focal loss (arXiv 1708.02002), forward and backward.

Labels are class numbers; for the sigmoid form any other number is background. A label
outside of the classes has no entry in ``weight``, where mmcv reads out of bounds: its
weight is 1 here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import lane

# mmcv's kernels take the logarithm of nothing smaller (C's FLT_MIN).
SMALLEST = torch.finfo(torch.float32).tiny


def _log(probability: Tensor) -> Tensor:
    return probability.clamp(min=SMALLEST).log()


def _of_label(weight: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor | float:
    """The weight of each row's label."""
    if weight.numel() == 0:
        return 1.0
    known = (target >= 0) & (target < len(weight))
    chosen = weight.to(dtype)[torch.where(known, target, 0)]
    return torch.where(known, chosen, 1)


def _is_label(input: Tensor, target: Tensor) -> Tensor:
    classes = torch.arange(input.shape[1], device=input.device)
    return target[:, None] == classes


def sigmoid_focal_loss_forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    output: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    """Focal loss of independent classes.

    Args:
        input: Logits ``[N, C]``.
        target: Labels (int64) ``[N]``.
        weight: Of each class ``[C]``, or empty.
        output: ``[N, C]``, receives the losses.
        gamma: How much easy examples are weighed down.
        alpha: Weight of the positive class; ``1 - alpha`` of the negative one.
    """
    dtype = lane.working_dtype(input)
    p = input.to(dtype).sigmoid()
    positive = -alpha * (1 - p).pow(gamma) * _log(p)
    negative = -(1 - alpha) * p.pow(gamma) * _log(1 - p)
    loss = torch.where(_is_label(input, target), positive, negative)
    weight = _of_label(weight, target, dtype)
    output.copy_(loss * (weight if isinstance(weight, float) else weight[:, None]))


def sigmoid_focal_loss_backward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    grad_input: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    """The derivative of each loss by its logit, written into ``grad_input``."""
    dtype = lane.working_dtype(input)
    p = input.to(dtype).sigmoid()
    positive = -alpha * (1 - p).pow(gamma) * (1 - p - gamma * p * _log(p))
    negative = -(1 - alpha) * p.pow(gamma) * (gamma * (1 - p) * _log(1 - p) - p)
    slope = torch.where(_is_label(input, target), positive, negative)
    weight = _of_label(weight, target, dtype)
    grad_input.copy_(slope * (weight if isinstance(weight, float) else weight[:, None]))


def softmax_focal_loss_forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    output: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    """Focal loss of exclusive classes.

    Args:
        input: Probabilities ``[N, C]``: mmcv has applied the softmax.
        target: Labels (int64) ``[N]``; a negative one gives no loss.
        weight: Of each class ``[C]``, or empty.
        output: ``[N]``, receives the losses.
        gamma: How much easy examples are weighed down.
        alpha: Weight of the loss.
    """
    dtype = lane.working_dtype(input)
    p = input.to(dtype).gather(1, target.clamp(min=0)[:, None])[:, 0]
    loss = -alpha * (1 - p).pow(gamma) * _log(p) * _of_label(weight, target, dtype)
    output.copy_(torch.where(target >= 0, loss, 0))


def softmax_focal_loss_backward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    buff: Tensor,
    grad_input: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    """The derivatives of each row's loss by its logits, into ``grad_input``.

    ``buff`` ``[N]`` receives the derivative by the logit of the label, over
    ``1 - p``.
    """
    dtype = lane.working_dtype(input)
    softmax = input.to(dtype)
    p = softmax.gather(1, target.clamp(min=0)[:, None])[:, 0]
    slope = gamma * (1 - p).pow(gamma - 1) * p * _log(p) - (1 - p).pow(gamma)
    slope = alpha * slope * _of_label(weight, target, dtype)
    slope = torch.where(target >= 0, slope, 0)
    buff.copy_(slope)
    label = _is_label(input, target).to(dtype)
    grad_input.copy_(slope[:, None] * (label - softmax))
