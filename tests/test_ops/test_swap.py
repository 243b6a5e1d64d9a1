"""`InvolutionConv` and `swap_convolutions`: recipes, shapes, what is left and why."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmcls_involution.ops import Involution2d, InvolutionConv, swap_convolutions


class Net(nn.Module):
    """What somebody may have written: a stem, two stages, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.same = nn.Conv2d(16, 16, 3, padding=1)
        self.wider = nn.Conv2d(16, 32, 5, stride=2, padding=2, bias=False)
        self.narrower = nn.Conv2d(32, 16, 3, padding='same', dilation=2)
        self.bn = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = self.same(self.stem(x).relu()).relu()
        x = self.bn(self.narrower(self.wider(x).relu())).relu()
        return self.head(x.mean((2, 3)))


def train_two_steps(model: nn.Module, loss) -> None:
    """SGD; every new weight moves."""
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        value = loss(model)
        assert torch.isfinite(value)
        value.backward()
        optimizer.step()
    for name, value in model.named_parameters():
        if 'involution' in name:
            assert not torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    ('channels', 'order'),
    [
        ((16, 16), ['involution']),
        ((16, 48), ['involution', 'projection']),
        ((48, 16), ['projection', 'involution']),
        ((3, 16), ['projection', 'involution']),
        ((16, 5), ['involution', 'projection']),
    ],
)
@pytest.mark.parametrize('stride', [1, 2, 3])
def test_output_has_the_shape_of_the_convolution(channels, order, stride):
    for size, dilation in ((3, 1), (5, 2)):
        geometry = (size, stride, dilation * (size - 1) // 2, dilation)
        layer = InvolutionConv(*channels, *geometry)
        conv = nn.Conv2d(*channels, *geometry)
        assert [name for name, _ in layer.named_children()] == order
        for shape in ((1, 1), (9, 14), (12, 7)):
            x = torch.rand(2, channels[0], *shape)
            assert layer(x).shape == conv(x).shape


def test_parts_of_the_layer_make_its_output():
    layer = InvolutionConv(48, 16, 3, stride=2, padding=1)
    nn.init.normal_(layer.bias)
    x = torch.rand(2, 48, 9, 7)
    expected = layer.involution(layer.projection(x)) + layer.bias.view(-1, 1, 1)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize('bias', [False, True])
def test_autocast_gives_the_dtype_of_the_convolution(bias):
    layer = InvolutionConv(16, 16, 3, padding=1, bias=bias)
    with torch.autocast('cpu', torch.bfloat16):
        out = layer(torch.rand(2, 16, 9, 7))
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ('arguments', 'reason'),
    [
        (dict(kernel_size=1), '1x1'),
        (dict(kernel_size=3, groups=2, padding=1), '2 groups'),
        (dict(kernel_size=(1, 3), padding=(0, 1)), 'kernel_size differs'),
        (dict(kernel_size=3, stride=(1, 2), padding=1), 'stride differs'),
        (dict(kernel_size=2, padding=0), 'no middle'),
        (dict(kernel_size=3, padding=1, padding_mode='circular'), 'circular'),
        (dict(kernel_size=3), r'padding is \(0, 0\).* needs \(1, 1\)'),
        (dict(kernel_size=3, padding=1, dilation=2), r'needs \(2, 2\)'),
    ],
)
def test_refuses_what_would_be_another_layer(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        InvolutionConv(16, 16, **arguments)
    model = nn.Sequential(nn.Conv2d(16, 16, **arguments))
    with pytest.raises(ValueError, match=f'no convolution was swapped.*\n.*{reason}'):
        swap_convolutions(model)


@pytest.mark.parametrize('number', [0, -8, '8', None, 8.0])
def test_group_channels_must_be_a_positive_int(number):
    expected = f'group_channels must be a positive int, got {number!r}'
    with pytest.raises(ValueError, match=expected):
        InvolutionConv(
            *(16, 16, 3), padding=1, involution_cfg=dict(group_channels=number)
        )
    with pytest.raises(ValueError, match=expected):
        swap_convolutions(Net(), group_channels=number)


def test_groups_must_divide_the_channels():
    with pytest.raises(ValueError, match='neither 3 nor 24 .* group_channels, 16'):
        InvolutionConv(3, 24, 3, padding=1)
    layer = InvolutionConv(3, 24, 3, padding=1, involution_cfg=dict(group_channels=8))
    assert layer.involution.channels == 24


def test_own_net():
    model, x = Net(), torch.rand(4, 3, 33, 21)
    bias = model.same.bias.clone()
    table = swap_convolutions(model, inputs=x)
    assert table.swapped == ('same', 'wider', 'narrower')
    assert model.wider.involution.kernel_size == 5
    assert torch.equal(model.same.bias, bias)
    rows = {row.name: row for row in table.rows}
    assert rows['stem'].reason == 'the rule says so'
    # 3*3*3*16 weights at each of 17 x 11 pixels of 4 images
    assert rows['stem'].flops == (4 * 17 * 11 * 432,) * 2
    # bottleneck 16 -> 4, its BN, 4 -> 9 with bias; the bias of the convolution
    assert rows['same'].parameters == (9 * 16 * 16 + 16, 64 + 8 + 36 + 9 + 16)
    pixels = 4 * 17 * 11
    assert rows['same'].flops[1] == pixels * (64 + 36 + 9 * 16)
    assert table.parameters[1] == sum(p.numel() for p in model.parameters())
    assert table.flops[0] - table.flops[1] == sum(
        row.flops[0] - row.flops[1] for row in table.rows
    )
    printed = str(table).splitlines()
    assert len(printed) == 6 and 'left, the rule says so: Conv2d(3, 16' in printed[1]
    labels = torch.tensor([0, 1, 2, 0])
    train_two_steps(model, lambda m: nn.functional.cross_entropy(m(x), labels))


def test_rule_and_arguments_of_the_involution():
    model = Net()
    table = swap_convolutions(
        model,
        lambda name, conv: name != 'same' and conv.stride == (2, 2),
        kernel_size=7,
        group_channels=8,
        generator='linear',
    )
    assert table.swapped == ('stem', 'wider')
    assert table.flops is None
    involutions = [m for m in model.modules() if isinstance(m, Involution2d)]
    assert {(m.kernel_size, m.group_channels, m.generator) for m in involutions} == {
        (7, 8, 'linear')
    }
    # what is inside an involution is no convolution to swap
    again = swap_convolutions(model, inputs=torch.rand(1, 3, 8, 8))
    assert again.swapped == ('same', 'narrower')


def test_keeps_dtype_device_and_mode():
    model = Net().to('meta', torch.bfloat16)
    model.same.eval()
    swap_convolutions(model)
    tensors = [*model.wider.parameters(), *model.wider.buffers()]
    assert {t.device.type for t in tensors} == {'meta'}
    assert {t.dtype for t in tensors} == {torch.bfloat16, torch.int64}
    assert model.wider.involution.training and not model.same.involution.training


def test_modes_survive_the_call():
    model = Net()
    model.bn.eval()
    swap_convolutions(model, inputs=torch.rand(1, 3, 8, 8))
    assert model.training and model.same.training and not model.bn.training
    statistics = model.same.involution.conv1.bn
    assert statistics.num_batches_tracked == 0


def test_shared_layer_stays_one():
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
    model.append(model[0])
    rule = lambda name, conv: name == '0'  # noqa: E731
    assert swap_convolutions(model, rule).swapped == ('0', '2')
    assert model[0] is model[2] and isinstance(model[0], InvolutionConv)


def test_what_a_convolution_is_besides_is_left():
    class Own(nn.Conv2d):
        pass

    def conv():
        return nn.Conv2d(16, 16, 3, padding=1)

    model = nn.ModuleDict(
        dict(
            own=Own(16, 16, 3, padding=1),
            normed=nn.utils.parametrizations.weight_norm(conv()),
            hooked=conv(),
            plain=conv(),
        )
    )
    model.hooked.register_forward_hook(lambda *_: None)
    table = swap_convolutions(model)
    assert table.swapped == ('plain',)
    reasons = [row.reason for row in table.rows]
    assert 'Own' in reasons[0] and 'Parametrized' in reasons[1]
    assert reasons[2] == 'it has hooks'
    assert len(str(table).splitlines()) == 6


def test_a_model_that_reads_weights_is_left_as_it_was():
    class Reads(Net):
        def forward(self, x):
            return super().forward(x) * self.same.weight.sum()

    model = Reads()
    same = model.same
    with pytest.raises(ValueError, match="has no attribute 'weight'.*what it was"):
        swap_convolutions(model, inputs=torch.rand(1, 3, 8, 8))
    assert model.same is same
    with pytest.raises(ValueError, match='the model is a convolution itself'):
        swap_convolutions(nn.Conv2d(16, 16, 3, padding=1))
    with pytest.raises(ValueError, match='the model has none'):
        swap_convolutions(nn.Sequential(nn.ReLU()))


def test_outputs_may_be_others_after_the_swap():
    """The new weights are others: a detector finds another number of boxes."""

    class Detects(Net):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return dict(boxes=super().forward(x).flatten()[: self.calls, None])

    table = swap_convolutions(Detects(), inputs=torch.rand(1, 3, 8, 8))
    assert table.swapped == ('same', 'wider', 'narrower')


def test_torchvision_resnet18():
    pytest.importorskip('mmcls_involution.compat').declare_torchvision_ops()
    torchvision = pytest.importorskip('torchvision', reason='torchvision is missing')
    model = torchvision.models.resnet18(num_classes=3)
    x = torch.rand(2, 3, 64, 64)
    table = swap_convolutions(model, inputs=x)
    assert len(table.swapped) == 16  # all but stem and 1x1 shortcuts
    assert table.parameters[1] < table.parameters[0] / 10
    labels = torch.tensor([0, 2])
    train_two_steps(model, lambda m: nn.functional.cross_entropy(m(x), labels))


def test_timm_resnet18():
    pytest.importorskip('mmcls_involution.compat').declare_torchvision_ops()
    timm = pytest.importorskip('timm', reason='timm is missing')
    model = timm.create_model('resnet18', num_classes=3)
    x = torch.rand(2, 3, 64, 64)
    table = swap_convolutions(model, inputs=x)
    assert len(table.swapped) == 16  # all but stem and 1x1 shortcuts
    labels = torch.tensor([0, 2])
    train_two_steps(model, lambda m: nn.functional.cross_entropy(m(x), labels))
    with pytest.raises(ValueError, match='no convolution was swapped'):
        swap_convolutions(timm.create_model('mobilenetv3_small_050'))
