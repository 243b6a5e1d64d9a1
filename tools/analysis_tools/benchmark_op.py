"""Time involution at the shapes of RedNet, every backend beside the alternatives.

    python tools/analysis_tools/benchmark_op.py [--image 8x224x224 ...] [--dry-run] ...

Per shape: every backend, the unfold form of the paper's pseudo-code (the backend
`reference`), the 3x3 convolution that the involution replaces, and the time that
reading input and kernels and writing the output takes at the machine's measured copy
bandwidth; the backward pass moves twice as much. On a GPU with CuPy also plain CUDA
kernels as the official ones are, with a thread for each output, always in float32. Then
the same involution with the 1x1 convolution that spans its kernels: in two steps, and
fused. All of them take turns in one process, so the ratios hold where absolute times
drift.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import one_thread_per_output
import torch
import torch.nn.functional as F
from benchmark_utils import (
    copy_bandwidth,
    describe_machine,
    peak_memory,
    time_in_turns,
    use_device,
    write_csv,
)
from torch import Tensor

from mmcls_involution.console import console, print_table
from mmcls_involution.models import Involution2d, RedNet
from mmcls_involution.ops import BACKENDS, fused_involution2d, involution2d
from mmcls_involution.ops.backends.contract import Problem

IMAGES = ('8x224x224', '1x800x1216', '2x512x1024')
DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}
Shape = dict[str, int]
# Of one candidate: forward_ms, backward_ms, peak_memory_mb; nan if not measured.
Figures = dict[str, float]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--depth', type=int, default=50, help='of RedNet (default: 50)')
    parser.add_argument(
        '--image',
        nargs='+',
        default=list(IMAGES),
        help='batch x height x width (default: %(default)s)',
    )
    parser.add_argument('--dtype', choices=DTYPES, default='fp32')
    parser.add_argument(
        '--device', default='cuda' if torch.cuda.is_available() else 'cpu'
    )
    parser.add_argument(
        '--backend', nargs='+', choices=BACKENDS, help='default: all that can run'
    )
    parser.add_argument('--forward-only', action='store_true')
    parser.add_argument(
        '--channels-last', action='store_true', help='memory format of the pixels'
    )
    parser.add_argument('--rounds', type=int, help='default: 7 on a CPU, 20 on a GPU')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/benchmark_op.csv'))
    parser.add_argument(
        '--dry-run', action='store_true', help='list shapes and backends, and stop'
    )
    args = parser.parse_args()
    if args.rounds is None:
        args.rounds = 7 if args.device == 'cpu' else 20
    return args


def involution_shapes(depth: int, batch: int, height: int, width: int) -> list[Shape]:
    """The distinct involutions of RedNet for images of one size, and how many each."""
    counts: dict[tuple[int, ...], int] = {}

    def record(module: Involution2d, inputs: tuple[Tensor, ...]) -> None:
        key = (*inputs[0].shape, module.kernel_size, module.stride)
        key += (module.channels // module.group_channels,)
        key += (module.channels // module.reduction_ratio,)
        counts[key] = counts.get(key, 0) + 1

    with torch.device('meta'):
        model = RedNet(depth).eval()
        image = torch.empty(batch, 3, height, width)
    for module in model.modules():
        if isinstance(module, Involution2d):
            module.register_forward_pre_hook(record)
    model(image)
    names = ('batch', 'channels', 'height', 'width', 'kernel', 'stride', 'groups')
    return [
        dict(zip((*names, 'reduced'), key, strict=True), layers=count)
        for key, count in counts.items()
    ]


def measure(
    candidates: dict[str, tuple[Callable[[], Tensor], list[Tensor]]],
    grad: Tensor,
    args: argparse.Namespace,
    label: str,
) -> dict[str, Figures]:
    """Figures of candidates: functions, and the tensors that they differentiate."""

    def backward(name: str) -> Callable:
        forward, tensors = candidates[name]
        out = forward()
        return lambda: torch.autograd.grad(out, tensors, grads[name], retain_graph=True)

    def step(name: str) -> Callable:
        forward, tensors = candidates[name]
        return lambda: torch.autograd.grad(forward(), tensors, grads[name])

    def time_all(functions: dict[str, Callable], what: str) -> None:
        turns = args.device, args.rounds, f'{label} {what}'
        seconds = time_in_turns(functions, *turns, kernels_alone=True)
        for name, value in seconds.items():
            results[name][f'{what}_ms'] = value * 1e3

    unknown = dict.fromkeys(('forward_ms', 'backward_ms', 'peak_memory_mb'), math.nan)
    results = {name: {**unknown} for name in candidates}
    with torch.no_grad():
        time_all({name: run for name, (run, _) in candidates.items()}, 'forward')
    if args.forward_only:
        return results
    # In the type and memory format of each one's output.
    grads = {
        name: torch.empty_like(forward()).copy_(grad)
        for name, (forward, _) in candidates.items()
    }
    time_all({name: backward(name) for name in candidates}, 'backward')
    for name in candidates:
        peak = peak_memory(step(name), args.device)
        results[name]['peak_memory_mb'] = peak / 1e6
    return results


def random_tensors(
    shape: Shape, args: argparse.Namespace
) -> tuple[Callable[..., Tensor], Tensor, Tensor, dict[str, int]]:
    """What makes parameters, input, gradient of the output, arguments."""
    stride, kernel = shape['stride'], shape['kernel']

    def make(*size: int) -> Tensor:
        tensor = torch.randn(size, dtype=DTYPES[args.dtype], device=args.device)
        if args.channels_last and len(size) == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        return tensor.requires_grad_()

    batch, channels = shape['batch'], shape['channels']
    size = shape['height'], shape['width']
    grad = make(batch, channels, *(-(-side // stride) for side in size)).detach()
    arguments = dict(stride=stride, padding=kernel // 2)
    return make, make(batch, channels, *size), grad, arguments


def measure_involution(
    shape: Shape, backends: list[str], args: argparse.Namespace, label: str
) -> tuple[dict[str, Figures], int]:
    """Figures with kernels given, and the bytes that a forward pass moves."""
    make, x, grad, arguments = random_tensors(shape, args)
    n, c, k = shape['batch'], shape['channels'], shape['kernel']
    weight = make(n, shape['groups'], k, k, *grad.shape[2:])
    filters = make(c, c, 3, 3)

    def involution(backend: str) -> Callable[[], Tensor]:
        return lambda: involution2d(x, weight, **arguments, backend=backend)

    candidates = {name: (involution(name), [x, weight]) for name in backends}
    candidates['conv3x3'] = (
        lambda: F.conv2d(x, filters, None, shape['stride'], 1),
        [x, filters],
    )
    if one_thread_per_output.unusable(args.device) is None:
        plain = [t.detach().float().contiguous().requires_grad_() for t in (x, weight)]
        candidates['one thread'] = (
            lambda: one_thread_per_output.involution(*plain, **arguments),
            plain,
        )
    figures = measure(candidates, grad, args, label)
    return figures, x.nbytes + weight.nbytes + grad.nbytes


def measure_spanned(
    shape: Shape, backend: str, args: argparse.Namespace, label: str
) -> dict[str, Figures]:
    """Figures with the 1x1 convolution that spans the kernels."""
    make, x, grad, arguments = random_tensors(shape, args)
    k, reduced_channels = shape['kernel'], shape['reduced']
    rows = shape['groups'] * k * k
    reduced = make(shape['batch'], reduced_channels, *grad.shape[2:])
    span, bias = make(rows, reduced_channels, 1, 1), make(rows)
    tensors = [x, reduced, span, bias]

    def two_steps() -> Tensor:
        kernels = F.conv2d(reduced, span, bias).unflatten(1, (-1, k, k))
        return involution2d(x, kernels, **arguments, backend=backend)

    def fused() -> Tensor:
        return fused_involution2d(*tensors, kernel_size=k, **arguments, backend=backend)

    candidates = {'two steps': (two_steps, tensors), 'fused': (fused, tensors)}
    return measure(candidates, grad, args, f'{label} spanned')


def table_row(shape: Shape, figures: dict[str, Figures], *keys: str) -> dict:
    """The shape, and per candidate those of its figures that were measured."""
    row: dict[str, object] = {
        'shape': '{channels}x{height}x{width} K{kernel} s{stride}'.format(**shape),
        'layers': shape['layers'],
    }
    for name, figure in figures.items():
        values = [figure[key] for key in keys if not math.isnan(figure[key])]
        row[name] = ' / '.join(f'{value:.3g}' for value in values)
    return row


def speedups(
    results: list[dict[str, Figures]], ours: str, other: str
) -> dict[str, object]:
    """How many times faster `ours` is, as geometric means over the shapes."""

    def mean(*keys: str) -> float:
        return statistics.geometric_mean(
            sum(result[other][key] for key in keys)
            / sum(result[ours][key] for key in keys)
            for result in results
        )

    row: dict[str, object] = {f'{ours} against': other, 'forward': mean('forward_ms')}
    both = mean('forward_ms', 'backward_ms')
    return row if math.isnan(both) else {**row, 'forward + backward': both}


def main() -> None:
    args = parse_args()
    use_device(args.device)
    dtype = DTYPES[args.dtype]
    typical = Problem.typical(torch.device(args.device).type, dtype)
    backends = []
    for name, backend in BACKENDS.items():
        if args.backend and name not in args.backend:
            continue
        reason = backend.supports(typical)
        priority = 'by name only' if backend.priority is None else backend.priority
        console.print(f'backend {name}: {reason or "usable"} (priority: {priority})')
        if reason is None:
            backends.append(name)
    reason = one_thread_per_output.unusable(args.device)
    console.print(f'plain CUDA kernels: {reason or "usable"}')
    shapes = {
        image: involution_shapes(args.depth, *map(int, image.split('x')))
        for image in args.image
    }
    if args.dry_run:
        for image, rows in shapes.items():
            print_table(f'RedNet-{args.depth} at {image}', rows)
        return
    if not backends:
        raise SystemExit('No backend can run: see the reasons above.')

    console.print(describe_machine(args.device))
    bandwidth = copy_bandwidth(args.device)
    console.print(f'copy bandwidth: {bandwidth / 1e9:.3g} GB/s\n')
    records, summary = [], []
    ours = backends[0]
    for image, rows in shapes.items():
        measured = []
        for i, shape in enumerate(rows):
            label = f'{image} [{i + 1}/{len(rows)}]'
            plain, size = measure_involution(shape, backends, args, label)
            spanned = measure_spanned(shape, ours, args, label)
            floor = size / bandwidth * 1e3
            measured.append((shape, plain, spanned, floor))
            setting = dict(dtype=args.dtype, channels_last=args.channels_last)
            records += [
                dict(image=image, **shape, **setting, candidate=name, **figures)
                | dict(floor_ms=floor)
                for name, figures in (plain | spanned).items()
            ]
            # Now, not at the end: what comes next may not fit into memory.
            write_csv(args.out, records)
        given, spans, memory = [], [], []
        for shape, plain, spanned, floor in measured:
            given.append(table_row(shape, plain, 'forward_ms', 'backward_ms'))
            given[-1] |= {'floor': floor, 'x floor': plain[ours]['forward_ms'] / floor}
            if not args.forward_only:
                twice = plain[ours]['backward_ms'] / (2 * floor)
                given[-1]['backward x floor'] = twice
            spans.append(table_row(shape, spanned, 'forward_ms', 'backward_ms'))
            memory.append(table_row(shape, plain | spanned, 'peak_memory_mb'))
        title = f'{image}, {args.dtype}: ms forward / backward'
        print_table(f'{title}; kernels given', given)
        print_table(f'{title}; kernels spanned by a 1x1 convolution', spans)
        if not args.forward_only:
            print_table(f'{image}, {args.dtype}: MB that both take', memory)
        _, plain, spanned, _ = zip(*measured, strict=True)
        pairs = [(plain, ours, other) for other in plain[0] if other != ours]
        pairs.append((spanned, 'fused', 'two steps'))
        summary += [{'image': image, **speedups(*pair)} for pair in pairs]
    for first in dict.fromkeys(list(row)[1] for row in summary):
        print_table(
            'times faster, geometric mean over the shapes',
            [row for row in summary if first in row],
        )
    console.print(f'Written: {args.out}')


if __name__ == '__main__':
    main()
