"""`involution2d`: argument checks, choice of backend, registration with torch.

Involution is linear in its input and in its kernels, so its two gradients are
bilinear as well and the three operators below are closed under differentiation:
each one's derivative is written with the other two.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import native, reference, tap_sum, triton
from .geometry import memory_format, output_size

BACKEND_VARIABLE = 'MMCLS_INVOLUTION_BACKEND'
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Backend:
    """One way to compute involution.

    Attributes:
        kernels: Module with ``forward``, ``grad_input`` and ``grad_weight``. It may
            have ``fused_forward`` and ``fused_backward`` too, which return None for
            what they cannot do; the others do that in tiles then.
        priority: The usable backend of highest priority is the default one; None
            for a backend that runs only when named.
        unusable: Given device type and dtype, the reason why this backend cannot
            run there, or None if it can.
        fused: Whether modules use the fused operator unless told otherwise.
    """

    kernels: ModuleType
    priority: int | None
    unusable: Callable[[str, torch.dtype], str | None]
    fused: bool = False


def _runs_everywhere(device: str, dtype: torch.dtype) -> None:
    return None


BACKENDS: dict[str, Backend] = {
    'native': Backend(native, 20, native.unusable, fused=True),
    'triton': Backend(triton, 20, triton.unusable),
    'tap_sum': Backend(tap_sum, 10, _runs_everywhere),
    'reference': Backend(reference, None, _runs_everywhere),
}


def _default_backend(device: str, dtype: torch.dtype) -> str:
    usable = [
        name
        for name, backend in BACKENDS.items()
        if backend.priority is not None and backend.unusable(device, dtype) is None
    ]
    return max(usable, key=lambda name: BACKENDS[name].priority)


# torch.compile takes the result as it is. torch.compiler.assume_constant_result would
# set the same, but imports all of torch._dynamo for it, which takes a second.
_default_backend._dynamo_marked_constant = True


def _kernels(backend: str, tensor: Tensor) -> ModuleType:
    """Kernels of the named backend, of the best one where the name is empty."""
    device, dtype = tensor.device.type, tensor.dtype
    if not backend:
        backend = _default_backend(device, dtype)
    reason = BACKENDS[backend].unusable(device, dtype)
    if reason is not None:
        raise ValueError(
            f'backend {backend!r} cannot run {dtype} on {device}: {reason}'
        )
    return BACKENDS[backend].kernels


def _pair(name: str, value: int | Sequence[int], lowest: int) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise ValueError(f'{name} must be an int or a pair of ints, got {value!r}')
    for v in pair:
        if isinstance(v, bool) or not isinstance(v, (int, torch.SymInt)):
            raise TypeError(f'{name} must be an int or a pair of ints, got {value!r}')
        if v < lowest:
            raise ValueError(f'{name} must be at least {lowest}, got {value!r}')
    return pair


def _check_input(input: Tensor) -> None:
    if input.dim() != 4:
        raise ValueError(f'input must be [N, C, H, W], got shape {tuple(input.shape)}')
    if input.dtype not in DTYPES:
        raise ValueError(f'input must be one of {DTYPES}, got {input.dtype}')
    h, w = input.shape[2:]
    if h < 1 or w < 1:
        raise ValueError(f'input must be at least 1x1 in size, got {h}x{w}')


def _check_like_input(name: str, tensor: Tensor, input: Tensor) -> None:
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


def _check_kernels(
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


def _check(input: Tensor, weight: Tensor, stride, padding, dilation) -> None:
    """Refuse what involution2d is not defined for. See its docstring."""
    _check_input(input)
    if weight.dim() != 6:
        raise ValueError(
            f'weight must be [N, G, Kh, Kw, Ho, Wo], got shape {tuple(weight.shape)}'
        )
    _check_like_input('weight', weight, input)
    _check_kernels('weight', input.shape, weight.shape, stride, padding, dilation)


def _named_backend(name: str | None) -> str:
    """The argument, else the environment's choice; empty for the best one."""
    name = name or os.environ.get(BACKEND_VARIABLE, '')
    if name and name not in BACKENDS:
        raise ValueError(f'backend must be one of {list(BACKENDS)}, got {name!r}')
    return name


def involution2d(
    input: Tensor,
    weight: Tensor,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    *,
    backend: str | None = None,
) -> Tensor:
    r"""Apply a kernel of its own to every pixel, shared within channel groups.

    Equation 4 of `Involution: Inverting the Inherence of Convolution for Visual
    Recognition <https://arxiv.org/abs/2103.06255>`_, with zero padding:

    .. math::
        Y_{n,c,i,j} = \sum_{u,v} H_{n,g(c),u,v,i,j} X_{n,c,is+ud-p,js+vd-p},
        \quad g(c) = \lfloor c G / C \rfloor

    Twice differentiable, deterministic, and usable under autocast, torch.compile
    and torch.export. Half precision is summed in float32.

    Args:
        input (Tensor): ``[N, C, H, W]``, float64, float32, float16 or bfloat16;
            H and W at least 1, N may be 0. Any strides; a channels_last input
            gives a channels_last output.
        weight (Tensor): Kernels ``[N, G, Kh, Kw, Ho, Wo]``, G a divisor of C, of
            the dtype (under autocast: any dtype) and device of ``input``.
        stride (int | tuple[int, int]): Step between windows in pixels, (height,
            width). Defaults to 1.
        padding (int | tuple[int, int]): Zero padding on every side in pixels.
            Defaults to 0.
        dilation (int | tuple[int, int]): Spacing of the kernel's taps in pixels.
            Defaults to 1.
        backend (str, optional): A name in :data:`BACKENDS`. Defaults to None: the
            one that the environment variable ``MMCLS_INVOLUTION_BACKEND`` names,
            else the usable one of highest priority.

    Returns:
        Tensor: ``[N, C, Ho, Wo]`` in the dtype of ``input`` (under autocast: in
        autocast's), with Ho = (H + 2*padding - dilation*(Kh-1) - 1) // stride + 1
        and Wo likewise.

    Raises:
        TypeError: If ``input`` or ``weight`` is not a tensor, or stride, padding or
            dilation is not made of ints.
        ValueError: If a rank, shape, dtype, device or group count does not fit, or
            if the backend is unknown or cannot run this dtype on this device.

    Example:
        >>> import torch
        >>> from mmcls_involution.ops import involution2d
        >>> input = torch.rand(2, 32, 9, 7)
        >>> weight = torch.rand(2, 2, 3, 3, 5, 4)
        >>> involution2d(input, weight, stride=2, padding=1).shape
        torch.Size([2, 32, 5, 4])
    """
    for name, tensor in (('input', input), ('weight', weight)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f'{name} must be a Tensor, got {type(tensor).__name__}')
    return _involution2d(
        input,
        weight,
        _pair('stride', stride, 1),
        _pair('padding', padding, 0),
        _pair('dilation', dilation, 1),
        _named_backend(backend),
    )


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
    _check(input, weight, stride, padding, dilation)
    kernels = _kernels(backend, input)
    out = kernels.forward(input, weight, stride, padding, dilation)
    return out.contiguous(memory_format=memory_format(input))


