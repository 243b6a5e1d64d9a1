"""Whether the Triton kernels can run, how they are compiled, tuned and launched."""

import csv
import importlib.util
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from op_cases import TRITON_KERNELS, WITH_TRITON

from mmcls_involution.ops import involution2d
from mmcls_involution.ops.backends import default_backend
from mmcls_involution.ops.backends import triton_kernels as triton
from mmcls_involution.ops.backends.contract import Problem

ROOT = Path(__file__).parents[2]
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
pytest.importorskip(**WITH_TRITON)


@pytest.fixture
def gpus(monkeypatch):
    """Sets up a torch that has these GPUs, which try-outs find well unless told."""

    def pretend(capabilities, cuda='13.0', capturing=False, found=None):
        monkeypatch.setattr(torch.version, 'cuda', cuda)
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
        monkeypatch.setattr(
            torch.cuda, 'get_device_capability', capabilities.__getitem__
        )
        monkeypatch.setattr(
            torch.cuda, 'is_current_stream_capturing', lambda: capturing
        )
        monkeypatch.setattr(triton, '_try_out', lambda device: found)

    caches = triton._gpu_problem, triton._warn
    for cache in caches:
        cache.cache_clear()
    yield pretend
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize(
    'cuda, version, capability, found, message',
    [
        (None, '3.9.0', (9, 0), None, 'made for NVIDIA GPUs'),
        ('13.0', '3.3.1', (9, 0), None, r'triton 3\.3\.1 is too old, needed is 3\.4'),
        ('13.0', '3.9.0', (7, 5), None, r'GPU 0 is too old.*7\.5, needed is 8\.0'),
        ('13.0', None, (9, 0), None, 'triton does not import.*ImportError: broken'),
        ('13.0', '3.9.0', (9, 0), 'no compiler', 'no compiler'),
    ],
)
def test_falls_back_to_plain_pytorch_and_says_so_once(
    monkeypatch, caplog, gpus, cuda, version, capability, found, message
):
    def import_triton(name):
        if version is None:
            raise ImportError('broken')
        return type('triton', (), {'__version__': version})

    monkeypatch.setattr(triton.importlib, 'import_module', import_triton)
    gpus([capability], cuda, found=found)
    for _ in range(2):
        assert default_backend('cuda', torch.float32) == 'tap_sum'
        assert triton.supports(Problem.typical('cuda', torch.float32))
    assert len(caplog.records) == 1
    assert re.search(message, caplog.text)


def test_an_old_gpu_beside_a_new_one_falls_back_alone(gpus):
    gpus([(7, 5), (9, 0)])
    assert default_backend('cuda', torch.float32, 0) == 'tap_sum'
    assert default_backend('cuda', torch.float32, 1) == 'triton'


def test_a_gpu_is_not_tried_out_during_a_capture(gpus, caplog):
    gpus([(9, 0)], capturing=True, found='must not be asked')
    for _ in range(2):
        assert default_backend('cuda', torch.float32) == 'tap_sum'
    assert len(caplog.records) == 1
    assert 'run one step before the capture' in caplog.text
    gpus([(9, 0)])
    assert default_backend('cuda', torch.float32) == 'triton'


def test_try_out_compiles_and_compares(monkeypatch):
    def try_out():
        with ThreadPoolExecutor(1) as thread:  # which it pins to the first blocks
            return thread.submit(triton._try_out, torch.device(DEVICE)).result()

    def fail(*_):
        raise PermissionError('no folder for the cache')

    def exhaust(*_):
        raise torch.OutOfMemoryError

    assert try_out() is None
    for name in ('grad_weight', 'grad_input', 'forward'):
        monkeypatch.setattr(triton, name, lambda x, *_: x + 1)
        wrong = f'a small kernel gives a wrong result on {DEVICE}: {name}'
        assert try_out() == wrong
    monkeypatch.setattr(triton, 'forward', fail)
    assert 'PermissionError: no folder for the cache' in try_out()
    monkeypatch.setattr(triton, 'forward', exhaust)
    with pytest.raises(triton._NotNow, match='no memory'):
        try_out()


@pytest.mark.parametrize('free, fits', [(99, False), (100, True)])
def test_timing_takes_no_memory_that_is_not_free(monkeypatch, free, fits):
    from mmcls_involution.ops.backends.triton_kernels import tuner

    properties = type('Properties', (), dict(L2_cache_size=60))
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda _: properties)
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda: (free, 1000))
    # 20 that torch has and does not use are free too.
    monkeypatch.setattr(torch.cuda, 'memory_reserved', lambda: 50)
    monkeypatch.setattr(torch.cuda, 'memory_allocated', lambda: 30)
    monkeypatch.setattr(tuner.torch, 'empty', lambda size, **_: size)
    if fits:
        assert tuner._cold_cache() == 120
    else:
        with pytest.raises(tuner._Untimed):
            tuner._cold_cache()


