from __future__ import annotations

import importlib.metadata

import pytest

from mmcls_involution import compat


def pretend_installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    def version(name: str) -> str:
        if name.replace('-', '_') not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name.replace('-', '_')]

    monkeypatch.setattr(importlib.metadata, 'version', version)


def test_this_environment_is_in_range():
    compat.check_versions()


@pytest.mark.parametrize('name', compat.SUPPORTED)
def test_range_is_lowest_inclusive_highest_exclusive(name, monkeypatch):
    lowest, highest = compat.SUPPORTED[name]
    pretend_installed(monkeypatch, **{name: lowest})
    compat.check_versions()
    for outside in (highest, f'{lowest}.dev1'):
        pretend_installed(monkeypatch, **{name: outside})
        with pytest.raises(ImportError, match=f'{name} {outside} is installed') as info:
            compat.check_versions()
        assert f'pip install "{name}>={lowest},<{highest}"' in str(info.value)


def test_absent_libraries_and_local_versions_are_fine(monkeypatch):
    pretend_installed(monkeypatch, torch='2.13.0+cpu')
    compat.check_versions()


def test_every_package_out_of_range_is_named(monkeypatch):
    pretend_installed(monkeypatch, torch='2.1.0', mmcv_lite='2.2.0', mmdet='3.3.0')
    with pytest.raises(ImportError) as info:
        compat.check_versions()
    message = str(info.value)
    assert 'torch 2.1.0' in message and 'mmcv-lite 2.2.0' in message
    assert 'mmdet' not in message


def test_mmcv_lite_is_not_put_beside_mmcv(monkeypatch):
    pretend_installed(monkeypatch, mmcv='2.2.0')
    with pytest.raises(ImportError, match='pip uninstall --yes mmcv first'):
        compat.check_versions()


def test_import_is_light(run_python):
    out = run_python(
        'import sys, mmcls_involution.compat\n'
        'print([m for m in ("torch", "numpy", "mmengine", "mmcv") if m in sys.modules])'
    )
    assert out.strip() == '[]'


def test_apply_with_torch_alone(run_python):
    run_python(
        'import importlib.util as u\n'
        'real = u.find_spec\n'
        'others = ("mm", "torchvision")\n'
        'u.find_spec = lambda n, *a: None if n.startswith(others) else real(n, *a)\n'
        'import sys\n'
        'from mmcls_involution import compat\n'
        'compat.apply()\n'
        'compat.apply()\n'
        'assert not [m for m in sys.modules if m.split(".")[0] in ("mmengine", "mmcv")]'
    )
