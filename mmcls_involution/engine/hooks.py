"""Hooks that stop a run before it does harm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_gather_object, all_reduce, get_rank, get_world_size
from mmengine.hooks import CheckpointHook, Hook
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from torch import Tensor

from mmcls_involution.data.rules import printable
from mmcls_involution.engine.errors import UserError
from mmcls_involution.weights.fit import Fit


class WeightsCheck(Hook):
    """Stop when a checkpoint does not fit the model.

    MMEngine loads what fits and only logs the rest; a model that keeps its random
    weights would be tested or trained as if nothing had happened.

    Args:
        complete: Whether every parameter must be loaded (testing), or any (training).
    """

    priority = 'VERY_HIGH'

    def __init__(self, complete: bool) -> None:
        self.complete = complete
        self.fit = Fit({})

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        # It is read, and goes into the model next.
        self.fit = Fit(dict(runner.model.named_parameters()))

    def _check(self, runner: Runner) -> None:
        kept, total = self.fit.empty, len(self.fit.tensors)
        if kept and (self.complete or len(kept) == total):
            raise UserError(
                f'The checkpoint {runner._load_from} does not fit the model: '
                f'{len(kept)} of {total} parameters are not in it, or have another '
                f'shape: {", ".join(kept[:5])}{", ..." if len(kept) > 5 else ""}. They '
                'would keep their random values. Use the config that the checkpoint '
                'was trained with.'
            )
        self.fit = Fit({})

    def before_train(self, runner: Runner) -> None:
        self._check(runner)

    def before_test(self, runner: Runner) -> None:
        self._check(runner)


class OwnBest(Hook):
    """Hold a resumed run to the best checkpoint in its own folder.

    A checkpoint names the best one so far by its absolute path, in the folder that the
    run had then; CheckpointHook deletes that file when it finds a better one. One that
    is gone, as after going back to before another one took its place, has no score to
    beat: perhaps no best one would be kept any more.
    """

    priority = 'LOWEST'  # after CheckpointHook

    def before_train(self, runner: Runner) -> None:
        for hook in runner.hooks:
            if best := getattr(hook, 'best_ckpt_path', None):
                hook.best_ckpt_path = self._own(runner, hook, best, '')
            for key, best in getattr(hook, 'best_ckpt_path_dict', {}).items():
                own = best and self._own(runner, hook, best, f'_{key}')
                hook.best_ckpt_path_dict[key] = own

    @staticmethod
    def _own(
        runner: Runner, hook: CheckpointHook, best: str, suffix: str
    ) -> str | None:
        own = hook.file_backend.join_path(hook.out_dir, Path(best).name)
        # The first process decides, lest one see what another does not.
        if all_gather_object(hook.file_backend.exists(own))[0]:
            return own
        runner.logger.warning(f'{own} is gone: the next best one need not beat it')
        for name in ('best_score', 'best_ckpt'):
            runner.message_hub.pop_info(f'{name}{suffix}', None)
        return None


class LossCheck(Hook):
    """Stop at a loss or gradient that is not finite, before the weights take it in.

    The step of such a batch is not taken, so that the weights are those from before it.
    Its images are named, and it is written to ``not_finite/iter_<N>.pth`` in the work
    dir, which loads weights-only.

    With dynamic loss scaling such a step is skipped and the scale lowered, so only a
    long row of them is an error.

    Args:
        skip (bool): Warn, put back the statistics of batch norms, and go on with the
            next batch; only a long row of such batches stops the training.
            Defaults to False.
    """

    priority = 'VERY_HIGH'
    patience = 50

    def __init__(self, skip: bool = False) -> None:
        self.skip = skip
        self.row = 0
        self.dropped = False
        self.buffers: list[tuple[Tensor, Tensor]] = []
        self.handles: list = []

    def before_train(self, runner: Runner) -> None:
        # Before a step, which it cannot call off: without gradients it does nothing.
        self.handles = [
            part.optimizer.register_step_pre_hook(self._look_at_gradients)
            for part in _wrappers(runner)
        ]
        if self.skip:
            self.buffers = [(b, b.clone()) for b in runner.model.buffers()]

    def after_train(self, runner: Runner) -> None:
        for handle in self.handles:
            handle.remove()

    def _look_at_gradients(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [
            parameter
            for group in optimizer.param_groups
            for parameter in group['params']
            if parameter.grad is not None
        ]
        norm = torch.nn.utils.clip_grad_norm_(parameters, float('inf'))
        bad = (~torch.isfinite(norm)).to(torch.uint8)
        if get_world_size() > 1:  # all take the step, or none
            all_reduce(bad, 'max')
        if bad:
            self.dropped = True
            for parameter in parameters:
                parameter.grad = None

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict = None,
        outputs: dict | None = None,
    ) -> None:
        losses = {
            key: value.detach()
            for key, value in (outputs or {}).items()
            if 'loss' in key and torch.is_tensor(value)
        }
        finite = all(torch.isfinite(value).all() for value in losses.values())
        dropped, self.dropped = self.dropped, False
        if finite and not dropped:
            self.row = 0
            for buffer, before in self.buffers:
                before.copy_(buffer)
            return
        for buffer, before in self.buffers:
            buffer.copy_(before)
        self.row += 1
        scaled = any(hasattr(part, 'loss_scaler') for part in _wrappers(runner))
        if scaled and not self.skip and self.row < self.patience:
            return
        values = ', '.join(f'{key} {value.mean():.4g}' for key, value in losses.items())
        rates = [  # 'lr', or of several optimizers 'NAME.lr'; not 'base_lr'
            f'{name} {rates[0]:.3g}'
            for name, rates in runner.optim_wrapper.get_lr().items()
            if name.rpartition('.')[2] == 'lr'
        ]
        images = [printable(name) for name in image_names(data_batch)]
        what = 'norm of the gradient' if finite else 'loss'
        message = (
            f'The {what} is not finite at iteration {runner.iter + 1}: {values}; '
            f'{", ".join(rates)}; images: {", ".join(images) or "without names"}. '
            f'{self._keep(runner, data_batch, losses, images)}'
        )
        if self.skip and self.row < self.patience:
            runner.logger.warning(f'{message} The batch is skipped')
            return
        raise UserError(
            f'{message} Training stopped; checkpoints in {runner.work_dir} are '
            'from before. Look at these images and their labels, lower '
            'optim_wrapper.optimizer.lr, lengthen the warm-up, or clip gradients: '
            'optim_wrapper.clip_grad.max_norm=5. To pass over such batches: '
            '--skip-not-finite.'
        )

    @staticmethod
    def _keep(runner: Runner, batch: Any, losses: dict, images: list[str]) -> str:
        """Write the batch down; where, in a sentence."""
        file = Path(runner.work_dir, 'not_finite', f'iter_{runner.iter + 1}.pth')
        if get_rank():
            file = file.with_stem(f'{file.stem}_process_{get_rank()}')
        content = dict(
            batch=_tensors(batch),
            images=images,
            losses={key: value.cpu() for key, value in losses.items()},
        )
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(content, file)
        except (OSError, RuntimeError) as error:  # torch's word for a full disk
            return f'(The batch could not be written to {file}: {error}.)'
        return f'The batch is in {file}.'


def _wrappers(runner: Runner) -> list[OptimWrapper]:
    """One for each optimizer."""
    wrapper = runner.optim_wrapper
    return [*wrapper.values()] if isinstance(wrapper, OptimWrapperDict) else [wrapper]


def image_names(batch: Any) -> list[str]:
    """The paths of the images in a batch, as far as it has them."""
    if isinstance(batch, BaseDataElement):
        found = batch.get('img_path')
    elif isinstance(batch, dict):
        found = batch.get('img_path')
        if found is None:
            found = [name for value in batch.values() for name in image_names(value)]
    elif isinstance(batch, list | tuple):
        found = [name for value in batch for name in image_names(value)]
    else:
        found = []
    return [found] if isinstance(found, str) else [str(name) for name in found or []]


def _tensors(value: Any) -> Any:
    """A batch as what loads weights-only: dicts, lists, tensors, numbers, text."""
    if torch.is_tensor(value):
        return value.detach().cpu()
    if isinstance(value, np.ndarray) and value.dtype.kind in 'biuf':
        return torch.from_numpy(value.copy())
    if isinstance(value, BaseDataElement):
        return {key: _tensors(item) for key, item in value.all_items()}
    if isinstance(value, dict):
        return {str(key): _tensors(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_tensors(item) for item in value]
    for inner in ('tensor', 'masks'):  # boxes and masks of MMDetection
        if hasattr(value, inner):
            return _tensors(getattr(value, inner))
    return value if type(value) in (bool, int, float, str) else str(value)
