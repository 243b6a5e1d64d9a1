from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mmcls_involution import compat
from mmcls_involution.paths import ROOT


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


def test_own_config_is_inherited_by_name(tmp_path):
    pytest.importorskip('mmdet')
    compat.apply()
    from mmengine.config import Config

    file = tmp_path / 'config.py'
    name = 'bccd/faster-rcnn_rednet50_fpn_bccd.py'
    file.write_text(f"_base_ = 'mmcls_involution::{name}'\n")
    cfg = Config.fromfile(file)
    assert cfg.model == Config.fromfile(ROOT / 'configs' / name).model
    assert cfg.model.backbone.type == 'RedNet' and cfg.model._scope_ == 'mmdet'
    file.write_text("_base_ = 'mmcls_involution::bccd/no.py'\n")
    with pytest.raises(FileNotFoundError, match='bccd/no.py'):
        Config.fromfile(file)


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
