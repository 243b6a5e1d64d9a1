"""mmcls_involution.doctor: it says what is broken, and never breaks itself."""

from __future__ import annotations

import importlib.util
import os
import pickle
import subprocess
import sys
import types
import venv
from pathlib import Path

import pytest
import torch

from mmcls_involution import doctor
from mmcls_involution.doctor import FAIL, OK, WARN

ROOT = Path(__file__).resolve().parents[1]


def run_doctor(python: str | Path = sys.executable, **env: str):
    """Runs the command; returns its exit code, its rows by name, and its output."""
    result = subprocess.run(
        [str(python), '-m', 'mmcls_involution.doctor'],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
    )
    assert 'Traceback' not in result.stdout + result.stderr
    rows, name = {}, ''
    for line in result.stdout.splitlines()[1:-1]:
        status, title, detail = line[:5].strip(), line[6:30].strip(), line[31:]
        if status:
            name = title
            rows[name] = [status, detail]
        else:
            rows[name].append(detail)
    return result.returncode, rows, result.stdout


def test_help_checks_nothing(command, capsys, monkeypatch):
    monkeypatch.setattr(doctor, 'found_by_child', lambda: pytest.fail('has checked'))
    assert command('doctor', '--help') == ''
    shown = capsys.readouterr().out
    assert 'usage: doctor' in shown and 'exits with 1 if any row says FAIL' in shown
    assert command('doctor', '--halp') == '2'


def test_everything_is_well_here():
    code, rows, output = run_doctor()
    assert [name for name, row in rows.items() if row[0] == FAIL] == [], output
    assert code == 0
    assert len(rows) == len(doctor.CHECKS)


def test_broken_libraries_are_named_with_their_fixes(tmp_path):
    """Files that come first on the path stand in for broken libraries."""
    broken = {
        'cv2.py': 'raise ImportError("libGL.so.1: cannot open shared object file")',
        'ftfy.py': 'raise ModuleNotFoundError("No module named \'ftfy\'")',
        # a compiled module that kills the interpreter
        'pycocotools/_mask.py': 'import os; os.abort()',
        'pycocotools/__init__.py': '',
        'torchvision/__init__.py': 'raise RuntimeError("torchvision::nms")',
    }
    for name, text in broken.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    code, rows, output = run_doctor(PYTHONPATH=str(tmp_path))
    assert code == 1
    assert len(rows) == len(doctor.CHECKS), output
    assert rows['OpenCV'][0] == FAIL
    assert 'libGL.so.1' in rows['OpenCV'][1]
    assert 'install --no-deps opencv-python-headless==' in rows['OpenCV'][2]
    assert rows['ftfy, regex'][0] == FAIL
    assert 'install ftfy regex' in rows['ftfy, regex'][2]
    assert rows['torchvision'][0] == FAIL
    assert rows['numpy'][:1] == [FAIL]
    assert 'ended the interpreter (SIGABRT)' in rows['numpy'][1]
    assert rows['involution'][0] == rows['mmcv version'][0] == OK


def test_a_check_that_takes_too_long_is_not_taken_for_a_broken_library(monkeypatch):
    monkeypatch.setattr(doctor, 'TIMEOUT_SECONDS', 0.01)
    monkeypatch.setattr(doctor, 'CHECKS', {'slow': ()})
    (found,) = doctor.found_by_child()
    assert found.status == FAIL and 'no answer after 0.01 s' in found.detail


def test_torch_alone(tmp_path):
    """Nothing but torch: the operator works, the rest is named."""
    venv.create(tmp_path / 'env', with_pip=False, symlinks=True)
    version = f'python{sys.version_info[0]}.{sys.version_info[1]}'
    site = tmp_path / 'env' / 'lib' / version / 'site-packages'
    needs = ['filelock', 'typing_extensions', 'sympy', 'mpmath', 'networkx', 'jinja2']
    for module in ['torch', *needs, 'markupsafe', 'fsspec']:
        spec = importlib.util.find_spec(module)
        there = Path(spec.origin)
        there = there.parent if spec.submodule_search_locations else there
        (site / there.name).symlink_to(there)
    (site / 'torchgen').symlink_to(Path(torch.__file__).parents[1] / 'torchgen')
    code, rows, output = run_doctor(tmp_path / 'env/bin/python', PYTHONPATH='')
    assert code == 1
    assert len(rows) == len(doctor.CHECKS), output
    assert rows['torch'][0] == rows['involution'][0] == OK, output
    for name in ('mmengine version', 'mmcv version', 'mmcv ops', 'OpenCV'):
        assert rows[name][0] == FAIL
        assert f'fix: {tmp_path}/env/bin/python -m pip install' in rows[name][2]
    for name in ('mmdet version', 'RedNet in mmdet', 'numpy', 'torchvision', 'resume'):
        assert rows[name][0] == WARN
    assert 'torchvision==0.' in rows['torchvision'][2]


# Single checks, with what they look at replaced


@pytest.fixture
def versions(monkeypatch):
    """Replaces the versions that look installed."""
    found: dict[str, str] = {}
    monkeypatch.setattr(doctor, 'installed_version', found.get)
    return found


@pytest.mark.parametrize(
    ('name', 'version', 'status', 'detail', 'fix'),
    [
        ('mmcv', '2.2.0', FAIL, 'needed is >=2.0.0rc4,<2.2.0', doctor.ONE_MMCV),
        ('mmcv', '2.1.0', OK, '2.1.0', ''),
        ('mmengine', '0.10.5', FAIL, '>=0.10.7', "'mmengine>=0.10.7,<0.11.0'"),
        ('mmengine', None, FAIL, 'not installed', "'mmengine>=0.10.7,<0.11.0'"),
        ('mmdet', None, WARN, 'only for its own tasks', "'mmdet>=3.3.0,<4.0.0'"),
    ],
)
def test_versions(versions, name, version, status, detail, fix):
    if version:
        versions[name] = version
    found = doctor.check_version(name)
    assert found.status == status
    assert detail in found.detail
    assert fix in found.fix


