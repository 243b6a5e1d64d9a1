"""Where and how an operator is computed: by torchvision, in which type and threads."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

# The operators that torchvision has with the same meaning. Its RoIPool rounds the RoIs,
# which mmcv's does not; its focal loss is of plain torch itself.
TORCHVISION = (
    'nms',
    'roi_align_forward',
    'roi_align_backward',
    'deform_conv_forward',
    'deform_conv_backward_input',
    'deform_conv_backward_parameters',
    'modulated_deform_conv_forward',
    'modulated_deform_conv_backward',
)


@functools.cache
def runs_on(device: str) -> bool:
    """Whether torchvision's compiled operators run on a type of device.

    They do not where torchvision is missing or was built for another torch, nor on a
    GPU where it was built without CUDA. One of them is run to know.
    """
    if device not in ('cpu', 'cuda'):  # others have a part of the operators
        return False
    try:
        import torchvision  # noqa: F401

        boxes = torch.tensor([[0.0, 0, 1, 1]], device=device)
        return torch.ops.torchvision.nms(boxes, boxes[:, 3], 0.5).tolist() == [0]
    except Exception:  # a missing library shows itself in many ways
        return False


def serves(tensor: Tensor) -> bool:
    """Whether torchvision's operators run where a tensor lies, and are wanted there.

    Their gradients on CUDA are sums in any order, which torch refuses where it is told
    to be deterministic.
    """
    if tensor.is_cuda and torch.are_deterministic_algorithms_enabled():
        return False
    return runs_on(tensor.device.type)


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where a tensor has it, else float32: half precision is not summed in."""
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return torch.float64
    return torch.float32


_lock = threading.Lock()
_inside: list[int] = []  # for each thread inside `one_thread` the number to go back to


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch to the calling thread.

    For loops over many small operations: threads gain little there, and where other
    processes (the workers of a data loader) use the cores, each waits for its turn at
    the end of every operation.
    """
    # torch's number is the calling thread's own, and the last one that any thread set
    # is what new threads begin with.
    with _lock:
        threads = torch.get_num_threads()
        if threads == 1 and _inside:  # perhaps only because another thread is inside
            threads = _inside[0]
        if threads > 1:
            _inside.append(threads)
            torch.set_num_threads(1)
    try:
        yield
    finally:
        if threads > 1:
            with _lock:
                _inside.remove(threads)
                torch.set_num_threads(threads)
