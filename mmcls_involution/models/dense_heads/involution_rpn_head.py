"""RPN head with an involution."""

from __future__ import annotations

from typing import Any

from mmdet.models.dense_heads import RPNHead
from mmengine.registry import MODELS

from ..layers import Involution2d


@MODELS.register_module()
class InvolutionRPNHead(RPNHead):
    """RPN head whose 3x3 convolution is an involution.

    Args:
        in_channels (int): Channels of the feature maps.
        feat_channels (int): Channels behind the involution, which keeps their
            number: the same as ``in_channels``. Defaults to 256.
        involution_cfg (dict, optional): Arguments of :class:`Involution2d`.
            Defaults to None: its defaults (kernel_size 7).
        init_cfg (dict | list[dict], optional): Initialization. Defaults to None:
            a normal distribution of std 0.01 for the two predictors, while the
            involution keeps its own, as in the official code.
        **kwargs: Further arguments of RPNHead, without ``num_convs``.

    Raises:
        ValueError: If ``feat_channels`` differs from ``in_channels``, or
            ``num_convs`` is set to anything but 1.
    """

    def __init__(
        self,
        in_channels: int,
        feat_channels: int = 256,
        *,
        involution_cfg: dict | None = None,
        init_cfg: dict | list[dict] | None = None,
        **kwargs: Any,
    ) -> None:
        if feat_channels != in_channels:
            raise ValueError(
                'InvolutionRPNHead needs feat_channels equal to in_channels, because '
                f'an involution keeps their number, got {feat_channels} and '
                f'{in_channels}'
            )
        if kwargs.get('num_convs', 1) != 1:
            raise ValueError(
                'InvolutionRPNHead has one involution, set by involution_cfg; it does '
                f'not take num_convs, got {kwargs["num_convs"]}'
            )
        self.involution_cfg = involution_cfg or {}
        super().__init__(
            in_channels=in_channels,
            feat_channels=feat_channels,
            init_cfg=init_cfg
            or [
                dict(type='Normal', std=0.01, override=dict(name='rpn_cls')),
                dict(type='Normal', std=0.01, override=dict(name='rpn_reg')),
            ],
            **kwargs,
        )

    def _init_layers(self) -> None:
        super()._init_layers()
        self.rpn_conv = Involution2d(self.in_channels, **self.involution_cfg)
