"""Non-maximum suppression: ``nms``, ``softnms``, ``nms_match``, ``bbox_overlaps``."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import lane

# Boxes that are decided together. What they suppress is found for all later boxes at
# once, among themselves one after another.
BLOCK = 128


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """The boxes that no better kept box overlaps by more than the threshold.

    Args:
        boxes: ``[N, 4]``, x1, y1, x2, y2.
        scores: ``[N]``.
        iou_threshold: Boxes with a larger intersection over union are dropped.
        offset: Added to widths and heights, 0 or 1.

    Returns:
        Tensor: Indices (int64) of the kept boxes, best first.
    """
    if boxes.numel() == 0:
        return torch.empty(0, dtype=torch.long, device=boxes.device)
    dtype = lane.working_dtype(boxes, scores)
    boxes, scores = boxes.to(dtype), scores.to(dtype)
    # mmcv's C++ takes a float, which decides where the overlap is the threshold.
    iou_threshold = float(np.float32(iou_threshold))
    if offset == 0 and lane.serves(boxes):
        return torch.ops.torchvision.nms(boxes, scores, iou_threshold)
    order = scores.argsort(descending=True)  # equal scores in mmcv's order
    with lane.one_thread():
        kept = _greedy_nms(_columns(boxes[order], offset), iou_threshold, offset)
    return order[kept]


def _greedy_nms(rest: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Ranks of the boxes that are kept of `_columns` in the order of their scores."""
    ranks = torch.arange(rest.shape[1], device=rest.device)
    kept = []
    while len(ranks):
        block, rest = rest[:, :BLOCK], rest[:, BLOCK:]
        overlaps = (_ious(block, block, offset) > iou_threshold).cpu().numpy()
        keep = np.ones(len(overlaps), dtype=bool)
        for i in range(len(keep)):
            if keep[i]:
                keep[i + 1 :] &= ~overlaps[i, i + 1 :]
        keep = torch.from_numpy(keep).to(rest.device)
        kept.append(ranks[:BLOCK][keep])
        left = ~(_ious(block[:, keep], rest, offset) > iou_threshold).any(0)
        ranks, rest = ranks[BLOCK:][left], rest[:, left]
    return torch.cat(kept)


def _columns(boxes: Tensor, offset: int) -> Tensor:
    """x1, y1, x2, y2 and area of boxes ``[N, 4]``, as rows: ``[5, N]``."""
    x1, y1, x2, y2 = boxes.unbind(1)
    return torch.stack([x1, y1, x2, y2, (x2 - x1 + offset) * (y2 - y1 + offset)])


def _intersections(a: Tensor, b: Tensor, offset: int) -> Tensor:
    """Areas that boxes share, for columns whose boxes broadcast."""
    width = torch.minimum(a[2], b[2]).sub_(torch.maximum(a[0], b[0]))
    height = torch.minimum(a[3], b[3]).sub_(torch.maximum(a[1], b[1]))
    return width.add_(offset).clamp_(min=0).mul_(height.add_(offset).clamp_(min=0))


