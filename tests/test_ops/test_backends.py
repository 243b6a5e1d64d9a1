"""The table of backends: which one computes a problem, why not, and what is logged."""

import pytest
import torch

from mmcls_involution.ops import BACKENDS, fused_involution2d, involution2d
from mmcls_involution.ops import backends as table
from mmcls_involution.ops.backends import tap_sum, triton_kernels
from mmcls_involution.ops.backends.contract import Problem

HALF = Problem.typical('cuda', torch.float16)
FUSED = HALF._replace(operation='fused_forward')


@pytest.fixture
def gpu(monkeypatch):
    """Triton kernels that would run, if there were a tensor for them."""
    monkeypatch.setattr(triton_kernels, '_gpu_problem', lambda index: None)


def kernels(side, size=(8, 8)):
    return dict(kernels_shape=(1, 1, side, side, *size))


def images(n, c, h, w):
    return dict(input_shape=(n, c, h, w), kernels_shape=(n, 1, 3, 3, h, w))


@pytest.mark.parametrize(
    'problem, change, reason',
    [
        (HALF, {}, None),
        (HALF, kernels(31), None),
        (HALF, images(2, 1, 32767, 32767), None),
        (HALF, images(2, 1, 32768, 32768), '2147418112 pixels, got 2 images of 32768x'),
        (HALF, kernels(1, (2**16, 2**15)), 'got 1 images of 8x8 and 65536x32768 kern'),
        (HALF, images(1, 2048, 64, 2**18), None),
        (
            HALF,
            {**images(1, 2048, 64, 2**18), 'channels_last': True},
            'at most 2147483647 values, got 7 rows of 262144 pixels of 2048',
        ),
        (HALF, {'dtype': torch.float64}, None),
        (FUSED, {}, 'it has no fused_forward'),
    ],
)
def test_limits_of_triton_kernels(gpu, problem, change, reason):
    found = BACKENDS['triton'].supports(problem._replace(**change))
    assert found is None if reason is None else reason in found


def test_blocks_have_no_more_rows_than_the_limits_count():
    kernels = pytest.importorskip(
        'mmcls_involution.ops.backends.triton_kernels.kernels'
    )
    most = max(config.kwargs['ROWS'] for config in kernels.CONFIGS)
    assert most == triton_kernels.MOST_ROWS


def test_another_backend_computes_what_one_cannot(gpu):
    large = HALF._replace(**images(1, 1, 2**16, 2**16))
    assert table.choose('', HALF) is triton_kernels
    assert table.choose('', large) is tap_sum
    with pytest.raises(
        ValueError, match="backend 'triton' cannot run torch.float16 on "
    ):
        table.choose('triton', large)
    for name in ('', 'triton', 'tap_sum'):
        assert table.choose_fused(name, FUSED) is None


class Limited:
    """Computes in plain PyTorch, images of up to 4 rows."""

    forward = staticmethod(tap_sum.forward)
    grad_input = staticmethod(tap_sum.grad_input)
    grad_weight = staticmethod(tap_sum.grad_weight)

    def __init__(self):
        self.asked = []

    def supports(self, problem):
        self.asked.append(problem)
        return 'too many rows' if problem.input_shape[2] > 4 else None


@pytest.fixture
def limited(monkeypatch):
    backend = Limited()
    monkeypatch.setitem(BACKENDS, 'limited', table.Entry(backend, priority=99))
    return backend


def train(rows, name=None, dtype=torch.float32, last=False):
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.rand(2, 6, rows, 5, dtype=dtype).contiguous(memory_format=layout)
    weight = torch.rand(2, 3, 3, 1, rows, 5, dtype=dtype)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    involution2d(x, weight, 1, (2, 0), (2, 1), backend=name).sum().backward()


def test_a_backend_is_asked_for_what_is_computed(limited):
    train(4, dtype=torch.bfloat16, last=True)
    arguments = ((2, 6, 4, 5), (2, 3, 3, 1, 4, 5), [1, 1], [2, 0], [2, 1])
    for operation, problem in zip(
        ('forward', 'grad_input', 'grad_weight'), limited.asked, strict=True
    ):
        last = operation != 'grad_input'  # sum() sends an expanded gradient
        expected = Problem(operation, 'cpu', torch.bfloat16, last, *arguments)
        assert expected == problem._replace(kernels_shape=tuple(problem.kernels_shape))


def test_a_named_backend_says_its_reason(limited):
    with pytest.raises(
        ValueError, match="'limited' cannot run .*on cpu: too many rows"
    ):
        train(5, 'limited')
    train(5)


@pytest.mark.parametrize('batch', [2, 0])
def test_tiles_ask_for_what_they_compute(limited, monkeypatch, batch):
    """Each tile is small enough, though the whole is not."""
    monkeypatch.setattr(table.tiled, 'TILE_BYTES', dict(cpu=1, other=1))
    x, z = torch.rand(batch, 4, 9, 5), torch.rand(batch, 2, 9, 5)
    tensors = x, z, torch.rand(9, 2, 1, 1)
    fused_involution2d(*tensors, kernel_size=3, padding=1, backend='limited')
    assert {problem.input_shape[2] for problem in limited.asked} == {3}
    with pytest.raises(ValueError, match='on NVIDIA GPUs alone'):
        fused_involution2d(*tensors, kernel_size=3, padding=1, backend='triton')


def test_choices_are_logged_once(limited, monkeypatch, caplog):
    monkeypatch.setattr(table, '_logged', set())
    monkeypatch.setattr(table, '_logging', table.switch)
    train(5)
    assert not caplog.records
    monkeypatch.setenv('MMCLS_INVOLUTION_LOG', '1')
    for _ in range(2):
        train(5)
    table.default_backend('cpu', torch.float64)  # nothing is computed
    messages = [record.getMessage() for record in caplog.records]
    for name, message in zip(
        ('forward', 'grad_input', 'grad_weight'), messages, strict=True
    ):
        kind = f'{name} of torch.float32 on cpu, contiguous, kernel 3x1: '
        assert message.startswith(kind)
        assert '; not limited: too many rows' in message
    monkeypatch.setenv('MMCLS_INVOLUTION_LOG', 'yes')
    with pytest.raises(ValueError, match="LOG must be 0 or 1, got 'yes'"):
        train(4)
