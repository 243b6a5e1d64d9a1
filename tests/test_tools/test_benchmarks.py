"""The benchmarks run to their end and write what they print; figures are not judged."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from mmcls_involution.ops import BACKENDS

TOOLS = Path(__file__).parents[2] / 'tools' / 'analysis_tools'


def run(name, *arguments):
    command = [sys.executable, TOOLS / name, '--device', 'cpu', *arguments]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=TOOLS.parents[1]
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_dry_run_lists_backends_and_shapes(tmp_path):
    out = run(
        'benchmark_op.py', '--dry-run', '--image', '8x224x224', '--out', tmp_path / 'a'
    )
    for name in BACKENDS:
        assert f'backend {name}: ' in out
    # RedNet-50 has 17 involutions: the stem's and one per block.
    rows = [line.split('\u2502') for line in out.splitlines() if '\u2502' in line]
    assert sum(int(row[9]) for row in rows) == 17
    assert not (tmp_path / 'a').exists()


@pytest.mark.parametrize('forward_only', [False, True])
def test_operator(tmp_path, forward_only):
    path = tmp_path / 'op.csv'
    arguments = ['--image', '1x32x32', '--rounds', '1', '--depth', '26', '--out', path]
    if forward_only:
        arguments += ['--forward-only', '--backend', 'tap_sum']
    out = run('benchmark_op.py', *arguments)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    candidates = {'tap_sum', 'conv3x3', 'two steps', 'fused'}
    if forward_only:
        assert {row['candidate'] for row in rows} == candidates
        assert {row['backward_ms'] for row in rows} == {'nan'}
    else:
        assert {row['candidate'] for row in rows} >= {*candidates, 'reference'}
        assert all(float(row['peak_memory_mb']) > 0 for row in rows)
    assert all(float(row['forward_ms']) > 0 for row in rows)
    assert 'times faster, geometric mean over the shapes' in out
    assert 'USDT' not in out


def test_model(tmp_path):
    path = tmp_path / 'model.csv'
    arguments = ['--shape', '2x3x32x32', '--rounds', '1', '--treatment', 'fused']
    run('benchmark_model.py', *arguments, '--out', path)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [row['what'] for row in rows] == [
        'inference, fused',
        'training step',
        'training step, channels_last',
    ]
    for row in rows:
        ratio = float(row['RedNet ms']) / float(row['ResNet ms'])
        assert float(row['time ratio']) == pytest.approx(ratio)
        assert float(row['memory ratio']) > 0
