from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mmcls_involution import compat


def test_external_base_configs_without_pkg_resources(tmp_path, monkeypatch):
    pytest.importorskip('mmdet')
    monkeypatch.setitem(sys.modules, 'pkg_resources', None)
    with pytest.raises(ImportError):
        import pkg_resources  # noqa: F401
    compat.apply()
    from mmengine.config import Config

    file = tmp_path / 'config.py'
    file.write_text("_base_ = 'mmdet::_base_/default_runtime.py'\n")
    assert Config.fromfile(file).default_scope == 'mmdet'


def test_package_is_found_by_distribution_or_module_name():
    import mmengine

    folder = str(Path(mmengine.__file__).parent)
    assert compat.get_installed_path('mmengine') == folder
    if compat.is_installed('mmseg'):
        folder = compat.get_installed_path('mmsegmentation')
        assert folder == compat.get_installed_path('mmseg')
    assert not compat.is_installed('no_such_package')
    with pytest.raises(ModuleNotFoundError, match='no_such_package is not installed'):
        compat.get_installed_path('no_such_package')
