"""Operators as nodes of ONNX, for both exporters of torch.

Involution is a node of our own, or several standard ones (``ops/standard.py``). What
makes boxes are ONNX's NonMaxSuppression and RoiAlign, operators here, so that a trace
has one node of each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.onnx import symbolic_helper

from mmcls_involution.deployment import translation

LOWEST_OPSET = 13  # below it ONNX lacks what involution needs
BOXES_OPSET = 16  # the first whose RoiAlign has aligned boxes
ALL = 2**31 - 1  # boxes that NonMaxSuppression may leave

# Each operator as a node of our own: name, inputs, and attributes, all lists of int.
DOMAIN = 'mmcls_involution'
NODES = {
    'involution2d': (
        'Involution2d',
        ('input', 'weight'),
        ('strides', 'pads', 'dilations'),
    ),
    'fused_involution2d': (
        'FusedInvolution2d',
        ('input', 'reduced', 'weight', 'bias'),
        ('kernel_shape', 'strides', 'pads', 'dilations'),
    ),
}


# Involution ---------------------------------------------------------------------------


def _symbolic(operator: str) -> Callable[..., Any]:
    """What TorchScript's exporter writes an operator with, where it is kept."""
    name, inputs, keys = NODES[operator]

    def write(g: Any, *arguments: Any) -> Any:
        tensors = [
            tensor
            for tensor in arguments[: len(inputs)]
            if not symbolic_helper._is_none(tensor)
        ]
        values = (
            symbolic_helper._parse_arg(value, 'is')
            for value in arguments[len(inputs) : -1]  # the last one is the backend
        )
        attributes = {
            f'{key}_i': list(value) for key, value in zip(keys, values, strict=True)
        }
        out = g.op(f'{DOMAIN}::{name}', *tensors, **attributes)
        # Where sizes are known ONNX Runtime adds residuals inside convolutions.
        shapes = [tensor.type().sizes() or [None] * 4 for tensor in tensors[:2]]
        sizes = [*shapes[0][:2], *shapes[1][-2:]]
        return out.setType(tensors[0].type().with_sizes(sizes))

    return write


def translations(operator: str = 'standard') -> dict[Any, Any]:
    """The argument ``custom_translation_table`` of ``torch.onnx.export``.

    Args:
        operator (str): ``'standard'``, or ``'custom'`` for this package's own nodes,
            which ``register_custom_operators`` makes known to ONNX Runtime. Defaults to
            ``'standard'``.
    """
    operators = torch.ops.mmcls_involution
    found = {name: getattr(translation, name) for name in NODES}
    if operator == 'custom':
        found = {name: _as_node(name, function) for name, function in found.items()}
    found |= {
        'non_max_suppression': _translate_suppression,
        'roi_align': _translate_roi_align,
    }
    return {getattr(operators, name).default: found[name] for name in found}


def _as_node(operator: str, other: Callable[..., Any]) -> Callable[..., Any]:
    """A function that writes an operator as a node, with the other form's signature."""
    name, inputs, attributes = NODES[operator]

    @functools.wraps(other)  # the exporter reads it
    def write(*arguments: Any) -> Any:
        import onnx
        from onnxscript.values import Op, Opset

        schema = onnx.defs.OpSchema
        value, kind = schema.FormalParameter, schema.FormalParameterOption
        of_node = schema(
            *(name, DOMAIN, 1),
            inputs=[
                value(
                    i, 'T', param_option=kind.Optional if i == 'bias' else kind.Single
                )
                for i in inputs
            ],
            outputs=[value('output', 'T')],
            type_constraints=[('T', ['tensor(float)'], '')],
            attributes=[schema.Attribute(a, schema.AttrType.INTS) for a in attributes],
        )
        tensors = [x for x in arguments[: len(inputs)] if x is not None]
        lists = map(list, arguments[len(inputs) : -1])  # the last one is the backend
        values = dict(zip(attributes, lists, strict=True))
        return Op(Opset(DOMAIN, 1), name, of_node)(*tensors, **values)

    return write


# Boxes --------------------------------------------------------------------------------


