"""Operators on whole feature maps, in plain torch.

CARAFE (arXiv 1905.02188), masked convolution, the masks of PSANet (ECCV 2018) and
multi-scale deformable attention (arXiv 2010.04159).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import lane


def _carafe(
    features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale: int
) -> Tensor:
    n, c, h, w = features.shape
    windows = F.unfold(features, kernel_size, padding=kernel_size // 2)
    windows = windows.view(n, group_size, c // group_size, kernel_size**2, h, w)
    masks = masks.reshape(n, group_size, kernel_size**2, h, scale, w, scale)
    # a product of matrices at each input pixel: [C / group, K * K] @ [K * K, scale**2]
    output = windows.permute(0, 1, 4, 5, 2, 3) @ masks.permute(
        0, 1, 3, 5, 2, 4, 6
    ).flatten(5)
    output = output.view(n, group_size, h, w, c // group_size, scale, scale)
    return output.permute(0, 1, 4, 2, 5, 3, 6).reshape(n, c, h * scale, w * scale)


def carafe_naive_forward(
    features: Tensor,
    masks: Tensor,
    output: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Upsample, each output pixel by a kernel of its own over the input.

    Args:
        features: ``[N, C, H, W]``.
        masks: ``[N, group_size * kernel_size**2, H * scale_factor, W * scale_factor]``.
        output: ``[N, C, H * scale_factor, W * scale_factor]``, receives the result.
        kernel_size: Odd side of the kernels.
        group_size: Groups of channels that share kernels.
        scale_factor: How much larger the output is.
    """
    dtype = lane.working_dtype(features, masks)
    tensors = features.to(dtype), masks.to(dtype)
    output.copy_(_carafe(*tensors, kernel_size, group_size, scale_factor))


