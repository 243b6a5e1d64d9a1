"""`fused_involution2d`: kernel generation and involution as one operator.

At the first stage of RedNet-50 the kernels are three times as large as the input. Here
they are never in memory as a whole: forward and backward pass generate them where they
use them, from the reduced map, which is a twelfth of their size.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import tiles
from .functional import (
    BACKENDS,
    _check_input,
    _check_kernels,
    _check_like_input,
    _default_backend,
    _kernels,
    _named_backend,
    _pair,
    _register_autocast,
    involution2d,
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
    module = _kernels(backend, input)
    out = None
    if hasattr(module, 'fused_forward'):
        out = module.fused_forward(
            input, reduced, weight, bias, kernel_size, *arguments
        )
    if out is None:
        out = tiles.forward(module, input, reduced, weight, bias, shape, *arguments)
    return out.contiguous(memory_format=memory_format(input))


@_fused_involution2d.register_fake
def _(input, reduced, weight, bias, kernel_size, stride, padding, dilation, backend):
    _check(input, reduced, weight, bias, kernel_size, stride, padding, dilation)
    out = input.new_empty((*input.shape[:2], *reduced.shape[2:]))
    return out.contiguous(memory_format=memory_format(input))


@torch.library.custom_op(
    'mmcls_involution::fused_involution2d_backward', mutates_args=()
)
def _gradients(
    grad: Tensor,
    input: Tensor,
    reduced: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],  # noqa: UP045
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    backend: str,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the four tensors; empty ones for those that are not `needed`."""
    module = _kernels(backend, input)
    tensors = (grad, input, reduced, weight, bias)
    arguments = (stride, padding, dilation, needed)
    grads = None
    if hasattr(module, 'fused_backward'):
        grads = module.fused_backward(*tensors, kernel_size, *arguments)
    if grads is None:
        taps = kernel_size[0] * kernel_size[1]
        shape = (len(input), len(weight) // taps, *kernel_size, *grad.shape[2:])
        grads = tiles.backward(module, *tensors, shape, *arguments)
    for i, (tensor, need) in enumerate(zip(tensors[1:], needed, strict=True)):
        if not need:
            grads[i] = input.new_empty(0)
        elif i < 2:
            grads[i] = grads[i].contiguous(memory_format=memory_format(tensor))
    return tuple(grads)


@_gradients.register_fake
def _(grad, input, reduced, weight, bias, *arguments):
    grads = []
    for i, need in enumerate(arguments[-1]):
        tensor = (input, reduced, weight, bias)[i]
        if not need:
            grads.append(input.new_empty(0))
            continue
        out = tensor.new_empty(tensor.shape)
        grads.append(
            out.contiguous(memory_format=memory_format(tensor)) if i < 2 else out
        )
    return tuple(grads)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.kernel_size, ctx.stride, ctx.padding, ctx.dilation, ctx.backend = (
        inputs
    )
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    tensors = ctx.saved_tensors
    needed = ctx.needs_input_grad[:4]
    arguments = (ctx.stride, ctx.padding, ctx.dilation)
    if torch.is_grad_enabled():  # gradients that shall be differentiated in turn
        wanted = [t for t, need in zip(tensors, needed, strict=True) if need]
        out = _two_steps(*tensors, ctx.kernel_size, *arguments, ctx.backend)
        found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
        grads = (next(found) if need else None for need in needed)
    else:
        grads = _gradients(
            grad, *tensors, ctx.kernel_size, *arguments, ctx.backend, needed
        )
        grads = (g if need else None for g, need in zip(grads, needed, strict=True))
    return *grads, *[None] * 5


def _two_steps(
    input, reduced, weight, bias, kernel_size, stride, padding, dilation, backend
) -> Tensor:
    # Autocast has been here already, in the forward pass.
    with torch.autocast(input.device.type, enabled=False):
        kernels = F.conv2d(reduced, weight, bias).unflatten(1, (-1, *kernel_size))
        return involution2d(input, kernels, stride, padding, dilation, backend=backend)


_fused_involution2d.register_autograd(_backward, setup_context=_setup_context)
_register_autocast('fused_involution2d', _fused_involution2d, tensors=4)
# A backward pass under autocast stays in the dtype of the forward pass.
_register_autocast('fused_involution2d_backward', _gradients, tensors=0)


def _flops_of_steps(input_shape, reduced_shape, weight_shape, kernel_size):
    """Of the convolution and of the involution, two per multiply-add."""
    pixels = reduced_shape[0] * reduced_shape[2] * reduced_shape[3]
    taps = kernel_size[0] * kernel_size[1]
    convolution = 2 * pixels * weight_shape[0] * weight_shape[1]
    return convolution, 2 * pixels * input_shape[1] * taps


@register_flop_formula(torch.ops.mmcls_involution.fused_involution2d)
def _flops(input_shape, reduced_shape, weight_shape, bias, kernel_size, *_, **__):
    shapes = (input_shape, reduced_shape, weight_shape)
    return sum(_flops_of_steps(*shapes, kernel_size))


@register_flop_formula(torch.ops.mmcls_involution.fused_involution2d_backward)
def _backward_flops(
    grad_shape, input_shape, reduced_shape, weight_shape, bias, kernel_size, *rest, **_
):
    shapes = (input_shape, reduced_shape, weight_shape)
    convolution, involution = _flops_of_steps(*shapes, kernel_size)
    needs_input, *needs_generator = rest[-1]
    flops = 0
    if needs_input:  # the kernels once more
        flops += convolution + involution
    if any(needs_generator):
        flops += involution + convolution * sum(needs_generator[:2])
    return flops
