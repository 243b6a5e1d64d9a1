"""Time involution at the shapes of RedNet, every backend beside the alternatives.

    python tools/analysis_tools/benchmark_op.py [--backend NAME ...] [--dry-run] ...

Per shape: every backend, the unfold form of the paper's pseudo-code (the backend
`reference`), the 3x3 convolution that the involution replaces, and the time that
reading input and kernels and writing the output takes at the machine's measured copy
bandwidth. All of them take turns in one process, so the ratios hold where absolute
times drift.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from benchmark_utils import (
    console,
    copy_bandwidth,
    describe_machine,
    peak_memory,
    print_table,
    time_in_turns,
    write_csv,
)

from mmcls_involution.models import Involution2d, RedNet
from mmcls_involution.ops import BACKENDS, involution2d

SETTINGS = {'224x224': 8, '800x1216': 1, '512x1024': 2}
DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--depth', type=int, default=50, help='of RedNet (default: 50)')
    parser.add_argument(
        '--image',
        nargs='+',
        choices=SETTINGS,
        default=list(SETTINGS),
        help='image sizes; their batch sizes are ' + str(SETTINGS),
    )
    parser.add_argument('--dtype', choices=DTYPES, default='fp32')
    parser.add_argument(
        '--device', default='cuda' if torch.cuda.is_available() else 'cpu'
    )
    parser.add_argument(
        '--backend', nargs='+', choices=BACKENDS, help='default: all that can run'
    )
    parser.add_argument('--forward-only', action='store_true')
    parser.add_argument('--rounds', type=int, default=7, help='default: %(default)s')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/benchmark_op.csv'))
    parser.add_argument(
        '--dry-run', action='store_true', help='list shapes and backends, and stop'
    )
    return parser.parse_args()


def involution_shapes(depth: int, batch: int, size: str) -> list[dict[str, int]]:
    """The distinct involutions of RedNet for images of one size, and how many each."""
    counts: dict[tuple[int, ...], int] = {}

    def record(module: Involution2d, inputs: tuple[torch.Tensor, ...]) -> None:
        key = (*inputs[0].shape, module.kernel_size, module.stride)
        key += (module.channels // module.group_channels,)
        counts[key] = counts.get(key, 0) + 1

    with torch.device('meta'):
        model = RedNet(depth).eval()
        image = torch.empty(batch, 3, *map(int, size.split('x')))
    for module in model.modules():
        if isinstance(module, Involution2d):
            module.register_forward_pre_hook(record)
    model(image)
    names = ('batch', 'channels', 'height', 'width', 'kernel', 'stride', 'groups')
    return [
        dict(zip(names, key, strict=True), layers=count)
        for key, count in counts.items()
    ]


def measure(
    shape: dict[str, int],
    backends: list[str],
    dtype: torch.dtype,
    device: str,
    rounds: int,
    forward_only: bool,
    label: str,
) -> dict[str, dict[str, float]]:
    """Seconds and bytes of every provider: {provider: {forward, backward, memory}}."""
    n, c, stride, k = (shape[key] for key in ('batch', 'channels', 'stride', 'kernel'))
    out_size = [-(-shape[side] // stride) for side in ('height', 'width')]
    options = dict(dtype=dtype, device=device, requires_grad=True)
    x = torch.randn(n, c, shape['height'], shape['width'], **options)
    weight = torch.randn(n, shape['groups'], k, k, *out_size, **options)
    filters = torch.randn(c, c, 3, 3, **options)
    grad = torch.randn(n, c, *out_size, dtype=dtype, device=device)

    def involution(backend: str):
        return lambda: involution2d(x, weight, stride, k // 2, backend=backend)

    providers = {name: (involution(name), weight) for name in backends}
    providers['conv3x3'] = (lambda: F.conv2d(x, filters, None, stride, 1), filters)

    def backward(out: torch.Tensor, parameters: torch.Tensor):
        return lambda: torch.autograd.grad(
            out, (x, parameters), grad, retain_graph=True
        )

    def step(forward, parameters: torch.Tensor):
        return lambda: torch.autograd.grad(forward(), (x, parameters), grad)

    with torch.no_grad():
        seconds = time_in_turns(
            {name: forward for name, (forward, _) in providers.items()},
            device,
            rounds,
            f'{label} forward',
        )
    results = {name: dict(forward=value) for name, value in seconds.items()}
    if not forward_only:
        graphs = {name: backward(f(), p) for name, (f, p) in providers.items()}
        seconds = time_in_turns(graphs, device, rounds, f'{label} backward')
        for name, value in seconds.items():
            results[name]['backward'] = value
        del graphs
        for name, (forward, parameters) in providers.items():
            results[name]['memory'] = peak_memory(step(forward, parameters), device)
    results['conv3x3']['bytes'] = 0
    for name in backends:
        results[name]['bytes'] = x.nbytes + weight.nbytes + grad.nbytes
    return results


def main() -> None:
    args = parse_args()
    dtype = DTYPES[args.dtype]
    backends = []
    for name, backend in BACKENDS.items():
        if args.backend and name not in args.backend:
            continue
        reason = backend.unusable(torch.device(args.device).type, dtype)
        priority = 'by name only' if backend.priority is None else backend.priority
        console.print(f'backend {name}: {reason or "usable"} (priority: {priority})')
        if reason is None:
            backends.append(name)
    shapes = {
        size: involution_shapes(args.depth, SETTINGS[size], size) for size in args.image
    }
    if args.dry_run:
        for size, rows in shapes.items():
            print_table(f'RedNet-{args.depth} at {size}', rows)
        return
    if not backends:
        raise SystemExit('No backend can run: see the reasons above.')

    console.print(describe_machine(args.device))
    bandwidth = copy_bandwidth(args.device)
    console.print(f'copy bandwidth: {bandwidth / 1e9:.3g} GB/s\n')
    records, ratios = [], {}
    for size, rows in shapes.items():
        table = []
        for i, shape in enumerate(rows):
            label = f'{size} [{i + 1}/{len(rows)}]'
            result = measure(
                shape,
                backends,
                dtype,
                args.device,
                args.rounds,
                args.forward_only,
                label,
            )
            best = backends[0]
            floor = result[best]['bytes'] / bandwidth
            name = '{channels}x{height}x{width} K{kernel} s{stride}'.format(**shape)
            row: dict[str, object] = {'shape': name, 'layers': shape['layers']}
            for provider, figures in result.items():
                row[f'{provider} fwd ms'] = figures['forward'] * 1e3
                if not args.forward_only:
                    row[f'{provider} bwd ms'] = figures['backward'] * 1e3
                    row[f'{provider} MB'] = figures['memory'] / 1e6
                records.append(
                    dict(
                        image=size,
                        **shape,
                        dtype=args.dtype,
                        provider=provider,
                        forward_ms=figures['forward'] * 1e3,
                        backward_ms=figures.get('backward', float('nan')) * 1e3,
                        peak_memory_mb=figures.get('memory', float('nan')) / 1e6,
                        floor_ms=floor * 1e3 if figures['bytes'] else float('nan'),
                    )
                )
            row['floor ms'] = floor * 1e3
            row['x floor'] = result[best]['forward'] / floor
            table.append(row)
            for other in (*backends[1:], 'conv3x3'):
                pair = ratios.setdefault((size, other), ([], []))
                pair[0].append(result[other]['forward'] / result[best]['forward'])
                if not args.forward_only:
                    ours, theirs = (
                        result[p]['forward'] + result[p]['backward']
                        for p in (best, other)
                    )
                    pair[1].append(theirs / ours)
        print_table(f'{size}, batch {SETTINGS[size]}, {args.dtype}', table)
    summary = [
        {
            'image': size,
            f'{backends[0]} against': other,
            'forward': statistics.geometric_mean(forward),
            'forward + backward': statistics.geometric_mean(both)
            if both
            else float('nan'),
        }
        for (size, other), (forward, both) in ratios.items()
    ]
    print_table('times faster, geometric mean over the shapes', summary)
    write_csv(args.out, records)


if __name__ == '__main__':
    main()
