"""`Involution2d`: a kernel generator and `involution2d`, as one module."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .backends import named_backend
from .checks import check_input, check_positive
from .functional import involution2d
from .fused import spanned_involution2d
from .geometry import outside
from .registration import grad_of_weight

# Kernel-generation function -> its convolutions.
GENERATORS = {
    'bottleneck': ('conv1.conv', 'conv2.conv'),
    'linear': ('conv2.conv',),
    'dot_product': ('query', 'key', 'value', 'position'),
    'attention': ('query', 'key', 'value', 'position'),
}


class Involution2d(nn.Module):
    r"""Involution with kernels generated from the input itself.

    By default with equation 6 of `Involution: Inverting the Inherence of Convolution
    for Visual Recognition <https://arxiv.org/abs/2103.06255>`_: a 1x1 convolution
    reduces the channels, norm and activation follow, and a second 1x1 convolution
    spans one K x K kernel per output pixel and channel group. The state dict has the
    keys and shapes of the official code.

    ``generator`` names another kernel-generation function:

    - ``'linear'``: the second 1x1 convolution alone, from all channels.
    - ``'dot_product'``: how well the query of the output pixel fits the key of each
      pixel of its window plus a learned vector for that place in the window. A group
      of channels is a head; the kernels are applied to values. Queries, keys and
      values are 1x1 convolutions of the input:

      .. math::
          H_{n,g,u,v,i,j} = \frac{1}{\sqrt{C/G}} \sum_{c \in g} Q_{n,c,i,j}
          (K_{n,c,is+ud-p,js+vd-p} + R_{c,u,v})

    - ``'attention'``: the same behind a softmax over the window, which is local
      self-attention as in `Stand-Alone Self-Attention in Vision Models
      <https://arxiv.org/abs/1906.05909>`_; the paper counts self-attention among the
      instantiations of involution. Taps outside the image get no weight: nothing is
      there, and with the weight of a key of zeros the output would fade at the border.

    Args:
        channels (int): Number of input and output channels, a multiple of
            ``group_channels``.
        kernel_size (int): Side of the kernels in pixels, odd. Defaults to 7.
        stride (int): Step between windows in pixels. The kernels of a strided
            involution are generated from the average-pooled input. Defaults to 1.
        dilation (int): Spacing of the kernels' taps in pixels. Defaults to 1.
        group_channels (int): Number of channels that share a kernel.
            Defaults to 16.
        reduction_ratio (int): Factor by which the first convolution of the bottleneck
            reduces the channels. Other generators have none. Defaults to 4.
        norm_layer (Callable[[int], nn.Module]): Makes the norm layer of the bottleneck
            for a number of channels. Defaults to ``nn.BatchNorm2d``.
        act_layer (Callable[[], nn.Module]): Makes the activation of the bottleneck.
            Defaults to ``nn.ReLU``.
        backend (str, optional): See :func:`involution2d`. Defaults to None.
        fused (bool, optional): Use :func:`fused_involution2d`, which stores no kernels:
            less memory, and in training one more generation of them. Defaults to None:
            what the environment variable ``MMCLS_INVOLUTION_FUSED`` says (1 or 0), else
            where it was measured to be faster. A convolution ``conv2.conv`` that has
            been replaced, parametrized, pruned or hooked, be it by a hook of all
            modules (``FlopCounterMode`` has them), is called as it is, never fused.
            Kernels that do not end in a convolution are never fused either.
        generator (str): Kernel-generation function, ``'bottleneck'``, ``'linear'``,
            ``'dot_product'`` or ``'attention'``, as above. Defaults to
            ``'bottleneck'``.
        init (str): What the module is before training. ``'official'``: all
            convolutions from He's normal initialization (fan-out, ReLU), as in the
            official code; the kernels are noise. ``'identity'``: the last convolution
            of the generator has weights of 0, and a bias of 1 for the middle tap and 0
            for the others; the output is the input (of a stride, every stride-th
            pixel), for ``'bottleneck'`` and ``'linear'`` only. docs/initialization.md
            compares them. Defaults to ``'official'``.

    Shape:
        - Input: ``[N, channels, H, W]``, any H and W of at least 1.
        - Output: ``[N, channels, ceil(H / stride), ceil(W / stride)]``.

    Raises:
        ValueError: If an argument is not a positive int, ``kernel_size`` is even,
            ``channels`` is no multiple of ``group_channels`` or, for a bottleneck,
            smaller than ``reduction_ratio``, ``generator`` or ``init`` is unknown, or
            the generator has no identity.

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
        generator: str = 'bottleneck',
        init: str = 'official',
    ) -> None:
        super().__init__()
        check_positive(
            dict(
                channels=channels,
                kernel_size=kernel_size,
                stride=stride,
                dilation=dilation,
                group_channels=group_channels,
                reduction_ratio=reduction_ratio,
            )
        )
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
        if generator not in tuple(GENERATORS):  # a dict could not be looked up
            raise ValueError(
                f'generator must be one of {list(GENERATORS)}, got {generator!r}'
            )
        if generator == 'bottleneck' and channels < reduction_ratio:
            raise ValueError(
                f'channels must be at least reduction_ratio, got {channels} channels '
                f'and a reduction ratio of {reduction_ratio}'
            )
        if init not in ('official', 'identity'):
            raise ValueError(f"init must be 'official' or 'identity', got {init!r}")
        if init == 'identity' and 'query' in GENERATORS[generator]:
            raise ValueError(
                "init='identity' needs the generator 'bottleneck' or 'linear', got "
                f'{generator!r}, whose kernels have no bias to start from'
            )
        self.channels = channels
        self.kernel_size = kernel_size
        self.stride = stride
        self.dilation = dilation
        self.group_channels = group_channels
        self.reduction_ratio = reduction_ratio
        self.backend = backend
        self.fused = fused
        self.generator = generator
        self.init = init

        groups = channels // group_channels
        # Partial windows at the border of odd sizes are averaged over the pixels
        # they hold; sizes that the stride divides have none.
        self.avgpool = (
            nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)
            if stride > 1
            else nn.Identity()
        )
        if 'query' in GENERATORS[generator]:
            self.query = nn.Conv2d(channels, channels, 1, bias=False)
            self.key = nn.Conv2d(channels, channels, 1, bias=False)
            self.value = nn.Conv2d(channels, channels, 1, bias=False)
            self.position = nn.Conv2d(
                channels, kernel_size**2 * groups, 1, groups=groups, bias=False
            )
        else:
            # Nested under these names for the official checkpoints' sake.
            reduced = channels
            self.conv1 = nn.Identity()
            if generator == 'bottleneck':
                reduced = channels // reduction_ratio
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
        """Initialize the convolutions as ``init`` says."""
        for name in GENERATORS[self.generator]:
            conv = self.get_submodule(name)
            nn.init.kaiming_normal_(conv.weight, mode='fan_out', nonlinearity='relu')
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
        if self.init == 'identity':
            span = self.conv2.conv
            nn.init.zeros_(span.weight)
            with torch.no_grad():
                taps = span.bias.unflatten(0, (-1, self.kernel_size**2))
                taps[:, self.kernel_size**2 // 2] = 1

    def forward(self, x: Tensor) -> Tensor:
        """Filter ``x`` with kernels generated from it. See the class for shapes.

        Raises:
            ValueError: If ``x`` has another shape, or is not of floats.
        """
        if isinstance(x, torch.fx.Proxy) and x.tracer.root is not self:
            # A layer of one node. MMEngine's efficient_conv_bn_eval, for one, asks of
            # which module the input of a norm layer comes.
            path = x.tracer.path_of_module(self)
            return x.tracer.create_proxy('call_module', path, (x,), {})
        check_input(x, self.channels)
        options = self._options()
        if 'query' in GENERATORS[self.generator]:
            return involution2d(self.value(x), self._relate(x), **options)
        reduced = self.conv1(self.avgpool(x))
        span = self._plain_span()
        if span is not None:
            return spanned_involution2d(
                *(x, reduced, span.weight, span.bias),
                kernel_size=self.kernel_size,
                fused=self.fused,
                **options,
            )
        return involution2d(x, self._unflatten(self.conv2(reduced)), **options)

    def kernels(self, x: Tensor) -> Tensor:
        """The kernels that ``x`` generates, all of them at once.

        :meth:`forward` need not store them: where it is fused, it makes the same ones
        tile by tile.

        Args:
            x (Tensor): Input, ``[N, channels, H, W]``.

        Returns:
            Tensor: ``[N, G, K, K, ceil(H / stride), ceil(W / stride)]``, with G groups
            of channels: row ``u`` and column ``v`` of the kernel of an output pixel
            weigh the input pixel that lies ``(u - K // 2) * dilation`` rows below and
            ``(v - K // 2) * dilation`` columns right of ``stride`` times its place.

        Raises:
            ValueError: If ``x`` has another shape, or is not of floats.
        """
        check_input(x, self.channels)
        if 'query' in GENERATORS[self.generator]:
            return self._relate(x)
        return self._unflatten(self.conv2(self.conv1(self.avgpool(x))))

    def _options(self) -> dict:
        """What `involution2d` takes besides input and kernels."""
        return dict(
            stride=self.stride,
            padding=self.dilation * (self.kernel_size - 1) // 2,
            dilation=self.dilation,
            backend=self.backend,
        )

    def _plain_span(self) -> nn.Conv2d | None:
        """What spans the kernels, where nothing has replaced it or watches its calls.

        A parametrization is a class of its own; pruning and the older norms of weights
        are hooks; what changes calls without either sets ``forward`` of an instance.
        """
        if type(self.conv2) is not nn.Sequential or len(self.conv2) != 1:
            return None
        span = self.conv2[0]
        if type(span) is not nn.Conv2d:
            return None
        if (  # of all modules
            torch_module._global_forward_hooks
            or torch_module._global_forward_pre_hooks
            or torch_module._global_backward_hooks
            or torch_module._global_backward_pre_hooks
        ):
            return None
        geometry = (span.kernel_size, span.stride, span.padding, span.groups)
        if geometry != ((1, 1), (1, 1), (0, 0), 1):
            return None
        for module in (self.conv2, span):
            if hooked(module):
                return None
        return span

    def _unflatten(self, kernels: Tensor) -> Tensor:
        """[N, G*K*K, Ho, Wo] to [N, G, K, K, Ho, Wo]."""
        groups = self.channels // self.group_channels
        return kernels.unflatten(1, (groups, self.kernel_size, self.kernel_size))

    def _relate(self, x: Tensor) -> Tensor:
        """Kernels from queries, keys and positions."""
        options = self._options()
        query = self.query(self.avgpool(x)) * self.group_channels**-0.5
        positions = self._unflatten(self.position(query))
        logits = _add_products(positions, query, self.key(x), **options)
        if self.generator == 'dot_product':
            return logits
        logits = _mask_outside(logits, x, self.kernel_size, **options)
        return self._unflatten(logits.flatten(2, 3).softmax(2).flatten(1, 2))

    def extra_repr(self) -> str:
        """The arguments, as they are written in Python."""
        return (
            f'{self.channels}, kernel_size={self.kernel_size}, stride={self.stride}, '
            f'dilation={self.dilation}, group_channels={self.group_channels}, '
            f'reduction_ratio={self.reduction_ratio}, generator={self.generator!r}, '
            f'init={self.init!r}'
        )


def _add_products(
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    backend: str | None,
) -> Tensor:
    """Each query's product with each key of its window, added to `positions`."""
    # Involution is linear in its kernels: the gradient of <query, involution of key>
    # with respect to them is just that.
    pairs = ((v, v) for v in (stride, padding, dilation))
    return positions + grad_of_weight(
        query, key, positions.shape, *pairs, named_backend(backend)
    )


def _mask_outside(
    logits: Tensor,
    x: Tensor,
    kernel_size: int,
    stride: int,
    padding: int,
    dilation: int,
    **_,
) -> Tensor:
    """`logits` [N, G, K, K, Ho, Wo], minus infinity for taps outside the image `x`."""
    taps = (kernel_size, kernel_size, *logits.shape[4:])  # to unfold K is a constant
    # The middle tap is always inside.
    mask = outside(x, taps, stride, padding, dilation)
    return logits.masked_fill(mask, -torch.inf)


def hooked(module: nn.Module) -> bool:
    """Whether more than its forward method runs when a module is called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or 'forward' in module.__dict__
    )


# What asks tensors for more than torch.fx's proxies know is one node of its graphs.
for _name in ('check_input', 'spanned_involution2d', '_add_products', '_mask_outside'):
    torch.fx.wrap(_name)
