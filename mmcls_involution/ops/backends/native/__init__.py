"""Involution by C++ kernels on the CPU; ``kernels.h`` says how they work.

The library is plain C++ behind a C interface, so one build serves every torch.
``pip install`` builds it where there is a C++ compiler.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ...geometry import Pair, Shape, memory_format
from ..contract import Problem

logger = logging.getLogger(__name__)

# As in involution.h.
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
FORWARD, GRAD_INPUT, GRAD_WEIGHT = range(3)
_Pair = ctypes.c_int64 * 2


class _CProblem(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in ('batch', 'channels', 'groups', 'reduced', 'channels_last')
        ),
        *(
            (name, _Pair)
            for name in ('kernel', 'input', 'output', 'stride', 'padding', 'dilation')
        ),
    ]


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled kernels; None, and a warning, if they were not built."""
    files = sorted(Path(__file__).parent.glob('_kernels*'))
    try:
        library = ctypes.CDLL(str(files[0]))
    except (IndexError, OSError) as error:
        reason = 'they were not built' if not files else error
        logger.warning(
            'The C++ kernels of involution are not in use (%s); the CPU runs slower '
            'ones. With g++ or clang++, reinstalling this package builds them: pip '
            'install --force-reinstall --no-deps <its folder>.',
            reason,
        )
        return None
    library.involution.argtypes = [
        ctypes.c_int32,
        ctypes.c_int32,
        ctypes.POINTER(_CProblem),
        ctypes.c_void_p * 4,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int32,
    ]
    library.involution_instruction_set.restype = ctypes.c_char_p
    return library


@cache
def _parallel_for() -> ctypes.c_void_p | None:
    """torch's own threads, from its stable C interface (torch >= 2.10)."""
    path = Path(torch.__file__).parent / 'lib' / 'libtorch_cpu.so'
    try:
        function = ctypes.CDLL(str(path)).torch_parallel_for
    except (OSError, AttributeError):
        return None
    return ctypes.cast(function, ctypes.c_void_p)


def supports(problem: Problem) -> str | None:
    """Everything on the CPU, if the kernels were built."""
    if problem.device != 'cpu':
        return 'the C++ kernels run on the CPU alone'
    if _library() is None:
        return 'the C++ kernels were not built; install with a C++ compiler'
    return None


def _run(
    operation: int,
    inputs: Sequence[Tensor | None],
    out: Tensor,
    input_shape: Shape,
    weight_shape: Shape,
    arguments: Sequence[Sequence[int]],
    layout: torch.memory_format,
    reduced: int = 0,
) -> Tensor:
    """Fill ``out``; every tensor lies in memory as involution.h says of ``layout``."""
    pairs = (weight_shape[2:4], input_shape[2:], weight_shape[4:], *arguments)
    problem = _CProblem(
        *input_shape[:2],
        weight_shape[1],
        reduced,
        layout == torch.channels_last,
        *(_Pair(*pair) for pair in pairs),
    )
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in inputs]
    failed = _library().involution(
        operation,
        DTYPES.index(out.dtype),
        problem,
        (ctypes.c_void_p * 4)(*pointers),
        out.data_ptr(),
        _parallel_for(),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError('involution2d: no memory for the scratch of one tile')
    return out


def _pixels_first(weight: Tensor) -> bool:
    """Whether kernels lie in memory as a channels_last convolution makes them."""
    return (
        not weight.is_contiguous() and weight.permute(0, 4, 5, 1, 2, 3).is_contiguous()
    )


def forward(
    input: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    """See :func:`mmcls_involution.ops.involution2d`."""
    # The kernels are the largest tensor by far: their memory is used as it lies.
    last = _pixels_first(weight)
    layout = torch.channels_last if last else torch.contiguous_format
    input = input.contiguous(memory_format=layout)
    if not last:
        weight = weight.contiguous()
    shape = (*input.shape[:2], *weight.shape[4:])
    out = torch.empty(shape, dtype=input.dtype, memory_format=layout)
    shapes, arguments = (input.shape, weight.shape), (stride, padding, dilation)
    return _run(FORWARD, (input, weight), out, *shapes, arguments, layout)


def fused_forward(
    input: Tensor,
    reduced: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Tensor:
    """See :func:`mmcls_involution.ops.fused_involution2d`."""
    layout = memory_format(input)
    size = reduced.shape[2:]
    taps = kernel_size[0] * kernel_size[1]
    return _run(
        FORWARD,
        (
            input.contiguous(memory_format=layout),
            reduced.contiguous(memory_format=layout),
            weight.contiguous(),
            None if bias is None else bias.contiguous(),
        ),
        torch.empty((*input.shape[:2], *size), dtype=input.dtype, memory_format=layout),
        input.shape,
        (len(input), len(weight) // taps, *kernel_size, *size),
        (stride, padding, dilation),
        layout,
        reduced=reduced.shape[1],
    )


def grad_input(
    grad: Tensor,
    weight: Tensor,
    input_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Tensor:
    """Gradient of :func:`forward` in ``input``, of spatial size ``input_size``."""
    layout = memory_format(grad)
    shape = (*grad.shape[:2], *input_size)
    tensors = grad.contiguous(memory_format=layout), weight.contiguous()
    out = torch.empty(shape, dtype=grad.dtype, memory_format=layout)
    shapes, arguments = (shape, weight.shape), (stride, padding, dilation)
    return _run(GRAD_INPUT, tensors, out, *shapes, arguments, layout)


def grad_weight(
    grad: Tensor,
    input: Tensor,
    weight_shape: Shape,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Tensor:
    """Gradient of :func:`forward` in ``weight``, of shape ``weight_shape``."""
    layout = memory_format(input)
    tensors = [tensor.contiguous(memory_format=layout) for tensor in (grad, input)]
    out = grad.new_empty(weight_shape)
    shapes, arguments = (input.shape, weight_shape), (stride, padding, dilation)
    return _run(GRAD_WEIGHT, tensors, out, *shapes, arguments, layout)
