"""Count the parameters and FLOPs of a detector, a segmenter or a classifier.

    python -m mmcls_involution flops CONFIG [--shape HEIGHT WIDTH] ...

One image goes through the model on torch's meta device, which knows shapes alone:
nothing is computed, and no weights or data are needed. One multiply-add counts as one
FLOP, as in the paper and in OpenMMLab. The heads of a two-stage detector see as many
regions as its test_cfg lets pass: on COCO 1000 boxes and 100 masks. What only training
runs, the auxiliary heads of segmenters, has parameters but no FLOPs.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mmcls_involution.console import console, print_table
from mmcls_involution.engine.config import add_cfg_options, read_config
from mmcls_involution.engine.errors import UserError

# default_scope -> height and width of the image that the paper counts for
SHAPES = {'mmdet': (800, 1280), 'mmseg': (1024, 2048), 'mmpretrain': (224, 224)}
HEADS = ('rpn_head', 'bbox_head', 'decode_head', 'head')
PARTS = (
    *('backbone', 'neck', 'rpn_head', 'bbox_head', 'roi_head.bbox_head'),
    *('roi_head.mask_head', 'decode_head', 'auxiliary_head', 'head'),
)


def _per_element(operations: int) -> Callable[..., int]:
    # Twice, because torch counts a multiply-add as two; both are halved in the end.
    return lambda shape, *args, **kwargs: 2 * operations * math.prod(shape)


# What MMCV 1.x, which the authors counted with, adds to convolutions and linear layers:
# operations per element that comes in.
aten = torch.ops.aten
ELEMENTWISE = {
    aten._native_batch_norm_legit_no_training: _per_element(2),
    aten.relu: _per_element(1),
    aten.relu_: _per_element(1),
    aten.max_pool2d_with_indices: _per_element(1),
    aten.avg_pool2d: _per_element(1),
    aten._adaptive_avg_pool2d: _per_element(1),
    aten.mean: _per_element(1),  # adaptive pooling to a single pixel
}


@dataclass(frozen=True)
class Complexity:
    """Size and cost of a model, or of a part of it.

    Attributes:
        parameters: Number of parameters.
        trained: Number of those that are not frozen, which is what MMCV 1.x, and with
            it the paper, calls the number of parameters.
        multiply_adds: Of convolutions, involutions and linear layers.
        elementwise: Operations of batch norm, ReLU and pooling.
    """

    parameters: int
    trained: int
    multiply_adds: int
    elementwise: int

    @property
    def flops(self) -> int:
        """All operations, as the authors counted them."""
        return self.multiply_adds + self.elementwise


def build_model(cfg: Config) -> nn.Module:
    """The model of a config, for testing, on the meta device.

    Args:
        cfg: Config of a toolbox, with ``default_scope``.

    Raises:
        UserError: If it has no ``model``.
    """
    if cfg.get('model') is None:
        raise UserError(
            "The config has no 'model'. It may be one that others are meant to inherit."
        )
    with MODELS.switch_scope_and_registry(cfg.default_scope) as registry:
        model = registry.build(cfg.model).to('meta')
    model.eval()  # MMPretrain's returns None
    return model


def measure(
    model: nn.Module, shape: Sequence[int], parts: Sequence[str] = ()
) -> dict[str, Complexity]:
    """Count the parameters of a model and its FLOPs for one image.

    Args:
        model: From :func:`build_model`.
        shape: Height and width of the image in pixels.
        parts: Dotted names of modules to report beside the whole; those that the model
            does not have are left out.

    Returns:
        dict[str, Complexity]: By dotted name; the name of the whole is ``''``.

    Raises:
        UserError: If the model cannot be run on an image of that size, or is of a kind
            that this tool does not know.
    """
    # Through the model's own call, so that the counter's names start at the model.
    model.forward = lambda image: _forward(model, image)
    counter = FlopCounterMode(display=False, custom_mapping=ELEMENTWISE)
    try:
        with torch.no_grad(), counter:
            model(torch.empty(1, 3, *shape, device='meta'))
    except Exception as error:
        raise UserError(
            f'Cannot count {type(model).__name__} for an image of '
            f'{" x ".join(map(str, shape))}: {type(error).__name__}: {error}. This '
            'tool knows one- and two-stage detectors, encoder-decoder segmenters and '
            'classifiers, with heads that need nothing but feature maps.'
        ) from error
    finally:
        del model.forward
    counts = counter.get_flop_counts()

    def complexity(name: str, module: nn.Module) -> Complexity:
        key = '.'.join(filter(None, (type(model).__name__, name)))
        operations = counts.get(key, {})
        elementwise = sum(n for op, n in operations.items() if op in ELEMENTWISE)
        parameters = list(module.parameters())
        return Complexity(
            parameters=sum(p.numel() for p in parameters),
            trained=sum(p.numel() for p in parameters if p.requires_grad),
            multiply_adds=(sum(operations.values()) - elementwise) // 2,
            elementwise=elementwise // 2,
        )

    modules = dict(model.named_modules())
    return {
        name: complexity(name, modules[name])
        for name in ('', *parts)
        if name in modules
    }


def _forward(model: nn.Module, image: Tensor) -> None:
    """Run all that an image goes through in testing and that has parameters."""
    features = model.extract_feat(image)
    for name in HEADS:
        if head := getattr(model, name, None):
            head(features)
    if not (roi_head := getattr(model, 'roi_head', None)):
        return
    # Where the regions lie depends on values, which a meta tensor does not have. MMCV
    # 1.x does not count what cuts out their features either.
    regions = {
        'bbox': model.test_cfg.rpn.max_per_img,
        'mask': model.test_cfg.rcnn.max_per_img,
    }
    for part, number in regions.items():
        if getattr(roi_head, f'with_{part}'):
            extractor = getattr(roi_head, f'{part}_roi_extractor')
            size = extractor.roi_layers[0].output_size
            cut_out = image.new_empty(number, extractor.out_channels, *size)
            getattr(roi_head, f'{part}_head')(cut_out)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument('config', help='file, or name of a config of this package')
    parser.add_argument(
        '--shape',
        type=int,
        nargs=2,
        metavar=('HEIGHT', 'WIDTH'),
        help="of the image in pixels (default: the paper's, "
        + ', '.join(f'{h} {w} for {scope}' for scope, (h, w) in SHAPES.items())
        + ')',
    )
    add_cfg_options(parser)


def main(args: argparse.Namespace) -> None:
    """The command ``flops``."""
    cfg = read_config(args.config, args.cfg_options)
    shape = args.shape or SHAPES.get(cfg.default_scope)
    if shape is None:
        raise UserError(
            f'No image size is known for {cfg.default_scope}: give --shape.'
        )
    complexities = measure(build_model(cfg), shape, PARTS)
    rows = [
        {
            'part': name or 'all',
            'parameters M': f'{part.parameters / 1e6:.3f}',
            'not frozen M': f'{part.trained / 1e6:.3f}',
            'conv + involution G': f'{part.multiply_adds / 1e9:.3f}',
            'BN, ReLU, pooling G': f'{part.elementwise / 1e9:.3f}',
            'sum G': f'{part.flops / 1e9:.3f}',
        }
        # the whole below its parts
        for name, part in [*complexities.items()][1:] + [('', complexities[''])]
    ]
    height, width = shape
    print_table(f'{args.config}, one image of {height} x {width}', rows)
    console.print('The paper gives the sum, and the parameters that are not frozen.')
