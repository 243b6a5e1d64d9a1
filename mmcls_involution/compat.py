"""What today's library versions need: a range check and repairs of upstream.

Importing this module imports none of the OpenMMLab libraries. :func:`apply` makes
every repair that the environment needs and may be called any number of times; call it
before mmdet, mmseg or mmpretrain are imported. Importing ``mmcls_involution.models``
and the scripts in ``tools/`` do so.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import inspect
import os
import pickle
import re
import sys
import zipfile
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

# distribution -> (lowest version, inclusive; highest version, exclusive)
SUPPORTED: dict[str, tuple[str, str]] = {
    # 2.13 is tested; 2.7 is a floor above 2.6, which made torch.load weights-only.
    'torch': ('2.7.0', '3.0.0'),
    # Older ones register Adafactor twice (mmengine#1609); the repairs below patch
    # functions of the 0.10 series.
    'mmengine': ('0.10.7', '0.11.0'),
    # What mmdet and mmsegmentation accept: they stop at import outside of it.
    'mmcv': ('2.0.0rc4', '2.2.0'),
    # The oldest tested release (it is also the newest) up to the next major one.
    'mmdet': ('3.3.0', '4.0.0'),
    'mmsegmentation': ('1.2.2', '2.0.0'),
    'mmpretrain': ('1.2.0', '2.0.0'),
}


def check_versions() -> None:
    """Refuse installed libraries whose version is outside :data:`SUPPORTED`.

    A library that is not installed is fine. ``mmcv-lite`` counts as ``mmcv``.

    Raises:
        ImportError: If a version is out of range. The message names every such
            package, what is installed, what is needed, and the pip command.
    """
    from packaging.version import Version

    problems, wanted = [], []
    for name, (lowest, highest) in SUPPORTED.items():
        for distribution in (name, 'mmcv-lite') if name == 'mmcv' else (name,):
            try:
                installed = importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:
                continue
            if not Version(lowest) <= Version(installed) < Version(highest):
                need = f'>={lowest},<{highest}'
                problems.append(
                    f'  {distribution} {installed} is installed, but {need} is needed'
                )
                wanted.append(f'"{distribution}{need}"')
    if problems:
        raise ImportError(
            'mmcls_involution does not work with these versions:\n'
            + '\n'.join(problems)
            + f'\nTo fix it: pip install {" ".join(wanted)}\n(mmcv needs '
            '--no-build-isolation where no wheel fits; `make setup` does it all.)'
        )


def apply() -> None:
    """Make every repair of upstream that this environment needs.

    Safe to call more than once, and with torch alone installed.
    """
    declare_torchvision_ops()
    if importlib.util.find_spec('mmengine') is not None:
        replace_pkg_resources()
        pickle_history_plainly()
        load_weights_only()
        name_fsdp_arguments()


# -------------------------------------------------------------------------- torchvision

_torchvision_schemas: Any = None  # the registration ends when this object dies


def declare_torchvision_ops() -> None:
    """Let a torchvision that was built for another torch be imported.

    Its C++ extension does not load, so its Python side fails with ``operator
    torchvision::nms does not exist``; MMEngine's environment report and MMPretrain's
    transforms import it. With the schemas declared the import succeeds. The compiled
    operators still do not exist, and torchvision says so when one is called.

    Answers https://github.com/pytorch/vision/issues/8985. Does nothing if torchvision
    is absent, already imported, or its extension loads; nor on Windows, where only
    torchvision itself knows the DLL folders to try that with.
    """
    global _torchvision_schemas
    if (
        _torchvision_schemas is not None
        or 'torchvision' in sys.modules
        or os.name == 'nt'
    ):
        return
    spec = importlib.util.find_spec('torchvision')
    if spec is None or spec.origin is None:
        return
    import torch

    try:
        for extension in Path(spec.origin).parent.glob('_C*.so'):
            torch.ops.load_library(extension)
            return
    except OSError:
        pass
    schemas = torch.library.Library('torchvision', 'FRAGMENT')
    schemas.define('nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
    schemas.define('qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
    _torchvision_schemas = schemas


# ------------------------------------------------------------------------ pkg_resources


def replace_pkg_resources() -> None:
    """Find packages for ``_base_ = 'mmdet::...'`` without ``pkg_resources``.

    MMEngine asks it where a package lies. setuptools 82 no longer ships it, and older
    ones warn at each use and take long to load.

    Answers https://github.com/open-mmlab/mmengine/pull/1676. Does nothing to an
    MMEngine that no longer uses ``pkg_resources``.
    """
    import mmengine.config.config
    import mmengine.hub.hub
    import mmengine.utils.package_utils

    stock = mmengine.utils.package_utils.get_installed_path
    if 'pkg_resources' not in inspect.getsource(stock):
        return
    for module in (
        mmengine.utils,
        mmengine.utils.package_utils,
        mmengine.config.config,
        mmengine.hub.hub,
    ):
        for function in (is_installed, get_installed_path):
            if hasattr(module, function.__name__):
                setattr(module, function.__name__, function)


def _module_origin(package: str) -> Path | None:
    """The ``__init__.py`` of a distribution or module; None if not installed."""
    names = [package]
    try:
        top_level = importlib.metadata.distribution(package).read_text('top_level.txt')
        names += (top_level or '').split()
    except importlib.metadata.PackageNotFoundError:
        pass
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            return Path(spec.origin)
    return None


def is_installed(package: str) -> bool:
    """Whether a distribution or module of this name is installed."""
    return _module_origin(package) is not None


def get_installed_path(package: str) -> str:
    """The folder of an installed package, by distribution or module name.

    Raises:
        ModuleNotFoundError: If it is not installed.
    """
    origin = _module_origin(package)
    if origin is None:
        raise ModuleNotFoundError(f'{package} is not installed; pip install {package}')
    return str(origin.parent)


# -------------------------------------------------------------------------- checkpoints

# The checkpoint that Runner.resume is reading: the user named it, or it lies in the
# run's own work directory.
_resumed_file: ContextVar[str | None] = ContextVar('resumed_file', default=None)


def pickle_history_plainly() -> None:
    """Make the training checkpoints that MMEngine writes loadable weights-only.

    A checkpoint holds the log history as ``HistoryBuffer`` objects, which pickle
    references to their methods through ``builtins.getattr``; torch >= 2.6 rightly
    refuses that, so MMEngine cannot resume its own file. Here the buffer is pickled as
    its constructor's arguments, two number arrays and an int, and the few types that
    this takes are allow-listed. Such a file is also readable by an unrepaired MMEngine.

    Answers https://github.com/open-mmlab/mmengine/issues/1655. Does nothing to a
    ``HistoryBuffer`` that already defines how it is pickled.
    """
    import numpy as np
    import torch
    from mmengine.logging import HistoryBuffer

    if '__reduce__' in HistoryBuffer.__dict__:
        return

    def __reduce__(self: HistoryBuffer) -> tuple:
        return type(self), (*self.data, self.max_length)

    HistoryBuffer.__reduce__ = __reduce__

    # Arrays and scalars of numbers: no code runs when they are rebuilt. numpy 1 and 2
    # pickle them under different module names.
    reconstruct = np.empty(0).__reduce__()[0]
    scalar = np.float64(0).__reduce__()[0]
    allowed: list[Any] = [HistoryBuffer, np.ndarray, np.dtype]
    for module in ('numpy._core.multiarray', 'numpy.core.multiarray'):
        allowed += [
            (reconstruct, f'{module}._reconstruct'),
            (scalar, f'{module}.scalar'),
        ]
    allowed += sorted(
        {
            type(np.dtype(code))
            for code in '?' + np.typecodes['AllInteger'] + np.typecodes['Float']
        },
        key=str,
    )
    torch.serialization.add_safe_globals(allowed)


def load_weights_only() -> None:
    """Read every checkpoint weights-only, whatever torch's default or environment.

    MMEngine leaves ``weights_only`` to torch.load, which TORCH_FORCE_NO_WEIGHTS_ONLY_
    LOAD turns off, and to torch.hub for a URL, whose default is an unrestricted load.
    ``load_from``, ``Pretrained`` and testing never need that. Only a local file given
    to ``Runner.resume`` is, where it holds more than weights-only loading allows,
    unpickled in full, after a warning.

    Answers https://github.com/open-mmlab/mmengine/issues/1655. Does nothing the second
    time.
    """
    from mmengine.runner import CheckpointLoader, Runner, checkpoint

    if checkpoint.load_from_local is _load_from_local:
        return
    CheckpointLoader.register_scheme('', _load_from_local, force=True)
    checkpoint.load_from_local = _load_from_local
    checkpoint.load_url = functools.partial(_load_url, checkpoint.load_url)
    Runner.resume = _trusting(Runner.resume)


def _trusting(resume: Callable[..., None]) -> Callable[..., None]:
    """Mark the file as the resumed one while ``Runner.resume`` runs."""

    @functools.wraps(resume)
    def wrapper(self: Any, filename: str, *args: Any, **kwargs: Any) -> None:
        token = _resumed_file.set(str(filename))
        try:
            resume(self, filename, *args, **kwargs)
        finally:
            _resumed_file.reset(token)

    return wrapper


def _load_from_local(filename: str, map_location: Any = None) -> Any:
    """Load a local checkpoint: the loader MMEngine uses for plain paths.

    Raises:
        FileNotFoundError: If there is no such file.
        pickle.UnpicklingError: If the file asks for code that weights do not need.
        RuntimeError: If the file is torn or is not a checkpoint.
    """
    import torch
    from mmengine.logging import print_log

    path = Path(filename).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f'Checkpoint not found: {filename}')
    try:
        with torch.serialization.safe_globals(
            [(_history_statistic, 'builtins.getattr')]
        ):
            return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        if str(filename) != _resumed_file.get():
            raise _refusal(filename, error) from None
        print_log(
            f'{filename} cannot be loaded weights-only ({_reason(path, error)}). It is '
            'unpickled in full because you resume from it: code in it will run. Stop '
            'now if you do not trust where it comes from.',
            logger='current',
            level=30,
        )
    except (RuntimeError, EOFError) as error:
        raise RuntimeError(
            f'{filename} is not a complete checkpoint: {error}. It may have been cut '
            'short by a full disk or a kill; use an earlier one.'
        ) from error
    return torch.load(path, map_location=map_location, weights_only=False)


def _load_url(stock: Callable[..., Any], url: str, **kwargs: Any) -> Any:
    """torch.hub's download with weights-only loading."""
    try:
        return stock(url, **{**kwargs, 'weights_only': True})
    except pickle.UnpicklingError as error:
        raise _refusal(url, error) from None


