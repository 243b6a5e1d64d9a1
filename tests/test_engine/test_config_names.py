"""Where a config is looked for."""

from __future__ import annotations

import pytest

pytest.importorskip('mmpretrain')
from mmcls_involution.engine.config import read_config
from mmcls_involution.engine.errors import UserError
from mmcls_involution.paths import ROOT


def test_configs_of_the_package_go_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = 'configs/bccd_cells/rednet26_1xb32_bccd-cells.py'
    for name in (path, 'rednet26_1xb32_bccd-cells', 'rednet26_1xb32_bccd-cells.py'):
        assert read_config(name).filename == str(ROOT / path)
    near = 'Did you mean rednet26_1xb32_bccd-cells'
    with pytest.raises(UserError, match=f'^Config not found: rednet26_1xb32.*{near}'):
        read_config('rednet26_1xb32_bccd-cell')
    with pytest.raises(UserError, match='^Config not found: configs/coco/rednet26'):
        read_config('configs/coco/rednet26_1xb32_bccd-cells.py')
    file = tmp_path / 'rednet26_1xb32_bccd-cells.py'  # a file comes first
    file.write_text("default_scope = 'mmpretrain'\n")
    assert 'model' not in read_config(file.name)
