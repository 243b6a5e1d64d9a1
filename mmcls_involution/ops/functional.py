"""`involution2d`, the operator that is given its kernels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from . import registration
from .backends import named_backend
from .checks import check_types, pair


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

    Twice differentiable, deterministic, and usable under autocast, torch.compile,
    torch.export, torch.func and forward-mode differentiation. Half precision is summed
    in float32. A tap outside the image adds nothing, even where its kernel value is
    infinite or NaN.

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
            else the one of highest priority that supports the problem.
            ``MMCLS_INVOLUTION_LOG=1`` logs each choice once for each kind of problem.

    Returns:
        Tensor: ``[N, C, Ho, Wo]`` in the dtype of ``input`` (under autocast: in
        autocast's), with Ho = (H + 2*padding - dilation*(Kh-1) - 1) // stride + 1
        and Wo likewise.

    Raises:
        TypeError: If ``input`` or ``weight`` is not a tensor, or stride, padding or
            dilation is not made of ints.
        ValueError: If a rank, shape, dtype, device or group count does not fit, if
            stride or dilation is below 1, padding below 0, or one of them a tuple of
            other than two, or if the named backend is unknown or does not support the
            problem.

    Example:
        >>> import torch
        >>> from mmcls_involution.ops import involution2d
        >>> input = torch.rand(2, 32, 9, 7)
        >>> weight = torch.rand(2, 2, 3, 3, 5, 4)
        >>> involution2d(input, weight, stride=2, padding=1).shape
        torch.Size([2, 32, 5, 4])
    """
    tensors = input, weight
    if has_torch_function(tensors):  # torch.fx's proxies, subclasses of Tensor
        options = dict(
            stride=stride, padding=padding, dilation=dilation, backend=backend
        )
        return handle_torch_function(involution2d, tensors, *tensors, **options)
    check_types(input=input, weight=weight)
    return registration.involution2d(
        input,
        weight,
        pair('stride', stride, 1),
        pair('padding', padding, 0),
        pair('dilation', dilation, 1),
        named_backend(backend),
    )
