"""Pictures of predictions and of kernels at every validation of a training."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
import torch
from mmengine.dist import is_main_process
from mmengine.fileio import get
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, Runner
from mmengine.visualization import TensorboardVisBackend

from mmcls_involution.apis.vis_kernels import (
    View,
    as_image,
    check_layers,
    draw_kernels,
    involutions,
    kernels_of,
)
from mmcls_involution.engine.errors import UserError


@HOOKS.register_module()
class WatchHook(Hook):
    """Show the same validation images at every validation, and write TensorBoard.

    Predictions stand beside the ground truth, as the toolbox draws them. Kernels are
    drawn as the command ``kernels`` does: heat maps, and the kernels of some points.
    All go to the visualizer of the run: into ``vis_data/vis_image`` of its folder, and
    to TensorBoard beside the scalars that MMEngine writes.

    Args:
        images (int): The first ones of the validation data (of this process) whose
            predictions are drawn. Defaults to 4.
        kernels (int): The first ones of these whose kernels are drawn too, for which
            the model runs once more. Defaults to 1; a model without involutions has
            none.
        points (Sequence[Sequence[float]]): x and y of pixels whose kernels are drawn,
            as parts of the width and height. Defaults to the middle.
        layers (Sequence[str], optional): Names of involutions. Defaults to None: the
            last one for each size of feature map in each part of the model.
        score_thr (float): Boxes and masks of a lower score are not drawn.
            Defaults to 0.3.
        tensorboard (bool): Whether to add TensorBoard to the visualizer.
            Defaults to True.

    Raises:
        UserError: If ``tensorboard`` is not installed, or points or layers are not in
            the image or model.

    Example:
        As an option of ``train``, or in a config::

            --cfg-options default_hooks.watch.type=mmcls_involution.apis.WatchHook

            default_hooks = dict(watch=dict(type='mmcls_involution.apis.WatchHook'))
    """

    priority = 'NORMAL'

    def __init__(
        self,
        images: int = 4,
        kernels: int = 1,
        points: Sequence[Sequence[float]] = ((0.5, 0.5),),
        layers: Sequence[str] | None = None,
        score_thr: float = 0.3,
        tensorboard: bool = True,
    ) -> None:
        if any(len(p) != 2 or not all(0 <= part <= 1 for part in p) for p in points):
            raise UserError(
                'WatchHook: points are pairs of x and y from 0 to 1, parts of the '
                f'width and height; got {points}.'
            )
        if tensorboard and find_spec('tensorboard') is None:
            raise UserError(
                'WatchHook writes for TensorBoard, and tensorboard is not installed: '
                'pip install tensorboard. Or tensorboard=False (--cfg-options '
                'default_hooks.watch.tensorboard=False): pictures in the work dir only.'
            )
        self.images, self.kernels = images, kernels
        self.points, self.layers = points, layers
        self.score_thr, self.tensorboard = score_thr, tensorboard
        self.seen = 0

    def before_run(self, runner: Runner) -> None:
        if self.layers:
            check_layers(_unwrapped(runner), self.layers)
        backends = runner.visualizer._vis_backends  # which has no other way in
        if self.tensorboard and not any(
            isinstance(backend, TensorboardVisBackend) for backend in backends.values()
        ):
            folder = Path(runner.log_dir, 'vis_data')
            backends['TensorboardVisBackend'] = TensorboardVisBackend(str(folder))

    def before_val_epoch(self, runner: Runner) -> None:
        self.seen = 0

    @torch.no_grad()
    def after_val_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | None = None,
        outputs: Sequence[Any] | None = None,
    ) -> None:
        by_epoch = isinstance(runner.train_loop, EpochBasedTrainLoop)
        step = runner.epoch if by_epoch else runner.iter
        for i, sample in enumerate(outputs[: self.images - self.seen]):
            one = {key: value[i : i + 1] for key, value in data_batch.items()}
            file = Path(sample.get('img_path') or 'image')
            name = f'{self.seen}_{file.stem}'
            self._draw_prediction(runner, f'{name}_prediction', one, sample, step)
            if self.seen < self.kernels and involutions(_unwrapped(runner)):
                self._draw_kernels(runner, f'{name}_kernels', one, step)
            self.seen += 1

    def _draw_prediction(
        self, runner: Runner, name: str, one: dict, sample: Any, step: int
    ) -> None:
        visualizer = runner.visualizer
        if hasattr(visualizer, 'visualize_cls'):
            # MMPretrain's own hook draws on what the model sees, too: not every
            # data set has files.
            visualizer.visualize_cls(_picture(one), sample, name=name, step=step)
            return
        image = mmcv.imfrombytes(get(sample.img_path), channel_order='rgb')
        options: dict[str, Any] = dict(step=step)
        if hasattr(sample, 'pred_instances'):
            options['pred_score_thr'] = self.score_thr
        visualizer.add_datasample(name, image, sample, **options)

    def _draw_kernels(self, runner: Runner, name: str, one: dict, step: int) -> None:
        # Every process runs it, for models whose parameters are spread over them.
        model, seen = _unwrapped(runner), _picture(one)
        found = kernels_of(model, lambda: runner.model.val_step(one), self.layers)
        if not is_main_process():
            return
        height, width = model.data_preprocessor(one, False)['inputs'].shape[2:]
        picture = np.zeros((height, width, 3), dtype=np.uint8)
        picture[: seen.shape[0], : seen.shape[1]] = seen
        source = np.full((height, width, 2), np.nan, dtype=np.float32)
        inside = np.indices(seen.shape[:2], dtype=np.float32)[::-1]
        source[: seen.shape[0], : seen.shape[1]] = np.moveaxis(inside, 0, 2)
        last = np.subtract(seen.shape[1::-1], 1)
        places = [tuple(np.round(last * point).tolist()) for point in self.points]
        figure = draw_kernels(View(picture, source, found), places)
        runner.visualizer.add_image(name, as_image(figure), step)


def _unwrapped(runner: Runner) -> torch.nn.Module:
    return runner.model.module if is_model_wrapper(runner.model) else runner.model


def _picture(one: dict) -> np.ndarray:
    """The image of a batch of one, before normalization: [H, W, 3], uint8, RGB."""
    image = np.moveaxis(one['inputs'][0].cpu().numpy(), 0, 2)[..., ::-1]
    return np.ascontiguousarray(image.clip(0, 255).astype(np.uint8))
