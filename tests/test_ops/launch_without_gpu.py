"""Launches the Triton kernels for a GPU that is not there: all but their run is real.

    python launch_without_gpu.py CACHE MOST_CANDIDATES

test_triton_setup.py runs this in a process of its own. A stand-in for the driver takes
the compiled kernels and counts their launches. Prints what it found as JSON.
"""

import json
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ['TRITON_CACHE_DIR'] = sys.argv[1]

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from mmcls_involution.ops.backends import triton_kernels as ops  # noqa: E402
from mmcls_involution.ops.backends.triton_kernels import kernels  # noqa: E402

TUNERS = (
    *(kernels.forward, kernels.grad_input),
    *(kernels.grad_weight, kernels.grad_weight_banded),
)
for tuner in TUNERS:
    tuner.configs = tuner.configs[: int(sys.argv[2])]
launches, compiled, timed = [], [], []


class Utils:
    def get_device_properties(self, device):
        return dict(
            max_shared_mem=232448,
            max_num_regs=65536,
            multiprocessor_count=132,
            warpSize=32,
        )

    def load_binary(self, *arguments):
        return 1, 2, 32, 0, 1024

    def unload_module(self, module):
        pass


class Launcher:
    def __init__(self, source, metadata):
        self.name = metadata.name

    def __call__(self, *arguments):
        launches.append([self.name, *arguments[:3]])


class Driver:
    utils, launcher_cls, architecture = Utils(), Launcher, 90

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget('cuda', self.architecture, 32)

    @staticmethod
    def is_active():
        return True


def run(height, width):
    x = torch.zeros(2, 32, height, width)
    weight = torch.zeros(2, 2, 3, 3, height, width)
    arguments = (1, 1), (1, 1), (1, 1)
    ops.forward(x, weight, *arguments)
    ops.grad_input(x, weight, (height, width), *arguments)
    ops.grad_weight(x, x, weight.shape, *arguments)
    half, padding = x.to(torch.bfloat16), (3, 3)
    shape = (2, 2, 7, 7, height, width)
    ops.grad_weight(half, half, shape, (1, 1), padding, (1, 1))


def time(call, **arguments):
    if exhausted:
        raise torch.OutOfMemoryError
    timed.append(1)
    call()
    return [1 / len(timed)] * 3  # the last candidate is the fastest


def kept():
    return len(list(Path(sys.argv[1]).glob('*/*.autotune.json')))


def launched(size=(17, 16)):
    launches.clear()
    run(*size)
    return launches.copy()


def forget():
    """What a new process would not know."""
    for tuner in TUNERS:
        tuner.cache.clear()


triton.runtime.driver.set_active(Driver())
triton.testing.do_bench = time
capturing, exhausted = True, False
torch.cuda.is_current_stream_capturing = lambda: capturing
found = {}

found['captured'] = launched()
found['kept of a capture'] = kept()

triton.knobs.runtime.jit_post_compile_hook = lambda **_: compiled.append(1)
for size in [(1, 1), (16, 17), (31, 64), (128, 96)]:
    run(*size)
found['compiled for new sizes'] = len(compiled)

capturing, exhausted = False, True
found['without memory'] = launched()
found['kept without memory'] = kept()

exhausted = False
errors = []


def run_and_keep_errors():
    try:
        run(17, 16)
    except Exception as error:
        errors.append(repr(error))


threads = [threading.Thread(target=run_and_keep_errors) for _ in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
found['errors of threads'] = errors
found['timed'] = len(timed)
found['candidates'] = sum(len(tuner.configs) for tuner in TUNERS)
found['kept'] = kept()
timed.clear()
found['tuned'] = launched()
forget()
capturing = True
found['captured when tuned'] = launched()
capturing = False
torch.use_deterministic_algorithms(True)
found['deterministic'] = launched()
torch.use_deterministic_algorithms(False)
found['timed again'] = len(timed)
forget()
ops._kind = lambda device: 1
run(17, 16)
found['timed on another GPU'] = len(timed)


def try_out():
    with ThreadPoolExecutor(1) as thread:  # which it pins to the first blocks
        return thread.submit(ops._try_out, torch.device('cpu')).result()


class WithoutCompiler(Launcher):
    def __init__(self, source, metadata):
        raise RuntimeError('Failed to find C compiler.')  # as Triton's own does


def compile_again():
    kernels.forward.fn.device_caches.clear()
    triton.knobs.compilation.always_compile = True


found['without results'] = try_out()
compile_again()
Driver.launcher_cls = WithoutCompiler
found['without a compiler'] = try_out()
Driver.launcher_cls = Launcher
compile_again()
Driver.architecture = 999  # of a GPU newer than the assembler
found['without an assembler'] = try_out()
Driver.architecture = 90
compile_again()
# Not a folder without rights, in which root may write all the same.
triton.knobs.cache.dir = __file__
found['without a folder'] = try_out()
print(json.dumps(found))
