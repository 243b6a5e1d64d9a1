"""What the operators refuse, and the messages, said once.

The public functions check types; the operators and their fake kernels check shapes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from .geometry import output_size

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
MOST = 2**31 - 1  # pixels: kernels count in 64-bit numbers, and multiply


def switch(variable: str) -> bool | None:
    """Whether an environment variable says 1 or 0; None if it is not set."""
    value = os.environ.get(variable, '')
    if value not in ('', '0', '1'):
        raise ValueError(f'{variable} must be 0 or 1, got {value!r}')
    return value == '1' if value else None


def check_types(**tensors: Tensor) -> None:
    """Refuse arguments that are no tensors."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f'{name} must be a Tensor, got {type(tensor).__name__}')


def pair(name: str, value: int | Sequence[int], lowest: int) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise ValueError(f'{name} must be an int or a pair of ints, got {value!r}')
    for v in pair:
        if isinstance(v, bool) or not isinstance(v, (int, torch.SymInt)):
            raise TypeError(f'{name} must be an int or a pair of ints, got {value!r}')
        if v < lowest:
            raise ValueError(f'{name} must be at least {lowest}, got {value!r}')
        if isinstance(v, int) and v > MOST:
            raise ValueError(f'{name} must be at most {MOST}, got {value!r}')
    return pair


def check_positive(arguments: dict[str, object]) -> None:
    """Refuse what is no positive int, by its name."""
    for name, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f'{name} must be a positive int, got {value!r}')


def check_input(input: Tensor, channels: int | None = None) -> None:
    """Refuse what is no image; with `channels`, one with another number of them."""
    expected = 'C' if channels is None else channels
    # Not by `in`: torch.compile takes a size it does not know for unequal.
    if input.dim() != 4 or (channels is not None and input.shape[1] != channels):
        raise ValueError(
            f'input must be [N, {expected}, H, W], got shape {tuple(input.shape)}'
        )
    if input.dtype not in DTYPES:
        raise ValueError(f'input must be one of {DTYPES}, got {input.dtype}')
    h, w = input.shape[2:]
    if h < 1 or w < 1:
        raise ValueError(f'input must be at least 1x1 in size, got {h}x{w}')


def check_like_input(name: str, tensor: Tensor, input: Tensor) -> None:
    if tensor.dtype != input.dtype:
        raise ValueError(
            f'{name} must have the dtype of input, {input.dtype}, got {tensor.dtype}; '
            'convert one of them or run under torch.autocast'
        )
    if tensor.device != input.device:
        raise ValueError(
            f'{name} must be on the device of input, {input.device}, '
            f'got {tensor.device}'
        )


def check_kernels(
    name: str, input_shape, kernels_shape, stride, padding, dilation
) -> None:
    """Refuse kernels, made from the argument `name`, that do not fit the input."""
    n, c, h, w = input_shape
    wn, g, kh, kw, ho, wo = kernels_shape
    if wn != n:
        raise ValueError(f'{name} must have the batch size of input, {n}, got {wn}')
    if c < 1 or g < 1 or c % g != 0:
        raise ValueError(
            f"weight's groups must divide input's channels, {c}, got {g} groups"
        )
    if kh < 1 or kw < 1:
        raise ValueError(f"weight's kernel must be at least 1x1, got {kh}x{kw}")
    expected = output_size((h, w), (kh, kw), stride, padding, dilation)
    if expected[0] < 1 or expected[1] < 1:
        raise ValueError(
            f'a {kh}x{kw} kernel with padding {tuple(padding)} and dilation '
            f'{tuple(dilation)} does not fit into an input of {h}x{w}; '
            'use more padding or a smaller kernel'
        )
    if ho != expected[0] or wo != expected[1]:
        raise ValueError(
            f'{name} must hold one kernel per output pixel, '
            f'{expected[0]}x{expected[1]} for input {h}x{w}, kernel {kh}x{kw}, '
            f'stride {tuple(stride)}, padding {tuple(padding)} and dilation '
            f'{tuple(dilation)}, got {ho}x{wo}'
        )


def check_involution(input: Tensor, weight: Tensor, stride, padding, dilation) -> None:
    """Refuse what involution2d is not defined for. See its docstring."""
    check_input(input)
    if weight.dim() != 6:
        raise ValueError(
            f'weight must be [N, G, Kh, Kw, Ho, Wo], got shape {tuple(weight.shape)}'
        )
    check_like_input('weight', weight, input)
    check_kernels('weight', input.shape, weight.shape, stride, padding, dilation)


def check_fused(
    input, reduced, weight, bias, kernel_size, stride, padding, dilation
) -> tuple[int, ...]:
    """Refuse what is not defined; the shape of the kernels for the rest."""
    check_input(input)
    if reduced.dim() != 4:
        raise ValueError(
            f'reduced must be [N, R, Ho, Wo], got shape {tuple(reduced.shape)}'
        )
    taps = kernel_size[0] * kernel_size[1]
    channels = reduced.shape[1]
    if (
        weight.dim() != 4
        or channels < 1
        or weight.shape[1:] != (channels, 1, 1)
        or weight.shape[0] % taps != 0
    ):
        raise ValueError(
            f'weight must be [G*Kh*Kw, R, 1, 1] with Kh*Kw = {taps} and R = '
            f'{channels}, the channels of reduced, got shape {tuple(weight.shape)}'
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f'bias must have one value per row of weight, {weight.shape[0]}, '
            f'got shape {tuple(bias.shape)}'
        )
    for name, tensor in (('reduced', reduced), ('weight', weight), ('bias', bias)):
        if tensor is not None:
            check_like_input(name, tensor, input)
    batch, _, *size = reduced.shape
    kernels = (batch, weight.shape[0] // taps, *kernel_size, *size)
    check_kernels('reduced', input.shape, kernels, stride, padding, dilation)
    return kernels