def _ious(a: Tensor, b: Tensor, offset: int) -> Tensor:
    """Intersections over unions ``[N, M]`` of columns ``[5, N]`` and ``[5, M]``."""
    a = a[:, :, None]
    inter = _intersections(a, b, offset)
    return inter / (a[4] + b[4] - inter)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft-NMS (arXiv 1704.04503): overlapping boxes lose score, not their place.

    Args:
        boxes: ``[N, 4]``, on the CPU.
        scores: ``[N]``.
        dets: ``[N, 5]``; its first rows receive boxes and new scores.
        iou_threshold: Where the score begins to fall (methods 0 and 1).
        sigma: Width of the Gaussian (method 2).
        min_score: A box whose score falls below it is dropped.
        method: 0 drops, 1 multiplies by ``1 - iou``, 2 by ``exp(-iou**2 / sigma)``.
        offset: Added to widths and heights, 0 or 1.

    Returns:
        Tensor: Indices (int64) of the boxes in the order of their choice.
    """
    dtype = lane.working_dtype(boxes, scores)
    columns = _columns(boxes.detach().to(dtype), offset)
    # rows x1, y1, x2, y2, area, score, index
    table = torch.cat([columns, scores.detach()[None].to(dtype)]).numpy().copy()
    index = np.arange(len(scores))
    iou_threshold, sigma, min_score = np.array(
        [iou_threshold, sigma, min_score], dtype=np.float32
    ).astype(table.dtype)
    n = table.shape[1]
    i = 0
    while i < n:
        # A score that is not a number stays where it is.
        best = i if np.isnan(table[5, i]) else i + np.nanargmax(table[5, i:n])
        if best != i:
            table[:, [i, best]] = table[:, [best, i]]
            index[[i, best]] = index[[best, i]]
        x1, y1, x2, y2, area, _ = table[:, i]
        others = table[:, i + 1 : n]
        width = np.minimum(x2, others[2]) - np.maximum(x1, others[0]) + offset
        height = np.minimum(y2, others[3]) - np.maximum(y1, others[1]) + offset
        inter = np.maximum(width, 0) * np.maximum(height, 0)
        with np.errstate(divide='ignore', invalid='ignore'):
            iou = inter / (area + others[4] - inter)
        if method == 2:
            others[5] *= np.exp(-(iou * iou) / sigma)
        else:
            others[5] *= np.where(iou >= iou_threshold, (1 - iou) * method, 1)
        # mmcv fills the place of a dropped box with the last one, which decides
        # between equal scores later.
        i += 1
        bad = others[5] < min_score
        if bad.any():
            count = int((~bad).sum())
            holes = np.flatnonzero(bad[:count])
            fillers = np.flatnonzero(~bad[count:])[::-1] + count
            others[:, holes] = others[:, fillers]
            index[i + holes] = index[i + fillers]
            n = i + count
    dets[:n] = torch.from_numpy(table[[0, 1, 2, 3, 5], :n].T).to(dets)
    return torch.from_numpy(index[:n].copy())


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Groups of a kept box and those that it suppresses.

    Args:
        dets: Boxes with scores ``[N, 5]``.
        iou_threshold: Boxes with at least this intersection over union are suppressed.

    Returns:
        list[list[int]]: One list for each kept box, best first: its index, then the
        suppressed ones by falling score.
    """
    boxes = dets.detach().cpu().to(lane.working_dtype(dets))
    rest = boxes[:, 4].argsort(descending=True)
    columns = _columns(boxes[:, :4], 0)
    threshold = float(np.float32(iou_threshold))
    groups = []
    while len(rest):
        best, rest = rest[:1], rest[1:]
        near = _ious(columns[:, best], columns[:, rest], 0)[0] >= threshold
        groups.append(best.tolist() + rest[near].tolist())
        rest = rest[~near]
    return groups


def bbox_overlaps(
    bboxes1: Tensor,
    bboxes2: Tensor,
    ious: Tensor,
    mode: int,
    aligned: bool,
    offset: int,
) -> None:
    """Overlaps of two sets of boxes, written into ``ious``.

    Args:
        bboxes1: ``[N, 4]``.
        bboxes2: ``[M, 4]``; ``[N, 4]`` if aligned.
        ious: ``[N, M]``; ``[N]`` if aligned.
        mode: 0 divides by the union, 1 by the first area.
        aligned: Whether box i meets box i alone.
        offset: Added to widths and heights, 0 or 1.
    """
    dtype = lane.working_dtype(bboxes1, bboxes2)
    a, b = (_columns(boxes.to(dtype), offset) for boxes in (bboxes1, bboxes2))
    if not aligned:
        a = a[:, :, None]
    inter = _intersections(a, b, offset)
    ious.copy_(inter / (a[4] + b[4] - inter if mode == 0 else a[4]))