@torch.library.custom_op('mmcls_involution::non_max_suppression', mutates_args=())
def non_max_suppression(
    boxes: Tensor, scores: Tensor, iou: float, above: float
) -> Tensor:
    """ONNX's NonMaxSuppression: [K, 3], image, class and place of what is kept."""
    from mmcv.ops import nms

    found = [boxes.new_zeros(0, 3, dtype=torch.long)]
    for image in range(scores.shape[0]):
        for group in range(scores.shape[1]):
            score = scores[image, group]
            (places,) = (score > above).nonzero(as_tuple=True)
            _, kept = nms(boxes[image, places], score[places], iou)
            where = places.new_tensor([image, group]).expand(len(kept), -1)
            found.append(torch.cat([where, places[kept, None]], 1))
    return torch.cat(found)


@non_max_suppression.register_fake
def _(boxes: Tensor, scores: Tensor, iou: float, above: float) -> Tensor:
    count = torch.library.get_ctx().new_dynamic_size()
    return boxes.new_empty(count, 3, dtype=torch.long)


@torch.library.custom_op('mmcls_involution::roi_align', mutates_args=())
def roi_align(
    feature: Tensor,
    boxes: Tensor,
    image: Tensor,
    size: Sequence[int],
    scale: float,
    samples: int,
    aligned: bool,
) -> Tensor:
    """ONNX's RoiAlign of boxes [R, 4] in the images [R]."""
    import mmcv.ops

    rois = torch.cat([image[:, None].to(boxes), boxes], 1)
    return mmcv.ops.roi_align(
        feature, rois, tuple(size), scale, samples, 'avg', aligned
    )


@roi_align.register_fake
def _(feature: Tensor, boxes: Tensor, image: Tensor, size: Sequence[int], *_) -> Tensor:
    return feature.new_empty(boxes.shape[0], feature.shape[1], *size)


@symbolic_helper.parse_args('v', 'v', 'f', 'f')
def _write_suppression(g: Any, boxes: Any, scores: Any, iou: float, above: float):
    def constant(value: float, dtype: torch.dtype) -> Any:
        return g.op('Constant', value_t=torch.tensor([value], dtype=dtype))

    return g.op(
        'NonMaxSuppression',
        *(boxes, scores, constant(ALL, torch.int64)),
        *(constant(iou, torch.float32), constant(above, torch.float32)),
    )


def _translate_suppression(boxes: Any, scores: Any, iou: float, above: float) -> Any:
    from onnxscript import opset18 as op

    thresholds = (op.Constant(value_floats=[value]) for value in (iou, above))
    all_ = op.Constant(value_ints=[ALL])
    return op.NonMaxSuppression(boxes, scores, all_, *thresholds)


def _roi_align_attributes(
    size: Sequence[int], scale: float, samples: int, aligned: bool
) -> dict[str, Any]:
    return dict(
        coordinate_transformation_mode='half_pixel' if aligned else 'output_half_pixel',
        output_height=size[0],
        output_width=size[1],
        sampling_ratio=max(samples, 0),
        spatial_scale=scale,
    )


@symbolic_helper.parse_args('v', 'v', 'v', 'is', 'f', 'i', 'b')
def _write_roi_align(
    g: Any,
    feature: Any,
    boxes: Any,
    image: Any,
    size: list[int],
    scale: float,
    samples: int,
    aligned: bool,
):
    # MMCV's own form means what the operator was before opset 16.
    attributes = _roi_align_attributes(size, scale, samples, aligned)
    suffixes = {str: 's', int: 'i', float: 'f'}
    return g.op(
        'RoiAlign',
        *(feature, boxes, image),
        **{f'{key}_{suffixes[type(v)]}': v for key, v in attributes.items()},
    )


def _translate_roi_align(
    feature: Any,
    boxes: Any,
    image: Any,
    size: Sequence[int],
    scale: float,
    samples: int,
    aligned: bool,
) -> Any:
    from onnxscript import opset18 as op

    attributes = _roi_align_attributes(size, scale, samples, aligned)
    return op.RoiAlign(feature, boxes, image, **attributes)


for _name, _write, _opset in (
    *((name, _symbolic(name), LOWEST_OPSET) for name in NODES),
    ('non_max_suppression', _write_suppression, BOXES_OPSET),
    ('roi_align', _write_roi_align, BOXES_OPSET),
):
    torch.onnx.register_custom_op_symbolic(f'mmcls_involution::{_name}', _write, _opset)
