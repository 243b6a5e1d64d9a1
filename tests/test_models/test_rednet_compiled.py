"""RedNet compiled, traced, exported, and under torch.func."""

import copy

import pytest
import torch
from mmengine.model import BaseModel
from mmengine.model.efficient_conv_bn_eval import turn_on_efficient_conv_bn_eval
from op_cases import needs_pooling_of_any_size
from torch.func import functional_call, grad, vmap

from mmcls_involution.models import RedNet

SLIM = dict(depth=26, base_channels=16, stem_channels=32)
TWO_STAGES = dict(
    **SLIM, num_stages=2, strides=(1, 2), dilations=(1, 1), out_indices=(0, 1)
)


@pytest.mark.parametrize('with_cp', [False, True])
def test_compiled_in_one_graph(with_cp):
    """Without a break, gradients too; what a compiler makes of the graph is its own."""
    plain = RedNet(**TWO_STAGES).train()
    model = RedNet(**TWO_STAGES, with_cp=with_cp).train()
    model.load_state_dict(plain.state_dict())
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    x = torch.randn(2, 3, 37, 50)
    for ours, theirs in zip(compiled(x), plain(x), strict=True):
        torch.testing.assert_close(ours, theirs)
    for network in (compiled, plain):
        sum(level.square().mean() for level in network(x)).backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


def outputs_and_gradients(model, x):
    model.zero_grad()
    outs = model(x)
    sum(out.square().mean() for out in outs).backward()
    # torch.fx gives parameters another order.
    return [*outs, *(p.grad for _, p in sorted(model.named_parameters()))]


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_symbolic_trace_changes_nothing(layout, training):
    model = RedNet(**SLIM, out_indices=(0, 3))
    model.train(training)
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    x = torch.randn(2, 3, 33, 40).contiguous(memory_format=layout)
    for ours, right in zip(
        outputs_and_gradients(traced, x), outputs_and_gradients(model, x), strict=True
    ):
        assert torch.equal(ours, right)
        assert ours.stride() == right.stride()


@pytest.mark.parametrize('norm_eval', [False, True])
def test_trains_with_efficient_conv_bn_eval(norm_eval):
    class Detector(BaseModel):
        def __init__(self):
            super().__init__()
            self.backbone = RedNet(**SLIM, norm_eval=norm_eval)

        def forward(self, x):
            return self.backbone(x)

    model = Detector().train()
    changed = copy.deepcopy(model)
    turn_on_efficient_conv_bn_eval(changed, ['backbone'])
    x = torch.randn(2, 3, 33, 40)
    for ours, right in zip(
        outputs_and_gradients(changed, x), outputs_and_gradients(model, x), strict=True
    ):
        if norm_eval:  # which multiplies weights, not features
            torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(ours, right)
    for ours, right in zip(changed.buffers(), model.buffers(), strict=True):
        assert torch.equal(ours, right)


def test_gradients_of_each_sample():
    model = RedNet(**SLIM).double().eval()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    x = torch.randn(2, 3, 33, 40, dtype=torch.float64)

    def loss(parameters, x):
        return functional_call(model, parameters, (x[None],))[0].square().sum()

    of_samples = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i, sample in enumerate(x):
        model.zero_grad()
        model(sample[None])[0].square().sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(of_samples[name][i], parameter.grad)


def test_exported_for_every_size():
    needs_pooling_of_any_size()
    model = RedNet(**TWO_STAGES).eval()
    sizes = {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    with torch.no_grad():
        program = torch.export.export(
            model, (torch.randn(1, 3, 37, 50),), dynamic_shapes=(sizes,)
        ).module()
        for size in ((37, 50), (64, 33)):
            x = torch.randn(1, 3, *size)
            for ours, theirs in zip(program(x), model(x), strict=True):
                torch.testing.assert_close(ours, theirs)
