"""`fused_involution2d`: kernel generation and involution as one operator.

At the first stage of RedNet-50 the kernels are three times as large as the input. Here
no one keeps them: the backward pass generates them again from the reduced map, and a
backend with a fused forward pass does not even hold them at once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .functional import (
    BACKENDS,
    _check_input,
    _check_kernels,
    _check_like_input,
    _default_backend,
    _grad_input,
    _grad_weight,
    _kernels,
    _named_backend,
    _pair,
    _register_autocast,
)
from .geometry import memory_format

FUSED_VARIABLE = 'MMCLS_INVOLUTION_FUSED'


def fusing_pays(input: Tensor, backend: str | None = None) -> bool:
    """Whether the fused operator is the default for a tensor like ``input``.

    The environment variable ``MMCLS_INVOLUTION_FUSED`` says so with 1 or 0; without it,
    the table of backends does.

    Raises:
        ValueError: If the variable or ``backend`` has another value.
    """
    variable = os.environ.get(FUSED_VARIABLE, '')
    if variable not in ('', '0', '1'):
        raise ValueError(f'{FUSED_VARIABLE} must be 0 or 1, got {variable!r}')
    if variable:
        return variable == '1'
    name = _named_backend(backend) or _default_backend(input.device.type, input.dtype)
    return BACKENDS[name].fused


def fused_involution2d(
    input: Tensor,
    reduced: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    backend: str | None = None,
) -> Tensor:
    r"""Apply kernels that a 1x1 convolution generates, without storing them.

    The same as this, but for rounding in half precision, where a fused backend does
    not round the kernels::

        kernels = F.conv2d(reduced, weight, bias).unflatten(1, (-1, *kernel_size))
        involution2d(input, kernels, stride, padding, dilation)

    which are equations 4 and 6 of `Involution: Inverting the Inherence of Convolution
    for Visual Recognition <https://arxiv.org/abs/2103.06255>`_. Training saves the four
    tensors alone and generates the kernels a second time for the backward pass.
    Differentiable, deterministic and usable as :func:`involution2d` is.

    Args:
        input (Tensor): ``[N, C, H, W]``, as for :func:`involution2d`.
        reduced (Tensor): What the kernels are generated from,
            ``[N, R, Ho, Wo]``, R at least 1.
        weight (Tensor): Of the 1x1 convolution, ``[G*Kh*Kw, R, 1, 1]``, G a divisor of
            C.
        bias (Tensor, optional): Of the 1x1 convolution, ``[G*Kh*Kw]``.
            Defaults to None.
        kernel_size (int | tuple[int, int]): Kh and Kw in pixels.
        stride (int | tuple[int, int]): See :func:`involution2d`. Defaults to 1.
        padding (int | tuple[int, int]): Likewise. Defaults to 0.
        dilation (int | tuple[int, int]): Likewise. Defaults to 1.
        backend (str, optional): Likewise. Defaults to None. One without a fused forward
            pass generates all kernels, uses them and drops them.

    Returns:
        Tensor: ``[N, C, Ho, Wo]``, as :func:`involution2d` returns it.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If a rank, shape, dtype, device or group count does not fit, or
            if the backend is unknown or cannot run this dtype on this device.

    Example:
        >>> import torch
        >>> from mmcls_involution.ops import fused_involution2d
        >>> input, reduced = torch.rand(2, 32, 9, 7), torch.rand(2, 8, 9, 7)
        >>> weight = torch.rand(2 * 49, 8, 1, 1)
        >>> fused_involution2d(input, reduced, weight, kernel_size=7, padding=3).shape
        torch.Size([2, 32, 9, 7])
    """
    tensors = dict(input=input, reduced=reduced, weight=weight, bias=bias)
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) and (name != 'bias' or tensor is not None):
            raise TypeError(f'{name} must be a Tensor, got {type(tensor).__name__}')
    return _fused_involution2d(
        input,
        reduced,
        weight,
        bias,
        _pair('kernel_size', kernel_size, 1),
        _pair('stride', stride, 1),
        _pair('padding', padding, 0),
        _pair('dilation', dilation, 1),
        _named_backend(backend),
    )


def _check(
    input, reduced, weight, bias, kernel_size, stride, padding, dilation
) -> tuple[int, ...]:
    """Refuse what is not defined; the shape of the kernels for the rest."""
    _check_input(input)
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
            _check_like_input(name, tensor, input)
    batch, _, *size = reduced.shape
    kernels = (batch, weight.shape[0] // taps, *kernel_size, *size)
    _check_kernels('reduced', input.shape, kernels, stride, padding, dilation)
    return kernels


def _generate(reduced, weight, bias, kernels: Sequence[int]) -> Tensor:
    # Autocast has been here already, in the forward pass.
    with torch.autocast(reduced.device.type, enabled=False):
        return F.conv2d(reduced, weight, bias).unflatten(1, tuple(kernels[1:4]))


@torch.library.custom_op('mmcls_involution::fused_involution2d', mutates_args=())
def _fused_involution2d(
    input: Tensor,
    reduced: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],  # noqa: UP045 (torch reads the schema from this form)
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    backend: str,
) -> Tensor:
    arguments = (stride, padding, dilation)
    shape = _check(input, reduced, weight, bias, kernel_size, *arguments)
    backend_kernels = _kernels(backend, input)
    if hasattr(backend_kernels, 'fused_forward'):
        out = backend_kernels.fused_forward(
            input, reduced, weight, bias, kernel_size, *arguments
        )
    else:
        kernels = _generate(reduced, weight, bias, shape)
        out = backend_kernels.forward(input, kernels, *arguments)
    return out.contiguous(memory_format=memory_format(input))


@_fused_involution2d.register_fake
def _(input, reduced, weight, bias, kernel_size, stride, padding, dilation, backend):
    _check(input, reduced, weight, bias, kernel_size, stride, padding, dilation)
    out = input.new_empty((*input.shape[:2], *reduced.shape[2:]))
    return out.contiguous(memory_format=memory_format(input))


def _setup_context(ctx, inputs, output):
    input, reduced, weight, bias, ctx.kernel_size, *ctx.arguments = inputs
    ctx.save_for_backward(input, reduced, weight, bias)


def _backward(ctx, grad):
    input, reduced, weight, bias = ctx.saved_tensors
    shape = (
        len(input),
        len(weight) // (ctx.kernel_size[0] * ctx.kernel_size[1]),
        *ctx.kernel_size,
        *grad.shape[2:],
    )
    # Gradients of backends want kernels in contiguous memory; the format that a 1x1
    # weight has depends on its strides alone.
    layout = memory_format(reduced)
    reduced = reduced.contiguous()
    weight = weight.flatten(1)[:, :, None, None]
    needs_input, *needs_generator = ctx.needs_input_grad[:4]
    grad_input = None
    grads = [None] * 3
    if needs_input:
        kernels = _generate(reduced, weight, bias, shape)
        grad_input = _grad_input(grad, kernels, input.shape[2:], *ctx.arguments)
        del kernels  # before memory of the same size is taken for their gradient
    if any(needs_generator):
        grad_kernels = _grad_weight(grad, input, shape, *ctx.arguments).flatten(1, 3)
        grads = list(
            torch.ops.aten.convolution_backward(
                grad_kernels,
                reduced,
                weight,
                None if bias is None else bias.shape,
                *([1, 1], [0, 0], [1, 1], False, [0, 0], 1),
                needs_generator,
            )
        )
        if grads[0] is not None:
            grads[0] = grads[0].contiguous(memory_format=layout)
    return grad_input, *grads, *[None] * 5


_fused_involution2d.register_autograd(_backward, setup_context=_setup_context)
_register_autocast('fused_involution2d', _fused_involution2d, tensors=4)


@register_flop_formula(torch.ops.mmcls_involution.fused_involution2d)
def _flops(
    input_shape, reduced_shape, weight_shape, *arguments, out_shape, **kwargs
) -> int:
    """Two FLOPs per multiply-add of convolution and involution."""
    n, c, ho, wo = out_shape
    kh, kw = arguments[1]
    rows, channels = weight_shape[:2]
    return 2 * n * ho * wo * (rows * channels + c * kh * kw)
