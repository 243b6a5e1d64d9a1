"""The operators as torch knows them: kernels, fakes, autograd, autocast, FLOPs.

Involution is linear in its input and in its kernels, so its two gradients are
bilinear as well and the first three operators are closed under differentiation:
each one's derivative is written with the other two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import standard
from .backends import choose, choose_fused, tiled
from .backends.contract import Problem
from .checks import DTYPES, check_fused, check_involution
from .geometry import memory_format
from .transforms import active, refuse_forward_mode, transformable

# The operators. Their fake kernels run the real ones' checks and allocations.


@torch.library.custom_op('mmcls_involution::involution2d', mutates_args=())
def _involution2d(
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    backend: str,
) -> Tensor:
    refuse_forward_mode('involution2d')
    check_involution(input, weight, stride, padding, dilation)
    arguments = (stride, padding, dilation)
    problem = Problem.of('forward', input, input.shape, weight.shape, *arguments)
    out = choose(backend, problem).forward(input, weight, *arguments)
    return out.contiguous(memory_format=memory_format(input))


@torch.library.custom_op('mmcls_involution::involution2d_grad_input', mutates_args=())
def _grad_of_input(
    grad: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    backend: str,
) -> Tensor:
    refuse_forward_mode('involution2d_grad_input')
    arguments = (stride, padding, dilation)
    shape = (*grad.shape[:2], *input_size)
    problem = Problem.of('grad_input', grad, shape, weight.shape, *arguments)
    out = choose(backend, problem).grad_input(grad, weight, input_size, *arguments)
    return out.contiguous(memory_format=memory_format(grad))


@torch.library.custom_op('mmcls_involution::involution2d_grad_weight', mutates_args=())
def _grad_of_weight(
    grad: Tensor,
    input: Tensor,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    backend: str,
) -> Tensor:
    refuse_forward_mode('involution2d_grad_weight')
    arguments = (stride, padding, dilation)
    problem = Problem.of('grad_weight', input, input.shape, weight_shape, *arguments)
    out = choose(backend, problem).grad_weight(grad, input, weight_shape, *arguments)
    return out.contiguous()


@_involution2d.register_fake
def _(input, weight, stride, padding, dilation, backend):
    check_involution(input, weight, stride, padding, dilation)
    out = input.new_empty((*input.shape[:2], *weight.shape[4:]))
    return out.contiguous(memory_format=memory_format(input))


@_grad_of_input.register_fake
def _(grad, weight, input_size, stride, padding, dilation, backend):
    out = grad.new_empty((*grad.shape[:2], *input_size))
    return out.contiguous(memory_format=memory_format(grad))


@_grad_of_weight.register_fake
def _(grad, input, weight_shape, stride, padding, dilation, backend):
    return grad.new_empty(weight_shape)


# Autograd. With A = involution2d, B and C = its two gradients, the inner
# products <A(x, w), g> = <x, B(g, w)> = <w, C(g, x)> give every derivative.


def _save_two(ctx, inputs, output):
    first, second, *ctx.arguments = inputs
    first_grad, second_grad = ctx.needs_input_grad[:2]
    ctx.save_for_backward(
        first if second_grad else None, second if first_grad else None
    )
    ctx.shapes = first.shape, second.shape


def _involution2d_backward(ctx, grad):
    input, weight = ctx.saved_tensors
    input_shape, weight_shape = ctx.shapes
    grad_input = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_input = grad_of_input(grad, weight, input_shape[2:], *ctx.arguments)
    if ctx.needs_input_grad[1]:
        grad_weight = grad_of_weight(grad, input, weight_shape, *ctx.arguments)
    return grad_input, grad_weight, None, None, None, None


def _grad_input_backward(ctx, grad):
    out_grad, weight = ctx.saved_tensors
    _, weight_shape = ctx.shapes
    _, *arguments = ctx.arguments
    grad_out_grad = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_out_grad = involution2d(grad, weight, *arguments)
    if ctx.needs_input_grad[1]:
        grad_weight = grad_of_weight(out_grad, grad, weight_shape, *arguments)
    return grad_out_grad, grad_weight, None, None, None, None, None


def _grad_weight_backward(ctx, grad):
    out_grad, input = ctx.saved_tensors
    _, input_shape = ctx.shapes
    _, *arguments = ctx.arguments
    grad_out_grad = grad_input = None
    if ctx.needs_input_grad[0]:
        grad_out_grad = involution2d(input, grad, *arguments)
    if ctx.needs_input_grad[1]:
        grad_input = grad_of_input(out_grad, grad, input_shape[2:], *arguments)
    return grad_out_grad, grad_input, None, None, None, None, None


_involution2d.register_autograd(_involution2d_backward, setup_context=_save_two)
_grad_of_input.register_autograd(_grad_input_backward, setup_context=_save_two)
_grad_of_weight.register_autograd(_grad_weight_backward, setup_context=_save_two)

# What Python calls.
_transformed = transformable(_involution2d, _save_two, _involution2d_backward)
grad_of_input = transformable(_grad_of_input, _save_two, _grad_input_backward)
_product = transformable(_grad_of_weight, _save_two, _grad_weight_backward)


def grad_of_weight(grad: Tensor, input: Tensor, *arguments) -> Tensor:
    # The attention generators call it in the forward pass. ONNX has no form of it kept,
    # and to torch.jit.trace the shape is made of tensors, which no operator takes.
    if torch.onnx.is_in_onnx_export() or torch.jit.is_tracing():
        return standard.grad_of_weight(grad, input, *arguments[:4])
    return _product(grad, input, *arguments)


def involution2d(input: Tensor, weight: Tensor, *arguments) -> Tensor:
    if standard.exporting():
        return standard.involution2d(input, weight, *arguments[:3])
    if not active():
        return _involution2d(input, weight, *arguments)
    input, weight = as_autocast(input, weight)
    # The operator's own check would see the batches that vmap makes one of.
    check_involution(input, weight, *arguments[:3])
    return _transformed(input, weight, *arguments)


# Autocast. torch.library.register_autocast casts to one dtype fixed in advance; users
# choose theirs when they enter autocast. In the operators, not in the public functions,
# because an exported program holds operators alone and runs under autocast too.

_library = torch.library.Library('mmcls_involution', 'FRAGMENT')
AUTOCAST_DEVICES = ('cpu', 'cuda', 'mps', 'xpu')


def _cast(device: str, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    dtype = torch.get_autocast_dtype(device)
    return [
        t.to(dtype)
        if t is not None and t.dtype in DTYPES and t.dtype != torch.float64
        else t
        for t in tensors
    ]


def _register_autocast(name: str, operator: Callable, tensors: int) -> None:
    """Cast the first `tensors` arguments of an operator, None among them."""
    for device in AUTOCAST_DEVICES:

        def cast_and_call(*arguments, device=device):
            cast = _cast(device, arguments[:tensors])
            with torch.autocast(device, enabled=False):
                return operator(*cast, *arguments[tensors:])

        _library.impl(name, cast_and_call, f'Autocast{device.upper()}')


def as_autocast(*tensors: Tensor | None) -> Sequence[Tensor | None]:
    """The same where it has to come before the operator. For no autocast, nothing."""
    device = tensors[0].device.type
    if device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device):
        return _cast(device, tensors)
    return tensors


_register_autocast('involution2d', _involution2d, tensors=2)


@register_flop_formula(
    [
        torch.ops.mmcls_involution.involution2d,
        torch.ops.mmcls_involution.involution2d_grad_input,
        torch.ops.mmcls_involution.involution2d_grad_weight,
    ]
)
def _flops(first_shape, second_shape, *arguments, out_shape, **kwargs) -> int:
    """Two FLOPs per multiply-add, as torch counts convolutions."""
    shapes = (first_shape, second_shape, out_shape)
    (kernels,) = (shape for shape in shapes if len(shape) == 6)
    n, c = first_shape[:2]  # of pixels, in all three
    return 2 * n * c * math.prod(kernels[2:])


# The fused operator.


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
    refuse_forward_mode('fused_involution2d')
    arguments = (stride, padding, dilation)
    shape = check_fused(input, reduced, weight, bias, kernel_size, *arguments)
    problem = Problem.of('fused_forward', input, input.shape, shape, *arguments)
    kernels = choose_fused(backend, problem)
    tensors = (input, reduced, weight, bias)
    if kernels is None:
        out = tiled.forward(backend, *tensors, shape, *arguments)
    else:
        out = kernels.fused_forward(*tensors, kernel_size, *arguments)
    return out.contiguous(memory_format=memory_format(input))


@_fused_involution2d.register_fake
def _(input, reduced, weight, bias, kernel_size, stride, padding, dilation, backend):
    check_fused(input, reduced, weight, bias, kernel_size, stride, padding, dilation)
    out = input.new_empty((*input.shape[:2], *reduced.shape[2:]))
    return out.contiguous(memory_format=memory_format(input))


@torch.library.custom_op(
    'mmcls_involution::fused_involution2d_backward', mutates_args=()
)
def fused_backward(
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
    refuse_forward_mode('fused_involution2d_backward')
    tensors = (grad, input, reduced, weight, bias)
    arguments = (stride, padding, dilation)
    taps = kernel_size[0] * kernel_size[1]
    shape = (len(input), len(weight) // taps, *kernel_size, *grad.shape[2:])
    problem = Problem.of('fused_backward', input, input.shape, shape, *arguments)
    kernels = choose_fused(backend, problem)
    if kernels is None:
        grads = tiled.backward(backend, *tensors, shape, *arguments, needed)
    else:
        grads = kernels.fused_backward(*tensors, kernel_size, *arguments, needed)
    for i, (tensor, need) in enumerate(zip(tensors[1:], needed, strict=True)):
        if not need:
            grads[i] = input.new_empty(0)
        elif i < 2:
            grads[i] = grads[i].contiguous(memory_format=memory_format(tensor))
        else:
            grads[i] = grads[i].contiguous()
    return tuple(grads)


@fused_backward.register_fake
def _(grad, input, reduced, weight, bias, *arguments):
    tensors, grads = (input, reduced, weight, bias), []
    for i, (tensor, need) in enumerate(zip(tensors, arguments[-1], strict=True)):
        out = tensor.new_empty(tensor.shape) if need else input.new_empty(0)
        if need and i < 2:
            out = out.contiguous(memory_format=memory_format(tensor))
        grads.append(out)
    return tuple(grads)


def _save_four(ctx, inputs, output):
    ctx.arguments = inputs[4:]
    ctx.save_for_backward(*inputs[:4])


def _fused_backward(ctx, grad):
    tensors = ctx.saved_tensors
    needed = ctx.needs_input_grad[:4]
    again = torch.is_grad_enabled()  # gradients that shall be differentiated in turn
    if again or active():
        with torch.enable_grad():
            # Of its own: one of the tensors may have been made of another, as the
            # reduced map is of the input, and that path is the caller's.
            tensors = [
                t.view_as(t) if need else t
                for t, need in zip(tensors, needed, strict=True)
            ]
            out = _two_steps(*tensors, *ctx.arguments)
        wanted = [t for t, need in zip(tensors, needed, strict=True) if need]
        found = iter(torch.autograd.grad(out, wanted, grad, create_graph=again))
        grads = (next(found) if need else None for need in needed)
    else:
        grads = fused_backward(grad, *tensors, *ctx.arguments, needed)
        grads = (g if need else None for g, need in zip(grads, needed, strict=True))
    return *grads, *[None] * 5


def _two_steps(
    input, reduced, weight, bias, kernel_size, stride, padding, dilation, backend
) -> Tensor:
    # Autocast has been here already, in the forward pass. The meta device has none.
    device = input.device.type
    known = torch.amp.is_autocast_available(device)
    with torch.autocast(device, enabled=False) if known else nullcontext():
        kernels = F.conv2d(reduced, weight, bias).unflatten(1, (-1, *kernel_size))
        return involution2d(input, kernels, stride, padding, dilation, backend)


_fused_involution2d.register_autograd(_fused_backward, setup_context=_save_four)
_register_autocast('fused_involution2d', _fused_involution2d, tensors=4)
# A backward pass under autocast stays in the dtype of the forward pass.
_register_autocast('fused_involution2d_backward', fused_backward, tensors=0)


def fused_involution2d(
    input: Tensor,
    reduced: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *arguments,
) -> Tensor:
    """What Python calls; transforms get the two steps."""
    tensors = (input, reduced, weight, bias)
    if standard.exporting():
        return standard.fused_involution2d(*tensors, *arguments[:4])
    if not active():
        return _fused_involution2d(*tensors, *arguments)
    tensors = as_autocast(*tensors)
    check_fused(*tensors, *arguments[:4])
    return _two_steps(*tensors, *arguments)


def _flops_of_steps(input_shape, reduced_shape, weight_shape, kernel_size):
    """Of the convolution and of the involution, two per multiply-add."""
    pixels = reduced_shape[0] * reduced_shape[2] * reduced_shape[3]
    taps = kernel_size[0] * kernel_size[1]
    convolution = 2 * pixels * weight_shape[0] * weight_shape[1]
    return convolution, 2 * pixels * input_shape[1] * taps


@register_flop_formula(torch.ops.mmcls_involution.fused_involution2d)
def _fused_flops(input_shape, reduced_shape, weight_shape, bias, kernel_size, *_, **__):
    shapes = (input_shape, reduced_shape, weight_shape)
    return sum(_flops_of_steps(*shapes, kernel_size))


@register_flop_formula(torch.ops.mmcls_involution.fused_involution2d_backward)
def _fused_backward_flops(
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
