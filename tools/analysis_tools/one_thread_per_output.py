"""Involution by plain CUDA kernels, one thread per output: the yardstick on GPUs.

The official kernels work like that, through CuPy: a thread for each element of the
output or of a gradient, float32, and every size a constant of the compiler. These were
written for the benchmark from the equations.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

THREADS = 256
SOURCE = r"""
#define EACH(i, count) \
    for (long i = blockIdx.x * (long)blockDim.x + threadIdx.x; i < (count); \
         i += (long)gridDim.x * blockDim.x)

// Y[c, i, j] = sum over u, v of H[u, v, i, j] X[c, i*S + u*D - P, j*S + v*D - P]
extern "C" __global__ void forward(const float* x, const float* h, float* y) {
  EACH(index, (long)N * C * HO * WO) {
    const int j = index % WO, i = index / WO % HO, c = index / (WO * HO) % C;
    const long n = index / ((long)WO * HO * C);
    float sum = 0;
#pragma unroll
    for (int u = 0; u < KH; ++u) {
#pragma unroll
      for (int v = 0; v < KW; ++v) {
        const int row = i * SH + u * DH - PH, column = j * SW + v * DW - PW;
        if (row >= 0 && row < H && column >= 0 && column < W)
          sum += h[(((n * G + c / (C / G)) * KH * KW + u * KW + v) * HO + i) * WO + j] *
                 x[((n * C + c) * H + row) * W + column];
      }
    }
    y[index] = sum;
  }
}

// dX[c, row, column]: the same products, summed over what reads this pixel
extern "C" __global__ void grad_input(const float* dy, const float* h, float* dx) {
  EACH(index, (long)N * C * H * W) {
    const int column = index % W, row = index / W % H, c = index / (W * H) % C;
    const long n = index / ((long)W * H * C);
    float sum = 0;
#pragma unroll
    for (int u = 0; u < KH; ++u) {
#pragma unroll
      for (int v = 0; v < KW; ++v) {
        const int y = row + PH - u * DH, x = column + PW - v * DW;
        if (y < 0 || x < 0 || y % SH || x % SW) continue;
        const int i = y / SH, j = x / SW;
        if (i < HO && j < WO)
          sum += h[(((n * G + c / (C / G)) * KH * KW + u * KW + v) * HO + i) * WO + j] *
                 dy[((n * C + c) * HO + i) * WO + j];
      }
    }
    dx[index] = sum;
  }
}

// dH[u, v, i, j] = sum over the group's channels of dY[c, i, j] X[c, row, column]
extern "C" __global__ void grad_weight(const float* dy, const float* x, float* dh) {
  EACH(index, (long)N * G * KH * KW * HO * WO) {
    const int j = index % WO, i = index / WO % HO;
    const int v = index / (WO * HO) % KW, u = index / (WO * HO * KW) % KH;
    const int g = index / ((long)WO * HO * KW * KH) % G;
    const long n = index / ((long)WO * HO * KW * KH * G);
    const int row = i * SH + u * DH - PH, column = j * SW + v * DW - PW;
    float sum = 0;
    if (row >= 0 && row < H && column >= 0 && column < W) {
      for (int c = g * (C / G); c < (g + 1) * (C / G); ++c)
        sum += dy[((n * C + c) * HO + i) * WO + j] *
               x[((n * C + c) * H + row) * W + column];
    }
    dh[index] = sum;
  }
}
"""


def constants(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[str, ...]:
    """Compiler options that tell the kernels every size."""
    n, c, h, w = input_shape
    _, g, kh, kw, ho, wo = weight_shape
    names = 'N C H W G KH KW HO WO SH SW PH PW DH DW'.split()
    values = (n, c, h, w, g, kh, kw, ho, wo, *stride, *padding, *dilation)
    return tuple(f'-D{name}={v}' for name, v in zip(names, values, strict=True))


@cache
def _kernel(name: str, options: tuple[str, ...]):
    import cupy

    return cupy.RawKernel(SOURCE, name, options)


def _run(name: str, options: tuple[str, ...], *tensors: Tensor) -> Tensor:
    import cupy

    *_, out = tensors
    blocks = min(-(-out.numel() // THREADS), 2**31 - 1)
    stream = cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)
    with stream:
        _kernel(name, options)(
            (blocks,), (THREADS,), tuple(tensor.data_ptr() for tensor in tensors)
        )
    return out


class _Involution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, *arguments):
        ctx.save_for_backward(input, weight)
        ctx.options = constants(input.shape, weight.shape, *arguments)
        out = input.new_empty(*input.shape[:2], *weight.shape[4:])
        return _run('forward', ctx.options, input, weight, out)

    @staticmethod
    def backward(ctx, grad):
        input, weight = ctx.saved_tensors
        grad = grad.contiguous()
        grads = torch.empty_like(input), torch.empty_like(weight)
        _run('grad_input', ctx.options, grad, weight, grads[0])
        _run('grad_weight', ctx.options, grad, input, grads[1])
        return *grads, None, None, None


def involution(input: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """As ``involution2d``, for contiguous float32 tensors on an NVIDIA GPU."""
    pairs = ((value, value) for value in (stride, padding, 1))
    return _Involution.apply(input, weight, *pairs)


def unusable(device: str) -> str | None:
    """Why the kernels cannot run there, or None if they can."""
    if torch.device(device).type != 'cuda':
        return 'runs on NVIDIA GPUs alone'
    try:
        import cupy  # noqa: F401
    except ImportError:
        return 'CuPy is not installed'
    return None
