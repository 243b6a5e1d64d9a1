"""The involution module, built from MMEngine configs."""

from __future__ import annotations

from typing import Any

from mmcv.cnn import build_activation_layer, build_norm_layer
from mmengine.registry import MODELS

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
