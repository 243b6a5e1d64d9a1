"""FPN with involutions on its outputs."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from mmengine.model import ModuleList
from mmengine.registry import MODELS

from ..layers import Involution2d

# The two FPNs agree but for end_level (inclusive in mmdet, exclusive in mmseg) and
# add_extra_convs=True ('on_input' in mmdet, 'on_output' in mmseg).
if find_spec('mmdet'):
    from mmdet.models.necks import FPN
else:
    from mmseg.models.necks import FPN


@MODELS.register_module()
class InvolutionFPN(FPN):
    """FPN whose 3x3 output convolutions are involutions.

    Only those of the backbone's levels: the extra stride-2 levels that RetinaNet
    adds, and the 1x1 lateral layers, stay convolutions, as in the paper. Serves
    MMDetection and MMSegmentation; arguments are those of MMDetection's FPN where it
    is installed, else of MMSegmentation's.

    Args:
        in_channels (list[int]): Channels of the backbone's levels.
        out_channels (int): Channels of every output level.
        num_outs (int): Number of output levels.
        involution_cfg (dict, optional): Arguments of :class:`Involution2d`.
            Defaults to None: its defaults (kernel_size 7).
        **kwargs: Further arguments of FPN, without ``conv_cfg`` and ``act_cfg``,
            which an involution has no use for. ``norm_cfg`` is that of the lateral
            layers and the extra levels; nothing follows the involutions, whose own
            norm is set by ``involution_cfg``.

    Raises:
        ValueError: If ``conv_cfg`` or ``act_cfg`` is set.
    """

    def __init__(
        self,
        in_channels: list[int],
        out_channels: int,
        num_outs: int,
        *,
        involution_cfg: dict | None = None,
        **kwargs: Any,
    ) -> None:
        for name in ('conv_cfg', 'act_cfg'):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f'InvolutionFPN does not take {name}, got {kwargs[name]}; its '
                    'output layers are involutions, set by involution_cfg'
                )
        super().__init__(in_channels, out_channels, num_outs, **kwargs)
        levels = len(self.lateral_convs)
        self.fpn_convs = ModuleList(
            [
                *(
                    Involution2d(out_channels, **(involution_cfg or {}))
                    for _ in range(levels)
                ),
                *self.fpn_convs[levels:],
            ]
        )
