"""What a backend is asked, and what it has to answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..geometry import Pair, Shape, memory_format


class Problem(NamedTuple):  # made in every call: a dataclass takes three times as long
    """What is to be computed. Sizes are those of this call, never symbols.

    Attributes:
        operation: The function of :class:`Backend` or :class:`FusedBackend` that is to
            be called.
        device: Type of the tensors' device.
        dtype: Of all tensors.
        channels_last: Whether pixels are in memory as ``[N, H, W, C]``.
        input_shape: ``[N, C, H, W]`` of the input or of its gradient.
        kernels_shape: ``[N, G, Kh, Kw, Ho, Wo]``.
        stride, padding, dilation: As of the operators.
        index: Number of the device among those of its type.
    """

    operation: str
    device: str
    dtype: torch.dtype
    channels_last: bool
    input_shape: Shape
    kernels_shape: Shape
    stride: Pair
    padding: Pair
    dilation: Pair
    index: int = 0

    @classmethod
    def of(cls, operation: str, pixels: Tensor, *arguments) -> Problem:
        """That of `pixels` [N, C, H, W]; `arguments` are the fields from shapes on."""
        last = memory_format(pixels) == torch.channels_last
        device = pixels.device
        place = device.type, pixels.dtype
        return cls(operation, *place, last, *arguments, device.index or 0)

    @classmethod
    def typical(cls, device: str, dtype: torch.dtype, index: int = 0) -> Problem:
        """A small one, for who asks before there are tensors."""
        shapes = (1, 16, 8, 8), (1, 1, 3, 3, 8, 8)
        arguments = (1, 1), (1, 1), (1, 1)
        return cls('forward', device, dtype, False, *shapes, *arguments, index)


class Backend(Protocol):
    """A module that computes involution and both its gradients.

    It gets checked arguments on one device, of any strides, and an empty batch too.
    Results are of the tensors' dtype, in any memory format.
    """

    def supports(self, problem: Problem) -> str | None:
        """The reason why it cannot compute that, or None if it can. Asked every time,
        so what takes long is cached."""

    def forward(
        self, input: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair
    ) -> Tensor:
        """See :func:`mmcls_involution.ops.involution2d`."""

    def grad_input(
        self,
        grad: Tensor,
        weight: Tensor,
        input_size: Pair,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
    ) -> Tensor:
        """Gradient of :meth:`forward` in ``input``, of spatial size ``input_size``."""

    def grad_weight(
        self,
        grad: Tensor,
        input: Tensor,
        weight_shape: Shape,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
    ) -> Tensor:
        """Gradient of :meth:`forward` in ``weight``, of shape ``weight_shape``."""


class FusedBackend(Backend, Protocol):
    """One that may generate the kernels itself; it can have either function alone.

    What it has not or does not support is done in tiles, by the functions above.
    """

    def fused_forward(
        self,
        input: Tensor,
        reduced: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        kernel_size: Pair,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
    ) -> Tensor:
        """See :func:`mmcls_involution.ops.fused_involution2d`."""

    def fused_backward(
        self,
        grad: Tensor,
        input: Tensor,
        reduced: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        kernel_size: Pair,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        needed: Sequence[bool],
    ) -> list[Tensor | None]:
        """Gradients in the four tensors of :meth:`fused_forward`; those not `needed`
        are ignored."""
