"""Compile the Triton kernels ahead of time, and report what they take.

    python tools/analysis_tools/compile_kernels.py [--architecture 80 90] ...

Needs Triton and no GPU: every kernel at the involutions of RedNet, in every precision
and memory format, for each architecture; registers of a thread, bytes that it spills to
memory, shared memory of a program, as the assembler reports them. And counted in the
disassembly, for groups of up to 16 channels:

- instructions: that a warp issues, loops times their trips;
- waits: for loads of which none had been issued when it waited for the ones before, so
  each of them is as long as the memory's latency;
- x floor: the time in which the GPU can issue all instructions, over the time in which
  its memory can move input, kernels and output once. Below 1 the memory binds, if
  enough warps hide the waits.
- x lsu: the same for the units of loads, stores, shared memory and shuffles, which take
  4 bytes from each thread of a warp in a cycle. What accesses of many lines or one bank
  cost besides is not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import os
import re
import subprocess
import tempfile
from pathlib import Path

import torch
from benchmark_utils import write_csv

from mmcls_involution.console import console, print_table, progress
from mmcls_involution.ops.backends.triton_kernels import (
    block_channels,
    choose_grad_weight,
)

NAMES = ('forward', 'grad_input', 'grad_weight')
TORCH_DTYPES = dict(fp32=torch.float32, fp16=torch.float16, bf16=torch.bfloat16)
DTYPES = tuple(TORCH_DTYPES)
# Kernel size and stride: of the stem, of the blocks, of the first block of a stage.
INVOLUTIONS = ((3, 1), (7, 1), (7, 2))
# Of what has that capability: multiprocessors, clock in Hz, memory in bytes per second.
GPUS = {
    80: (108, 1.41e9, 2.04e12),  # A100, 80 GB
    90: (132, 1.755e9, 3.35e12),  # H100 SXM
    120: (170, 2.41e9, 1.79e12),  # RTX 5090
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--architecture',
        type=int,
        nargs='+',
        default=[80, 90, 120],
        choices=GPUS,
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


def disassemble(cubin: bytes) -> list[tuple[str, int]]:
    """Instructions and the words that hold their control bits; labels with None."""
    import triton

    folder = Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin'
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [folder / 'nvdisasm', '-c', '-hex', file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    # An address, an instruction and half of its code; the other half is on a line of
    # its own.
    pattern = (
        r'(\.L_x_\d+):|/\*[0-9a-f]{4,}\*/ +(.*?) *;? */\* 0x.*\n.*/\* (0x[0-9a-f]+)'
    )
    return [
        (label, None) if label else (instruction, int(word, 16))
        for label, instruction, word in re.findall(pattern, text)
    ]


def lsu_cycles(instruction: str) -> int:
    """For which it occupies the units of a multiprocessor that load and store."""
    found = re.search(r'\b(LD[GLS]|ST[GLS]|SHFL|LDSM|STSM)\b([.\w]*)', instruction)
    if found is None:
        return 0
    width = re.search(r'\.(64|128)\b|\.M\w*88\.([24])', found[2])
    return 1 if width is None else int(width[2] or int(width[1]) // 32)


def count(cubin: bytes, trips: int) -> tuple[int, int, int]:
    """Instructions that a warp issues, waits in a row, cycles of the units that load.

    Loops make so many `trips`.
    """
    code = disassemble(cubin)
    last = max(i for i, (text, _) in enumerate(code) if 'EXIT' in text)
    labels = {text: i for i, (text, word) in enumerate(code) if word is None}
    times = [0 if word is None else 1 for _, word in code[: last + 1]]
    for i, (text, word) in enumerate(code[: last + 1]):
        target = re.search(r'\bBRA\b.*`\((\.L_x_\d+)\)', text)
        if word is not None and target and labels[target[1]] < i:
            for j in range(labels[target[1]], i + 1):
                times[j] *= trips
    waits, last_wait = 0, 0
    loads: dict[int, int] = {}  # barrier -> how many waits there were before the load
    for (text, word), weight in zip(code, times, strict=False):
        if word is None:
            continue
        barrier, mask = word >> 46 & 7, word >> 52 & 63
        for waited in [b for b in loads if mask >> b & 1]:
            if loads.pop(waited) == last_wait:
                last_wait += 1
                waits += weight
        if re.search(r'\bLDG\b', text) and barrier < 6:
            loads[barrier] = last_wait
    lsu = sum(
        lsu_cycles(text) * weight
        for (text, _), weight in zip(code, times, strict=False)
    )
    return sum(times), waits, lsu


def times_floor(
    name: str, cycles: float, constants: dict, dtype: str, gpu: int
) -> float:
    """Time of so many cycles of a multiprocessor over that to move the bytes."""
    processors, clock, bandwidth = GPUS[gpu]
    channels, taps = constants['GROUP_CHANNELS'], constants['KH'] * constants['KW']
    steps = constants['SH'] * constants['SW']
    values = channels * steps + taps + channels  # for each output pixel
    if name == 'grad_input':  # whose lanes are input pixels
        values /= steps
    pixels = constants['ROWS'] * constants['BLOCK_P']
    size = 4 if dtype == 'fp32' else 2
    return cycles / (processors * clock) / (pixels * values * size / bandwidth)


def compile_kernel(
    kernel: object, constants: dict, dtype: str, config: object, architecture: int
) -> dict[str, int | float]:
    """Compile a tuned kernel with one of its configs."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = kernel.fn
    constants = {**constants, **config.kwargs}
    pointers = dict.fromkeys(('input', 'weight', 'grad', 'output'), f'*{dtype}')
    signature, aligned = {}, {}
    for i, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = 'constexpr'
        else:
            signature[name] = pointers.get(name, 'i32')
        if name in (*pointers, 'channels'):
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
    figures = {
        'registers': int(registers[1]),
        'spilled bytes': sum(map(int, re.findall(r'(\d+) bytes spill', report))),
        'shared bytes': compiled.metadata.shared,
    }
    name, group_channels = function.__name__, constants['GROUP_CHANNELS']
    counted = dict.fromkeys(('instructions', 'waits', 'x floor', 'x lsu'), '')
    if group_channels <= constants['BLOCK_C']:  # others have loops in loops
        trips = constants['KW']
        if name == 'grad_input':
            trips = -(-trips // constants['SW'])
        instructions, waits, lsu = count(compiled.asm['cubin'], trips)
        # Four schedulers of a multiprocessor issue one instruction each in a cycle.
        issue, lsu = (
            times_floor(name, cycles, constants, dtype, architecture)
            for cycles in (
                config.num_warps * instructions / 4,
                config.num_warps * lsu,
            )
        )
        counted = {
            'instructions': instructions,
            'waits': waits,
            'x floor': round(issue, 2),
            'x lsu': round(lsu, 2),
        }
    return {**figures, **counted}


def main() -> None:
    args = parse_args()
    os.environ.pop('TRITON_INTERPRET', None)
    # The report is the assembler's; a kernel from the cache has none.
    os.environ.update(TRITON_DUMP_PTXAS_LOG='1', TRITON_ALWAYS_COMPILE='1')
    try:
        from mmcls_involution.ops.backends.triton_kernels import kernels
    except ImportError as error:
        raise SystemExit(f'needs Triton ({error}): pip install triton') from None

    dtypes, involutions = DTYPES, INVOLUTIONS
    if args.quick:
        dtypes, involutions = ('fp32', 'bf16'), ((7, 1),)
    problems = [
        (*problem, config)
        for problem in itertools.product(
            args.architecture, NAMES, dtypes, (False, True), involutions
        )
        for config in kernels.CONFIGS[: 1 if args.quick else None]
    ]
    rows = []
    for architecture, name, dtype, channels_last, (size, stride), config in progress(
        problems, 'compiling'
    ):
        constants = dict(
            **dict.fromkeys(('KH', 'KW'), size),
            **dict.fromkeys(('SH', 'SW'), stride),
            **dict.fromkeys(('DH', 'DW', 'GCD_H', 'GCD_W'), 1),
            GROUP_CHANNELS=args.group_channels,
            BLOCK_C=block_channels(args.group_channels),
            CHANNELS_LAST=channels_last,
        )
        if name == 'grad_weight':
            name = choose_grad_weight(
                *(TORCH_DTYPES[dtype], args.group_channels, size),
                *((stride, stride), (1, 1)),
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
                **compile_kernel(
                    getattr(kernels, name), constants, dtype, config, architecture
                ),
            }
        )
    print_table('Triton kernels, compiled ahead of time', rows)
    write_csv(args.out, rows)
    console.print(f'Written: {args.out}')


if __name__ == '__main__':
    main()
