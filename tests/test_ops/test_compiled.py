"""Modules under autocast, exported, compiled."""

import pytest
import torch
from op_cases import every_generator, needs_pooling_of_any_size

from mmcls_involution.ops import Involution2d


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@every_generator
def test_trains_under_autocast(generator, dtype):
    module = Involution2d(32, stride=2, generator=generator)
    with torch.autocast('cpu', dtype=dtype):
        out = module(torch.randn(2, 32, 9, 7))
    assert out.dtype == dtype
    out.float().square().sum().backward()
    for parameter in module.parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize(
    'stride, generator', [(1, 'bottleneck'), (2, 'bottleneck'), (2, 'attention')]
)
def test_export_with_dynamic_sizes(stride, generator):
    if stride > 1:
        needs_pooling_of_any_size()
    module = Involution2d(16, stride=stride, generator=generator).eval()
    auto = torch.export.Dim.AUTO
    program = torch.export.export(
        module,
        (torch.randn(2, 16, 9, 7),),
        dynamic_shapes=({0: auto, 2: auto, 3: auto},),
    ).module()
    for shape in [(2, 16, 9, 7), (3, 16, 8, 12)]:
        x = torch.randn(shape)
        torch.testing.assert_close(program(x), module(x))


@pytest.mark.parametrize('fused', [False, True])
def test_exported_program_runs_under_autocast(fused):
    module = Involution2d(16, fused=fused).eval()
    x = torch.randn(2, 16, 9, 7)
    program = torch.export.export(module, (x,)).module()
    with torch.autocast('cpu', torch.bfloat16):
        out, expected = program(x), module(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize('fused', [False, True])
def test_compile_under_autocast_without_graph_breaks(fused):
    module = Involution2d(16, 3, fused=fused)

    def call(x):
        with torch.autocast('cpu', torch.bfloat16):
            return module(x)

    compiled = torch.compile(call, fullgraph=True, backend='aot_eager')
    x = torch.randn(2, 16, 9, 7, requires_grad=True)
    ours, expected = compiled(x), call(x)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(
        *(
            torch.autograd.grad(out.float().square().sum(), x)
            for out in (ours, expected)
        )
    )


@pytest.mark.parametrize('generator', ['bottleneck', 'attention'])
def test_compile_without_graph_breaks_for_changing_sizes(generator):
    module = Involution2d(16, 3, stride=2, generator=generator)
    # Inductor's C++ compilation takes minutes and none of it is ours.
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend='aot_eager')
    for size in [(9, 7), (6, 10)]:
        x = torch.randn(2, 16, *size)
        torch.testing.assert_close(compiled(x), module(x))
