"""The backends of the operators: their table, and the choice among them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from . import native, reference, tap_sum, triton_kernels

BACKEND_VARIABLE = 'MMCLS_INVOLUTION_BACKEND'


@dataclass(frozen=True)
class Backend:
    """One way to compute involution.

    Attributes:
        kernels: Module with ``forward``, ``grad_input`` and ``grad_weight``. It may
            have ``fused_forward`` and ``fused_backward`` too, which return None for
            what they cannot do; the others do that in tiles then.
        priority: The usable backend of highest priority is the default one; None
            for a backend that runs only when named.
        unusable: Given device type and dtype, the reason why this backend cannot
            run there, or None if it can.
        fused: Whether modules use the fused operator unless told otherwise.
    """

    kernels: ModuleType
    priority: int | None
    unusable: Callable[[str, torch.dtype], str | None]
    fused: bool = False


def _runs_everywhere(device: str, dtype: torch.dtype) -> None:
    return None


BACKENDS: dict[str, Backend] = {
    'native': Backend(native, 20, native.unusable, fused=True),
    'triton': Backend(triton_kernels, 20, triton_kernels.unusable),
    'tap_sum': Backend(tap_sum, 10, _runs_everywhere),
    'reference': Backend(reference, None, _runs_everywhere),
}


def default_backend(device: str, dtype: torch.dtype) -> str:
    usable = [
        name
        for name, backend in BACKENDS.items()
        if backend.priority is not None and backend.unusable(device, dtype) is None
    ]
    return max(usable, key=lambda name: BACKENDS[name].priority)


# torch.compile takes the result as it is. torch.compiler.assume_constant_result would
# set the same, but imports all of torch._dynamo for it, which takes a second.
default_backend._dynamo_marked_constant = True


def kernels_of(backend: str, tensor: Tensor) -> ModuleType:
    """Kernels of the named backend, of the best one where the name is empty."""
    device, dtype = tensor.device.type, tensor.dtype
    if not backend:
        backend = default_backend(device, dtype)
    reason = BACKENDS[backend].unusable(device, dtype)
    if reason is not None:
        raise ValueError(
            f'backend {backend!r} cannot run {dtype} on {device}: {reason}'
        )
    return BACKENDS[backend].kernels


def named_backend(name: str | None) -> str:
    """The argument, else the environment's choice; empty for the best one."""
    name = name or os.environ.get(BACKEND_VARIABLE, '')
    if name and name not in BACKENDS:
        raise ValueError(f'backend must be one of {list(BACKENDS)}, got {name!r}')
    return name
