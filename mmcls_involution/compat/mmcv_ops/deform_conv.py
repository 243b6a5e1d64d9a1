"""Deformable convolution v1 (arXiv 1703.06211) and v2 (arXiv 1811.11168).

In plain torch the features are gathered at the moved positions, image by image, and
multiplied by the weights; the backward passes differentiate that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import lane


def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Convolve at positions that are moved by offsets.

    Args:
        input: ``[N, C, H, W]``.
        weight: ``[O, C / group, kH, kW]``.
        offset: ``[N, deformable_group * kH * kW * 2, Ho, Wo]``, y before x.
        output: ``[N, O, Ho, Wo]``, receives the result.
        columns: Scratch of mmcv's kernels, unused.
        ones: The same.
        kW, kH, dW, dH, padW, padH, dilationW, dilationH: Width and height of kernel,
            stride, padding and dilation.
        group: Groups of the convolution.
        deformable_group: Groups of channels that share offsets.
        im2col_step: Images that mmcv's kernels take at once, unused.

    Raises:
        ValueError: If the offsets' shape does not fit.
    """
    options = ((dH, dW), (padH, padW), (dilationH, dilationW), group, deformable_group)
    output.copy_(_forward(input, weight, offset, None, None, options))


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradInput: Tensor,
    gradOffset: Tensor,
    weight: Tensor,
    columns: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Add the gradients by features and offsets to ``gradInput`` and ``gradOffset``."""
    options = ((dH, dW), (padH, padW), (dilationH, dilationW), group, deformable_group)
    gradients = _backward(gradOutput, input, weight, offset, None, None, options)
    gradInput += gradients[0]
    gradOffset += gradients[2]


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradWeight: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    scale: float,
    im2col_step: int,
) -> None:
    """Add ``scale`` times the gradient by the weights to ``gradWeight``."""
    options = ((dH, dW), (padH, padW), (dilationH, dilationW), group, deformable_group)
    weight = torch.zeros_like(gradWeight)  # this gradient is the same for any
    gradients = _backward(gradOutput, input, weight, offset, None, None, options)
    gradWeight.add_(gradients[1], alpha=scale)


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """As `deform_conv_forward`, each moved feature multiplied by its mask.

    Args:
        bias: ``[O]``, used if ``with_bias``.
        mask: ``[N, deformable_group * kernel_h * kernel_w, Ho, Wo]``.
    """
    options = (
        (stride_h, stride_w),
        (pad_h, pad_w),
        (dilation_h, dilation_w),
        group,
        deformable_group,
    )
    bias = bias if with_bias else None
    output.copy_(_forward(input, weight, offset, mask, bias, options))


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Add the gradients of `modulated_deform_conv_forward` to the ``grad_`` tensors."""
    options = (
        (stride_h, stride_w),
        (pad_h, pad_w),
        (dilation_h, dilation_w),
        group,
        deformable_group,
    )
    bias = bias if with_bias else None
    gradients = _backward(grad_output, input, weight, offset, mask, bias, options)
    targets = [grad_input, grad_weight, grad_offset, grad_mask]
    if with_bias:
        targets.append(grad_bias)
    for target, gradient in zip(targets, gradients, strict=True):
        target += gradient


def _check(
    input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, options: tuple
) -> None:
    stride, padding, dilation, group, deformable_group = options
    channels, kernel = input.shape[1], weight.shape[2:]
    if channels != weight.shape[1] * group or channels % deformable_group:
        raise ValueError(
            f'{channels} channels do not fit weights {tuple(weight.shape)} with '
            f'{group} groups and {deformable_group} groups of offsets'
        )
    size = [
        (input.shape[i + 2] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1)
        // stride[i]
        + 1
        for i in range(2)
    ]
    taps = deformable_group * kernel[0] * kernel[1]
    for name, tensor, count in (('offset', offset, 2 * taps), ('mask', mask, taps)):
        if tensor is not None and list(tensor.shape) != [len(input), count, *size]:
            raise ValueError(
                f'{name} is {tuple(tensor.shape)}; needed is '
                f'{(len(input), count, *size)}'
            )


