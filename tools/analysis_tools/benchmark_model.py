"""Time RedNet against MMPretrain's ResNet of the same depth.

    python tools/analysis_tools/benchmark_model.py [--shape 8x3x224x224 ...] [--amp] ...
    python tools/analysis_tools/benchmark_model.py --runtimes [NAME ...] [--plot FILE]

Inference and training step of the backbones with all four stages out, both networks
treated alike, in turns in one process: the ratios hold where absolute times drift. On a
CPU RedNet turns to channels_last memory by itself, and back; the treatment
`channels_last` gives both networks that memory from the start.

With --runtimes inference alone, on the CPU, in PyTorch, compiled and elsewhere. Each
runtime's output is compared with PyTorch's first. One whose packages are missing is
left out, and said so.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from benchmark_runtimes import RUNTIMES, compare_runtimes, plot
from benchmark_utils import (
    describe_machine,
    peak_memory,
    time_in_turns,
    use_device,
    write_csv,
)
from mmcv.cnn import fuse_conv_bn

from mmcls_involution import compat
from mmcls_involution.console import console, print_table
from mmcls_involution.models import RedNet

TREATMENTS = ('eager', 'fused', 'channels_last')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--depth', type=int, choices=(50, 101, 152), default=50, help='default: 50'
    )
    parser.add_argument(
        '--shape',
        nargs='+',
        help='batch x channels x height x width (default: 8x3x224x224 1x3x800x1216; '
        'of runtimes 1x3x224x224 8x3x224x224)',
    )
    parser.add_argument(
        '--treatment',
        nargs='+',
        choices=TREATMENTS,
        default=list(TREATMENTS),
        help='of both networks in inference: as they are; batch norm folded into the '
        'convolutions; folded and channels_last (default: all)',
    )
    parser.add_argument(
        '--device', default='cuda' if torch.cuda.is_available() else 'cpu'
    )
    parser.add_argument('--amp', action='store_true', help='autocast to bfloat16')
    parser.add_argument('--compile', action='store_true', help='use torch.compile')
    parser.add_argument('--no-train', action='store_true', help='inference alone')
    parser.add_argument(
        '--runtimes',
        nargs='*',
        choices=RUNTIMES,
        help='compare these instead, or all: %(choices)s',
    )
    parser.add_argument(
        '--threads',
        type=int,
        nargs='+',
        default=[1],
        help='numbers of them, of --runtimes (default: 1)',
    )
    parser.add_argument(
        '--plot', type=Path, help='file for a chart of --runtimes, by its suffix'
    )
    parser.add_argument('--rounds', type=int, default=5, help='default: %(default)s')
    parser.add_argument(
        '--out', type=Path, default=Path('work_dirs/benchmark_model.csv')
    )
    return parser.parse_args()


def report_runtimes(args: argparse.Namespace) -> None:
    """What --runtimes asks for."""
    from mmpretrain.models import ResNet

    models = {'RedNet': RedNet(args.depth), 'ResNet': ResNet(args.depth)}
    rows = compare_runtimes(
        models,
        args.runtimes or list(RUNTIMES),
        args.shape or ['1x3x224x224', '8x3x224x224'],
        args.threads,
        args.rounds,
    )
    title = f'RedNet-{args.depth} and ResNet-{args.depth}, inference, fp32'
    print_table(title, rows)
    write_csv(args.out, rows)
    console.print(f'Written: {args.out}')
    if args.plot:
        plot(rows, title, args.plot)
        console.print(f'Written: {args.plot}')


def main() -> None:
    args = parse_args()
    use_device(args.device)
    compat.apply()
    from mmpretrain.models import ResNet

    console.print(describe_machine(args.device))
    if args.runtimes is not None:
        report_runtimes(args)
        return
    stages = dict(depth=args.depth, out_indices=(0, 1, 2, 3))
    models = {
        'RedNet': RedNet(**stages).to(args.device),
        'ResNet': ResNet(**stages).to(args.device),
    }

    def autocast() -> torch.autocast:
        kind = torch.device(args.device).type
        return torch.autocast(kind, torch.bfloat16, enabled=args.amp)

    def prepare(model: torch.nn.Module, treatment: str) -> torch.nn.Module:
        model = copy.deepcopy(model)
        model.eval()  # MMPretrain's returns None
        if treatment != 'eager':
            model = fuse_conv_bn(model)
        if treatment == 'channels_last':
            model = model.to(memory_format=torch.channels_last)
        return torch.compile(model) if args.compile else model

    def inference(model: torch.nn.Module, x: torch.Tensor):
        def run() -> None:
            with torch.inference_mode(), autocast():
                model(x)

        return run

    def training_step(model: torch.nn.Module, x: torch.Tensor):
        model.train()
        run_model = torch.compile(model) if args.compile else model

        def run() -> None:
            model.zero_grad()
            with autocast():
                loss = sum(level.square().mean() for level in run_model(x))
            loss.backward()

        return run

    rows = []

    def report(shape: str, what: str, functions: dict) -> None:
        label = f'{shape} {what}'
        seconds = time_in_turns(functions, args.device, args.rounds, label)
        peaks = {name: peak_memory(f, args.device) for name, f in functions.items()}
        row = {'shape': shape, 'what': what}
        row |= {f'{name} ms': value * 1e3 for name, value in seconds.items()}
        row['time ratio'] = seconds['RedNet'] / seconds['ResNet']
        row |= {f'{name} MB': value / 1e6 for name, value in peaks.items()}
        row['memory ratio'] = peaks['RedNet'] / peaks['ResNet']
        rows.append(row)
        console.print(f'{label}: {row["time ratio"]:.2f} of the time')

    for shape in args.shape or ['8x3x224x224', '1x3x800x1216']:
        x = torch.randn(*map(int, shape.split('x')), device=args.device)
        for treatment in args.treatment:
            images = x
            if treatment == 'channels_last':
                images = x.contiguous(memory_format=torch.channels_last)
            functions = {
                name: inference(prepare(model, treatment), images)
                for name, model in models.items()
            }
            report(shape, f'inference, {treatment}', functions)
        layouts = {'training step': x}
        layouts['training step, channels_last'] = x.contiguous(
            memory_format=torch.channels_last
        )
        for what, images in {} if args.no_train else layouts.items():
            functions = {
                name: training_step(model, images) for name, model in models.items()
            }
            report(shape, what, functions)
    precision = 'bf16 autocast' if args.amp else 'fp32'
    print_table(f'RedNet-{args.depth} against ResNet-{args.depth}, {precision}', rows)
    write_csv(args.out, rows)
    console.print(f'Written: {args.out}')


if __name__ == '__main__':
    main()
