from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from mmcls_involution import compat
from mmcls_involution.compat import torchvision_import


def fake_torchvision(folder: Path) -> Path:
    """A torchvision whose extension does not load and whose import needs its ops."""
    package = folder / 'torchvision'
    package.mkdir()
    (package / '_C.so').write_bytes(b'built for another torch')
    (package / '__init__.py').write_text(
        'import torch\n'
        'for op in ("nms", "qnms"):\n'
        '    torch.library.register_fake(f"torchvision::{op}", lambda *a: a[0])\n'
    )
    return folder


def test_mismatched_torchvision_can_be_imported(tmp_path, run_python):
    folder = fake_torchvision(tmp_path)
    with pytest.raises(AssertionError, match='torchvision::nms does not exist'):
        run_python('import torchvision', folder)
    run_python(
        'from mmcls_involution import compat\n'
        'compat.declare_torchvision_ops()\n'
        'compat.declare_torchvision_ops()\n'
        'import torchvision',
        folder,
    )


@pytest.mark.parametrize('state', ['absent', 'imported', 'loads'])
def test_torchvision_is_left_alone(state, tmp_path, monkeypatch):
    import torch

    def no_library(*args):
        raise AssertionError('declared operators that nobody misses')

    monkeypatch.setattr(torch.library, 'Library', no_library)
    monkeypatch.setattr(torchvision_import, '_torchvision_schemas', None)
    monkeypatch.delitem(sys.modules, 'torchvision', raising=False)
    if state == 'absent':
        monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    else:
        monkeypatch.syspath_prepend(fake_torchvision(tmp_path))
        if state == 'imported':
            monkeypatch.setitem(sys.modules, 'torchvision', object())
        else:
            monkeypatch.setattr(torch.ops, 'load_library', lambda path: None)
    compat.declare_torchvision_ops()
    assert torchvision_import._torchvision_schemas is None
