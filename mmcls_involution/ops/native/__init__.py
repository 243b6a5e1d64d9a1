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

logger = logging.getLogger(__name__)

# As in involution.h.
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
FORWARD, GRAD_INPUT, GRAD_WEIGHT, FORWARD_CHANNELS_LAST = range(4)
_Pair = ctypes.c_int64 * 2


class _Problem(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ('batch', 'channels', 'groups')),
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
        ctypes.POINTER(_Problem),
        *[ctypes.c_void_p] * 4,
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


def unusable(device: str, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run there, or None if they can."""
    if device != 'cpu':
        return 'the C++ kernels run on the CPU alone'
    if _library() is None:
        return 'the C++ kernels were not built; install with a C++ compiler'
    return None


def _run(
    operation: int,
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    arguments: tuple[Sequence[int], ...],
    a: Tensor,
    b: Tensor,
    out_shape: Sequence[int],
) -> Tensor:
    if operation == FORWARD_CHANNELS_LAST:
        a = a.contiguous(memory_format=torch.channels_last)
        out = torch.empty(out_shape, dtype=a.dtype, memory_format=torch.channels_last)
    else:
        a, b = a.contiguous(), b.contiguous()
        out = a.new_empty(out_shape)
    pairs = (weight_shape[2:4], input_shape[2:], weight_shape[4:], *arguments)
    problem = _Problem(
        *input_shape[:2], weight_shape[1], *(_Pair(*pair) for pair in pairs)
    )
    failed = _library().involution(
        operation,
        DTYPES.index(a.dtype),
        problem,
        a.data_ptr(),
        b.data_ptr(),
        out.data_ptr(),
        _parallel_for(),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError('involution2d: no memory for the scratch of one tile')
    return out


def forward(
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """See :func:`mmcls_involution.ops.involution2d`."""
    arguments = (stride, padding, dilation)
    shape = (*input.shape[:2], *weight.shape[4:])
    # The kernels are the largest tensor by far: their memory is used as it lies.
    channels_last = (
        not weight.is_contiguous() and weight.permute(0, 4, 5, 1, 2, 3).is_contiguous()
    )
    operation = FORWARD_CHANNELS_LAST if channels_last else FORWARD
    return _run(operation, input.shape, weight.shape, arguments, input, weight, shape)


def grad_input(
    grad: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Gradient of :func:`forward` in ``input``, of spatial size ``input_size``."""
    arguments = (stride, padding, dilation)
    shape = (*grad.shape[:2], *input_size)
    return _run(GRAD_INPUT, shape, weight.shape, arguments, grad, weight, shape)


def grad_weight(
    grad: Tensor,
    input: Tensor,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Gradient of :func:`forward` in ``weight``, of shape ``weight_shape``."""
    arguments = (stride, padding, dilation)
    return _run(
        GRAD_WEIGHT, input.shape, weight_shape, arguments, grad, input, weight_shape
    )
