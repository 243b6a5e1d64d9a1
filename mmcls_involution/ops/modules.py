"""`Involution2d`: the kernel generator and `involution2d`, as one module."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor, nn

from .functional import involution2d
from .fused import fused_involution2d, fusing_pays


class Involution2d(nn.Module):
    """Involution with kernels generated from the input itself.

    Equation 6 of `Involution: Inverting the Inherence of Convolution for Visual
    Recognition <https://arxiv.org/abs/2103.06255>`_: a 1x1 convolution reduces the
    channels, norm and activation follow, and a second 1x1 convolution spans one
    K x K kernel per output pixel and channel group. The state dict has the keys and
    shapes of the official code. Convolutions start from He's normal initialization
    (fan-out, ReLU), as they do there.

    Args:
        channels (int): Number of input and output channels, a multiple of
            ``group_channels``.
        kernel_size (int): Side of the kernels in pixels, odd. Defaults to 7.
        stride (int): Step between windows in pixels. The kernels of a strided
            involution are generated from the average-pooled input. Defaults to 1.
        dilation (int): Spacing of the kernels' taps in pixels. Defaults to 1.
        group_channels (int): Number of channels that share a kernel.
            Defaults to 16.
        reduction_ratio (int): Factor by which the first convolution reduces the
            channels. Defaults to 4.
        norm_layer (Callable[[int], nn.Module]): Makes the norm layer for a number
            of channels. Defaults to ``nn.BatchNorm2d``.
        act_layer (Callable[[], nn.Module]): Makes the activation.
            Defaults to ``nn.ReLU``.
        backend (str, optional): See :func:`involution2d`. Defaults to None.
        fused (bool, optional): Use :func:`fused_involution2d`, which stores no kernels:
            less memory, and in training one more generation of them. Defaults to None:
            what the environment variable ``MMCLS_INVOLUTION_FUSED`` says (1 or 0), else
            where it was measured to be faster. A convolution ``conv2.conv`` that has
            been replaced or hooked is called as it is, never fused.

    Shape:
        - Input: ``[N, channels, H, W]``, any H and W of at least 1.
        - Output: ``[N, channels, ceil(H / stride), ceil(W / stride)]``.

    Raises:
        ValueError: If an argument is not a positive int, ``kernel_size`` is even,
            ``channels`` is no multiple of ``group_channels`` or smaller than
            ``reduction_ratio``.

    Example:
        >>> import torch
        >>> from mmcls_involution.ops import Involution2d
        >>> Involution2d(32, stride=2)(torch.rand(2, 32, 9, 7)).shape
        torch.Size([2, 32, 5, 4])
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 7,
        stride: int = 1,
        dilation: int = 1,
        group_channels: int = 16,
        reduction_ratio: int = 4,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
        act_layer: Callable[[], nn.Module] = nn.ReLU,
        backend: str | None = None,
        fused: bool | None = None,
    ) -> None:
        super().__init__()
        for name, value in (
            ('channels', channels),
            ('kernel_size', kernel_size),
            ('stride', stride),
            ('dilation', dilation),
            ('group_channels', group_channels),
            ('reduction_ratio', reduction_ratio),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f'{name} must be a positive int, got {value!r}')
        if kernel_size % 2 == 0:
            raise ValueError(
                f'kernel_size must be odd, so that a kernel has a middle, got '
                f'{kernel_size}'
            )
        if channels % group_channels != 0:
            raise ValueError(
                f'channels must be a multiple of group_channels, got {channels} '
                f'channels in groups of {group_channels}; set group_channels to a '
                f'divisor of {channels}'
            )
        if channels < reduction_ratio:
            raise ValueError(
                f'channels must be at least reduction_ratio, got {channels} channels '
                f'and a reduction ratio of {reduction_ratio}'
            )
        self.channels = channels
        self.kernel_size = kernel_size
        self.stride = stride
        self.dilation = dilation
        self.group_channels = group_channels
        self.reduction_ratio = reduction_ratio
        self.backend = backend
        self.fused = fused

        reduced = channels // reduction_ratio
        groups = channels // group_channels
        # Partial windows at the border of odd sizes are averaged over the pixels
        # they hold; sizes that the stride divides have none.
        self.avgpool = (
            nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)
            if stride > 1
            else nn.Identity()
        )
        # Nested under these names for the official checkpoints' sake.
        self.conv1 = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(channels, reduced, 1, bias=False),
                bn=norm_layer(reduced),
                activate=act_layer(),
            )
        )
        self.conv2 = nn.Sequential(
            OrderedDict(conv=nn.Conv2d(reduced, kernel_size**2 * groups, 1))
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the convolutions as the official module does."""
        for conv in (self.conv1.conv, self.conv2.conv):
            nn.init.kaiming_normal_(conv.weight, mode='fan_out', nonlinearity='relu')
        nn.init.zeros_(self.conv2.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Filter ``x`` with kernels generated from it. See the class for shapes."""
        reduced = self.conv1(self.avgpool(x))
        padding = self.dilation * (self.kernel_size - 1) // 2
        span = self.conv2.conv
        fused = fusing_pays(x, self.backend) if self.fused is None else self.fused
        if fused and type(span) is nn.Conv2d and not span._forward_hooks:
            return fused_involution2d(
                x,
                reduced,
                span.weight,
                span.bias,
                kernel_size=self.kernel_size,
                stride=self.stride,
                padding=padding,
                dilation=self.dilation,
                backend=self.backend,
            )
        groups = self.channels // self.group_channels
        weight = self.conv2(reduced)
        weight = weight.unflatten(1, (groups, self.kernel_size, self.kernel_size))
        return involution2d(
            x, weight, self.stride, padding, self.dilation, backend=self.backend
        )

    def extra_repr(self) -> str:
        """The arguments, as they are written in Python."""
        return (
            f'{self.channels}, kernel_size={self.kernel_size}, stride={self.stride}, '
            f'dilation={self.dilation}, group_channels={self.group_channels}, '
            f'reduction_ratio={self.reduction_ratio}'
        )