def _history_statistic(owner: type, name: str) -> Callable:
    """Stand in for ``builtins.getattr`` in checkpoints of an unrepaired MMEngine.

    They use it for the four statistics of ``HistoryBuffer`` and nothing else.
    """
    from mmengine.logging import HistoryBuffer

    if owner is not HistoryBuffer or name not in ('min', 'max', 'current', 'mean'):
        raise pickle.UnpicklingError(
            f'Unsupported global: getattr({owner!r}, {name!r})'
        )
    return getattr(HistoryBuffer, name)


def _reason(path: Path, error: Exception) -> str:
    """What in the file asks for more than weights-only loading gives."""
    import torch

    if zipfile.is_zipfile(path):
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        if names:
            return 'it asks for ' + ', '.join(sorted(names))
    found = re.search(
        r'nsupported (?:global: (?:GLOBAL )?|GLOBAL )(getattr\(.*?\)|\S+)', str(error)
    )
    return f'it asks for {found[1]}' if found else 'it is not a file of weights'


def _refusal(source: str, error: Exception) -> pickle.UnpicklingError:
    reason = _reason(Path(source).expanduser(), error)
    return pickle.UnpicklingError(
        f'Refused to load {source}: {reason}. Loading it could run code, and weights '
        'need none. If you trust the file, extract its weights with '
        "torch.save(torch.load(PATH, weights_only=False)['state_dict'], NEW_PATH) "
        'and load those.'
    )


# --------------------------------------------------------------------------------- FSDP


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
