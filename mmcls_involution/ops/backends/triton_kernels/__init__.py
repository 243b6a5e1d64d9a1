"""Involution by Triton kernels on NVIDIA GPUs; ``kernels.py`` says how they work.

Triton comes with CUDA builds of torch; it is imported when the kernels are first used.
Where the environment variable ``TRITON_INTERPRET`` was 1 by then, its interpreter runs
the functions of this module on CPU tensors: for tests, it is slow.
"""

from __future__ import annotations

import importlib
import logging
import math
import threading
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor

from ...geometry import Pair, Shape, memory_format
from .. import tap_sum
from ..contract import Problem

logger = logging.getLogger(__name__)

LOWEST_TRITON = (3, 4)
# Whose dot products take tiles of fewer than 16 columns.
LOWEST_TRITON_BANDED = (3, 5)
LOWEST_CAPABILITY = (8, 0)
# Lanes are numbered by int32.
MOST_PIXELS = 2**31 - 2**16
# So are the values from the first to the last pixel that a lane reads. More rows than
# a lane has in any of the kernels' blocks.
MOST_REACH, MOST_ROWS = 2**31 - 1, 4


class _NotNow(Exception):
    """Why a GPU could not be tried out; it may be later."""


_trying = threading.Lock()


@cache
def _gpu_problem(index: int) -> str | None:
    """Why that GPU cannot run the kernels, and a warning, or None if it can.

    Raises:
        _NotNow: With a reason that holds for this call alone.
    """
    reason = _find_problem(index)
    if reason is not None:
        _warn(reason)
    return reason


@cache
def _warn(reason: str) -> None:
    logger.warning(
        'The Triton kernels of involution are not in use (%s); GPUs run slower '
        'ones, in plain PyTorch.',
        reason,
    )


def _find_problem(index: int) -> str | None:
    if torch.version.cuda is None:
        return 'they are made for NVIDIA GPUs, and this torch is not'
    if not torch.cuda.is_available():
        return 'torch finds no GPU'
    try:
        version = importlib.import_module('triton').__version__
    except Exception as error:  # a broken install raises whatever it likes
        return f'triton does not import: {type(error).__name__}: {error}'
    if _is_older(version, LOWEST_TRITON):
        return 'triton {} is too old, needed is {}.{}'.format(version, *LOWEST_TRITON)
    capability = torch.cuda.get_device_capability(index)
    if capability < LOWEST_CAPABILITY:
        have, need = ('{}.{}'.format(*v) for v in (capability, LOWEST_CAPABILITY))
        return f'GPU {index} is too old, of compute capability {have}, needed is {need}'
    if torch.cuda.is_current_stream_capturing():
        raise _NotNow(
            f'GPU {index} has not been tried out, which cannot be done while a CUDA '
            'graph is captured; run one step before the capture'
        )
    # In a thread of its own: modes of torch (fake tensors of a compiler, torch.func,
    # autocast, inference) hold for the thread that asks.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_try_out, torch.device('cuda', index)).result()


def _is_older(version: str, lowest: tuple[int, int]) -> bool:
    return tuple(map(int, version.split('.')[:2])) < lowest


def _try_out(device: torch.device) -> str | None:
    """Why a small kernel does not compile, launch and give the right result there."""
    try:
        from .tuner import pin_this_thread

        pin_this_thread()
        for name, dtype, tensors, arguments in _small_problems():
            expected = getattr(tap_sum, name)(*tensors, *arguments).to(dtype)
            tensors = [tensor.to(device, dtype) for tensor in tensors]
            if not torch.equal(globals()[name](*tensors, *arguments).cpu(), expected):
                return f'a small kernel gives a wrong result on {device}: {name}'
    except torch.OutOfMemoryError as error:
        raise _NotNow(f'no memory to try out {device}: {error}') from error
    except Exception as error:  # of a compiler, a driver, a file system ...
        return f'a small kernel fails on {device}: {type(error).__name__}: {error}'
    return None


