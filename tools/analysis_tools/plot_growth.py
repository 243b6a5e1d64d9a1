"""Plot how time and memory grow with the image, from the benchmarks' CSV files.

    python tools/analysis_tools/benchmark_op.py --image 1x256x256 1x512x512 ...
    python tools/analysis_tools/benchmark_model.py --shape 1x3x256x256 1x3x512x512 ...
    python tools/analysis_tools/plot_growth.py --out growth.png

Above the involutions of RedNet with the convolutions that span their kernels, forward
and backward: the time of all layers, the peak memory of the largest one. Below the
training step of the network beside ResNet's.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.ticker import LogLocator, NullFormatter  # noqa: E402

CANDIDATES = ('two steps', 'fused')
# name -> megapixels -> milliseconds and megabytes
Curves = dict[str, dict[float, tuple[float, float]]]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    folder = Path('work_dirs')
    parser.add_argument('--op', type=Path, default=folder / 'benchmark_op.csv')
    parser.add_argument('--model', type=Path, default=folder / 'benchmark_model.csv')
    parser.add_argument('--out', type=Path, default=folder / 'growth.png')
    return parser.parse_args()


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        raise SystemExit(f'{path} is not there: run the benchmark that writes it.')
    with path.open() as file:
        return list(csv.DictReader(file))


def megapixels(shape: str) -> float:
    """Of all images in 'batch x ... x height x width'."""
    batch, *_, height, width = map(int, shape.split('x'))
    return batch * height * width / 1e6


def involutions(path: Path) -> Curves:
    """Of the candidates that span their kernels."""
    curves: Curves = defaultdict(dict)
    for row in read(path):
        if row['candidate'] not in CANDIDATES:
            continue
        curve, size = curves[row['candidate']], megapixels(row['image'])
        time, memory = curve.get(size, (0.0, 0.0))
        step = float(row['forward_ms']) + float(row['backward_ms'])
        curve[size] = (
            time + int(row['layers']) * step,
            max(memory, float(row['peak_memory_mb'])),
        )
    return curves


def networks(path: Path) -> Curves:
    """Of the training step."""
    curves: Curves = defaultdict(dict)
    for row in read(path):
        if row['what'] == 'training step':
            for name in ('RedNet', 'ResNet'):
                figures = float(row[f'{name} ms']), float(row[f'{name} MB'])
                curves[name][megapixels(row['shape'])] = figures
    return curves


def main() -> None:
    args = parse_args()
    panels = {
        'involutions of RedNet': involutions(args.op),
        'training step': networks(args.model),
    }
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.4), layout='constrained')
    for (title, curves), row in zip(panels.items(), axes, strict=True):
        if not curves:
            raise SystemExit(f'The file for the {title} has no rows of the kind.')
        for i, (axis, unit) in enumerate(zip(row, ('ms', 'MB'), strict=True)):
            for name, curve in curves.items():
                sizes = sorted(curve)
                axis.plot(sizes, [curve[s][i] for s in sizes], 'o-', label=name)
            axis.set(xscale='log', yscale='log', xlabel='megapixels', ylabel=unit)
            axis.set_xticks(sizes, [f'{size:.2g}' for size in sizes], minor=False)
            axis.set_xticks([], minor=True)
            axis.set_title(f'{title}, {"time" if unit == "ms" else "peak memory"}')
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter('{x:g}')
            axis.yaxis.set_minor_formatter(NullFormatter())
            axis.grid(alpha=0.3, which='both')
            axis.legend()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=110)
    print(f'Written: {args.out}')


if __name__ == '__main__':
    main()