def _torchvision_arguments(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    options: tuple,
) -> tuple:
    stride, padding, dilation, group, deformable_group = options
    return (
        input.contiguous(),
        weight.contiguous(),
        offset.contiguous(),
        input.new_zeros(len(input), 1) if mask is None else mask.contiguous(),
        input.new_zeros(len(weight)) if bias is None else bias,
        *(*stride, *padding, *dilation, group, deformable_group, mask is not None),
    )


def _forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    options: tuple,
) -> Tensor:
    _check(input, weight, offset, mask, options)
    dtype = lane.working_dtype(input)
    tensors = [
        None if tensor is None else tensor.to(dtype)
        for tensor in (input, weight, offset, mask, bias)
    ]
    if lane.serves(input):
        return torch.ops.torchvision.deform_conv2d(
            *_torchvision_arguments(*tensors, options)
        )
    input, weight, offset, mask, bias = tensors
    masks = [None] * len(input) if mask is None else mask
    images = zip(input, offset, masks, strict=True)
    return torch.stack(
        [_convolve(x, weight, o, m, bias, options) for x, o, m in images]
    )


def _backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    options: tuple,
) -> list[Tensor]:
    """Gradients by input, weight and offset, then by mask and bias where given."""
    dtype = lane.working_dtype(input)
    tensors = [
        None if tensor is None else tensor.detach().to(dtype)
        for tensor in (input, weight, offset, mask, bias)
    ]
    grad_output = grad_output.to(dtype)
    if lane.serves(input):
        gradients = torch.ops.torchvision._deform_conv2d_backward(
            grad_output.contiguous(), *_torchvision_arguments(*tensors, options)
        )
        return [
            gradient
            for gradient, tensor in zip(gradients, tensors, strict=True)
            if tensor is not None
        ]
    per_image = (True, False, True, True, False)  # bias and weight serve all images
    totals = [
        None if tensor is None else torch.zeros_like(tensor) for tensor in tensors
    ]
    for n in range(len(input)):
        with torch.enable_grad():
            leaves = [
                None if tensor is None else (tensor[n] if own else tensor).detach()
                for tensor, own in zip(tensors, per_image, strict=True)
            ]
            wanted = [leaf.requires_grad_() for leaf in leaves if leaf is not None]
            output = _convolve(*leaves, options)
            gradients = iter(torch.autograd.grad(output, wanted, grad_output[n]))
        for total, own in zip(totals, per_image, strict=True):
            if total is not None:
                (total[n] if own else total).add_(next(gradients))
    return [total for total in totals if total is not None]


def _convolve(
    image: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    options: tuple,
) -> Tensor:
    """One image ``[C, H, W]``; the output ``[O, Ho, Wo]``."""
    stride, padding, dilation, group, deformable_group = options
    _, height, width = image.shape
    kernel, size = weight.shape[2:], offset.shape[1:]
    moves = offset.view(deformable_group, kernel.numel(), 2, *size)
    axes = []
    for axis in range(2):
        out = torch.arange(size[axis]).to(offset) * stride[axis] - padding[axis]
        tap = torch.arange(kernel[axis]).to(offset) * dilation[axis]
        shape = [1, *kernel, *size]
        grid = (tap[:, None] + out).view(
            [n if i in (1 + axis, 3 + axis) else 1 for i, n in enumerate(shape)]
        )
        axes.append(grid.expand(shape).reshape(1, -1, *size) + moves[:, :, axis])
    y, x = axes
    inside = (y > -1) & (y < height) & (x > -1) & (x < width)
    planes = image.view(deformable_group, -1, height * width)
    columns = 0
    for row, row_share in _neighbours(y):
        for column, column_share in _neighbours(x):
            there = inside & (row >= 0) & (row < height)
            there = there & (column >= 0) & (column < width)
            place = torch.where(there, row * width + column, 0).long()
            place = place.flatten(1)[:, None].expand(-1, planes.shape[1], -1)
            share = torch.where(there, row_share * column_share, 0)
            columns = columns + planes.gather(2, place) * share.flatten(1)[:, None]
    if mask is not None:
        columns = columns * mask.view(deformable_group, 1, -1)
    columns = columns.view(group, -1, size.numel())
    output = weight.view(group, len(weight) // group, -1) @ columns
    output = output.view(len(weight), *size)
    return output if bias is None else output + bias[:, None, None]


def _neighbours(position: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
    """The whole numbers around positions, each with its share."""
    low = position.detach().floor()
    above = position - low
    return (low, 1 - above), (low + 1, above)
