"""Sizes and memory formats, once for checks, fake kernels and every backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = Sequence[int]  # (height, width) in pixels
Shape = Sequence[int]


def output_size(
    input_size: Pair, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair
) -> tuple[int, int]:
    """Spatial size of involution's output, the same as a convolution's.

    Every argument is a (height, width) pair in pixels.
    """
    height, width = (
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(
            input_size, kernel_size, stride, padding, dilation, strict=True
        )
    )
    return height, width


def outside(
    input: Tensor,
    taps: Shape,
    stride: int | Pair,
    padding: int | Pair,
    dilation: int | Pair,
) -> Tensor:
    """Which taps are outside the image, bool of shape ``taps``, [Kh, Kw, Ho, Wo]."""
    image = input.new_ones(1, 1, *input.shape[2:])
    inside = F.unfold(image, tuple(taps[:2]), dilation, padding, stride)
    return (inside == 0).view(taps)


def memory_format(tensor: Tensor) -> torch.memory_format:
    """The format of results made from ``tensor`` [N, C, H, W].

    channels_last for what is that and not contiguous at once, else contiguous.
    """
    if not tensor.is_contiguous() and tensor.is_contiguous(
        memory_format=torch.channels_last
    ):
        return torch.channels_last
    return torch.contiguous_format
