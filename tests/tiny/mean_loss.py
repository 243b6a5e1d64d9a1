"""A hook for tests/tiny: the losses of a global batch, whatever splits it."""

from __future__ import annotations

from mmengine.dist import all_reduce_dict
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner


@HOOKS.register_module()
class MeanLoss(Hook):
    """Log the mean over all processes; MMEngine logs what the first one computes."""

    priority = 'HIGHEST'  # before RuntimeInfoHook takes the values

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict = None,
        outputs: dict | None = None,
    ) -> None:
        all_reduce_dict(outputs, 'mean')