def carafe_naive_backward(
    top_grad: Tensor,
    features: Tensor,
    masks: Tensor,
    bottom_grad: Tensor,
    mask_grad: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Write the gradients by features and masks."""
    dtype = lane.working_dtype(features, masks)
    with torch.enable_grad():
        leaves = [tensor.detach().to(dtype) for tensor in (features, masks)]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        output = _carafe(*leaves, kernel_size, group_size, scale_factor)
        gradients = torch.autograd.grad(output, leaves, top_grad.to(dtype))
    bottom_grad.copy_(gradients[0])
    mask_grad.copy_(gradients[1])


def carafe_forward(
    features: Tensor,
    masks: Tensor,
    rfeatures: Tensor,
    routput: Tensor,
    rmasks: Tensor,
    output: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """As `carafe_naive_forward`; ``rfeatures`` keeps the features for the gradient."""
    rfeatures.copy_(features)
    carafe_naive_forward(features, masks, output, kernel_size, group_size, scale_factor)


def carafe_backward(
    top_grad: Tensor,
    rfeatures: Tensor,
    masks: Tensor,
    rtop_grad: Tensor,
    rbottom_grad_hs: Tensor,
    rbottom_grad: Tensor,
    rmask_grad: Tensor,
    bottom_grad: Tensor,
    mask_grad: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """As `carafe_naive_backward`, from the features that `carafe_forward` kept."""
    carafe_naive_backward(
        top_grad,
        rfeatures,
        masks,
        bottom_grad,
        mask_grad,
        kernel_size,
        group_size,
        scale_factor,
    )


def masked_im2col_forward(
    im: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    col: Tensor,
    kernel_h: int,
    kernel_w: int,
    pad_h: int,
    pad_w: int,
) -> None:
    """The windows at chosen places, written into ``col``.

    Args:
        im: ``[1, C, H, W]``.
        mask_h_idx: Rows of the places ``[M]``.
        mask_w_idx: Columns of the places ``[M]``.
        col: ``[C * kernel_h * kernel_w, M]``.
        kernel_h, kernel_w, pad_h, pad_w: Height and width of window and padding.
    """
    windows = F.unfold(im, (kernel_h, kernel_w), padding=(pad_h, pad_w))[0]
    width = im.shape[3] + 2 * pad_w - kernel_w + 1
    col.copy_(windows[:, mask_h_idx * width + mask_w_idx])


def masked_col2im_forward(
    col: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    im: Tensor,
    height: int,
    width: int,
    channels: int,
) -> None:
    """Write columns ``[C, M]`` to the chosen places of ``im`` ``[1, C, H, W]``."""
    im[0, :, mask_h_idx, mask_w_idx] = col.view(channels, -1).to(im)


def _psa_places(
    h_feature: int, w_feature: int, mask_size: tuple[int, int], half: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """For a pixel p and another q: the entry of p's mask that lies on q, if any.

    Returns:
        tuple[Tensor, Tensor]: Entries (0 where there is none) and whether there is
        one, ``[h_feature * w_feature (q), h_feature * w_feature (p)]``.
    """
    rows = torch.arange(h_feature).repeat_interleave(w_feature)
    columns = torch.arange(w_feature).repeat(h_feature)
    dy = rows[:, None] - rows + half[0]
    dx = columns[:, None] - columns + half[1]
    there = (dy >= 0) & (dy < mask_size[0]) & (dx >= 0) & (dx < mask_size[1])
    return torch.where(there, dy * mask_size[1] + dx, 0), there


def psamask_forward(
    input: Tensor,
    output: Tensor,
    psa_type: int,
    num_: int,
    h_feature: int,
    w_feature: int,
    h_mask: int,
    w_mask: int,
    half_h_mask: int,
    half_w_mask: int,
) -> None:
    """Lay each pixel's mask over the feature map, centred on the pixel.

    Args:
        input: Masks ``[num_, h_mask * w_mask, h_feature, w_feature]``.
        output: ``[num_, h_feature * w_feature, h_feature, w_feature]``, receives for
            ``psa_type`` 0 (collect) pixel q's value in p's mask at ``[:, q, p]``, for
            1 (distribute) at ``[:, p, q]``.
        psa_type: 0 or 1.
        num_, h_feature, w_feature: The sizes above.
        h_mask, w_mask, half_h_mask, half_w_mask: Sizes of the mask and its middle.
    """
    place, there = _psa_places(
        h_feature, w_feature, (h_mask, w_mask), (half_h_mask, half_w_mask)
    )
    place, there = place.to(input.device), there.to(input.device)
    masks = input.flatten(2)
    laid = torch.where(there, masks.gather(1, place.expand(num_, -1, -1)), 0)
    output.copy_((laid if psa_type == 0 else laid.mT).view_as(output))


def psamask_backward(
    grad_output: Tensor,
    grad_input: Tensor,
    psa_type: int,
    num_: int,
    h_feature: int,
    w_feature: int,
    h_mask: int,
    w_mask: int,
    half_h_mask: int,
    half_w_mask: int,
) -> None:
    """Write the gradient of `psamask_forward` into ``grad_input``."""
    place, there = _psa_places(
        h_feature, w_feature, (h_mask, w_mask), (half_h_mask, half_w_mask)
    )
    place, there = place.to(grad_output.device), there.to(grad_output.device)
    gradient = grad_output.flatten(2)
    gradient = torch.where(there, gradient if psa_type == 0 else gradient.mT, 0)
    total = torch.zeros_like(grad_input.flatten(2))
    total.scatter_add_(1, place.expand(num_, -1, -1), gradient.to(total))
    grad_input.copy_(total.view_as(grad_input))


def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Multi-scale deformable attention by mmcv's own form in plain torch.

    Returns:
        Tensor: ``[N, queries, channels]``.
    """
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    dtype = lane.working_dtype(value)
    output = multi_scale_deformable_attn_pytorch(
        value.to(dtype),
        value_spatial_shapes,
        sampling_locations.to(dtype),
        attention_weights.to(dtype),
    )
    return output.to(value.dtype)


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Write the gradients of `ms_deform_attn_forward`."""
    with torch.enable_grad():
        leaves = [
            tensor.detach().requires_grad_()
            for tensor in (value, sampling_locations, attention_weights)
        ]
        output = ms_deform_attn_forward(
            leaves[0], value_spatial_shapes, None, *leaves[1:], im2col_step
        )
        gradients = torch.autograd.grad(output, leaves, grad_output)
    for target, gradient in zip(
        (grad_value, grad_sampling_loc, grad_attn_weight), gradients, strict=True
    ):
        target.copy_(gradient)
