"""Detectors whose boxes are part of the graph, by NonMaxSuppression and RoiAlign.

What MMDetection's heads do after their convolutions asks Python how many boxes there
are, which no graph can. Here every number of boxes is fixed: too few are filled up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcls_involution.deployment.nodes import non_max_suppression, roi_align
from mmcls_involution.deployment.runtime import detections
from mmcls_involution.deployment.wrappers import Exported
from mmcls_involution.engine.errors import UserError

BOXES = ('dets', 'labels', 'masks')
ALIKE = 0.1  # pixels between the edges of the same box from two runtimes
UNSURE = 1e-3  # a pixel whose probability is so near to the threshold may be either
UNMATCHED = 0.02  # part of the boxes that may be others: rounding suppresses some
CODER = 'DeltaXYWHBBoxCoder'
NMS = {'iou_threshold', 'class_agnostic', 'split_thr'}  # what is known of its settings
# What MMDetection makes boxes by. The second row is of heads of second stages.
METHODS = (
    *('predict', 'predict_by_feat', '_predict_by_feat_single', '_bbox_post_process'),
    *('predict_bbox', 'predict_mask', '_bbox_forward', '_mask_forward'),
)


class WithBoxes(Exported):
    """A detector as a function of normalized images ``[N, 3, H, W]``.

    Args:
        model (nn.Module): A detector of MMDetection; a copy of it is changed.
        image (Tensor, optional): See :class:`Exported`. Defaults to None.

    Raises:
        UserError: If it is none, or one whose boxes are made in another way.
    """

    def __init__(self, model: nn.Module, image: Tensor | None = None) -> None:
        super().__init__(model, image=image)
        if why := _why_not(self.model, self.kind):
            raise UserError(
                f'--boxes: {why}. Without --boxes the maps of the heads are exported.'
            )

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Boxes, then what :class:`Exported` gives.

        Returns:
            tuple[Tensor]: ``dets`` ``[N, K, 5]``, boxes in pixels of the image and
            their scores, falling; ``labels`` ``[N, K]``; with a mask head ``masks``
            ``[N, K, h, w]``, probabilities in the box. K is ``max_per_img``, or the
            number of candidates if that is smaller; what is missing has score 0 and
            label -1.
        """
        maps = super().forward(image)
        # As tensors, so that the sizes stay a part of the graph.
        height, width = (torch.scalar_tensor(side) for side in image.shape[2:])
        limits = torch.stack([width, height, width, height]).to(image)
        if not hasattr(self.model, 'roi_head'):
            return *_one_stage(self.model.bbox_head, maps, limits), *maps
        levels = self.model.rpn_head.prior_generator.num_levels
        features, maps_of_rpn = maps[: -2 * levels], maps[-2 * levels :]
        rois, found = _proposals(self.model.rpn_head, maps_of_rpn, limits)
        roi_head = self.model.roi_head
        dets, labels = _second_stage(roi_head, features, rois, found, limits)
        boxes = [dets, labels]
        if roi_head.with_mask:
            boxes.append(_masks(roi_head, features, dets[..., :4], labels))
        return *boxes, *maps

    def names(self, outputs: tuple[Tensor, ...]) -> list[str]:
        """Names of the outputs, given the outputs."""
        masks = hasattr(self.model, 'roi_head') and self.model.roi_head.with_mask
        boxes = BOXES if masks else BOXES[:2]
        return [*boxes, *super().names(outputs[len(boxes) :])]

    def axes(self, name: str) -> dict[int, str]:
        """Names of the axes of an output that vary with the image."""
        return {0: 'batch'} if name in BOXES else super().axes(name)


