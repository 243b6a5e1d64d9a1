"""`fused_involution2d`: kernel generation and involution as one operator.

At the first stage of RedNet-50 the kernels are three times as large as the input. Here
they are never in memory as a whole: forward and backward pass generate them where they
use them, from the reduced map, which is a twelfth of their size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from . import registration, standard
from .backends import BACKENDS, default_backend, named_backend
from .backends.tiled import generate
from .checks import check_types, pair, switch
from .functional import involution2d

FUSED_VARIABLE = 'MMCLS_INVOLUTION_FUSED'


def fusing_pays(input: Tensor, backend: str | None = None) -> bool:
    """Whether the fused operator is the default for a tensor like ``input``.

    The environment variable ``MMCLS_INVOLUTION_FUSED`` says so with 1 or 0; without it,
    the table of backends does.

    Raises:
        ValueError: If the variable or ``backend`` has another value.
    """
    fused = switch(FUSED_VARIABLE)
    if fused is not None:
        return fused
    device = input.device
    name = named_backend(backend) or default_backend(
        device.type, input.dtype, device.index or 0
    )
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
        backend (str, optional): Likewise. Defaults to None. What no backend fuses, or
            not the named one, is done in tiles.

    Returns:
        Tensor: ``[N, C, Ho, Wo]``, as :func:`involution2d` returns it.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If a rank, shape, dtype, device or group count does not fit, if
            kernel size, stride or dilation is below 1, padding below 0, or one of them
            a tuple of other than two, or if the named backend is unknown or does not
            support the problem.

    Example:
        >>> import torch
        >>> from mmcls_involution.ops import fused_involution2d
        >>> input, reduced = torch.rand(2, 32, 9, 7), torch.rand(2, 8, 9, 7)
        >>> weight = torch.rand(2 * 49, 8, 1, 1)
        >>> fused_involution2d(input, reduced, weight, kernel_size=7, padding=3).shape
        torch.Size([2, 32, 9, 7])
    """
    tensors = input, reduced, weight, bias
    if has_torch_function(tensors):  # torch.fx's proxies, subclasses of Tensor
        options = dict(
            kernel_size=kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            backend=backend,
        )
        return handle_torch_function(fused_involution2d, tensors, *tensors, **options)
    check_types(input=input, reduced=reduced, weight=weight)
    if bias is not None:
        check_types(bias=bias)
    return registration.fused_involution2d(
        input,
        reduced,
        weight,
        bias,
        pair('kernel_size', kernel_size, 1),
        pair('stride', stride, 1),
        pair('padding', padding, 0),
        pair('dilation', dilation, 1),
        named_backend(backend),
    )


def spanned_involution2d(
    input: Tensor,
    reduced: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    kernel_size: int,
    fused: bool | None,
    **options,
) -> Tensor:
    """The fused operator, or the two steps that it stands for.

    Args:
        input, reduced, weight, bias, kernel_size: See :func:`fused_involution2d`.
        fused (bool | None): Which of the two; None for the one that pays.
        **options: Further arguments of :func:`involution2d`.
    """
    if fused is None:
        fused = standard.exporting() or fusing_pays(input, options['backend'])
    if fused:
        return fused_involution2d(
            input, reduced, weight, bias, kernel_size=kernel_size, **options
        )
    if input.device.type == 'cpu':  # whose kernels read what a convolution makes
        kernels = F.conv2d(reduced, weight, bias)
    else:
        # Contiguous, whatever the memory format of the reduced map: what Triton's
        # kernels read, which would copy a convolution's output in each pass. Autocast
        # would cast the weight once for each image.
        tensors = registration.as_autocast(reduced, weight, bias)
        kernels = generate(*tensors).unflatten(2, reduced.shape[2:])
    kernels = kernels.unflatten(1, (-1, kernel_size, kernel_size))
    return involution2d(input, kernels, **options)