@torch.library.custom_op('mmcls_involution::involution2d_grad_input', mutates_args=())
def _grad_input(
    grad: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    backend: str,
) -> Tensor:
    kernels = _kernels(backend, grad)
    out = kernels.grad_input(grad, weight, input_size, stride, padding, dilation)
    return out.contiguous(memory_format=memory_format(grad))


@torch.library.custom_op('mmcls_involution::involution2d_grad_weight', mutates_args=())
def _grad_weight(
    grad: Tensor,
    input: Tensor,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    backend: str,
) -> Tensor:
    kernels = _kernels(backend, grad)
    out = kernels.grad_weight(grad, input, weight_shape, stride, padding, dilation)
    return out.contiguous()


@_involution2d.register_fake
def _(input, weight, stride, padding, dilation, backend):
    _check(input, weight, stride, padding, dilation)
    out = input.new_empty((*input.shape[:2], *weight.shape[4:]))
    return out.contiguous(memory_format=memory_format(input))


@_grad_input.register_fake
def _(grad, weight, input_size, stride, padding, dilation, backend):
    out = grad.new_empty((*grad.shape[:2], *input_size))
    return out.contiguous(memory_format=memory_format(grad))


@_grad_weight.register_fake
def _(grad, input, weight_shape, stride, padding, dilation, backend):
    return grad.new_empty(weight_shape)


# Autograd. With A = _involution2d, B = _grad_input, C = _grad_weight, the inner
# products <A(x, w), g> = <x, B(g, w)> = <w, C(g, x)> give every derivative.


def _setup_context(ctx, inputs, output):
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
        grad_input = _grad_input(grad, weight, input_shape[2:], *ctx.arguments)
    if ctx.needs_input_grad[1]:
        grad_weight = _grad_weight(grad, input, weight_shape, *ctx.arguments)
    return grad_input, grad_weight, None, None, None, None


def _grad_input_backward(ctx, grad):
    out_grad, weight = ctx.saved_tensors
    _, weight_shape = ctx.shapes
    _, *arguments = ctx.arguments
    grad_out_grad = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_out_grad = _involution2d(grad, weight, *arguments)
    if ctx.needs_input_grad[1]:
        grad_weight = _grad_weight(out_grad, grad, weight_shape, *arguments)
    return grad_out_grad, grad_weight, None, None, None, None, None


def _grad_weight_backward(ctx, grad):
    out_grad, input = ctx.saved_tensors
    _, input_shape = ctx.shapes
    _, *arguments = ctx.arguments
    grad_out_grad = grad_input = None
    if ctx.needs_input_grad[0]:
        grad_out_grad = _involution2d(input, grad, *arguments)
    if ctx.needs_input_grad[1]:
        grad_input = _grad_input(out_grad, grad, input_shape[2:], *arguments)
    return grad_out_grad, grad_input, None, None, None, None, None


_involution2d.register_autograd(_involution2d_backward, setup_context=_setup_context)
_grad_input.register_autograd(_grad_input_backward, setup_context=_setup_context)
_grad_weight.register_autograd(_grad_weight_backward, setup_context=_setup_context)


# Autocast. torch.library.register_autocast casts to one dtype fixed in advance;
# users choose theirs when they enter autocast.

_library = torch.library.Library('mmcls_involution', 'FRAGMENT')


def _register_autocast(name: str, operator: Callable, tensors: int) -> None:
    """Cast the first `tensors` arguments of an operator, None among them."""
    for device in ('cpu', 'cuda'):
        key = f'Autocast{device.upper()}'

        def cast_and_call(*arguments, device=device, key=key):
            dtype = torch.get_autocast_dtype(device)
            cast = (
                t.to(dtype)
                if t is not None and t.dtype in DTYPES and t.dtype != torch.float64
                else t
                for t in arguments[:tensors]
            )
            with torch._C._ExcludeDispatchKeyGuard(
                torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
            ):
                return operator(*cast, *arguments[tensors:])

        _library.impl(name, cast_and_call, key)


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
    _, groups, kh, kw, ho, wo = kernels
    n, c = first_shape[:2] if len(first_shape) == 4 else out_shape[:2]
    return 2 * n * c * kh * kw * ho * wo
