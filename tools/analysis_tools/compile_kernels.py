"""Compile the Triton kernels ahead of time, and report what they take.

    python tools/analysis_tools/compile_kernels.py [--architecture 80 90] ...

Needs Triton and no GPU: every kernel at the involutions of RedNet, in every precision
and memory format, for each architecture; registers of a thread, bytes that it spills to
memory, shared memory of a program, as the assembler reports them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import os
import re
from pathlib import Path

from benchmark_utils import write_csv

from mmcls_involution.console import print_table, progress
from mmcls_involution.ops.backends.triton_kernels import block_channels, span_blocks

NAMES = (
    *('forward', 'grad_input', 'grad_weight'),
    *('fused_forward', 'fused_grad_input', 'fused_grad_generator'),
)
DTYPES = ('fp32', 'fp16', 'bf16')
# Kernel size and stride: of the stem, of the blocks, of the first block of a stage.
INVOLUTIONS = ((3, 1), (7, 1), (7, 2))
REDUCED = 32  # channels that the fused kernel spans kernels from, as in stage 2


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--architecture',
        type=int,
        nargs='+',
        default=[80, 90],
        help='compute capability times ten (default: %(default)s)',
    )
    parser.add_argument(
        '--group-channels', type=int, default=16, help="default: %(default)s, RedNet's"
    )
    parser.add_argument(
        '--quick',
        action='store_true',
        help='only the default blocks, 7x7 at stride 1, fp32 and bf16',
    )
    parser.add_argument(
        '--out', type=Path, default=Path('work_dirs/compile_kernels.csv')
    )
    return parser.parse_args()


def compile_kernel(
    kernel: object, constants: dict, dtype: str, config: object, architecture: int
) -> dict[str, int]:
    """Compile a tuned kernel with one of its configs."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = kernel.fn
    constants = {**constants, **config.kwargs}
    pointers = dict.fromkeys(
        ('input', 'reduced', 'weight', 'bias', 'grad', 'output', 'scratch'),
        f'*{dtype}',
    )
    if 'grad_reduced' in function.arg_names:  # sums over the groups and the pixels
        sums = ('grad_reduced', 'grad_weight', 'grad_bias')
        pointers.update(dict.fromkeys(sums, '*fp32'))
    signature, aligned = {}, {}
    for i, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = 'constexpr'
        else:
            signature[name] = pointers.get(name, 'i32')
        if name in (*pointers, 'channels', 'reduced_channels'):
            aligned[(i,)] = [['tt.divisibility', 16]]
    constants = {name: constants[name] for name in signature if name in constants}
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(
            ASTSource(function, signature, constants, aligned),
            target=GPUTarget('cuda', architecture, 32),
            options=dict(
                num_warps=config.num_warps,
                num_stages=config.num_stages,
                enable_fp_fusion=True,
            ),
        )
    report = log.getvalue()
    registers = re.search(r'Used (\d+) registers', report)
    if registers is None:
        raise SystemExit(
            f'triton {triton.__version__} passes on no report of the assembler; '
            '3.6 and newer do: pip install --upgrade triton'
        )
    return {
        'registers': int(registers[1]),
        'spilled bytes': sum(map(int, re.findall(r'(\d+) bytes spill', report))),
        'shared bytes': compiled.metadata.shared,
    }


def main() -> None:
    args = parse_args()
    os.environ.pop('TRITON_INTERPRET', None)
    # The report is the assembler's; a kernel from the cache has none.
    os.environ.update(TRITON_DUMP_PTXAS_LOG='1', TRITON_ALWAYS_COMPILE='1')
    try:
        from mmcls_involution.ops.backends.triton_kernels import fused_kernels, kernels
    except ImportError as error:
        raise SystemExit(f'needs Triton ({error}): pip install triton') from None

    def fused(name: str) -> bool:
        return name.startswith('fused')

    def kernel(name: str) -> object:
        return getattr(fused_kernels if fused(name) else kernels, name)

    def configs(name: str, channels_last: bool) -> list:
        if fused(name) and not channels_last:
            return []  # they convert their pixels
        return kernel(name).configs[: 1 if args.quick else None]

    dtypes, involutions = DTYPES, INVOLUTIONS
    if args.quick:
        dtypes, involutions = ('fp32', 'bf16'), ((7, 1),)
    problems = [
        (*problem, config)
        for problem in itertools.product(
            args.architecture, NAMES, dtypes, (False, True), involutions
        )
        for config in configs(problem[1], problem[3])
    ]
    rows = []
    for architecture, name, dtype, channels_last, (size, stride), config in progress(
        problems, 'compiling'
    ):
        constants = dict(
            **dict.fromkeys(('KH', 'KW'), size),
            **dict.fromkeys(('SH', 'SW'), stride),
            **dict.fromkeys(('DH', 'DW', 'GCD_H', 'GCD_W'), 1),
            **span_blocks((size, size), REDUCED),
            GROUP_CHANNELS=args.group_channels,
            BLOCK_C=block_channels(args.group_channels),
            CHANNELS_LAST=channels_last,
        )
        rows.append(
            {
                'architecture': f'sm_{architecture}',
                'kernel': name,
                'dtype': dtype,
                'layout': 'channels_last' if channels_last else 'nchw',
                'involution': f'K{size} s{stride}',
                'blocks': '{ROWS} x {BLOCK_P}'.format(**config.kwargs),
                'warps': config.num_warps,
                **compile_kernel(kernel(name), constants, dtype, config, architecture),
            }
        )
    print_table('Triton kernels, compiled ahead of time', rows)
    write_csv(args.out, rows)
    console.print(f'Written: {args.out}')


if __name__ == '__main__':
    main()
