"""Let MMEngine's ``FSDPStrategy`` resume."""

from __future__ import annotations

import inspect
from typing import Any


def name_fsdp_arguments() -> None:
    """Let MMEngine's ``FSDPStrategy`` resume.

    It passes the arguments of ``FSDP.optim_state_dict_to_load`` by position, in the
    order that they had in torch 2.0; torch 2.1 changed it.

    Answers https://github.com/pytorch/pytorch/issues/105727. Does nothing to an
    MMEngine that has been mended.
    """
    from mmengine._strategy.fsdp import FSDPStrategy

    stock = FSDPStrategy.load_optim_state_dict
    if 'state_dict, self.model, self.optim_wrapper' in inspect.getsource(stock):
        FSDPStrategy.load_optim_state_dict = _load_optim_state_dict


def _load_optim_state_dict(self: Any, state_dict: dict) -> None:
    """``FSDPStrategy.load_optim_state_dict``, the arguments passed by name."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    own_part = FullyShardedDataParallel.optim_state_dict_to_load(
        model=self.model,
        optim=self.optim_wrapper.optimizer,
        optim_state_dict=state_dict,
    )
    self.optim_wrapper.load_state_dict(own_part)
