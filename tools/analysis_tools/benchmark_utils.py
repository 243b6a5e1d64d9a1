"""What the benchmarks share: timing in turns, peak memory, tables."""

from __future__ import annotations

import csv
import json
import mmap
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from mmcls_involution.console import progress


def use_device(device: str) -> None:
    """Make a GPU that is named by its number the current one, before anything runs.

    Events, memory figures and names are those of the current GPU.
    """
    if torch.device(device).type == 'cuda' and torch.device(device).index is not None:
        torch.cuda.set_device(device)


def synchronize(device: str) -> None:
    """Wait for the work that a GPU has been given."""
    if device != 'cpu':
        torch.get_device_module(device).synchronize()


def time_in_turns(
    functions: dict[str, Callable[[], object]],
    device: str,
    rounds: int,
    description: str,
    kernels_alone: bool = False,
    settle: bool = False,
) -> dict[str, float]:
    """Median time of each function in seconds.

    The functions run in turns, round by round, so that a machine whose speed drifts
    slows all of them alike; the first round is a warm-up and does not count. A GPU is
    timed by its own events, and its caches are overwritten before each run.

    Args:
        functions (dict[str, Callable]): What to time, by name.
        device (str): Where they run.
        rounds (int): Number of counted rounds.
        description (str): Of the progress bar.
        kernels_alone (bool): Leave the GPU so far behind that it never waits for
            Python to launch a kernel. Defaults to False.
        settle (bool): Run each function once more before each time it counts: threads
            of another runtime go on to wait for work, at full speed, for a while.
            Defaults to False.
    """

    def stopwatch(function: Callable[[], object]) -> float:
        return _time_on_clock(function, device)

    if torch.device(device).type == 'cuda':
        # Larger than any cache.
        junk = torch.empty(2**28, dtype=torch.int8, device=device)

        def stopwatch(function: Callable[[], object]) -> float:
            return _time_on_gpu(function, junk, kernels_alone)

    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in progress(range(rounds + 1), description):
        for name, function in functions.items():
            if settle:
                function()
            seconds = stopwatch(function)
            if turn:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def _time_on_clock(function: Callable[[], object], device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def _time_on_gpu(
    function: Callable[[], object], junk: torch.Tensor, kernels_alone: bool
) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    junk.zero_()
    junk.view(torch.float32).sum()  # and nothing is left to be written back
    if kernels_alone:
        torch.cuda._sleep(20_000_000)  # clock cycles, some ten milliseconds
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def peak_memory(function: Callable[[], object], device: str) -> int:
    """Bytes that tensors hold at most while ``function`` runs, above those before.

    Memory that a library takes past torch's allocator is not seen.
    """
    if device != 'cpu':
        module = torch.get_device_module(device)
        module.reset_peak_memory_stats()
        before = module.memory_allocated()
        function()
        synchronize(device)
        return module.max_memory_allocated() - before
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # a line per start and stop
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / 'trace.json'
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())['traceEvents']
    events = [event for event in events if event.get('name') == '[memory]']
    events.sort(key=lambda event: event['ts'])
    held = peak = 0
    for event in events:
        held += event['args']['Bytes']
        peak = max(peak, held)
    return peak


def copy_bandwidth(device: str, megabytes: int = 256) -> float:
    """Bytes per second, read and written, of copying a tensor beyond the caches."""
    source = torch.zeros(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    seconds = time_in_turns(
        {'copy': lambda: target.copy_(source)}, device, 5, 'copy bandwidth'
    )['copy']
    return 2 * source.nbytes / seconds


# Of time_exchange: answers each number with the same one, as long as it is asked.
_ANSWER = """
import mmap, os, sys
parent, last = os.getppid(), 0
with open(sys.argv[1], 'r+b') as file:
    cells = mmap.mmap(file.fileno(), 0)
while os.getppid() == parent:
    for _ in range(100_000):
        if cells[0] != last:
            last = cells[128] = cells[0]
"""


def available_cores() -> int:
    """Number of processor cores that this process may use."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def time_exchange(exchanges: int = 200) -> float:
    """Seconds that a number takes to another process and back, both waiting for it.

    The median of a hundred parts. Python's own share is most of it where the two run on
    cores that share a cache. Where they share none it is two to three times as long,
    and threads that work on each other's results lose by it. Which it is may change
    from one minute to the next where a host moves a virtual machine's cores. It needs
    two cores.

    Args:
        exchanges (int): Of each part. Defaults to 200.

    Raises:
        RuntimeError: If the other process ends before it answers.
    """
    parts = []
    number = 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'cells'
        path.write_bytes(bytes(256))
        command = [sys.executable, '-c', _ANSWER, str(path)]
        with path.open('r+b') as file, mmap.mmap(file.fileno(), 0) as cells:
            child = subprocess.Popen(command)
            try:
                cells[0] = number
                while cells[128] != number:
                    if child.poll() is not None:
                        raise RuntimeError(f'{sys.executable} ended at its start')
                for _ in range(100):
                    start = time.perf_counter()
                    for _ in range(exchanges):
                        number = 3 - number  # never the one before
                        cells[0] = number
                        while cells[128] != number:
                            pass
                    parts.append((time.perf_counter() - start) / exchanges)
            finally:
                child.kill()
                child.wait()
    return statistics.median(parts)


def describe_machine(device: str) -> str:
    """One line: the processor or GPU, threads, and versions."""
    if device != 'cpu':
        name = torch.get_device_module(device).get_device_name()
    else:
        cpuinfo = Path('/proc/cpuinfo')
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        names = [line.split(': ')[1] for line in lines if line.startswith('model name')]
        name = names[0] if names else platform.processor()
        name += f', {torch.get_num_threads()} threads'
    return f'{name}; torch {torch.__version__}, Python {platform.python_version()}'


def write_csv(path: Path, rows: Iterable[dict[str, object]]) -> None:
    """Write dicts with the same keys to a CSV file, making its folder."""
    rows = list(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('w', newline='') as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