def _why_not(model: nn.Module, kind: str) -> str | None:
    """Why the boxes of a model are not those that this file makes."""
    if kind != 'detector':
        return f'{type(model).__name__} is no detector'
    from mmcv.ops import RoIAlign
    from mmdet.models import SingleStageDetector, StandardRoIHead, TwoStageDetector
    from mmdet.models.dense_heads import AnchorHead, RPNHead
    from mmdet.models.roi_heads.bbox_heads import BBoxHead
    from mmdet.models.roi_heads.mask_heads import FCNMaskHead
    from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor

    two_stages = hasattr(model, 'roi_head')
    head = model.rpn_head if two_stages else model.bbox_head
    if not isinstance(head, AnchorHead):
        return f'{type(head).__name__} has no anchors'
    parts = [
        (model, TwoStageDetector if two_stages else SingleStageDetector),
        (head, RPNHead if two_stages else AnchorHead),
    ]
    cfgs = [head.test_cfg]
    extractors = []
    if two_stages:
        roi_head = model.roi_head
        if roi_head.with_shared_head:
            return 'its second stage has a shared head'
        cfgs.append(roi_head.test_cfg)
        parts += [(roi_head, StandardRoIHead), (roi_head.bbox_head, BBoxHead)]
        extractors.append(roi_head.bbox_roi_extractor)
        if roi_head.with_mask:
            parts.append((roi_head.mask_head, FCNMaskHead))
            extractors.append(roi_head.mask_roi_extractor)
    for part, known in parts:
        coder = getattr(part, 'bbox_coder', None)
        loss = getattr(part, 'loss_cls', None)
        if not isinstance(part, known) or any(
            getattr(type(part), name, None) is not getattr(known, name, None)
            for name in METHODS
        ):
            return f'{type(part).__name__} makes boxes in a way of its own'
        if coder and (type(coder).__name__ != CODER or coder.use_box_type):
            return f'{type(coder).__name__} codes boxes in a way of its own'
        if getattr(loss, 'custom_cls_channels', False):
            return f'{type(loss).__name__} has an activation of its own'
    for extractor in extractors:
        if type(extractor) is not SingleRoIExtractor or any(
            type(layer) is not RoIAlign or layer.pool_mode != 'avg'
            for layer in extractor.roi_layers
        ):
            return f'{type(extractor).__name__} crops by other than averaging RoIAlign'
    bounds = [(cfgs[0], 'nms_pre'), *((cfg, 'max_per_img') for cfg in cfgs)]
    for cfg, key in bounds:
        if cfg.get(key, -1) < 1:
            return f'its test_cfg sets no {key}, which bounds the number of boxes'
    for cfg in cfgs:
        nms = dict(cfg.get('nms') or {})
        if nms.pop('type', 'nms') != 'nms' or not {'iou_threshold'} <= set(nms) <= NMS:
            return f'its test_cfg suppresses boxes by {cfg.get("nms")}'
    return None


# The stages ---------------------------------------------------------------------------


def _one_stage(
    head: Any, maps: Sequence[Tensor], limits: Tensor
) -> tuple[Tensor, Tensor]:
    """MMDetection's BaseDenseHead._predict_by_feat_single, of a batch."""
    cfg = head.test_cfg
    boxes, scores, labels, _ = _candidates(head, maps, limits)
    above = cfg.get('score_thr', 0)
    kept = _suppress_groups(boxes, scores, labels, head.num_classes, cfg.nms, above)
    return _best(boxes, kept, labels, cfg.max_per_img)


def _proposals(
    head: Any, maps: Sequence[Tensor], limits: Tensor
) -> tuple[Tensor, Tensor]:
    """MMDetection's RPNHead._predict_by_feat_single: [N, R, 4], and which are any."""
    cfg = head.test_cfg
    boxes, scores, _, levels = _candidates(head, maps, limits)
    count = head.prior_generator.num_levels
    kept = _suppress_groups(boxes, scores, levels, count, cfg.nms, above=0)
    dets, _ = _best(boxes, kept, levels, cfg.max_per_img)
    return dets[..., :4], dets[..., 4] > 0


def _second_stage(
    roi_head: Any, features: Sequence[Tensor], rois: Tensor, found: Tensor, limits
) -> tuple[Tensor, Tensor]:
    """MMDetection's StandardRoIHead.predict_bbox of rois [N, R, 4]."""
    cfg, head = roi_head.test_cfg, roi_head.bbox_head
    classes, count = head.num_classes, rois.shape[1]
    scores, deltas = head(_extract(roi_head.bbox_roi_extractor, features, rois))
    scores = scores.softmax(-1)[:, :-1].reshape(-1, count, classes)
    scores = torch.where(found[..., None], scores, -torch.ones_like(scores))
    kinds = 1 if head.reg_class_agnostic else classes
    rois = rois[:, :, None].expand(-1, -1, kinds, -1)
    boxes = _decode(head.bbox_coder, rois, deltas, limits)
    boxes = boxes.expand(-1, -1, classes, -1).permute(0, 2, 1, 3)  # [N, C, R, 4]
    # What suppresses each other is an image of its own: its boxes of a class, or all.
    together = classes * count if cfg.nms.get('class_agnostic') else count
    kept = _suppress(
        boxes.reshape(-1, together, 4),
        scores.permute(0, 2, 1).reshape(-1, 1, together),
        cfg.nms.iou_threshold,
        cfg.score_thr,
    )
    kept = kept.reshape(-1, classes * count)
    labels = torch.arange(classes, device=kept.device)[:, None].expand(-1, count)
    labels = labels.reshape(1, -1).expand_as(kept)
    return _best(boxes.reshape(-1, classes * count, 4), kept, labels, cfg.max_per_img)