def _small_problems() -> Iterator[tuple[str, torch.dtype, Sequence[Tensor], tuple]]:
    """Each kernel with and without a stride, of small integers: sums are exact."""

    def integers(*shape: int, modulus: int) -> Tensor:
        values = torch.arange(math.prod(shape), dtype=torch.float32)
        return (values % modulus - modulus // 2).view(shape)

    for dtype, channels, kernel, stride in (
        (torch.float32, 2, (3, 3), 1),
        (torch.float32, 2, (3, 3), 2),
        (torch.float16, 9, (1, 7), 1),  # whose kernels' gradient is by tensor cores
    ):
        out_size = -(-5 // stride)
        padding = kernel[0] // 2, kernel[1] // 2
        arguments = (stride, stride), padding, (1, 1)
        x = integers(1, channels, 5, 5, modulus=7)
        grad = integers(1, channels, out_size, out_size, modulus=5)
        weight = integers(1, 1, *kernel, out_size, out_size, modulus=3)
        yield 'forward', dtype, (x, weight), arguments
        yield 'grad_input', dtype, (grad, weight), ((5, 5), *arguments)
        yield 'grad_weight', dtype, (grad, x), (weight.shape, *arguments)


def supports(problem: Problem) -> str | None:
    """What fits 32-bit numbers, on GPUs that have been tried out."""
    if problem.device != 'cuda':
        return 'the Triton kernels run on NVIDIA GPUs alone'
    try:
        with _trying:
            reason = _gpu_problem(problem.index)
    except _NotNow as error:
        reason = str(error)
        _warn(reason)
    return reason or _beyond_limits(problem)


def _beyond_limits(problem: Problem) -> str | None:
    batch, channels, *size = problem.input_shape
    _, _, kh, kw, *out_size = problem.kernels_shape
    if batch * max(math.prod(size), math.prod(out_size)) > MOST_PIXELS:
        return (
            f'the Triton kernels of involution take at most {MOST_PIXELS} pixels, got '
            f'{batch} images of {size[0]}x{size[1]} and {out_size[0]}x{out_size[1]} '
            "kernels for each; split the batch or use backend 'tap_sum'"
        )
    step = channels if problem.channels_last else 1
    rows = kh * problem.dilation[0] + MOST_ROWS * problem.stride[0]
    width = max(size[1], out_size[1])
    reach = (rows * width + kw * problem.dilation[1]) * step
    if reach > MOST_REACH:
        return (
            f'the Triton kernels of involution take windows of at most {MOST_REACH} '
            f'values, got {rows} rows of {width} pixels of {step}; use less dilation '
            "or backend 'tap_sum'"
        )
    return None


def block_channels(group_channels: int) -> int:
    """Channels that a program works on at once, a power of two."""
    return min(16, 1 << (group_channels - 1).bit_length())


def choose_grad_weight(
    dtype: torch.dtype, group_channels: int, kw: int, stride: Pair, dilation: Pair
) -> str:
    """Which of the kernels computes the gradient of involution kernels.

    Tensor cores are exact in half precision alone, and multiply 16 channels. Of windows
    wider than 16 pixels, or of narrow kernels, too little of the product is used.
    """
    import triton

    if _is_older(triton.__version__, LOWEST_TRITON_BANDED):
        return 'grad_weight'
    half = dtype in (torch.float16, torch.bfloat16)
    dense = math.prod(stride) == math.prod(dilation) == 1
    fits = 8 < group_channels <= 16 and 6 < kw <= 8
    return 'grad_weight_banded' if half and dense and fits else 'grad_weight'


def _run(
    name: str,
    tensors: Sequence[Tensor],
    layout: torch.memory_format,
    input_shape: Shape,
    weight_shape: Shape,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> None:
    """Launch a kernel on its inputs and its output; `layout` is that of pixels."""
    from . import kernels

    batch, channels, *size = input_shape
    groups, out_size = weight_shape[1], weight_shape[4:]
    if batch == 0:
        return
    group_channels = channels // groups
    block = block_channels(group_channels)
    constants = dict(
        zip(('KH', 'KW'), weight_shape[2:4], strict=True),
        SH=stride[0],
        SW=stride[1],
        DH=dilation[0],
        DW=dilation[1],
        GROUP_CHANNELS=group_channels,
        CHANNELS_LAST=layout == torch.channels_last,
        BLOCK_C=block,
    )
    # What lanes number, and the parts of the work that each lane is in.
    lanes, parts = [*out_size], groups
    if name == 'grad_weight_banded':  # in runs of 8
        lanes[1] += -lanes[1] % 8
    elif name != 'grad_weight':
        parts *= -(-group_channels // block)
    if name == 'grad_input':
        lanes = [-(-side // step) for side, step in zip(size, stride, strict=True)]
        parts *= math.prod(stride)
        constants['GCD_H'], constants['GCD_W'] = map(math.gcd, stride, dilation)

    def grid(meta: dict) -> tuple[int]:
        count = batch * -(-lanes[0] // meta['ROWS']) * lanes[1]
        return (-(-count // meta['BLOCK_P']) * parts,)

    with torch.cuda.device_of(tensors[0]):
        getattr(kernels, name)[grid](
            *tensors,
            *(batch, channels, *size, *out_size, *padding),
            _timing_class(batch * math.prod(lanes) * parts, tensors[0].device),
            **constants,
            enable_fp_fusion=True,
        )


@cache
def _kind(device: torch.device) -> int:
    """A number of 26 bits for all GPUs alike, and for slices of one."""
    if device.type != 'cuda':  # in the interpreter
        return 0
    properties = torch.cuda.get_device_properties(device)
    kind = f'{properties.name} {properties.multi_processor_count}'
    return zlib.crc32(kind.encode()) >> 6


def _timing_class(lanes: int, device: torch.device) -> int:
    """What timings hold for: a range of sizes, a power of four, on one kind of GPU.

    A number, as it passes through the kernels' arguments to the tuner.
    """
    return _kind(device) << 5 | lanes.bit_length() // 2


def forward(
    input: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    """See :func:`mmcls_involution.ops.involution2d`."""
    layout = memory_format(input)
    input = input.contiguous(memory_format=layout)
    shape = (*input.shape[:2], *weight.shape[4:])
    out = torch.empty(
        shape, dtype=input.dtype, device=input.device, memory_format=layout
    )
    tensors, arguments = (input, weight.contiguous(), out), (stride, padding, dilation)
    _run('forward', tensors, layout, input.shape, weight.shape, *arguments)
    return out


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
    grad = grad.contiguous(memory_format=layout)
    shape = (*grad.shape[:2], *input_size)
    out = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=layout)
    tensors, arguments = (grad, weight.contiguous(), out), (stride, padding, dilation)
    _run('grad_input', tensors, layout, shape, weight.shape, *arguments)
    return out


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
    grad, input = (t.contiguous(memory_format=layout) for t in (grad, input))
    out = grad.new_empty(weight_shape)
    tensors, arguments = (grad, input, out), (stride, padding, dilation)
    name = choose_grad_weight(
        input.dtype,
        input.shape[1] // weight_shape[1],
        *(weight_shape[3], stride, dilation),
    )
    _run(name, tensors, layout, input.shape, weight_shape, *arguments)
    return out
