"""`Involution2d.kernels` and `record_kernels`, against a plain computation."""

from __future__ import annotations

import pytest
import torch
from op_cases import every_generator
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mmcls_involution.ops import Involution2d, involution2d, record_kernels
from mmcls_involution.ops.modules import GENERATORS


def plain_bottleneck(layer: Involution2d, x: torch.Tensor) -> torch.Tensor:
    """Equation 6, one pixel after the other, for sizes that the stride divides."""
    s, k = layer.stride, layer.kernel_size
    groups = layer.channels // layer.group_channels
    rows, columns = x.shape[2] // s, x.shape[3] // s
    kernels = torch.empty(len(x), groups, k, k, rows, columns, dtype=x.dtype)
    bn, span = layer.conv1.bn, layer.conv2.conv
    for i in range(rows):
        for j in range(columns):
            pixel = x[:, :, i * s : (i + 1) * s, j * s : (j + 1) * s].mean((2, 3))
            reduced = pixel @ layer.conv1.conv.weight[:, :, 0, 0].T
            reduced = (reduced - bn.running_mean) / (bn.running_var + bn.eps).sqrt()
            reduced = F.relu(reduced * bn.weight + bn.bias)
            kernel = reduced @ span.weight[:, :, 0, 0].T + span.bias
            kernels[..., i, j] = kernel.view(len(x), groups, k, k)
    return kernels


@pytest.mark.parametrize('stride', [1, 2, 3])
def test_bottleneck_against_a_plain_computation(stride):
    layer = Involution2d(32, kernel_size=3, stride=stride).double().eval()
    for value in (*layer.parameters(), layer.conv1.bn.running_var):
        nn.init.uniform_(value, 0.1, 1)
    nn.init.normal_(layer.conv1.bn.running_mean)
    x = torch.randn(2, 32, 6, 12, dtype=torch.float64)
    torch.testing.assert_close(layer.kernels(x), plain_bottleneck(layer, x))


@every_generator
@pytest.mark.parametrize('stride', [1, 2])
def test_kernels_make_the_output(generator, stride):
    options = dict(kernel_size=5, stride=stride, dilation=2)
    layer = Involution2d(32, generator=generator, **options).double().eval()
    x = torch.randn(2, 32, 9, 7, dtype=torch.float64)
    with record_kernels(layer) as recorded:
        output = layer(x)
    (kernels,) = recorded['']
    assert kernels.shape == (2, 2, 5, 5, -(-9 // stride), -(-7 // stride))
    value = layer.value(x) if 'query' in GENERATORS[generator] else x
    again = involution2d(value, kernels, stride=stride, padding=4, dilation=2)
    torch.testing.assert_close(again, output)


class Shared(nn.Module):
    """A layer that two levels share, and one that does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.head = Involution2d(16, kernel_size=3)
        self.idle = Involution2d(16)

    def forward(self, levels):
        return [self.head(x) for x in levels]


def test_every_call_is_recorded():
    model = Shared().eval()
    levels = [torch.rand(1, 16, 8, 6), torch.rand(1, 16, 4, 3)]
    with record_kernels(model) as kernels:
        model(levels)
    model(levels)  # no longer recorded
    assert [*kernels] == ['head', 'idle'] and kernels['idle'] == []
    for x, recorded in zip(levels, kernels['head'], strict=True):
        torch.testing.assert_close(recorded, model.head.kernels(x))


def test_training_goes_on_as_without():
    models = [Shared(), Shared()]
    models[1].load_state_dict(models[0].state_dict())
    levels = [torch.rand(2, 16, 8, 6), torch.rand(2, 16, 4, 3)]
    for model in models:
        with record_kernels(models[0]) as kernels:
            outputs = model(levels)
        sum(output.square().sum() for output in outputs).backward()
    assert kernels['head'] == []
    ours, theirs = ([p.grad for p in m.head.parameters()] for m in models)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(*(m.head.buffers() for m in models), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize('training', [True, False])
def test_gradients_where_statistics_are_fixed(training):
    model = Shared().train(training)
    x = torch.rand(1, 16, 8, 6, requires_grad=True)
    with record_kernels(model) as kernels:
        sum(output.sum() for output in model([x, x])).backward()
    assert not kernels['head'][0].requires_grad


@pytest.mark.parametrize('use_reentrant', [True, False])
def test_a_checkpointed_layer_is_recorded_once(use_reentrant):
    model = Shared()
    x = torch.rand(1, 16, 4, 4, requires_grad=True)
    with record_kernels(model) as kernels:
        checkpoint(model.head, x, use_reentrant=use_reentrant).sum().backward()
        model.head(x)
    assert len(kernels['head']) == 2


@pytest.mark.parametrize('layers', [['head'], 'head'])
def test_the_fused_path_stays(layers, monkeypatch):
    calls = []
    stock = Involution2d._plain_span
    monkeypatch.setattr(
        Involution2d,
        '_plain_span',
        lambda layer: calls.append(stock(layer)) or calls[-1],
    )
    model = Shared()
    with record_kernels(model, layers) as kernels:
        model([torch.rand(1, 16, 4, 4)])
    assert calls == [model.head.conv2.conv]
    assert [*kernels] == ['head']


def test_names_that_are_not_there():
    model = Shared()
    with (
        pytest.raises(ValueError, match='called tail; there are head, idle'),
        record_kernels(model, ['head', 'tail']),
    ):
        pass
    with (
        pytest.raises(ValueError, match='Sequential has no Involution2d'),
        record_kernels(nn.Sequential()),
    ):
        pass
