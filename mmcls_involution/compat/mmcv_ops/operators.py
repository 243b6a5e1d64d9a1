"""The table of what ``mmcv._ext`` provides."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import deform_conv, dense, focal_loss, nms, roi


def get_compiler_version() -> str:
    """What mmcv's environment report prints of its compiler."""
    return 'none: operators of mmcls_involution'


def get_compiling_cuda_version() -> str:
    """What mmcv says of a build without CUDA."""
    return 'not available'


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compute in the tensors' dtypes, as compiled code does, which sees no autocast."""

    @functools.wraps(function)
    def operator(*args: Any, **kwargs: Any) -> Any:
        values = (*args, *kwargs.values())
        device = next(v for v in values if isinstance(v, Tensor)).device.type
        if not torch.amp.is_autocast_available(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return operator


_FUNCTIONS: tuple[Callable[..., Any], ...] = (
    nms.nms,
    nms.softnms,
    nms.nms_match,
    nms.bbox_overlaps,
    roi.roi_align_forward,
    roi.roi_align_backward,
    roi.roi_pool_forward,
    roi.roi_pool_backward,
    focal_loss.sigmoid_focal_loss_forward,
    focal_loss.sigmoid_focal_loss_backward,
    focal_loss.softmax_focal_loss_forward,
    focal_loss.softmax_focal_loss_backward,
    deform_conv.deform_conv_forward,
    deform_conv.deform_conv_backward_input,
    deform_conv.deform_conv_backward_parameters,
    deform_conv.modulated_deform_conv_forward,
    deform_conv.modulated_deform_conv_backward,
    dense.carafe_naive_forward,
    dense.carafe_naive_backward,
    dense.carafe_forward,
    dense.carafe_backward,
    dense.masked_im2col_forward,
    dense.masked_col2im_forward,
    dense.psamask_forward,
    dense.psamask_backward,
    dense.ms_deform_attn_forward,
    dense.ms_deform_attn_backward,
)
OPERATORS: dict[str, Callable[..., Any]] = {
    function.__name__: _without_autocast(function) for function in _FUNCTIONS
}
