"""The benchmarks run to their end and write what they print; figures are not judged."""

import contextlib
import csv
import ctypes
import importlib
import importlib.util
import io
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmcls_involution.ops import BACKENDS, output_size
from mmcls_involution.ops.backends import reference

TOOLS = Path(__file__).parents[2] / 'tools' / 'analysis_tools'


def run(name, *arguments):
    """In a process of its own, as users do; gives what it prints."""
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


@pytest.fixture(scope='module')
def benchmark_op():
    """Run it in this process, which has imported all it needs; gives what it prints."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TOOLS)
        tool = importlib.import_module('benchmark_op')
        patch.setattr(tool.console, 'width', 140)  # whatever the terminal

        def call(*arguments):
            argv = ['benchmark_op.py', '--device', 'cpu', *map(str, arguments)]
            patch.setattr(sys, 'argv', argv)
            with contextlib.redirect_stdout(io.StringIO()) as out:
                tool.main()
            return out.getvalue()

        yield call


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope='module')
def operator_run(benchmark_op, tmp_path_factory):
    """What the benchmark prints, and its file."""
    path = tmp_path_factory.mktemp('op') / 'op.csv'
    arguments = ['--image', '1x32x32', '1x48x32', '--rounds', '1', '--depth', '26']
    return benchmark_op(*arguments, '--out', path), path


@pytest.fixture(scope='module')
def model_run(tmp_path_factory):
    path = tmp_path_factory.mktemp('model') / 'model.csv'
    arguments = ['--shape', '2x3x32x32', '2x3x48x32', '--rounds', '1']
    out = run('benchmark_model.py', *arguments, '--treatment', 'fused', '--out', path)
    return out, path


def test_operator(operator_run):
    out, path = operator_run
    rows = read(path)
    candidates = {'tap_sum', 'conv3x3', 'two steps', 'fused', 'reference'}
    assert {row['candidate'] for row in rows} >= candidates
    for column in ('peak_memory_mb', 'forward_ms', 'backward_ms'):
        assert all(float(row[column]) > 0 for row in rows)
    assert 'times faster, geometric mean over the shapes' in out
    assert 'USDT' not in out


def test_forward_pass_of_one_backend(benchmark_op, tmp_path):
    path = tmp_path / 'op.csv'
    arguments = ['--image', '1x32x32', '--rounds', '1', '--depth', '26', '--out', path]
    benchmark_op(*arguments, '--forward-only', '--backend', 'tap_sum')
    rows = read(path)
    candidates = {'tap_sum', 'conv3x3', 'two steps', 'fused'}
    assert {row['candidate'] for row in rows} == candidates
    assert {row['backward_ms'] for row in rows} == {'nan'}


def test_model(model_run):
    rows = read(model_run[1])
    assert [row['what'] for row in rows] == 2 * [
        'inference, fused',
        'training step',
        'training step, channels_last',
    ]
    for row in rows:
        ratio = float(row['RedNet ms']) / float(row['ResNet ms'])
        assert float(row['time ratio']) == pytest.approx(ratio)
        assert float(row['memory ratio']) > 0


CUDA_AS_CPP = r"""
#define __global__
struct Index { int x; } blockIdx, blockDim, threadIdx, gridDim;
#include "kernels.cu"
extern "C" void run(void (*kernel)(const float*, const float*, float*),
                    const float* a, const float* b, float* out) {
  blockDim = {4}, gridDim = {3};
  for (blockIdx.x = 0; blockIdx.x < 3; ++blockIdx.x)
    for (threadIdx.x = 0; threadIdx.x < 4; ++threadIdx.x) kernel(a, b, out);
}
"""


@pytest.mark.skipif(shutil.which('g++') is None, reason='needs g++')
@pytest.mark.parametrize(
    'stride, padding, dilation', [((1, 1), (1, 2), (1, 1)), ((2, 3), (2, 1), (2, 1))]
)
def test_plain_cuda_kernels_are_right(tmp_path, stride, padding, dilation):
    """Compiled as C++, where three blocks of four threads run one after the other."""
    path = TOOLS / 'one_thread_per_output.py'
    spec = importlib.util.spec_from_file_location('one_thread_per_output', path)
    plain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plain)
    x = torch.randn(2, 6, 7, 9, requires_grad=True)
    size = output_size(x.shape[2:], (3, 5), stride, padding, dilation)
    weight = torch.randn(2, 3, 3, 5, *size, requires_grad=True)
    arguments = stride, padding, dilation
    (tmp_path / 'kernels.cu').write_text(plain.SOURCE)
    (tmp_path / 'run.cpp').write_text(CUDA_AS_CPP)
    library = tmp_path / 'kernels.so'
    options = plain.constants(x.shape, weight.shape, *arguments)
    subprocess.run(
        ['g++', '-shared', '-fPIC', *options, tmp_path / 'run.cpp', '-o', library],
        check=True,
    )
    library = ctypes.CDLL(str(library))

    def run(name, *tensors):
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
        library.run(getattr(library, name), *pointers)
        return tensors[-1]

    expected = reference.forward(x, weight, *arguments)
    grad = torch.randn_like(expected)
    grads = torch.autograd.grad(expected, (x, weight), grad)
    for name, inputs, right in (
        ('forward', (x, weight), expected),
        ('grad_input', (grad, weight), grads[0]),
        ('grad_weight', (grad, x), grads[1]),
    ):
        ours = run(name, *inputs, torch.full_like(right, torch.nan))
        torch.testing.assert_close(ours, right)
