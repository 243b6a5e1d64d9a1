"""Hooks that stop a run before it does harm."""

from __future__ import annotations

from pathlib import Path

import torch
from mmengine.hooks import CheckpointHook, Hook
from mmengine.runner import Runner

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
    """Keep a resumed run from deleting the best checkpoint of another one.

    A checkpoint names the best one so far by its absolute path, in the folder that the
    run had then; CheckpointHook deletes that file when it finds a better one.
    """

    priority = 'LOWEST'  # after CheckpointHook

    def before_train(self, runner: Runner) -> None:
        for hook in runner.hooks:
            best = getattr(hook, 'best_ckpt_path', None)
            if best is not None:
                hook.best_ckpt_path = self._own(hook, best)
            for name, best in getattr(hook, 'best_ckpt_path_dict', {}).items():
                hook.best_ckpt_path_dict[name] = best and self._own(hook, best)

    @staticmethod
    def _own(hook: CheckpointHook, best: str) -> str:
        return str(Path(hook.out_dir, Path(best).name))


class LossCheck(Hook):
    """Stop at a loss that is not finite, before a checkpoint of it is written.

    With dynamic loss scaling such a step is skipped and the scale lowered, so only a
    long row of them is an error.
    """

    priority = 'VERY_HIGH'
    patience = 50

    def __init__(self) -> None:
        self.row = 0

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
        if all(torch.isfinite(value).all() for value in losses.values()):
            self.row = 0
            return
        self.row += 1
        if hasattr(runner.optim_wrapper, 'loss_scaler') and self.row < self.patience:
            return
        values = ', '.join(f'{key} {value.mean():.4g}' for key, value in losses.items())
        rates = [f'{lr:.3g}' for lr in runner.optim_wrapper.get_lr()['lr']]
        raise UserError(
            f'The loss is not finite at iteration {runner.iter + 1}: {values}; '
            f'lr {rates[0]}. Training stopped; checkpoints in {runner.work_dir} are '
            'from before. Lower optim_wrapper.optimizer.lr, lengthen the warm-up, or '
            'clip gradients: optim_wrapper.clip_grad.max_norm=5.'
        )
