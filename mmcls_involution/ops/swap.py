"""Involution in place of convolutions: one layer, and all that a model has."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .checks import check_positive
from .modules import Involution2d, hooked


class InvolutionConv(nn.Sequential):
    """An involution with the arguments, the shapes and the bias of a convolution.

    Where the number of channels changes, a 1x1 convolution without bias goes with the
    involution, which works on the smaller of the two numbers that its groups divide:
    ``projection`` before it or behind it. ``involution`` takes the stride, and
    ``bias`` is added in the end.

    Args:
        in_channels (int): Number of input channels.
        out_channels (int): Number of output channels.
        kernel_size (int | tuple[int, int]): Side of the convolution's kernel in pixels,
            odd and larger than 1.
        stride (int | tuple[int, int]): Step in pixels. Defaults to 1.
        padding (int | tuple[int, int] | str): Must be half of the kernel,
            ``dilation * (kernel_size - 1) / 2``, or, at stride 1, ``'same'``. Defaults
            to 0, which is refused, as its output would be smaller than that of an
            involution.
        dilation (int | tuple[int, int]): Spacing of the taps in pixels. Defaults to 1.
        groups (int): Must be 1. Defaults to 1.
        bias (bool): Whether a bias is added. Defaults to True.
        padding_mode (str): Must be ``'zeros'``. Defaults to ``'zeros'``.
        involution_cfg (dict, optional): Arguments of :class:`Involution2d`, such as
            ``dict(kernel_size=7, group_channels=8)``. Defaults to None: its defaults,
            and the kernel size of the convolution.

    Shape:
        - Input: ``[N, in_channels, H, W]``, any H and W of at least 1.
        - Output: ``[N, out_channels, ceil(H / stride), ceil(W / stride)]``, as of the
          convolution.

    Raises:
        ValueError: If an involution cannot stand in for such a convolution; the message
            says why.

    Example:
        >>> import torch
        >>> from mmcls_involution.ops import InvolutionConv
        >>> layer = InvolutionConv(32, 48, 3, stride=2, padding=1)
        >>> layer(torch.rand(2, 32, 9, 7)).shape
        torch.Size([2, 48, 5, 4])
    """

    involution_type: type[Involution2d] = Involution2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = 'zeros',
        involution_cfg: dict[str, Any] | None = None,
    ) -> None:
        # On the meta device: torch checks and completes the arguments.
        conv = nn.Conv2d(
            *(in_channels, out_channels, kernel_size, stride, padding, dilation),
            *(groups, bias, padding_mode),
            device='meta',
        )
        cfg = dict(involution_cfg or {})
        group_channels = _group_channels(cfg)
        if reason := _why_not(conv, group_channels):
            raise ValueError(f'no involution can stand in for {conv}: {reason}')
        channels = _channels(conv, group_channels)
        cfg.setdefault('kernel_size', conv.kernel_size[0])
        layers = OrderedDict(
            involution=self.involution_type(
                channels, stride=conv.stride[0], dilation=conv.dilation[0], **cfg
            )
        )
        if in_channels != out_channels:
            layers['projection'] = nn.Conv2d(in_channels, out_channels, 1, bias=False)
            layers.move_to_end('projection', last=channels == in_channels)
        super().__init__(layers)
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        # What MMCV's ConvModule, and others, read of a convolution.
        for name in (
            *('in_channels', 'out_channels', 'kernel_size', 'stride', 'padding'),
            *('dilation', 'groups', 'padding_mode', 'transposed', 'output_padding'),
        ):
            setattr(self, name, getattr(conv, name))

    def forward(self, x: Tensor) -> Tensor:
        """Filter ``x``. See the class for shapes."""
        x = super().forward(x)
        if self.bias is None:
            return x
        # As a convolution under autocast, not in the parameter's wider dtype.
        return x + self.bias.to(x.dtype)[:, None, None]


def _group_channels(involution_cfg: dict[str, Any]) -> int:
    group_channels = involution_cfg.get('group_channels', 16)
    check_positive(dict(group_channels=group_channels))
    return group_channels


def _channels(conv: nn.Conv2d, group_channels: int) -> int | None:
    """On how many channels the involution works; None where groups divide neither."""
    fitting = [
        channels
        for channels in (conv.in_channels, conv.out_channels)
        if channels % group_channels == 0
    ]
    return min(fitting, default=None)


def _why_not(conv: nn.Conv2d, group_channels: int) -> str | None:
    """Why an involution cannot stand in for a convolution; None where it can."""
    if conv.kernel_size == (1, 1):
        return 'it is 1x1'
    if conv.groups != 1:
        return f'it has {conv.groups} groups'
    for name in ('kernel_size', 'stride', 'dilation'):
        first, second = getattr(conv, name)
        if first != second:
            return f'{name} differs between height and width, {first} and {second}'
    size, dilation = conv.kernel_size[0], conv.dilation[0]
    if size % 2 == 0:
        return f'its kernel has no middle, {size} x {size}'
    if conv.padding_mode != 'zeros':
        return f'its padding_mode is {conv.padding_mode!r}, an involution pads zeros'
    same = dilation * (size - 1) // 2
    if conv.padding not in ('same', (same, same)):
        return (
            f'its padding is {conv.padding}, an involution of that output size needs '
            f'{(same, same)}'
        )
    if _channels(conv, group_channels) is None:
        return (
            f'neither {conv.in_channels} nor {conv.out_channels} channels are a '
            f'multiple of group_channels, {group_channels}'
        )
    return None


@dataclass(frozen=True)
class Swap:
    """What became of a convolution.

    Attributes:
        name: Dotted name in the model.
        convolution: The convolution with its arguments, in one line.
        reason: Why it was left; '' where it was swapped.
        parameters: Their number before and after.
        flops: Multiply-adds before and after; None where no inputs were given.
    """

    name: str
    convolution: str
    reason: str
    parameters: tuple[int, int]
    flops: tuple[int, int] | None


@dataclass(frozen=True)
class Swaps:
    """What became of the convolutions of a model; ``print`` shows a table.

    Attributes:
        rows: One for each convolution, but for those inside involutions.
        parameters: Of the whole model, before and after.
        flops: Multiply-adds of the whole model, before and after: of its convolutions,
            matrix products and involutions. None where no inputs were given.
    """

    rows: tuple[Swap, ...]
    parameters: tuple[int, int]
    flops: tuple[int, int] | None

    @property
    def swapped(self) -> tuple[str, ...]:
        """The names of what was swapped."""
        return tuple(row.name for row in self.rows if not row.reason)

    def __str__(self) -> str:
        total = Swap('the model', '', '', self.parameters, self.flops)
        table = [('name', 'parameters', 'multiply-adds', 'convolution')]
        for row in (*self.rows, total):
            what = f'left, {row.reason}: ' if row.reason else ''
            table.append(
                (
                    row.name,
                    _before_after(row.parameters),
                    _before_after(row.flops),
                    what + row.convolution,
                )
            )
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = (
            '  '.join(
                cell.ljust(width) for cell, width in zip(row, widths, strict=True)
            )
            for row in table
        )
        return '\n'.join(line.rstrip() for line in lines)


def _before_after(numbers: tuple[int, int] | None) -> str:
    if numbers is None:
        return ''
    before, after = numbers
    return f'{before:,}' if before == after else f'{before:,} -> {after:,}'


def reads_features(name: str, conv: nn.Conv2d) -> bool:
    """The default rule of :func:`swap_convolutions`: 16 input channels or more.

    A kernel is generated from one pixel. One of a photo, three numbers, says too little
    about what is there; RedNet starts with a convolution too.
    """
    return conv.in_channels >= 16


def swap_convolutions(
    model: nn.Module,
    where: Callable[[str, nn.Conv2d], bool] = reads_features,
    inputs: tuple | Tensor | None = None,
    **involution_cfg: Any,
) -> Swaps:
    """Put involutions in the place of a model's spatial convolutions.

    The model is changed. What takes a convolution's place is an
    :class:`InvolutionConv`, with new weights that are to be trained, and with the bias,
    the dtype, the device and the training mode of the convolution. Convolutions for
    which none can stand in are left: of 1x1, of several groups, of even or oblong
    kernels, with a padding that changes the output's size, with a subclass's, a
    parametrization's or a hook's own behaviour. A convolution that a model calls at
    several places stays one layer. An involution mixes no channels: where a network has
    none of the 1x1 convolutions that do so, as in the blocks of ResNet-18, it has fewer
    parameters and can express less. Make the optimizer, or call ``model.parameters()``,
    after the swap.

    Args:
        model (nn.Module): Any model.
        where (Callable[[str, nn.Conv2d], bool]): The rule: gets the dotted name of a
            convolution (the first of a shared one) and the convolution, which it may
            ask for ``in_channels``, ``kernel_size`` and so on, and says whether to swap
            it. Defaults to :func:`reads_features`, all that read 16 channels or more.
        inputs (tuple | Tensor, optional): Arguments of one call of the model. With them
            it is called before and after, in eval mode and without gradients: FLOPs are
            counted, and the swapped model is tried out. Defaults to None.
        **involution_cfg: Arguments of :class:`Involution2d`, such as
            ``kernel_size=7`` or ``group_channels=8``, but for channels, stride and
            dilation. Defaults to its own, and to the kernel size of each convolution.

    Returns:
        Swaps: What was swapped, what was left and why, with parameters and FLOPs.

    Raises:
        ValueError: If nothing was swapped, the model is a convolution itself, an
            argument of the involution is wrong, or with ``inputs`` the swapped model
            fails. The model is then what it was.
        TypeError: If the involution has no argument of that name, or has it from the
            convolution. Then, too, the model is what it was.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from mmcls_involution.ops import swap_convolutions
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3, padding=1))
        >>> swap_convolutions(model, inputs=torch.rand(1, 3, 8, 8)).swapped
        ('1',)
    """
    if isinstance(model, nn.Conv2d):
        raise ValueError(
            'the model is a convolution itself, which only its parent could swap; put '
            'it into an nn.Sequential, or build an InvolutionConv'
        )
    parents = dict(model.named_modules(remove_duplicate=False))
    involutions = tuple(
        f'{name}.' if name else ''
        for name, module in parents.items()
        if isinstance(module, Involution2d)
    )
    convolutions = {
        name: module
        for name, module in parents.items()
        if isinstance(module, nn.Conv2d) and not name.startswith(involutions)
    }
    group_channels = _group_channels(involution_cfg)
    before = _measure(model, inputs)

    reasons, layers = {}, {}  # of each convolution; a shared one goes by its first name
    for name, conv in convolutions.items():
        if conv in reasons:
            continue
        reason = _watched(conv) or _why_not(conv, group_channels)
        if not reason and not where(name, conv):
            reason = 'the rule says so'
        reasons[conv] = reason or ''
        if not reason:
            layers[conv] = _stand_in(conv, involution_cfg)
    swapped = [name for name, conv in convolutions.items() if conv in layers]
    if not swapped:
        found = '\n'.join(
            f'{name}: {reasons[conv]}' for name, conv in convolutions.items()
        )
        raise ValueError(
            'no convolution was swapped; '
            + (f'they were left because\n{found}' if found else 'the model has none')
        )

    def put(name: str, layer: nn.Module) -> None:
        parent, _, child = name.rpartition('.')
        parents[parent]._modules[child] = layer

    for name in swapped:
        put(name, layers[convolutions[name]])
    try:
        after = _measure(model, inputs)
    except Exception as error:
        for name in swapped:
            put(name, convolutions[name])
        raise ValueError(
            f'the swapped model fails: {type(error).__name__}: {error}. The model is '
            "what it was; leave the layers in question out by the rule 'where'"
        ) from error

    def row(name: str, conv: nn.Conv2d) -> Swap:
        flops = None
        if inputs is not None:
            flops = before.flops.get(name, 0), after.flops.get(name, 0)
        parameters = _parameters(conv), _parameters(model.get_submodule(name))
        # One line, of a parametrized one too, which prints its parts below.
        text = f'{conv._get_name()}({conv.extra_repr()})'
        return Swap(name, text, reasons[conv], parameters, flops)

    return Swaps(
        tuple(row(name, conv) for name, conv in convolutions.items()),
        (before.parameters, after.parameters),
        None if inputs is None else (before.flops[''], after.flops['']),
    )


def _watched(conv: nn.Conv2d) -> str | None:
    """What a convolution is besides, and an involution would not be; None if nothing.

    A parametrization is a class of its own; pruning and the older norms of weights are
    hooks.
    """
    if type(conv) is not nn.Conv2d:
        kind = type(conv)
        return f'it is a {kind.__module__}.{kind.__qualname__}'
    return 'it has hooks' if hooked(conv) else None


def _stand_in(conv: nn.Conv2d, involution_cfg: dict[str, Any]) -> InvolutionConv:
    """An involution that takes the place of a convolution."""
    with torch.device(conv.weight.device):
        layer = InvolutionConv(
            *(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride),
            *(conv.padding, conv.dilation),
            bias=conv.bias is not None,
            involution_cfg=involution_cfg,
        )
    layer.to(conv.weight.dtype).train(conv.training)
    if conv.bias is not None:
        with torch.no_grad():
            layer.bias.copy_(conv.bias)
    return layer


@dataclass(frozen=True)
class _Measured:
    parameters: int
    flops: dict[str, int]  # by dotted name, '' for the whole


def _measure(model: nn.Module, inputs: tuple | Tensor | None) -> _Measured:
    parameters = _parameters(model)
    if inputs is None:
        return _Measured(parameters, {})
    modes = {module: module.training for module in model.modules()}
    model.eval()
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), counter:
            model(*((inputs,) if isinstance(inputs, Tensor) else inputs))
    finally:
        for module, mode in modes.items():
            module.training = mode
    root = type(model).__name__
    flops = {
        # twice, because torch counts a multiply-add as two
        name.removeprefix(root).removeprefix('.'): sum(counts.values()) // 2
        for name, counts in counter.get_flop_counts().items()
        if name != 'Global'
    }
    return _Measured(parameters, {'': 0, **flops})


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
