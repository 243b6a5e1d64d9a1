"""RoIAlign and RoIPool, forward and backward.

A bilinear sample is a product of two weightings, one along y and one along x, and so is
the mean of a bin's samples. RoIAlign in plain torch is therefore two small matrix
products for each RoI, ``Wy @ crop @ Wx.T``, and its gradient the transposed ones: no
scatter, the same result every time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import lane

# What mmcv's kernels begin a maximum with.
LOWEST = -10000.0


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Pool RoIs by bilinear samples (Mask R-CNN, arXiv 1703.06870).

    Args:
        input: Features ``[B, C, H, W]`` in any memory format.
        rois: ``[N, 5]``: index of the image, then x1, y1, x2, y2 in the image's pixels.
        output: ``[N, C, aligned_height, aligned_width]``, receives the result.
        argmax_y: Like the output, receives for ``pool_mode`` 0 the number of the
            largest sample in its bin along y, -1 for none.
        argmax_x: The same along x.
        aligned_height: Bins along y.
        aligned_width: Bins along x.
        spatial_scale: Features per pixel of the image.
        sampling_ratio: Samples along each side of a bin; 0 for one per feature.
        pool_mode: 0 takes the largest sample, 1 the mean.
        aligned: Whether pixel centres lie at halves.

    Raises:
        ValueError: On the CPU, if a RoI is not finite, has a negative size (and is
            aligned) or names an image that is not in the batch.
    """
    if rois.shape[0] == 0 or input.numel() == 0:
        return
    geometry = (aligned_height, aligned_width, spatial_scale, sampling_ratio, aligned)
    dtype = lane.working_dtype(input)
    features, rois = input.to(dtype), rois.to(dtype)
    _check(rois, len(input), aligned)
    if pool_mode == 0:
        with lane.one_thread():
            _max_forward(features, rois, output, argmax_y, argmax_x, geometry)
    elif lane.serves(input):
        output.copy_(
            torch.ops.torchvision.roi_align(
                features.contiguous(),
                rois,
                spatial_scale,
                aligned_height,
                aligned_width,
                sampling_ratio,
                aligned,
            )
        )
    else:
        pixels = features.permute(0, 2, 3, 1).contiguous()
        result = pixels.new_zeros(
            len(rois), aligned_height, aligned_width, pixels.shape[3]
        )
        with lane.one_thread():
            for roi, crop, along_y, along_x in _crops(rois, pixels, geometry):
                rows = (along_y @ crop.flatten(1)).unflatten(1, crop.shape[1:])
                torch.matmul(along_x, rows, out=result[roi])
        output.copy_(result.permute(0, 3, 1, 2))


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Add the gradient of `roi_align_forward` to ``grad_input``."""
    if rois.shape[0] == 0 or grad_input.numel() == 0:
        return
    geometry = (aligned_height, aligned_width, spatial_scale, sampling_ratio, aligned)
    dtype = lane.working_dtype(grad_output)
    gradient, rois = grad_output.to(dtype), rois.to(dtype)
    if pool_mode == 0:
        _max_backward(gradient, rois, argmax_y, argmax_x, grad_input, geometry)
    elif lane.serves(grad_output):
        grad_input += torch.ops.torchvision._roi_align_backward(
            gradient,
            rois,
            spatial_scale,
            aligned_height,
            aligned_width,
            *grad_input.shape,
            sampling_ratio,
            aligned,
        )
    else:
        batch, channels, height, width = grad_input.shape
        pixels = gradient.new_zeros(batch, height, width, channels)
        gradient = gradient.permute(0, 2, 3, 1).contiguous()
        with lane.one_thread():
            for roi, crop, along_y, along_x in _crops(rois, pixels, geometry):
                columns = along_x.T @ gradient[roi]
                crop.flatten(1).addmm_(along_y.T, columns.flatten(1))
        grad_input += pixels.permute(0, 3, 1, 2)


def _check(rois: Tensor, batch: int, aligned: bool) -> None:
    if rois.device.type != 'cpu':
        return  # it would wait for the device
    index, boxes = rois[:, 0], rois[:, 1:]
    wrong = ~torch.isfinite(rois).all(1) | (index < 0) | (index >= batch)
    if aligned:
        wrong |= (boxes[:, 2:] < boxes[:, :2]).any(1)
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise ValueError(
            f'RoI {first} is {rois[first].tolist()}: expected are the index of an '
            f'image below {batch} and finite x1 <= x2, y1 <= y2'
        )


class _Samples(NamedTuple):
    """The samples of all RoIs along one axis; ``[N, bins, samples]`` each."""

    inside: Tensor  # exists, and lies less than a pixel outside of the features
    low: Tensor  # the neighbour below ...
    high: Tensor  # ... and above
    above: Tensor  # the share of the one above
    count: Tensor  # [N], the samples of a bin


def _samples(
    begin: Tensor, end: Tensor, bins: int, size: int, geometry: tuple
) -> _Samples:
    """Where the samples lie along one axis, in the order of mmcv's operations."""
    _, _, scale, sampling_ratio, aligned = geometry
    shift = 0.5 if aligned else 0.0
    scale = torch.tensor(scale, dtype=begin.dtype).item()
    start, stop = begin * scale - shift, end * scale - shift
    extent = stop - start
    if not aligned:
        extent = extent.clamp(min=1)
    if sampling_ratio > 0:
        count = torch.full_like(extent, sampling_ratio)
    else:
        count = (extent / bins).float().ceil().clamp(min=0).to(extent)
    step = (extent / bins)[:, None]
    number = torch.arange(max(int(count.max()), 1)).to(extent)
    bin_start = start[:, None] + torch.arange(bins).to(extent) * step
    within = (number + 0.5) * step / count.clamp(min=1)[:, None]
    position = bin_start[:, :, None] + within[:, None, :]
    inside = (position >= -1) & (position <= size)
    inside &= (number < count[:, None])[:, None, :]
    position = position.clamp(0, size - 1)
    low = position.floor()
    high = (low + 1).clamp(max=size - 1)
    return _Samples(inside, low.long(), high.long(), position - low, count)


