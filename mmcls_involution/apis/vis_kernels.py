"""Draw the kernels that a model's involutions generate for an image.

    python -m mmcls_involution kernels IMAGE --config CONFIG --weights W --out FILE ...

Each layer has a heat map for each group of channels: the sum of the values of a pixel's
kernel, over the image as the model sees it. --points adds, for a pixel of the image,
the kernel itself in every layer and group, over the window that it reads: red weighs
positive, blue negative, and what the middle weighs, most often far more than the
others, stands above. The layers are the last one for each size of feature map in
backbone, neck and head; --layers names others, --list-layers lists them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from mmcv.transforms import BaseTransform
from torch import Tensor, nn

from mmcls_involution.apis.inferencer import (
    add_model_arguments,
    build_inferencer,
    preprocess,
)
from mmcls_involution.console import console
from mmcls_involution.data.images import open_image
from mmcls_involution.engine.config import check_picture
from mmcls_involution.engine.errors import UserError, did_you_mean
from mmcls_involution.ops import Involution2d, record_kernels

COLUMNS = 4, 8  # pictures beside each other, at least and at most
TALLEST = 4  # height over width of a heat map's place: a strip would fill the memory


@dataclass(frozen=True)
class LayerKernels:
    """The kernels of one call of an involution, on one image.

    Attributes:
        name: Of the layer, and which call it was where there were several.
        kernels: ``[G, K, K, H, W]``, float32, on the CPU.
        layer: The involution.
    """

    name: str
    kernels: Tensor
    layer: Involution2d

    @property
    def heat(self) -> np.ndarray:
        """The sum of the values of each kernel, ``[G, H, W]``."""
        return self.kernels.sum((1, 2)).numpy()


@dataclass(frozen=True)
class View:
    """An image as the model sees it, and the kernels that it generates.

    Attributes:
        image: ``[H, W, 3]``, uint8, RGB: resized, cut and padded by the test pipeline.
        source: ``[H, W, 2]``, float32: the x and y in the original image that each
            pixel of ``image`` shows; NaN for padding.
        layers: In the order of the model.
    """

    image: np.ndarray
    source: np.ndarray
    layers: tuple[LayerKernels, ...]

    def find(self, x: float, y: float) -> tuple[int, int]:
        """Column and row in ``image`` of a pixel of the original image.

        Raises:
            UserError: If the model does not see it.
        """
        low, high = (f(self.source, axis=(0, 1)) for f in (np.nanmin, np.nanmax))
        if not all(low - 1 <= (x, y)) or not all((x, y) <= high + 1):
            raise UserError(
                f'The point {x:g},{y:g} is outside of what the model sees of the '
                f'image: x from {low[0]:.0f} to {high[0]:.0f}, y from {low[1]:.0f} to '
                f'{high[1]:.0f}.'
            )
        distance = np.square(self.source - (x, y)).sum(2)
        row, column = np.unravel_index(np.nanargmin(distance), distance.shape)
        return int(column), int(row)

    def stride(self, layer: LayerKernels) -> tuple[float, float]:
        """Pixels of ``image`` per column and row of a layer's output, a power of two.

        Feature maps of sizes that a stride does not divide are rounded up.
        """
        sizes = zip(self.image.shape[1::-1], layer.kernels.shape[:2:-1], strict=True)
        return tuple(2.0 ** math.ceil(math.log2(size / out)) for size, out in sizes)


def involutions(model: nn.Module) -> list[str]:
    """Names of the involutions that see the whole image, not regions cut out of it."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, Involution2d) and 'roi_head' not in name.split('.')
    ]


@torch.no_grad()
def look(
    inferencer: Any, image: np.ndarray, layers: Sequence[str] | None = None
) -> View:
    """Run a model on an image, and keep the kernels that it generates.

    Args:
        inferencer (Any): From :func:`build_inferencer`.
        image (np.ndarray): ``[H, W, 3]``, uint8, BGR.
        layers (Sequence[str], optional): See :func:`kernels_of`. Defaults to None.

    Raises:
        UserError: If the model has no such layers, or the test pipeline does more to
            an image than to resize, cut, flip and pad it.
    """
    model = inferencer.model
    check_layers(model, layers)
    data = model.data_preprocessor(preprocess(inferencer, [image]), False)
    source = _source(inferencer, image, data['inputs'].shape[2:])
    found = kernels_of(model, lambda: model(**data, mode='predict'), layers)
    columns, rows = (np.nan_to_num(source[..., i], nan=-1) for i in (0, 1))
    seen = cv2.remap(image[..., ::-1], columns, rows, cv2.INTER_LINEAR)
    return View(seen, source, found)


def check_layers(model: nn.Module, layers: Sequence[str] | None = None) -> None:
    """Refuse names that are not of :func:`involutions`, and models without any.

    Raises:
        UserError: If so; the message names those that are close.
    """
    known = involutions(model)
    for name in layers or ():
        if name not in known:
            raise UserError(
                f'{name}: there is no involution of that name that sees the whole '
                f'image.{did_you_mean(name, known)} `python -m mmcls_involution '
                'kernels --list-layers` lists them.'
            )
    if not known:
        raise UserError('The model has no involution that sees the whole image.')


