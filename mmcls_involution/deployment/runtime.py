"""What who runs an exported model needs of this package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmcls_involution.engine.errors import UserError
from mmcls_involution.ops.backends import native


def register_custom_operators(session_options: Any) -> None:
    """Teach ONNX Runtime the operators of ``export --operator custom``.

    Args:
        session_options (onnxruntime.SessionOptions): Of the session to come. Its
            threads compute involution too.

    Raises:
        UserError: If the C++ kernels were not built, or ONNX Runtime is older than
            1.17.
    """
    files = sorted(Path(native.__file__).parent.glob('_kernels*'))
    if not files:
        raise UserError(
            'The C++ kernels of involution were not built, and the custom operators '
            'are part of them. With g++ or clang++, reinstall this package: pip '
            'install --force-reinstall --no-deps <its folder>; or export with '
            '--operator standard.'
        )
    try:
        session_options.register_custom_ops_library(str(files[0]))
    except Exception as error:  # ONNX Runtime has classes of its own for each code
        raise UserError(
            f'ONNX Runtime does not take the operators of {files[0]}: {error}. Version '
            '1.17 or later is needed, and a library built from this version.'
        ) from error


def detections(
    model: torch.nn.Module,
    outputs: Sequence[Tensor | np.ndarray],
    image_shape: tuple[int, int],
) -> list[Any]:
    """The boxes that an exported detector's outputs mean, by the toolbox's own code.

    Args:
        model (torch.nn.Module): MMDetection's detector, from the same config and
            checkpoint.
        outputs (Sequence[Tensor | np.ndarray]): All outputs of the file, in its order.
        image_shape (tuple[int, int]): Height and width of the images that went in.

    Returns:
        list[InstanceData]: For each image boxes ``[n, 4]`` in its pixels, scores and
        labels; of Mask R-CNN masks too.

    Raises:
        UserError: If there are fewer or more outputs than such a file has.
    """
    from mmdet.structures import DetDataSample

    outputs = [torch.as_tensor(output) for output in outputs]
    count = len(outputs[0])
    meta = dict(
        img_shape=image_shape,
        ori_shape=image_shape,
        pad_shape=image_shape,
        scale_factor=(1.0, 1.0),
    )
    metas = [dict(meta) for _ in range(count)]
    two_stages = hasattr(model, 'roi_head')
    head = model.rpn_head if two_stages else model.bbox_head
    levels = head.prior_generator.num_levels
    kinds = ('feature', 'score', 'box') if two_stages else ('score', 'box')
    if len(outputs) != len(kinds) * levels:
        names = ', '.join(f'{kind}0 to {kind}{levels - 1}' for kind in kinds)
        raise UserError(
            f'{len(outputs)} outputs: {type(model).__name__} exported without --boxes '
            f'has {len(kinds) * levels}, {names}. Give all of them; a file with '
            '--boxes gives boxes itself.'
        )
    scores, boxes = outputs[-2 * levels : -levels], outputs[-levels:]
    with torch.no_grad():
        found = head.predict_by_feat(
            list(scores), list(boxes), batch_img_metas=metas, rescale=not two_stages
        )
        if not two_stages:
            return found
        samples = [DetDataSample(metainfo=meta) for meta in metas]
        features = tuple(outputs[: -2 * levels])
        return model.roi_head.predict(features, found, samples, rescale=True)