def _samples_of(
    rois: Tensor, height: int, width: int, geometry: tuple
) -> tuple[_Samples, _Samples]:
    """The samples along y and along x."""
    _, x1, y1, x2, y2 = rois.unbind(1)
    return (
        _samples(y1, y2, geometry[0], height, geometry),
        _samples(x1, x2, geometry[1], width, geometry),
    )


def _weights(samples: _Samples, size: int) -> tuple[Tensor, list[int], list[int]]:
    """The mean of each bin as a matrix ``[N, bins, size]``, and its columns in use."""
    share = samples.inside / samples.count.clamp(min=1)[:, None, None]
    matrix = share.new_zeros(*share.shape[:2], size)
    matrix.scatter_add_(2, samples.low, (1 - samples.above) * share)
    matrix.scatter_add_(2, samples.high, samples.above * share)
    begin = samples.low.masked_fill(~samples.inside, size).flatten(1).amin(1)
    end = samples.high.masked_fill(~samples.inside, -1).flatten(1).amax(1) + 1
    return matrix, begin.tolist(), end.tolist()


def _crops(rois: Tensor, pixels: Tensor, geometry: tuple):
    """Each RoI with the part ``[h, w, C]`` that it reads of ``[B, H, W, C]``.

    Yields:
        tuple: Index of the RoI, the part (a view), and the weights ``[bins, h]`` and
        ``[bins, w]`` along y and x. A RoI that reads nothing is left out.
    """
    _, height, width, _ = pixels.shape
    along_y, along_x = _samples_of(rois, height, width, geometry)
    along_y, top, bottom = _weights(along_y, height)
    along_x, left, right = _weights(along_x, width)
    images = rois[:, 0].long().tolist()
    for roi, (image, y1, y2, x1, x2) in enumerate(
        zip(images, top, bottom, left, right, strict=True)
    ):
        if y1 < y2 and x1 < x2:
            crop = pixels[image, y1:y2, x1:x2]
            yield roi, crop, along_y[roi, :, y1:y2], along_x[roi, :, x1:x2]