def kernels_of(
    model: nn.Module, run: Callable[[], Any], layers: Sequence[str] | None = None
) -> tuple[LayerKernels, ...]:
    """The kernels of the first image of a batch, after :func:`check_layers`.

    Args:
        model (nn.Module): Of any of the three toolboxes.
        run (Callable[[], Any]): Runs it on a batch.
        layers (Sequence[str], optional): Of :func:`involutions`. Defaults to None: the
            last one for each size of feature map in each part of the model.
    """
    slides = getattr(model, 'test_cfg', None) or {}
    mode = slides.get('mode')
    if mode:
        slides['mode'] = 'whole'  # a segmenter that slides a window
    try:
        with record_kernels(model, layers or involutions(model)) as recorded:
            run()
    finally:
        if mode:
            slides['mode'] = mode
    found = [
        LayerKernels(
            f'{name}, call {i}' if len(calls) > 1 else name,
            kernels[0].float().cpu(),
            model.get_submodule(name),
        )
        for name, calls in recorded.items()
        for i, kernels in enumerate(calls, 1)
    ]
    if layers:
        return tuple(found)
    last = {
        (layer.name.split('.')[0], layer.kernels.shape[3:]): layer for layer in found
    }
    return tuple(layer for layer in found if any(layer is one for one in last.values()))


