"""Find packages for ``_base_ = 'mmdet::...'`` without ``pkg_resources``, and ours."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
from pathlib import Path

from mmcls_involution.paths import ROOT

OWN = 'mmcls_involution::'


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


def find_own_configs() -> None:
    """Let a config inherit one of this package, ``_base_ = 'mmcls_involution::...'``.

    MMEngine 0.10 knows the packages of OpenMMLab alone, and would look every type of
    what is inherited up in our scope; a config of ours says its toolbox itself.
    """
    from mmengine.config import Config

    stock = Config._get_cfg_path
    if getattr(stock, 'finds', None) == OWN:
        return

    def get_cfg_path(cfg_path: str, filename: str) -> tuple[str, str | None]:
        if cfg_path.startswith(OWN):
            return str(ROOT / 'configs' / cfg_path.removeprefix(OWN)), None
        return stock(cfg_path, filename)

    get_cfg_path.finds = OWN
    Config._get_cfg_path = staticmethod(get_cfg_path)


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