def test_cpu_tensors_are_refused():
    x, weight = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 1, 1, 2, 2)
    with pytest.raises(ValueError, match="'triton' cannot run.*on NVIDIA GPUs alone"):
        involution2d(x, weight, backend='triton')


# In bfloat16 on sm_90: the time to issue or to load, whichever is longer, over the
# memory's, and waits in a row for loads. Counted by Triton 3.9.0 (docs/benchmarks.md),
# and a tenth more for other versions.
MOST = {
    'forward': (1.75, 44),
    'grad_input': (1.8, 24),
    'grad_weight_banded': (1.64, 14),
}
# Bytes of a thread that spill with 16 channels, the most that was seen and 32 more.
SPILLED = {
    'forward': 144 + 32,
    'grad_input': 160 + 32,
    'grad_weight': 168 + 32,
    'grad_weight_banded': 136 + 32,
}


@pytest.mark.long  # the compiler takes minutes
@pytest.mark.parametrize('architecture, group_channels', [('90', '16'), ('80', '12')])
def test_compiles_ahead(architecture, group_channels, tmp_path):
    """The default blocks at 7x7 all but stay in registers, and issue what is bound."""
    package = Path(importlib.util.find_spec('triton').origin).parent
    if not (package / 'backends' / 'nvidia' / 'bin' / 'nvdisasm').exists():
        pytest.skip('this Triton brings no nvdisasm, which counts instructions')
    table = tmp_path / 'kernels.csv'
    tool = ROOT / 'tools' / 'analysis_tools' / 'compile_kernels.py'
    arguments = ['--architecture', architecture, '--quick', '--out', table]
    arguments += ['--group-channels', group_channels]
    environment = {k: v for k, v in os.environ.items() if k != 'TRITON_INTERPRET'}
    result = subprocess.run(
        [sys.executable, tool, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**environment, 'TRITON_CACHE_DIR': str(tmp_path / 'cache')},
    )
    assert result.returncode == 0, result.stderr
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert {row['kernel'] for row in rows} == set(TRITON_KERNELS)
    assert {row['dtype'] for row in rows} == {'fp32', 'bf16'}
    for row in rows:
        assert 0 < int(row['registers']) <= 255
        most = SPILLED[row['kernel']] if group_channels == '16' else 512
        assert int(row['spilled bytes']) <= most, row
        if (architecture, group_channels, row['dtype']) == ('90', '16', 'bf16'):
            floor, waits = MOST[row['kernel']]
            assert max(float(row['x floor']), float(row['x lsu'])) <= floor, row
            assert int(row['waits']) <= waits, row


@pytest.mark.parametrize('most', [2, pytest.param(99, marks=pytest.mark.long)])
def test_launches_as_a_gpu_would_see_them(most, tmp_path):
    """Grids; nothing compiled for new sizes, timed twice, or kept if it was not timed.

    Threads that tune at once; choices that a capture finds on disk; try-outs of a GPU
    where something that Triton needs is missing. With two candidates for the tuner of
    each kernel, and with all.
    """
    script = Path(__file__).with_name('launch_without_gpu.py')
    environment = {k: v for k, v in os.environ.items() if k != 'TRITON_INTERPRET'}
    result = subprocess.run(
        [sys.executable, script, tmp_path, str(most)],
        capture_output=True,
        text=True,
        check=False,
        env={**environment, 'PYTHONPATH': str(ROOT)},
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    # 2 images, 5 blocks of 4 rows and 16 columns make 160 lanes; 2 groups.
    first = [[name, 10, 1, 1] for name in TRITON_KERNELS]
    for untuned in ('captured', 'without memory', 'deterministic'):
        assert found[untuned] == first
    assert found['tuned'] == found['captured when tuned'] != first
    assert found['kept without memory'] == 0
    assert found['errors of threads'] == []
    assert found['kept of a capture'] == 0
    assert found['compiled for new sizes'] == 0
    assert found['timed'] == found['candidates']
    assert found['kept'] == len(TRITON_KERNELS)
    assert found['timed again'] == 0
    assert found['timed on another GPU'] == found['candidates']
    assert 'up to some minutes' in result.stderr
    assert found['without a compiler'].startswith('a small kernel fails on cpu: ')
    assert 'Failed to find C compiler' in found['without a compiler']
    assert 'fails on cpu: PTXASError' in found['without an assembler']
    assert 'fails on cpu: NotADirectoryError' in found['without a folder']
    wrong = 'a small kernel gives a wrong result on cpu: forward'
    assert found['without results'] == wrong