def _max_forward(
    features: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    geometry: tuple,
) -> None:
    """Values in mmcv's order of operations, since ties decide where gradients go."""
    *_, height, width = features.shape
    ys, xs = _samples_of(rois, height, width, geometry)
    flat = features.flatten(2)
    counts_y, counts_x = ys.count.long().tolist(), xs.count.long().tolist()
    for roi, image in enumerate(rois[:, 0].long().tolist()):
        ny, nx = counts_y[roi], counts_x[roi]
        if ny * nx == 0:
            output[roi], argmax_y[roi], argmax_x[roi] = LOWEST, -1, -1
            continue
        # y runs along dimensions 0 (bin) and 2 (sample), x along 1 and 3
        y_low, y_high, y_above = (
            part[roi, :, None, :ny, None] for part in (ys.low, ys.high, ys.above)
        )
        x_low, x_high, x_above = (
            part[roi, None, :, None, :nx] for part in (xs.low, xs.high, xs.above)
        )
        inside = ys.inside[roi, :, None, :ny, None] & xs.inside[roi, None, :, None, :nx]
        value = 0
        for y, y_share in ((y_low, 1 - y_above), (y_high, y_above)):
            for x, x_share in ((x_low, 1 - x_above), (x_high, x_above)):
                value = value + (y_share * x_share) * flat[image][:, y * width + x]
        value = torch.where(inside, value, 0).flatten(3)
        best, first = _first_max(value, 3)
        found = best > LOWEST
        output[roi] = best.clamp(min=LOWEST)
        argmax_y[roi] = torch.where(found, first // nx, -1).to(argmax_y)
        argmax_x[roi] = torch.where(found, first % nx, -1).to(argmax_x)


def _max_backward(
    gradient: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    geometry: tuple,
) -> None:
    batch, channels, height, width = grad_input.shape
    found = argmax_y >= 0
    shares = []
    for samples, number in zip(
        _samples_of(rois, height, width, geometry), (argmax_y, argmax_x), strict=True
    ):
        # the sample `number` of each bin: [N, C, bins along y, bins along x]
        along_y = number is argmax_y
        roi = torch.arange(len(rois), device=rois.device)[:, None, None, None]
        bins = torch.arange(samples.low.shape[1], device=rois.device)
        place = (roi, bins[:, None] if along_y else bins, number.clamp(min=0).long())
        found = found & samples.inside[place]
        above = samples.above[place]
        shares.append(((samples.low[place], 1 - above), (samples.high[place], above)))
    image = rois[:, 0].long()[:, None, None, None] * channels
    plane = image + torch.arange(channels, device=rois.device)[:, None, None]
    total = gradient.new_zeros(grad_input.numel())
    gradient = torch.where(found, gradient, 0)
    for y, y_share in shares[0]:
        for x, x_share in shares[1]:
            index = (plane * height + y) * width + x
            total.index_add_(
                0, index.flatten(), (gradient * (y_share * x_share)).flatten()
            )
    grad_input += total.view_as(grad_input)


def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Pool RoIs by the largest feature of each bin (Fast R-CNN, arXiv 1504.08083).

    As mmcv's kernel, which rounds bins outwards and not the RoIs; torchvision's rounds
    the RoIs.

    Args:
        input: Features ``[B, C, H, W]``.
        rois: ``[N, 5]``: index of the image, then x1, y1, x2, y2 in the image's pixels.
        output: ``[N, C, pooled_height, pooled_width]``, receives the result; an empty
            bin gives 0.
        argmax: Like the output (int32), receives the place of the largest feature in
            its plane, -1 for none.
        pooled_height: Bins along y.
        pooled_width: Bins along x.
        spatial_scale: Features per pixel of the image.

    Raises:
        ValueError: On the CPU, if a RoI is not finite or names an image that is not in
            the batch.
    """
    output.zero_()
    argmax.fill_(-1)
    if rois.shape[0] == 0 or input.numel() == 0:
        return
    dtype = lane.working_dtype(input)
    features, rois = input.to(dtype), rois.to(dtype)
    _check(rois, len(input), aligned=False)
    *_, height, width = input.shape
    spatial_scale = torch.tensor(spatial_scale, dtype=dtype).item()

    def spans(begin: Tensor, end: Tensor, bins: int, size: int) -> list:
        start, stop = begin * spatial_scale, (end + 1) * spatial_scale
        step = ((stop - start) / bins)[:, None]
        number = torch.arange(bins).to(step)
        low = (number * step + start[:, None]).floor().clamp(0, size).long()
        high = ((number + 1) * step + start[:, None]).ceil().clamp(0, size).long()
        empty = (stop <= start)[:, None]
        return torch.stack([low, high.masked_fill(empty, 0)], 2).tolist()

    index, x1, y1, x2, y2 = rois.unbind(1)
    spans_y = spans(y1, y2, pooled_height, height)
    spans_x = spans(x1, x2, pooled_width, width)
    with lane.one_thread():
        for roi, image in enumerate(index.long().tolist()):
            # Along x, then along y: the first of equal features in reading order.
            for px, (left, right) in enumerate(spans_x[roi]):
                if left >= right:
                    continue
                value, x = _first_max(features[image, :, :, left:right], 2)
                for py, (top, bottom) in enumerate(spans_y[roi]):
                    if top >= bottom:
                        continue
                    best, y = _first_max(value[:, top:bottom], 1)
                    column = left + x[:, top:bottom].gather(1, y[:, None])[:, 0]
                    output[roi, :, py, px] = best.to(output)
                    argmax[roi, :, py, px] = ((y + top) * width + column).to(argmax)


def _first_max(tensor: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The largest values along a dimension, and where the first of them stands."""
    best = tensor.amax(dim, keepdim=True)
    size = tensor.shape[dim]
    shape = [1] * tensor.dim()
    shape[dim] = size
    number = torch.arange(size, device=tensor.device).view(shape)
    return best.squeeze(dim), torch.where(tensor == best, number, size).amin(dim)


def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Add the gradient of `roi_pool_forward` to ``grad_input``."""
    if rois.shape[0] == 0 or grad_input.numel() == 0:
        return
    _, channels, height, width = grad_input.shape
    image = rois[:, 0].long()[:, None, None, None] * channels
    plane = image + torch.arange(channels, device=rois.device)[:, None, None]
    index = plane * (height * width) + argmax.clamp(min=0)
    dtype = lane.working_dtype(grad_output)
    gradient = torch.where(argmax >= 0, grad_output.to(dtype), 0)
    total = gradient.new_zeros(grad_input.numel())
    total.index_add_(0, index.flatten(), gradient.flatten())
    grad_input += total.view_as(grad_input)
