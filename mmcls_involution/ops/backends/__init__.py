"""The backends of the operators: their table, and the choice among them."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from functools import cache

import torch

from ..checks import switch
from . import native, reference, tap_sum, triton_kernels
from .contract import Backend, FusedBackend, Problem

logger = logging.getLogger(__name__)

BACKEND_VARIABLE = 'MMCLS_INVOLUTION_BACKEND'
LOG_VARIABLE = 'MMCLS_INVOLUTION_LOG'


@dataclass(frozen=True)
class Entry:
    """A row of the table.

    Attributes:
        kernels: The module that computes.
        priority: Of the backends that support a problem the one of highest priority
            runs; None for a backend that runs only when named.
        fused: Whether modules use the fused operator unless told otherwise.
    """

    kernels: Backend | FusedBackend
    priority: int | None
    fused: bool = False

    def supports(self, problem: Problem) -> str | None:
        """The reason why this backend cannot compute `problem`, or None if it can."""
        if not hasattr(self.kernels, problem.operation):
            return f'it has no {problem.operation}'
        return self.kernels.supports(problem)


BACKENDS: dict[str, Entry] = {
    'native': Entry(native, 20, fused=True),
    'triton': Entry(triton_kernels, 20),
    'tap_sum': Entry(tap_sum, 10),
    'reference': Entry(reference, None),
}


def named_backend(name: str | None) -> str:
    """The argument, else the environment's choice; empty for the best one."""
    name = name or os.environ.get(BACKEND_VARIABLE, '')
    if name and name not in BACKENDS:
        raise ValueError(f'backend must be one of {list(BACKENDS)}, got {name!r}')
    return name


def _find(name: str, problem: Problem) -> tuple[str | None, dict[str, str]]:
    """The backend that computes `problem`, if any, and why those before it do not."""
    if name:
        reason = BACKENDS[name].supports(problem)
        return (name, {}) if reason is None else (None, {name: reason})
    found, highest, reasons = None, -1, {}
    for name, entry in BACKENDS.items():
        if entry.priority is not None and entry.priority > highest:
            reason = entry.supports(problem)
            if reason is None:
                found, highest = name, entry.priority
            else:
                reasons[name] = reason
    return found, reasons


def default_backend(device: str, dtype: torch.dtype, index: int = 0) -> str:
    """The backend of a typical problem on the device of that type and number."""
    return _find('', Problem.typical(device, dtype, index))[0]


# torch.compile takes the result as it is. torch.compiler.assume_constant_result would
# set the same, but imports all of torch._dynamo for it, which takes a second.
default_backend._dynamo_marked_constant = True


def choose(name: str, problem: Problem) -> Backend:
    """Kernels of the named backend, of the best one where the name is empty.

    Raises:
        ValueError: If it does not support the problem, with the reason.
    """
    found, reasons = _find(name, problem)
    if found is None:
        name, reason = reasons.popitem()
        raise ValueError(
            f'backend {name!r} cannot run {problem.dtype} on {problem.device}: {reason}'
        )
    _log(problem, found, reasons)
    return BACKENDS[found].kernels


def choose_fused(name: str, problem: Problem) -> FusedBackend | None:
    """Kernels of the named backend or the best one that fuses the problem, if any."""
    found, reasons = _find(name, problem)
    _log(problem, found or 'tiles', reasons)
    return found and BACKENDS[found].kernels


_logged = set()
_logging = cache(switch)  # reading the environment takes as long as the choice


def _log(problem: Problem, found: str, reasons: dict[str, str]) -> None:
    """Say the choice, once for each kind of problem, where the environment asks."""
    if not _logging(LOG_VARIABLE):
        return
    layout = 'channels_last' if problem.channels_last else 'contiguous'
    kind = f'{problem.operation} of {problem.dtype} on {problem.device}, {layout}, '
    kind += 'kernel {}x{}: '.format(*problem.kernels_shape[2:4]) + found
    if kind not in _logged:
        _logged.add(kind)
        passed_over = (f'; not {name}: {reason}' for name, reason in reasons.items())
        # A level that is shown without any set-up.
        logger.warning('%s', kind + ''.join(passed_over))
