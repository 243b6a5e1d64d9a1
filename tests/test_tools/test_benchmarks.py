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
from torch import nn

from mmcls_involution.deployment.wrappers import Exported
from mmcls_involution.engine.errors import UserError
from mmcls_involution.ops import BACKENDS, Involution2d, output_size
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


class Chosen(Exception):
    """Ends a benchmark where it has chosen its GPU."""


@pytest.mark.parametrize('name', ['benchmark_op', 'benchmark_model'])
def test_the_named_gpu_is_the_current_one(name, monkeypatch):
    def set_device(device):
        assert torch.device(device) == torch.device('cuda:1')
        raise Chosen

    monkeypatch.syspath_prepend(TOOLS)
    tool = importlib.import_module(name)
    monkeypatch.setattr(torch.cuda, 'set_device', set_device)
    monkeypatch.setattr(sys, 'argv', [f'{name}.py', '--device', 'cuda:1'])
    with pytest.raises(Chosen):
        tool.main()
    for unnumbered in ('cpu', 'cuda'):  # which set_device would refuse
        tool.use_device(unnumbered)


@pytest.fixture
def runtimes(monkeypatch):
    """It leaves torch the number of threads of its last row."""
    monkeypatch.syspath_prepend(TOOLS)
    threads = torch.get_num_threads()
    yield importlib.import_module('benchmark_runtimes')
    torch.set_num_threads(threads)


def test_exchange_waits_for_the_other_process(monkeypatch):
    """Each number comes back before the next is sent, and nobody waits afterwards."""
    monkeypatch.syspath_prepend(TOOLS)
    utils = importlib.import_module('benchmark_utils')
    if utils.available_cores() < 2:
        pytest.skip('two processes need two cores')
    children = []
    popen = subprocess.Popen
    monkeypatch.setattr(
        utils.subprocess,
        'Popen',
        lambda *args: children.append(popen(*args)) or children[-1],
    )
    # The speed of light allows less than this to no two cores.
    assert utils.time_exchange(2) > 1e-9
    slow = utils._ANSWER.replace('last = cells', 'time.sleep(1e-3); last = cells')
    monkeypatch.setattr(utils, '_ANSWER', slow.replace('mmap, os', 'mmap, os, time'))
    for exchanges in (1, 2):
        assert utils.time_exchange(exchanges) > 1e-3
    monkeypatch.setattr(utils, '_ANSWER', 'pass')
    with pytest.raises(RuntimeError, match='ended at its start'):
        utils.time_exchange(2)
    assert [child.poll() is None for child in children] == [False] * 4


@pytest.mark.parametrize(('cores', 'threads'), [(2, 1), (1, 2), (2, 2)])
def test_runtimes_say_how_far_apart_threads_were(
    cores, threads, runtimes, monkeypatch, capsys
):
    times = iter([4e-7, 2e-7, 6e-7, 5e-7])
    monkeypatch.setattr(runtimes, 'available_cores', lambda: cores)
    monkeypatch.setattr(runtimes, 'time_exchange', lambda: next(times))
    models = {name: Features() for name in ('RedNet', 'ResNet')}
    rows = runtimes.compare_runtimes(models, ['eager'], ['1x3x9x9'], [threads], 1)
    assert [row['runtime'] for row in rows] == ['eager']
    said = capsys.readouterr().out.replace('\n', ' ')
    figures = 'numbers in 200 to 600 ns, half of the times in less than 450'
    assert (figures in said) == (cores == threads == 2)


class Features(nn.Module):
    """A backbone of one convolution, or of an involution behind it."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), *layers)

    def forward(self, x):
        return (self.layers(x),)


def test_runtimes(runtimes, monkeypatch, tmp_path):
    """One that is not installed is a row without figures, named."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        'find_spec',
        lambda name: None if name == 'openvino' else find_spec(name),
    )
    tool = importlib.import_module('benchmark_model')
    monkeypatch.setattr(tool, 'RedNet', lambda depth: Features(Involution2d(16, 3)))
    path, picture = tmp_path / 'runtimes.csv', tmp_path / 'runtimes.png'
    names = ['eager', 'openvino']
    if find_spec('onnx') and find_spec('onnxruntime'):
        names.append('onnxruntime')
    argv = ['benchmark_model.py', '--runtimes', *names, '--shape', '1x3x33x40']
    argv += ['--rounds', '1', '--out', path, '--plot', picture]
    monkeypatch.setattr(sys, 'argv', [*map(str, argv)])
    tool.main()
    rows = {row['runtime']: row for row in read(path)}
    assert [*rows] == names
    missing = rows.pop('openvino')
    assert missing['note'].endswith('openvino')
    assert missing['RedNet ms'] == 'nan'
    best = min(float(row['ResNet ms']) for row in rows.values())
    for row in rows.values():
        ours, theirs = float(row['RedNet ms']), float(row['ResNet ms'])
        assert float(row['RedNet / ResNet']) == pytest.approx(ours / theirs)
        assert float(row['RedNet / best ResNet']) == pytest.approx(ours / best)
        assert float(row['ResNet / best ResNet']) == pytest.approx(theirs / best)
        assert row['note'].startswith('differs by')
    assert picture.read_bytes().startswith(b'\x89PNG')


def test_a_runtime_that_computes_something_else_is_refused(runtimes, monkeypatch):
    def wrong(model, *rest):
        return lambda image: [out * (1 + 2e-5) for out in model(image)]

    monkeypatch.setitem(runtimes.RUNTIMES, 'wrong', wrong)
    models = dict.fromkeys(('RedNet', 'ResNet'), Features())
    with pytest.raises(UserError, match='differs from PyTorch'):
        runtimes.compare_runtimes(models, ['wrong'], ['1x3x9x9'], [1], 1)


@pytest.mark.skipif(shutil.which('g++') is None, reason='needs g++')
@pytest.mark.long
@pytest.mark.parametrize('runtime', ['compile', 'freeze', 'aot'])
def test_compiled_runtimes(runtime, runtimes, tmp_path):
    """Frozen weights are packed for oneDNN's convolution, others can change."""
    model = Exported(nn.ModuleDict({'backbone': Features()}), backbone=True)
    image = torch.randn(1, 3, 9, 9)
    with torch.no_grad():
        run = runtimes.RUNTIMES[runtime](model, image, tmp_path, 1)
        torch.testing.assert_close(run(image)[0], model(image)[0])
        with torch.profiler.profile() as profile:
            run(image)
    packed = any('mkldnn::_convolution' in event.key for event in profile.events())
    assert packed == (runtime == 'freeze')


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
