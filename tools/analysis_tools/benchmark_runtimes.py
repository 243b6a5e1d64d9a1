"""RedNet and ResNet in several runtimes: what `benchmark_model.py --runtimes` times.

Every network is a backbone in inference, float32, batch norm folded where it can be.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from benchmark_utils import available_cores, time_exchange, time_in_turns
from torch import Tensor, nn

from mmcls_involution.console import console
from mmcls_involution.deployment import export
from mmcls_involution.deployment.wrappers import Exported
from mmcls_involution.engine.errors import UserError

Run = Callable[[Tensor], list[Tensor]]


def _eager(model: Exported, image: Tensor, folder: Path, threads: int) -> Run:
    return copy.deepcopy(model).to(memory_format=torch.channels_last)


def _compile(model: Exported, image: Tensor, folder: Path, threads: int) -> Run:
    _need_compiler()
    return torch.compile(model, fullgraph=True)


def _freeze(model: Exported, image: Tensor, folder: Path, threads: int) -> Run:
    _need_compiler()
    from torch._inductor import config

    # The option alone freezes nothing: Dynamo asks the setting whether parameters are
    # constants. It does tell this graph from that of _compile.
    run = torch.compile(model, fullgraph=True, options={'freezing': True})
    with config.patch(freezing=True):
        run(image)
    return run


def _aot(model: Exported, image: Tensor, folder: Path, threads: int) -> Run:
    _need_compiler()
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    file = str(folder / 'model.pt2')
    program = torch.export.export(model, (image,))
    options = {'freezing': True}
    aoti_compile_and_package(program, package_path=file, inductor_configs=options)
    return aoti_load_package(file)


def _need_compiler() -> None:
    compiler = os.environ.get('CXX', 'g++')
    if shutil.which(compiler) is None:
        raise UserError(f'there is no C++ compiler {compiler}')


def _need(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f'not installed: {", ".join(missing)}')


def _onnxruntime(model: Exported, image: Tensor, folder: Path, threads: int) -> Run:
    return _write_onnx(model, image, folder, threads, 'standard')


def _custom(model: Exported, image: Tensor, folder: Path, threads: int) -> Run:
    return _write_onnx(model, image, folder, threads, 'custom')


def _write_onnx(
    model: Exported, image: Tensor, folder: Path, threads: int, operator: str
) -> Run:
    _need('onnx', 'onnxruntime')
    file = folder / f'{operator}.onnx'
    export.export_onnx(model, image, file, operator=operator)
    return export.load(file, 'onnx', threads, operator)


def _openvino(model: Exported, image: Tensor, folder: Path, threads: int) -> Run:
    _need('onnx', 'openvino')
    import openvino

    file = folder / 'openvino.onnx'
    export.export_onnx(model, image, file)
    options = {
        'INFERENCE_NUM_THREADS': threads,
        # Else it computes in bfloat16 where the processor can.
        'INFERENCE_PRECISION_HINT': 'f32',
        'PERFORMANCE_HINT': 'LATENCY',
    }
    compiled = openvino.Core().compile_model(str(file), 'CPU', options)
    request = compiled.create_infer_request()
    return lambda image: [
        torch.from_numpy(out) for out in request.infer([image.numpy()]).values()
    ]


RUNTIMES = {
    'eager': _eager,
    'compile': _compile,
    'freeze': _freeze,
    'aot': _aot,
    'onnxruntime': _onnxruntime,
    'onnxruntime-custom': _custom,
    'openvino': _openvino,
}


def compare_runtimes(
    models: dict[str, nn.Module],
    runtimes: Iterable[str],
    shapes: Iterable[str],
    threads: Iterable[int],
    rounds: int,
) -> list[dict[str, object]]:
    """Time two networks in each runtime, all of them in turns.

    Args:
        models (dict[str, nn.Module]): Backbones 'RedNet' and 'ResNet'.
        runtimes (Iterable[str]): Names in RUNTIMES.
        shapes (Iterable[str]): Of the images, as ``'1x3x224x224'``.
        threads (Iterable[int]): Numbers of threads.
        rounds (int): Number of counted rounds.

    Returns:
        list[dict]: A row for each shape, number of threads and runtime. One that cannot
        run has NaN in place of figures, and the reason as its note. How far apart two
        threads were is printed, see :func:`benchmark_utils.time_exchange`.

    Raises:
        UserError: If a runtime's output differs from PyTorch's by more than 1e-5 of
            the largest value.
    """
    models = {
        name: Exported(nn.ModuleDict({'backbone': model}), backbone=True)
        for name, model in models.items()
    }
    rows: list[dict[str, object]] = []
    for shape, count in itertools.product(shapes, threads):
        torch.set_num_threads(count)
        torch._dynamo.reset()  # compiled code is for a number of threads
        image = torch.randn(*map(int, shape.split('x')))
        label = f'{shape}, {count} thread{"s" * (count > 1)}'
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            runs, notes = _prepare(models, runtimes, image, Path(folder), count)
            calls = {key: partial(run, image) for key, run in runs.items()}
            exchanges: list[float] = []
            if min(count, available_cores()) > 1:
                calls['exchange'] = lambda kept=exchanges: kept.append(time_exchange())
            seconds = time_in_turns(calls, 'cpu', rounds, label, settle=True)
            seconds.pop('exchange', None)
        if exchanges:
            low, middle, high = (
                round(of(exchanges) * 1e9) for of in (min, statistics.median, max)
            )
            console.print(
                f'{label}: cores exchanged numbers in {low} to {high} ns, half of the '
                f'times in less than {middle}'
            )
        best = min(
            (value for (_, name), value in seconds.items() if name == 'ResNet'),
            default=torch.nan,
        )
        for runtime in notes:
            times = {name: seconds.get((runtime, name), torch.nan) for name in models}
            row = {'shape': shape, 'threads': count, 'runtime': runtime}
            row |= {f'{name} ms': value * 1e3 for name, value in times.items()}
            row['RedNet / ResNet'] = times['RedNet'] / times['ResNet']
            for name, value in times.items():
                row[f'{name} / best ResNet'] = value / best
            rows.append(row | {'note': notes[runtime]})
    return rows


def _prepare(
    models: dict[str, Exported],
    runtimes: Iterable[str],
    image: Tensor,
    folder: Path,
    threads: int,
) -> tuple[dict[tuple[str, str], Run], dict[str, str]]:
    """Functions to time by runtime and network, and a note of each runtime."""
    runs: dict[tuple[str, str], Run] = {}
    notes = {}
    for runtime in runtimes:
        worst, found = 0.0, {}
        for name, model in models.items():
            place = folder / f'{runtime}-{name}'
            place.mkdir()
            try:
                run = RUNTIMES[runtime](model, image, place, threads)
            except UserError as error:
                notes[runtime] = f'skipped: {error}'
                break
            worst = max(worst, export.compare(model, run, [tuple(image.shape)]))
            found[runtime, name] = run
        else:
            runs |= found
            notes[runtime] = f'differs by {worst:.0e}'
        console.print(f'{runtime}: {notes[runtime]}')
    return runs, notes


def plot(rows: list[dict[str, object]], title: str, path: Path) -> None:
    """Draw each runtime's times, as parts of the best ResNet's, as horizontal bars.

    Args:
        rows (list[dict]): From :func:`compare_runtimes`.
        title (str): Of the whole picture.
        path (Path): File to write; its suffix says the format.
    """
    from matplotlib.figure import Figure

    rows = [row for row in rows if row['RedNet ms'] == row['RedNet ms']]  # no NaN
    settings = list(dict.fromkeys((row['shape'], row['threads']) for row in rows))
    names = list(dict.fromkeys(row['runtime'] for row in rows))
    across = min(2, len(settings))
    down = -(-len(settings) // across)
    figure = Figure(
        figsize=(4.6 * across + 1, (0.42 * len(names) + 1) * down + 0.6),
        layout='constrained',
    )
    figure.suptitle(title)
    axes = figure.subplots(down, across, squeeze=False, sharey=True, sharex=True)
    for unused in axes.flat[len(settings) :]:
        unused.set_visible(False)
    for (shape, threads), axis in zip(settings, axes.flat, strict=False):
        here = {
            row['runtime']: row
            for row in rows
            if (row['shape'], row['threads']) == (shape, threads)
        }
        for shift, name, color in ((-0.2, 'ResNet', '0.7'), (0.2, 'RedNet', 'C3')):
            values = [here[runtime][f'{name} / best ResNet'] for runtime in names]
            places = [i + shift for i in range(len(names))]
            bars = axis.barh(places, values, 0.4, label=name, color=color)
            axis.bar_label(bars, fmt='%.2f', padding=2, fontsize=8)
        axis.axvline(1, color='0.3', linewidth=0.8, linestyle=':')
        axis.set_yticks(range(len(names)), names)
        axis.margins(x=0.12)
        axis.set_title(f'{shape}, {threads} thread{"s" * (threads > 1)}', fontsize=10)
        axis.spines[['top', 'right']].set_visible(False)
        axis.set_xlabel("time / best ResNet's")
        axis.tick_params(labelbottom=True)
    axes[0, 0].invert_yaxis()
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
