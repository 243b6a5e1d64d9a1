"""The involution module, built from MMEngine configs."""

from __future__ import annotations

from typing import Any

from mmcv.cnn import build_activation_layer, build_norm_layer
from mmengine.registry import MODELS
from torch import nn

from mmcls_involution import ops


@MODELS.register_module()
class Involution2d(ops.Involution2d):
    """:class:`mmcls_involution.ops.Involution2d` with norm and activation as configs.

    Args:
        channels (int): Number of input and output channels.
        norm_cfg (dict, optional): Norm layer. Defaults to None: ``dict(type='BN')``.
        act_cfg (dict, optional): Activation. Defaults to None:
            ``dict(type='ReLU', inplace=True)``.
        **kwargs: Further arguments of :class:`mmcls_involution.ops.Involution2d`.
    """

    def __init__(
        self,
        channels: int,
        norm_cfg: dict | None = None,
        act_cfg: dict | None = None,
        **kwargs: Any,
    ) -> None:
        norm_cfg = norm_cfg or dict(type='BN')
        act_cfg = act_cfg or dict(type='ReLU', inplace=True)
        super().__init__(
            channels,
            norm_layer=lambda features: build_norm_layer(norm_cfg, features)[1],
            act_layer=lambda: build_activation_layer(act_cfg),
            **kwargs,
        )

    def init_weights(self) -> None:
        """Start as ``init`` says, where an ``init_cfg`` around it means all Conv2d.

        Of the official start nothing is repeated: there, too, a neck or a head
        initializes the convolutions of its involutions by its own rule.
        """
        if self.init != 'official':
            self.reset_parameters()


class InvolutionConv(ops.InvolutionConv):
    """:class:`mmcls_involution.ops.InvolutionConv` around the involution of configs."""

    involution_type = Involution2d

    def init_weights(self) -> None:
        """See :meth:`Involution2d.init_weights`."""
        self.involution.init_weights()


@MODELS.register_module('InvolutionConv')
def involution_or_conv(
    in_channels: int,
    out_channels: int,
    kernel_size: int | tuple[int, int],
    *args: Any,
    involution_cfg: dict[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """What ``conv_cfg=dict(type='InvolutionConv', involution_cfg=...)`` builds.

    Args:
        in_channels (int): Number of input channels.
        out_channels (int): Number of output channels.
        kernel_size (int | tuple[int, int]): Side of the kernel in pixels.
        *args: Further arguments of a convolution.
        involution_cfg (dict, optional): Arguments of :class:`Involution2d`, but for
            channels, stride and dilation. ``init='identity'`` is lost where MMEngine's
            initialization passes the layer over, inside an ``nn.ModuleList`` such as
            RetinaHead's; docs/inference.md has an ``init_cfg`` for it. Defaults to
            None: its defaults, and the kernel size of the convolution.
        **kwargs: Further arguments of a convolution.

    Returns:
        nn.Module: A convolution if it is 1x1 or has groups, as inside a bottleneck or
        a depthwise separable convolution; an :class:`InvolutionConv` otherwise.

    Raises:
        ValueError: If an involution cannot stand in for the convolution.
    """
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, *args, **kwargs)
    if conv.kernel_size == (1, 1) or conv.groups > 1:
        return conv
    return InvolutionConv(
        *(in_channels, out_channels, kernel_size, *args),
        involution_cfg=involution_cfg,
        **kwargs,
    )
