"""Files made by hand for the custom operators: what is wrong is said, nothing dies."""

from __future__ import annotations

import pytest
import torch
from deployment_cases import needs_library, needs_onnx
from torch import Tensor

from mmcls_involution.deployment import register_custom_operators
from mmcls_involution.ops import fused_involution2d, involution2d

PAIRS = dict(strides=[2, 1], pads=[1, 0], dilations=[1, 2])
# Input, kernels [N, G, Kh, Kw, Ho, Wo].
GIVEN = dict(input=(2, 4, 5, 7), weight=(2, 2, 3, 2, 3, 5))
# Input, reduced map [N, R, Ho, Wo], weight and bias of the span.
FUSED = dict(input=(2, 4, 5, 7), reduced=(2, 3, 3, 5), weight=(12, 3, 1, 1), bias=(12,))
TAPS = dict(kernel_shape=[3, 2])


def run(
    shapes: dict[str, tuple[int, ...]], attributes: dict[str, list[int]]
) -> tuple[list[Tensor], Tensor]:
    """Random inputs, and the output of one node in ONNX Runtime."""
    import onnxruntime
    from onnx import TensorProto, helper

    name = 'FusedInvolution2d' if 'reduced' in shapes else 'Involution2d'
    node = helper.make_node(
        name, list(shapes), ['output'], domain='mmcls_involution', **attributes
    )

    def values(names):
        kind = TensorProto.FLOAT
        return [helper.make_tensor_value_info(n, kind, None) for n in names]

    graph = helper.make_graph([node], 'g', values(shapes), values(['output']))
    versions = [helper.make_opsetid(*v) for v in (('', 17), ('mmcls_involution', 1))]
    model = helper.make_model(graph, opset_imports=versions, ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    register_custom_operators(options)
    content, providers = model.SerializeToString(), ['CPUExecutionProvider']
    session = onnxruntime.InferenceSession(content, options, providers=providers)
    inputs = {n: torch.randn(s) for n, s in shapes.items()}
    (output,) = session.run(None, {n: tensor.numpy() for n, tensor in inputs.items()})
    return list(inputs.values()), torch.from_numpy(output)


@needs_onnx
def test_given_kernels_agree_with_pytorch():
    needs_library()
    inputs, output = run(GIVEN, PAIRS)
    exact = involution2d(*(t.double() for t in inputs), *PAIRS.values())
    torch.testing.assert_close(output.double(), exact, rtol=1e-5, atol=1e-5)


@needs_onnx
@pytest.mark.parametrize('bias', [True, False])
def test_generated_kernels_agree_with_pytorch(bias):
    needs_library()
    shapes = {n: s for n, s in FUSED.items() if bias or n != 'bias'}
    inputs, output = run(shapes, PAIRS | TAPS)
    exact = fused_involution2d(
        *(t.double() for t in inputs),
        kernel_size=TAPS['kernel_shape'],
        **dict(zip(('stride', 'padding', 'dilation'), PAIRS.values(), strict=True)),
    )
    torch.testing.assert_close(output.double(), exact, rtol=1e-5, atol=1e-5)


@needs_onnx
@pytest.mark.parametrize(
    'changes, message',
    [
        (dict(input=(4, 5, 7)), r'input must be \[N, C, H, W\], got shape \[4, 5, 7\]'),
        (dict(input=()), r'input must be .* got shape \[\]'),
        (dict(weight=(2, 3, 3, 5)), r'weight must be \[N, G, Kh, Kw, Ho, Wo\], got'),
        (dict(input=(64, 4, 5, 7)), r'the batch size of input, 64, got shape \[2, 2'),
        (dict(weight=(2, 8, 3, 2, 3, 5)), 'divide the channels of input, 4, got 8'),
        (dict(weight=(2, 3, 3, 2, 3, 5)), 'divide the channels of input, 4, got 3'),
        (dict(weight=(2, 0, 3, 2, 3, 5)), 'divide the channels of input, 4, got 0'),
        (dict(input=(2, 0, 5, 7)), 'divide the channels of input, 0, got 2'),
        (dict(weight=(2, 2, 0, 2, 3, 5)), r'a kernel of size \[0, 2\].* does not fit'),
        (dict(weight=(2, 2, 9, 2, 3, 5)), r'a kernel of size \[9, 2\].* does not fit'),
        (dict(input=(2, 4, 0, 7)), r'not fit into an input of shape \[2, 4, 0, 7\]'),
        (
            dict(weight=(2, 2, 3, 2, 4, 6)),
            r'one kernel per output pixel, \[3, 5\] .* strides \[2, 1\], pads \[1, 0\] '
            r'and dilations \[1, 2\], got \[4, 6\]',
        ),
        (dict(strides=[0, 0]), r'strides must be 2 numbers from 1 to .* got \[0, 0\]'),
        (dict(strides=[1, 2**31]), 'strides must be 2 numbers .* to 2147483647, got'),
        (dict(dilations=[1, 0]), 'dilations must be 2 numbers from 1 to'),
        (dict(pads=[0, -1]), r'pads must be 2 numbers from 0 to .* got \[0, -1\]'),
        (dict(pads=[1, 1, 1, 1]), r'pads must be 2 numbers .* got \[1, 1, 1, 1\]'),
        (dict(pads=[1]), r'pads must be 2 numbers .* got \[1\]'),
    ],
    ids=str,
)
def test_kernels_that_do_not_fit(changes, message):
    refused(GIVEN, PAIRS, changes, message)


@needs_onnx
@pytest.mark.parametrize(
    'changes, message',
    [
        (dict(input=(4, 5, 7)), r'input must be \[N, C, H, W\], got shape \[4, 5, 7\]'),
        (dict(reduced=(3, 3, 5)), r'reduced must be \[N, R, Ho, Wo\], got'),
        (dict(reduced=(1, 3, 3, 5)), r'the batch size of input, 2, got shape \[1, 3'),
        (dict(weight=(12, 5, 1, 1)), r'Kw = 6 and R = 3, .* got shape \[12, 5, 1, 1\]'),
        (dict(weight=(13, 3, 1, 1)), r'Kw = 6 and R = 3, .* got shape \[13, 3, 1, 1\]'),
        (dict(weight=(12, 3)), r'Kw = 6 and R = 3, .* got shape \[12, 3\]'),
        (dict(bias=(5,)), r'one value per row of weight, 12, got shape \[5\]'),
        (dict(bias=()), r'one value per row of weight, 12, got shape \[\]'),
        (dict(weight=(18, 3, 1, 1), bias=(18,)), 'the channels of input, 4, got 3'),
        (dict(weight=(0, 3, 1, 1), bias=(0,)), 'the channels of input, 4, got 0'),
        (dict(reduced=(2, 3, 9, 9)), r'reduced must hold .* \[3, 5\] .* got \[9, 9\]'),
        (dict(kernel_shape=[0, 0]), r'kernel_shape must be 2 numbers .* got \[0, 0\]'),
    ],
    ids=str,
)
def test_generators_that_do_not_fit(changes, message):
    refused(FUSED, PAIRS | TAPS, changes, message)


def refused(shapes, attributes, changes, message):
    needs_library()
    shapes, attributes = (
        {name: changes.get(name, value) for name, value in given.items()}
        for given in (shapes, attributes)
    )
    with pytest.raises(Exception, match='mmcls_involution: .*' + message):
        run(shapes, attributes)
