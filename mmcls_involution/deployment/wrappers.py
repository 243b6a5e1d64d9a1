"""What of a model goes into a file: images in, tensors out, no data samples."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
import torch.nn.functional as F
from mmcv.cnn import fuse_conv_bn
from mmengine.logging import print_log
from torch import Tensor, nn

from mmcls_involution.engine.errors import UserError

TOLERANCE = 1e-5  # of the largest value of an output


class Exported(nn.Module):
    """A model as a function of normalized images ``[N, 3, H, W]``.

    Args:
        model (nn.Module): Of a toolbox; a copy of it is changed.
        backbone (bool): Take its backbone alone. Defaults to False.
        fold (bool): Fold batch norms into convolutions and replace what does not
            export; without, the model is what an export is compared with. Defaults to
            True.
        image (Tensor, optional): An example. Where folding changes the outputs for it,
            norms stay. Defaults to None: that is not tried.
    """

    def __init__(
        self,
        model: nn.Module,
        backbone: bool = False,
        fold: bool = True,
        image: Tensor | None = None,
    ) -> None:
        super().__init__()
        has_backbone = hasattr(model, 'backbone')
        if backbone and not has_backbone:
            raise UserError(f'--backbone: {type(model).__name__} has no backbone.')
        # Of the part alone: what cannot be folded may be elsewhere.
        part = model.backbone if backbone else model
        self.model = _replace_layers(_folded(part)) if fold else _frozen(part)
        if backbone:
            self.kind = 'backbone'
        elif hasattr(model, 'decode_head') and not isinstance(
            model.decode_head, nn.ModuleList
        ):  # else a cascade
            self.kind = 'segmenter'
        elif hasattr(model, 'rpn_head') or getattr(model, 'bbox_head', None):
            self.kind = 'detector'
        elif getattr(model, 'head', None):
            self.kind = 'classifier'
        else:
            raise UserError(
                f'{type(model).__name__} is no classifier, encoder-decoder segmenter, '
                'or one- or two-stage detector'
                + ('; --backbone exports its backbone.' if has_backbone else '.')
            )
        self.eval()  # torch's exporter restores the mode that the outermost had
        if fold and image is not None:
            self._unfold_where_wrong(part, image)

    def _unfold_where_wrong(self, part: nn.Module, image: Tensor) -> None:
        """Keep the norms of a model that folding changes.

        MMCV takes for a pair what was registered in turn: a norm that runs before its
        convolution, each of the norms that share one (RTMDet's head), or a convolution
        that makes its weights anew in each call.
        """
        with torch.no_grad():
            folded, self.model = self.model, _replace_layers(_frozen(part))
            expected = Exported.forward(self, image)
            unfolded, self.model = self.model, folded
            found = Exported.forward(self, image)
        worst = (difference(*pair) for pair in zip(expected, found, strict=True))
        if not all(value <= TOLERANCE for value in worst):  # NaN too
            self.model = unfolded
            print_log(
                'Folding batch norms into convolutions would change the outputs of '
                'this model: they stay norms, and take their time',
                level=logging.WARNING,
            )

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """The outputs that :meth:`names` names."""
        if self.kind == 'backbone':
            return _stages(self.model, image)
        features = self.model.extract_feat(image)
        if self.kind == 'classifier':
            return (_logits(self.model.head, features),)
        if self.kind == 'segmenter':
            logits = _logits(self.model.decode_head, features)
            corners = self.model.align_corners
            size = image.shape[2:]
            return (
                F.interpolate(logits, size, mode='bilinear', align_corners=corners),
            )
        two_stages = hasattr(self.model, 'rpn_head')
        head = self.model.rpn_head if two_stages else self.model.bbox_head
        maps = _maps(head, features)
        if len(maps) != 2:
            raise UserError(
                f'{type(head).__name__} gives {len(maps)} kinds of maps. Detectors '
                'whose head gives two, scores and boxes, are exported; of others '
                '--backbone exports the backbone.'
            )
        scores, boxes = maps
        for level in (*scores, *boxes):
            if not isinstance(level, Tensor):
                raise UserError(
                    f'{type(head).__name__} gives a {type(level).__name__} for each '
                    'level. Detectors whose head gives one tensor of scores and one of '
                    'boxes are exported; of others --backbone exports the backbone.'
                )
        return (*features, *scores, *boxes) if two_stages else (*scores, *boxes)

    def names(self, outputs: tuple[Tensor, ...]) -> list[str]:
        """Names of the outputs, given the outputs."""
        if self.kind in ('classifier', 'segmenter'):
            return ['logits']
        if self.kind == 'backbone':
            return [f'feature{i}' for i in range(len(outputs))]
        two_stages = hasattr(self.model, 'rpn_head')
        parts = ('feature', 'score', 'box') if two_stages else ('score', 'box')
        levels = len(outputs) // len(parts)
        return [f'{part}{i}' for part in parts for i in range(levels)]

    def axes(self, name: str) -> dict[int, str]:
        """Names of the axes of an output that vary with the image."""
        if self.kind == 'classifier':
            return {0: 'batch'}
        # ONNX Runtime takes what is called alike to be of one size.
        prefix = '' if self.kind == 'segmenter' else f'{name}_'
        return {0: 'batch', 2: f'{prefix}height', 3: f'{prefix}width'}


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference from our values, over the largest of them."""
    # A map of zeros has no scale.
    scale = ours.abs().max().clamp(min=torch.finfo(ours.dtype).tiny)
    return ((ours - theirs).abs().max() / scale).item()


def _stages(backbone: nn.Module, image: Tensor) -> tuple[Tensor, ...]:
    """The features of a backbone, if they are tensors."""
    stages = backbone(image)
    if isinstance(stages, Tensor):  # DDRNet's and PIDNet's, when they do not train
        return (stages,)
    for stage in stages:
        if not isinstance(stage, Tensor):
            raise UserError(
                f'{type(backbone).__name__} gives a {type(stage).__name__} for a '
                'stage. Backbones that give one tensor of features for each are '
                'exported.'
            )
    return tuple(stages)


def _maps(head: nn.Module, features: Any) -> Any:
    """What a head says of features, if it needs nothing else."""
    try:
        return head(features)
    except (TypeError, NotImplementedError) as error:  # a transformer's, or in steps
        raise UserError(
            f'{type(head).__name__} does not take feature maps alone: {error}. Models '
            'whose head does are exported; of others --backbone exports the backbone.'
        ) from error


def _logits(head: nn.Module, features: Any) -> Tensor:
    """What the head of a classifier or segmenter says, if it is one tensor."""
    logits = _maps(head, features)
    if not isinstance(logits, Tensor):
        raise UserError(
            f'{type(head).__name__} gives {type(logits).__name__}, not one tensor of '
            'logits. Models whose head gives one are exported; of others --backbone '
            'exports the backbone.'
        )
    return logits


def _frozen(model: nn.Module) -> nn.Module:
    """A copy of the model that learns nothing any more."""
    model = copy.deepcopy(model)
    model.eval()  # MMPretrain's returns None
    return model.requires_grad_(False)


def _folded(model: nn.Module) -> nn.Module:
    """A frozen copy with its batch norms in the convolutions before them.

    As it was where MMCV, which takes for a pair what was registered in turn, ends in an
    error: their channels differ, or the norm has no statistics or weights.
    """
    try:
        return fuse_conv_bn(_frozen(model))
    except (RuntimeError, TypeError, AttributeError):
        return _frozen(model)


class _AnySizePool(nn.Module):
    """nn.AdaptiveAvgPool2d by two matrices: ONNX has it for one output pixel alone."""

    def __init__(self, size: int | tuple[int | None, int | None]) -> None:
        super().__init__()
        self.size = (size, size) if isinstance(size, int) else size

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, C, *size]."""
        rows, columns = self.size
        if rows is not None:  # coordinate attention pools one side alone
            x = torch.matmul(self._means(x, 2, rows), x)
        if columns is not None:
            x = torch.matmul(x, self._means(x, 3, columns).transpose(0, 1))
        return x

    def _means(self, x: Tensor, axis: int, size: int) -> Tensor:
        length = x.shape[axis]
        pixels = torch.arange(length, device=x.device)
        bins = torch.arange(size, device=x.device)[:, None]
        first = bins * length // size
        end = ((bins + 1) * length + size - 1) // size
        inside = ((pixels >= first) & (pixels < end)).to(x.dtype)
        return inside / inside.sum(1, keepdim=True)


def _replace_layers(model: nn.Module) -> nn.Module:
    """Put what exports for any size in the place of what does not."""
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is nn.AdaptiveAvgPool2d and child.output_size not in (
                1,
                (1, 1),
            ):
                setattr(module, name, _AnySizePool(child.output_size))
            elif type(child).__name__ == 'Upsample' and not isinstance(
                child, nn.Upsample
            ):  # MMSegmentation's, which makes a constant of the size
                upsample = nn.Upsample(
                    child.size, child.scale_factor, child.mode, child.align_corners
                )
                setattr(module, name, upsample)
    return model
