"""FCN mask head with involutions."""

from __future__ import annotations

from typing import Any

from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmengine.model import ModuleList, Sequential
from mmengine.registry import MODELS
from torch import nn

from ...layers import Involution2d


@MODELS.register_module()
class InvolutionFCNMaskHead(FCNMaskHead):
    """FCN mask head whose 3x3 convolutions are involutions.

    Args:
        num_convs (int): Number of involutions, each followed by a ReLU.
            Defaults to 4.
        in_channels (int): Channels of the region features. Defaults to 256.
        conv_out_channels (int): Channels behind the involutions, which keep their
            number: the same as ``in_channels``. Defaults to 256.
        involution_cfg (dict, optional): Arguments of :class:`Involution2d`.
            Defaults to None: its defaults (kernel_size 7).
        **kwargs: Further arguments of FCNMaskHead, without ``conv_kernel_size``,
            ``conv_cfg`` and ``norm_cfg``, which an involution has no use for.

    Raises:
        ValueError: If ``conv_out_channels`` differs from ``in_channels``, or
            ``conv_kernel_size``, ``conv_cfg`` or ``norm_cfg`` is set.
    """

    def __init__(
        self,
        num_convs: int = 4,
        *,
        in_channels: int = 256,
        conv_out_channels: int = 256,
        involution_cfg: dict | None = None,
        **kwargs: Any,
    ) -> None:
        for name in ('conv_kernel_size', 'conv_cfg', 'norm_cfg'):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f'InvolutionFCNMaskHead does not take {name}, got {kwargs[name]}; '
                    'its layers are involutions, set by involution_cfg'
                )
        if conv_out_channels != in_channels:
            raise ValueError(
                'InvolutionFCNMaskHead needs conv_out_channels equal to in_channels, '
                'because an involution keeps their number, got '
                f'{conv_out_channels} and {in_channels}'
            )
        super().__init__(
            num_convs,
            in_channels=in_channels,
            conv_out_channels=conv_out_channels,
            **kwargs,
        )
        self.convs = ModuleList(
            Sequential(
                Involution2d(in_channels, **(involution_cfg or {})),
                nn.ReLU(inplace=True),
            )
            for _ in range(num_convs)
        )