def test_mmcv_lite_counts_as_mmcv(versions):
    versions['mmcv-lite'] = '2.1.0'
    assert doctor.check_version('mmcv').status == OK


def test_mmcv_and_mmcv_lite_at_once(versions):
    versions.update({'mmcv': '2.1.0', 'mmcv-lite': '2.1.0'})
    found = doctor.check_version('mmcv')
    assert (found.status, found.fix) == (FAIL, doctor.ONE_MMCV)
    assert 'mmcv 2.1.0 and mmcv-lite 2.1.0 are installed' in found.detail
    assert 'uninstall --yes mmcv mmcv-lite &&' in found.fix


@pytest.mark.parametrize(
    ('error', 'detail'),
    [
        ("No module named 'mmcv._ext'", "No module named 'mmcv._ext'"),
        ('_ext.so: undefined symbol: _ZN3c106detail', 'compiled for another torch'),
    ],
)
def test_mmcv_ops_that_do_not_import(monkeypatch, versions, error, detail):
    def fail(name):
        raise AttributeError(name) if name.startswith('__') else ImportError(error)

    module = types.ModuleType('mmcv.ops')
    module.__getattr__ = fail
    monkeypatch.setitem(sys.modules, 'mmcv.ops', module)
    versions.update(mmcv='2.1.0')
    found = doctor.check_mmcv_ops()
    assert (found.status, found.fix) == (FAIL, doctor.ONE_MMCV)
    assert detail in found.detail


def test_mmcv_ops_with_a_wrong_result(monkeypatch):
    import mmcv.ops

    monkeypatch.setattr(mmcv.ops, 'nms', lambda boxes, *_: (boxes, torch.tensor([0])))
    found = doctor.check_mmcv_ops()
    assert (found.status, found.detail) == (FAIL, 'nms on cpu kept [0], not [0, 2]')


@pytest.mark.parametrize(
    ('provided', 'detail'),
    [
        (True, 'cpu: nms, roi_align by torchvision; softnms by torch'),
        (False, 'cpu: compiled, nms runs'),
    ],
)
def test_what_computes_the_ops_of_mmcv(monkeypatch, provided, detail):
    lanes = {'nms': 'torchvision', 'softnms': 'torch'}
    lanes |= dict.fromkeys(('roi_align_forward', 'roi_align_backward'), 'torchvision')
    monkeypatch.setattr(doctor.mmcv_ops, 'lanes', lambda device: lanes)
    monkeypatch.setattr(doctor.mmcv_ops, 'is_provided', lambda: provided)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert doctor.check_mmcv_ops() == (OK, detail, '')


def test_both_opencv_builds(versions):
    versions.update({'opencv-python': '5.0', 'opencv-python-headless': '5.0'})
    found = doctor.check_opencv()
    assert found.status == WARN
    assert 'uninstall --yes opencv-python opencv-python-headless' in found.fix


@pytest.mark.parametrize(
    ('built_for', 'driver', 'detail'),
    [
        (None, True, 'this torch is built for CPU'),
        ('13.0', False, 'built for CUDA 13.0, no GPU seen'),
    ],
)
def test_gpu_and_torch_that_do_not_meet(monkeypatch, built_for, driver, detail):
    monkeypatch.setattr(torch.version, 'cuda', built_for)
    monkeypatch.setattr(torch.version, 'hip', None)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    found = '/usr/bin/nvidia-smi' if driver else None
    monkeypatch.setattr(doctor.shutil, 'which', lambda name: found)
    found = doctor.check_cuda()
    assert found.status == WARN
    assert detail in found.detail


def test_checkpoint_that_cannot_be_resumed(monkeypatch):
    from mmengine.runner import CheckpointLoader

    def refuse(file):
        raise pickle.UnpicklingError('Weights only load failed')

    monkeypatch.setattr(CheckpointLoader, 'load_checkpoint', refuse)
    found = doctor.run_check(doctor.check_resume)
    assert found.status == FAIL
    assert 'Weights only load failed' in found.detail


def test_error_in_a_check_is_a_row():
    def check_weather():
        raise OSError('rain')

    found = doctor.run_check(check_weather)
    assert (found.status, found.detail) == (FAIL, 'OSError: rain')


def test_unregistered_rednet(monkeypatch):
    from mmdet.registry import MODELS

    monkeypatch.setattr(MODELS, 'get', lambda name: None)
    found = doctor.check_registry('mmdet')
    assert (found.status, found.detail) == (FAIL, 'RedNet is not in the registry')


@pytest.mark.parametrize(
    'device, reason, status, detail',
    [
        ('cpu', 'no compiler', WARN, 'slow on the CPU: no compiler'),
        ('cuda', 'no Triton', WARN, 'slow on the GPU: no Triton'),
        ('cuda', None, OK, 'on GPUs by Triton kernels'),
    ],
)
def test_slow_backends(monkeypatch, device, reason, status, detail):
    from mmcls_involution.ops import BACKENDS

    def supports(problem):
        return reason if problem.device == device else None

    for name in ('native', 'triton'):
        monkeypatch.setattr(BACKENDS[name].kernels, 'supports', supports)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: device == 'cuda')
    found = doctor.check_ops()
    assert found.status == status
    assert detail in found.detail
    assert bool(found.fix) == (status == WARN)
