"""Where a config is looked for."""

from __future__ import annotations

from pathlib import Path

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


@pytest.mark.parametrize('absolute', [False, True])
def test_a_missing_config_is_looked_for_nearby_alone(absolute, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = tmp_path if absolute else Path()
    for file in ('mine.py', 'a/mine.py', 'configs/b/mine.py', 'c/d/mine.py'):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()

    def suggested(name: str) -> set[str]:
        with pytest.raises(UserError, match='^Config not found') as error:
            read_config(str(root / name))
        found = str(error.value).partition('Did you mean ')[2].rstrip('?')
        return {*found.split(' or ')} - {''}

    near = {str(root / file) for file in ('mine.py', 'a/mine.py')}
    assert suggested('mien.py') >= {str(root / 'mine.py')}
    assert suggested('aa/mine.py') >= near
    assert suggested('configs/bb/mine.py') == {str(root / 'configs/b/mine.py')}
    assert suggested('c/d/mien.py') == {str(root / 'c/d/mine.py')}
    for far in ('c/e/f/mine.py', 'e/d/mine.py'):  # whose folder would be a long search
        assert str(root / 'c/d/mine.py') not in suggested(far)