def _source(inferencer: Any, image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Where in an image each pixel that the model sees comes from: [H, W, 2].

    The test pipeline is run on an image of coordinates.
    """
    rows, columns = np.indices(image.shape[:2], dtype=np.float32)
    coordinates = np.stack([columns, rows, np.ones_like(rows)], axis=2)
    # Pillow resizes no numbers but those of 8 bits.
    steps = [
        step
        for step in _steps(inferencer.pipeline)
        if getattr(step, 'backend', None) == 'pillow'
    ]
    for step in steps:
        step.backend = 'cv2'
    try:
        inside = preprocess(inferencer, [coordinates])['inputs'][0].numpy()
    finally:
        for step in steps:
            step.backend = 'pillow'
    source = np.full((3, *shape), np.nan, dtype=np.float32)
    source[:, : inside.shape[1], : inside.shape[2]] = inside
    source[:, np.abs(source[2] - 1) > 1e-3] = np.nan
    if np.isnan(source).all():
        raise UserError(
            'The test pipeline of the config changes the values of an image, so that '
            'it cannot be told where its pixels go. Normalize in data_preprocessor, as '
            'OpenMMLab 2 does.'
        )
    return np.moveaxis(source[:2], 0, 2)


def _steps(part: Any) -> Iterator[Any]:
    """The transforms in a pipeline, those inside of others (RandomApply) too."""
    if isinstance(part, dict):
        part = [*part.values()]
    if isinstance(part, (list, tuple)):
        for item in part:
            yield from _steps(item)
    elif isinstance(part, BaseTransform) or hasattr(part, 'transforms'):
        yield part
        yield from _steps(vars(part))


def draw_kernels(
    view: View, points: Sequence[tuple[float, float]] = (), heat: bool = True
) -> Figure:
    """Heat maps of every layer and group, and the kernels of some pixels.

    Args:
        view (View): From :func:`look`.
        points (Sequence[tuple[float, float]]): x and y in the original image.
            Defaults to none.
        heat (bool): Whether to draw the heat maps. Defaults to True.

    Raises:
        UserError: If the model does not see a point.
    """
    places = [view.find(*point) for point in points]
    sections = [
        (layer, point, place)
        for layer in view.layers
        for point, place in zip((None, *points), (None, *places), strict=True)
        if heat or point
    ]
    columns = int(np.clip(max(len(layer.kernels) for layer in view.layers), *COLUMNS))
    lines = [math.ceil(len(layer.kernels) / columns) for layer, *_ in sections]
    height, width = view.image.shape[:2]
    place_height = 1.8 * min(height / width, TALLEST) + 0.1
    heights = [
        n * (1.9 if point else place_height) + 0.4
        for n, (_, point, _) in zip(lines, sections, strict=True)
    ]
    figure = Figure((1.8 * columns, sum(heights)), layout='constrained')
    parts = np.atleast_1d(figure.subfigures(len(sections), height_ratios=heights))
    for part, count, (layer, point, place) in zip(parts, lines, sections, strict=True):
        axes = part.subplots(count, columns, squeeze=False).flat
        for ax in axes:
            ax.set_axis_off()
        groups, size, _, *shape = layer.kernels.shape
        title = f'{layer.name}: {size}x{size} kernels of {shape[0]}x{shape[1]} pixels'
        if point:
            title = f'{layer.name}: kernels at x={point[0]:g}, y={point[1]:g}'
        part.suptitle(title, fontsize=9, x=0.01, ha='left')
        for group, ax in zip(range(groups), part.axes, strict=False):
            if point:
                _draw_kernel(ax, view, layer, group, place)
            else:
                _draw_heat(ax, view, layer, group, places)
    return figure


def as_image(figure: Figure, dpi: int = 80) -> np.ndarray:
    """A figure as ``[H, W, 3]``, uint8, RGB."""
    figure.dpi = dpi
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def _draw_heat(
    ax: Axes, view: View, layer: LayerKernels, group: int, places: Sequence
) -> None:
    heat = layer.heat[group]
    step_x, step_y = view.stride(layer)
    height, width = view.image.shape[:2]
    low, high = np.percentile(heat, (1, 99))
    ax.imshow(cv2.cvtColor(view.image, cv2.COLOR_RGB2GRAY), cmap='gray')
    ax.imshow(
        heat,
        cmap='inferno',
        alpha=0.65,
        vmin=low,
        vmax=high,
        extent=(0, heat.shape[1] * step_x, heat.shape[0] * step_y, 0),
        interpolation='bilinear',
    )
    for column, row in places:
        ax.plot(column, row, '+', color='cyan', markersize=6)
    ax.set(xlim=(0, width), ylim=(height, 0))
    ax.set_title(f'group {group}: {low:.2g} to {high:.2g}', fontsize=7, pad=2)


def _draw_kernel(
    ax: Axes, view: View, layer: LayerKernels, group: int, place: tuple[int, int]
) -> None:
    steps = view.stride(layer)
    indices = [
        min(int(pixel / step), out - 1)
        for pixel, step, out in zip(
            place, steps, layer.kernels.shape[:2:-1], strict=True
        )
    ]
    kernel = layer.kernels[group, :, :, indices[1], indices[0]].numpy()
    stride, dilation = layer.layer.stride, layer.layer.dilation
    middle = len(kernel) // 2
    # Pixels of the picture per pixel of the layer's input, and where the window begins.
    sizes = [step / stride for step in steps]
    corner = [
        (index * stride - middle * dilation) * size
        for index, size in zip(indices, sizes, strict=True)
    ]
    span = [((len(kernel) - 1) * dilation + 1) * size for size in sizes]
    others = np.abs(np.delete(kernel, kernel.size // 2))
    limit = max(float(others.max(initial=0)), 1e-12)
    grid = np.zeros([(len(kernel) - 1) * dilation + 1] * 2 + [4])
    taps = grid[::dilation, ::dilation]
    taps[:] = matplotlib.colormaps['RdBu_r'](0.5 + kernel / limit / 2)
    taps[..., 3] = 0.15 + 0.75 * np.abs(kernel / limit).clip(max=1)
    left, top = corner
    right, bottom = left + span[0], top + span[1]
    ax.set_axis_on()
    ax.imshow(cv2.cvtColor(view.image, cv2.COLOR_RGB2GRAY), cmap='gray')
    ax.imshow(grid, extent=(left, right, bottom, top), interpolation='nearest')
    at = [
        start + middle * dilation * size
        for start, size in zip(corner, sizes, strict=True)
    ]
    ax.add_patch(Rectangle(at, *sizes, fill=False, edgecolor='cyan'))
    ax.set(
        xlim=(left - sizes[0], right + sizes[0]),
        ylim=(bottom + sizes[1], top - sizes[1]),
        xticks=[],
        yticks=[],
        facecolor='0.2',
    )
    value = kernel[middle, middle]
    ax.set_title(
        f'group {group}: middle {value:.2g}, others to {limit:.2g}', fontsize=6, pad=2
    )


def _point(text: str) -> tuple[float, float]:
    x, y = map(float, text.split(','))
    return x, y


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument('image', help='image file')
    add_model_arguments(parser)
    parser.add_argument('--layers', nargs='+', help='names of involutions')
    parser.add_argument(
        '--points',
        nargs='+',
        type=_point,
        default=[],
        metavar='X,Y',
        help='pixels of the image whose kernels are drawn',
    )
    parser.add_argument('--out', help='picture to write: .png, .jpg, .pdf, .svg')
    parser.add_argument(
        '--list-layers', action='store_true', help='list the involutions, draw nothing'
    )


def main(args: argparse.Namespace) -> None:
    """The command ``kernels``."""
    if not args.list_layers:
        check_picture(args.out, '--out')
    try:
        if not Path(args.image).is_file():
            raise UserError(f'image {args.image} is missing.')
        image = open_image(Path(args.image))
    except ValueError as error:
        raise UserError(f'{error}.') from error
    inferencer = build_inferencer(args.config, args.weights, args.device)
    if args.list_layers:
        for name in involutions(inferencer.model):
            console.print(f'{name}  {inferencer.model.get_submodule(name)!r}')
        return
    figure = draw_kernels(look(inferencer, image, args.layers), args.points)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=110)
    console.print(f'Kernels: {args.out}')
