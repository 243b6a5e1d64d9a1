"""The end of a command that runs in several processes."""

from __future__ import annotations

import gc

# Its functions keep the group that exists at its first import, as their default.
import torch.distributed.nn  # noqa: F401
from mmengine.dist import is_distributed
from torch import distributed


def leave_process_group() -> None:
    """End the threads in which torch communicates with the other processes, if any.

    Gloo's free the tensors of a communication after it. One that still does as Python
    shuts down cannot have the interpreter's lock, and the process aborts, whose work is
    done. Not for a command that failed: a thread that waits for a process that has
    ended would be waited for.
    """
    if not is_distributed():
        return
    # The threads end with the group's last reference. The model's wrapper has one, and
    # the runner, which holds the model, is part of a cycle.
    gc.collect()
    distributed.destroy_process_group()
