"""Time this package's operators for mmcv beside those of a compiled mmcv.

    python tools/analysis_tools/benchmark_mmcv_ops.py

needs an environment with compiled mmcv: both run in it, in turns, on one thread.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from types import SimpleNamespace

import torch
from benchmark_utils import describe_machine, time_in_turns
from torch import Tensor

from mmcls_involution import compat
from mmcls_involution.compat import mmcv_ops
from mmcls_involution.compat.mmcv_ops import lane
from mmcls_involution.compat.mmcv_ops.operators import OPERATORS
from mmcls_involution.console import console, print_table


def random_rois(n: int, smallest: float, largest: float, batch: int = 2) -> Tensor:
    """RoIs in images of 1216x800 pixels: index, x1, y1, x2, y2."""
    size = torch.rand(n, 2) * (largest - smallest) + smallest
    corner = torch.rand(n, 2) * (torch.tensor([1216.0, 800]) - size)
    index = torch.randint(batch, (n, 1)).float()
    return torch.cat([index, corner, corner + size], 1)


def problems() -> dict[str, Callable[[], object]]:
    """What Faster and Mask R-CNN ask of mmcv, at their sizes."""
    from mmcv.ops import nms, roi_align

    calls: dict[str, Callable[[], object]] = {}
    features = torch.randn(2, 256, 50, 76, requires_grad=True)
    for name, smallest, largest in (('112 to 448', 112, 448), ('50 to 700', 50, 700)):
        rois = random_rois(512, smallest, largest)
        for samples in (2, 0):
            weight = torch.randn(512, 256, 7, 7)

            def both(rois=rois, samples=samples, weight=weight) -> None:
                y = roi_align(features, rois, 7, 1 / 16, samples, 'avg', True)
                torch.autograd.grad(y, features, weight)

            def forward(rois=rois, samples=samples) -> None:
                roi_align(features.detach(), rois, 7, 1 / 16, samples, 'avg', True)

            title = f'RoIAlign, 512 RoIs of {name} pixels, sampling_ratio {samples}'
            calls[f'{title}, forward'] = forward
            calls[f'{title}, forward + backward'] = both
    masks, rois = torch.rand(20, 1, 800, 1216), random_rois(128, 50, 400, 20)
    calls['RoIAlign, 128 mask targets of 28x28'] = lambda: roi_align(masks, rois, 28)
    for n in (1000, 5000):
        dets, scores = random_rois(n, 20, 200)[:, 1:], torch.rand(n)
        calls[f'NMS, {n} boxes, threshold 0.7'] = lambda d=dets, s=scores: nms(
            d, s, 0.7
        )
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=5, help='counted rounds (5)')
    args = parser.parse_args()
    compat.apply()
    if mmcv_ops.is_provided():
        raise SystemExit(
            'This mmcv has no compiled operators to compare with. They come with\n'
            f'    {mmcv_ops.COMPILE_MMCV}'
        )
    torch.manual_seed(0)
    torch.set_num_threads(1)
    calls = problems()
    modules = [
        module
        for name, module in sys.modules.items()
        if name.startswith('mmcv.ops.') and hasattr(module, 'ext_module')
    ]
    compiled = modules[0].ext_module

    def run(call: Callable[[], object], extension: object, runs_on: object) -> None:
        for module in modules:
            module.ext_module = extension
        lane.runs_on = runs_on
        call()

    ours, stock = SimpleNamespace(**OPERATORS), lane.runs_on
    lanes = {'torch': lambda device: False}
    if stock('cpu'):
        lanes['torchvision'] = stock
    rows = []
    for title, call in calls.items():
        variants = {'compiled': lambda c=call: run(c, compiled, stock)}
        for name, runs_on in lanes.items():
            variants[name] = lambda c=call, r=runs_on: run(c, ours, r)
        times = time_in_turns(variants, 'cpu', args.rounds, title)
        row = {'operator': title, 'compiled, ms': times['compiled'] * 1e3}
        rows.append(
            row | {f'{n} / compiled': times[n] / times['compiled'] for n in lanes}
        )
    console.print(describe_machine('cpu'))
    print_table("mmcv's operators, time over that of compiled mmcv", rows)


if __name__ == '__main__':
    main()