def _masks(
    roi_head: Any, features: Sequence[Tensor], boxes: Tensor, labels: Tensor
) -> Tensor:
    """MMDetection's StandardRoIHead.predict_mask, before masks are laid into images."""
    logits = roi_head.mask_head(
        _extract(roi_head.mask_roi_extractor, features, boxes)
    )  # [N * K, C, h, w]
    if roi_head.mask_head.class_agnostic:
        chosen = logits[:, :1]
    else:
        index = labels.reshape(-1, 1, 1, 1).clamp(min=0)
        chosen = logits.gather(1, index.expand(-1, -1, *logits.shape[2:]))
    return chosen.sigmoid().reshape(-1, boxes.shape[1], *logits.shape[2:])


# Their parts --------------------------------------------------------------------------


def _candidates(
    head: Any, maps: Sequence[Tensor], limits: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best `nms_pre` of each level: [N, P, 4], and scores, labels, levels [N, P].

    A score below 0 is that of no box.
    """
    cfg, count = head.test_cfg, head.test_cfg.nms_pre
    classes = head.num_classes
    middle = len(maps) // 2
    priors = head.prior_generator.grid_priors(
        [score.shape[-2:] for score in maps[:middle]],
        dtype=maps[0].dtype,
        device=maps[0].device,
    )
    found = []
    for level, (score, delta, prior) in enumerate(
        zip(maps[:middle], maps[middle:], priors, strict=True)
    ):
        score = score.permute(0, 2, 3, 1).reshape(
            score.shape[0], -1, head.cls_out_channels
        )
        score = score.sigmoid() if head.use_sigmoid_cls else score.softmax(-1)
        score = F.pad(score[..., :classes].flatten(1), (0, count), value=-1.0)
        best, index = score.topk(count)
        index = torch.where(best < 0, torch.zeros_like(index), index)
        place = torch.div(index, classes, rounding_mode='floor')
        delta = delta.permute(0, 2, 3, 1).reshape(delta.shape[0], -1, 4)
        found.append(
            (
                prior[place],
                delta.gather(1, place[..., None].expand(-1, -1, 4)),
                best,
                index % classes,
                torch.full_like(index, level),
            )
        )
    prior, delta, scores, labels, levels = (
        torch.cat(parts, 1) for parts in zip(*found, strict=True)
    )
    boxes = _decode(head.bbox_coder, prior, delta, limits)
    smallest = cfg.get('min_bbox_size', -1)
    if smallest >= 0:
        large = ((boxes[..., 2:] - boxes[..., :2]) > smallest).all(-1)
        scores = torch.where(large, scores, -torch.ones_like(scores))
    return boxes, scores, labels, levels


def _decode(coder: Any, priors: Tensor, deltas: Tensor, limits: Tensor) -> Tensor:
    """Boxes in the shape of `priors`, [..., 4], inside the image if the coder says."""
    boxes = coder.decode(priors.reshape(-1, 4), deltas.reshape(-1, 4))
    if coder.clip_border:
        boxes = torch.minimum(boxes.clamp(min=0), limits)
    return boxes.reshape(priors.shape)


def _suppress_groups(
    boxes: Tensor, scores: Tensor, groups: Tensor, count: int, nms: Any, above: float
) -> Tensor:
    """Scores [N, P], 0 where a box is suppressed by one of its group."""
    grouped = scores[:, None]
    if not nms.get('class_agnostic'):  # [N, count, P], -1 but in the own group
        rows = torch.arange(count, device=scores.device)[:, None]
        others = -torch.ones_like(grouped)
        grouped = torch.where(groups[:, None] == rows, grouped, others)
    return _suppress(boxes, grouped, nms.iou_threshold, above).sum(1)


def _suppress(boxes: Tensor, scores: Tensor, iou: float, above: float) -> Tensor:
    """Scores [B, C, P], 0 where a box [B, P, 4] is suppressed within its class."""
    index = non_max_suppression(boxes, scores, float(iou), float(above))
    places = index[:, 0], index[:, 1], index[:, 2]
    return torch.zeros_like(scores).index_put(places, scores[places])


def _best(
    boxes: Tensor, scores: Tensor, labels: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """The `count` highest scores [N, P]: boxes with them [N, K, 5], labels [N, K]."""
    # P is a number of the config, and that of a graph's first run.
    score, index = scores.topk(min(count, int(scores.shape[1])))
    box = boxes.gather(1, index[..., None].expand(-1, -1, 4))
    label = torch.where(score > 0, labels.gather(1, index), -torch.ones_like(index))
    box = torch.where((score > 0)[..., None], box, torch.zeros_like(box))
    return torch.cat([box, score[..., None]], -1), label


def _extract(extractor: Any, features: Sequence[Tensor], boxes: Tensor) -> Tensor:
    """MMDetection's SingleRoIExtractor of boxes [N, R, 4]: [N * R, C, h, w]."""
    image = torch.arange(boxes.shape[0], device=boxes.device)[:, None]
    image = image.expand(-1, boxes.shape[1]).reshape(-1)
    boxes = boxes.reshape(-1, 4)
    features = features[: extractor.num_inputs]
    rois = torch.cat([image[:, None].to(boxes), boxes], 1)
    level = extractor.map_roi_levels(rois, len(features))
    size = extractor.roi_layers[0].output_size
    out = boxes.new_zeros(boxes.shape[0], extractor.out_channels, *size)
    for i, (feature, layer) in enumerate(
        zip(features, extractor.roi_layers, strict=True)
    ):
        (chosen,) = (level == i).nonzero(as_tuple=True)
        crops = roi_align(
            *(feature, boxes[chosen], image[chosen], size),
            *(layer.spatial_scale, layer.sampling_ratio, layer.aligned),
        )
        out = out.index_put((chosen,), crops)
    return out


# The check ----------------------------------------------------------------------------


def check_boxes(
    model: nn.Module,
    boxes: Sequence[Tensor],
    maps: Sequence[Tensor],
    size: Sequence[int],
) -> int:
    """Compare the boxes of a file with those that MMDetection makes of its maps.

    Args:
        model (nn.Module): The detector of MMDetection.
        boxes (Sequence[Tensor]): ``dets``, ``labels`` and maybe ``masks`` of the file.
        maps (Sequence[Tensor]): Its other outputs.
        size (Sequence[int]): Height and width of the images.

    Returns:
        int: How many boxes were compared.

    Raises:
        UserError: If more than one in fifty has no match: of its label, with edges
            within 0.1 pixels, with a score within 1e-4, and a mask that has the same
            pixels but for those within 1e-3 of the threshold.
    """
    expected = detections(model, list(maps), tuple(size))
    compared = unmatched = 0
    for image, theirs in enumerate(expected):
        (any_,) = (boxes[1][image] >= 0).nonzero(as_tuple=True)
        dets, labels = boxes[0][image, any_], boxes[1][image, any_]
        matches = (
            ((dets[:, None, :4] - theirs.bboxes).abs().amax(-1) <= ALIKE)
            & ((dets[:, 4:] - theirs.scores).abs() <= 1e-4)
            & (labels[:, None] == theirs.labels)
        )
        if len(boxes) == len(BOXES) and len(dets) and len(theirs):
            ours = _laid_out(boxes[2][image, any_], dets[:, :4], size).flatten(1)
            ours -= model.roi_head.test_cfg.mask_thr_binary
            others = theirs.masks.flatten(1).float()
            inside, outside = (ours > UNSURE).float(), (ours < -UNSURE).float()
            matches &= inside @ (1 - others).T + outside @ others.T == 0
        compared += max(matches.shape)
        unmatched += max((~matches.any(1)).sum().item(), (~matches.any(0)).sum().item())
    if unmatched > UNMATCHED * compared:
        raise UserError(
            f'The exported model differs from MMDetection: {unmatched} of {compared} '
            f'boxes in images of {tuple(size)} have no match. No file was written.'
        )
    return compared


def _laid_out(masks: Tensor, boxes: Tensor, size: Sequence[int]) -> Tensor:
    """Masks [K, h, w] of boxes as probabilities in the image [K, H, W]."""
    from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask

    return _do_paste_mask(masks[:, None], boxes, *size, skip_empty=False)[0]
