"""The compiled operators of mmcv, by torchvision or in plain torch.

``mmcv-lite`` holds all of mmcv's Python and no ``mmcv._ext``, the compiled module that
``mmcv.ops`` imports; mmcv itself has no wheel for today's torch. Here a module of that
name is provided where mmcv has none: `OPERATORS` take the arguments of the functions of
``mmcv/ops/csrc/pytorch/pybind.cpp``, write into the same tensors and give the same
values. Half precision, as autocast brings it, is computed in float32. What is not in
the table can be imported and raises NotImplementedError when it is called.

Answers https://github.com/open-mmlab/mmcv/issues/3319 and its kind.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

# What brings the operators that are not here; a C++ compiler and 10 minutes or more.
COMPILE_MMCV = (
    'pip uninstall --yes mmcv-lite && '
    "pip install 'setuptools<82' wheel ninja psutil && "
    'pip install --no-deps --no-build-isolation --no-cache-dir mmcv==2.1.0'
)
NAME = 'mmcv._ext'


def provide_mmcv_ops() -> None:
    """Let ``import mmcv._ext`` find :data:`OPERATORS` where mmcv has no such file.

    A compiled mmcv is found first and stays as it is. Does nothing the second time.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


def is_provided() -> bool:
    """Whether ``mmcv.ops`` uses the operators of this package."""
    import importlib.util

    spec = importlib.util.find_spec(NAME)
    return spec is not None and isinstance(spec.loader, _Loader)


def lanes(device: str = 'cpu') -> dict[str, str]:
    """What computes each operator on a type of device.

    Args:
        device: ``'cpu'``, ``'cuda'`` or another of torch's device types.

    Returns:
        dict[str, str]: The names in :data:`OPERATORS`, each with ``'torchvision'`` or
        ``'torch'``.
    """
    from .lane import TORCHVISION, runs_on

    served = TORCHVISION if runs_on(device) else ()
    return {name: 'torchvision' if name in served else 'torch' for name in _operators()}


class _Finder:
    """Asked by the import system when no other finder knows a module."""

    def find_spec(
        self, name: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != NAME:
            return None
        return importlib.machinery.ModuleSpec(name, _Loader(), origin=__name__)


class _Loader:
    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        from . import operators

        vars(module).update(
            operators.OPERATORS,
            get_compiler_version=operators.get_compiler_version,
            get_compiling_cuda_version=operators.get_compiling_cuda_version,
            __getattr__=_missing,
        )


def _missing(name: str) -> Callable[..., NoReturn]:
    """The attribute of ``mmcv._ext`` that stands for an operator that is not here."""
    if name.startswith('__'):
        raise AttributeError(f'module {NAME!r} has no attribute {name!r}')

    def operator(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"mmcv's compiled operator {name!r} is needed here, and mmcv-lite has "
            'none. mmcls_involution provides the ones that detectors and segmenters '
            'use most; for this one compile mmcv in its place:\n'
            f'    {COMPILE_MMCV}'
        )

    operator.__name__ = name
    return operator


def _operators() -> dict[str, Callable[..., Any]]:
    # Not at the top: importing compat must stay light.
    from .operators import OPERATORS

    return OPERATORS
