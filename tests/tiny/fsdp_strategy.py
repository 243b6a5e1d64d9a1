"""MMEngine's FSDPStrategy, with the repairs that docs/distributed.md explains."""

from __future__ import annotations

import torch
from mmengine._strategy import FSDPStrategy
from mmengine.device import get_device
from mmengine.registry import STRATEGIES
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel


@STRATEGIES.register_module()
class RepairedFSDPStrategy(FSDPStrategy):
    """FSDPStrategy of MMEngine 0.10.7 that resumes, and runs on the CPU."""

    def _wrap_model(self, model: nn.Module) -> nn.Module:
        if get_device() == 'cpu':  # a bare index means an accelerator
            self.model_wrapper['device_id'] = torch.device('cpu')
        return super()._wrap_model(model)

    def load_optim_state_dict(self, state_dict: dict) -> None:
        # MMEngine passes these by position, in the order that they had in torch 2.0.
        self.optim_wrapper.load_state_dict(
            FullyShardedDataParallel.optim_state_dict_to_load(
                model=self.model,
                optim=self.optim_wrapper.optimizer,
                optim_state_dict=state_dict,
            )
        )
