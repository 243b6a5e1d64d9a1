"""Check this environment: ``python -m mmcls_involution.doctor``.

Prints one row for each thing that is known to break, with the command that mends
it, and exits with 1 if any row says FAIL. The checks import libraries that may be
missing or broken, so they run in a child process: one that kills the interpreter
becomes a row, and the rest goes on.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from mmcls_involution import compat
from mmcls_involution.compat import mmcv_ops
from mmcls_involution.paths import MIM
from mmcls_involution.version import __version__

OK, WARN, FAIL = 'ok', 'warn', 'FAIL'
TIMEOUT_SECONDS = 300
ROW_MARK = '\x1erow '  # begins the child's own lines among what libraries print

# The name by which a shell finds this Python, else its path.
PYTHON = 'python' if shutil.which('python') == sys.executable else sys.executable
PIP = f'{shlex.quote(PYTHON)} -m pip'
LITE = f"{PIP} install 'mmcv-lite>=2.0.1,<2.2.0'"
# mmcv and mmcv-lite are one package under two names: away with both, then one.
ONE_MMCV = f'{PIP} uninstall --yes mmcv mmcv-lite && {LITE}'
# In the folder of this package's sources.
REINSTALL = f'{PIP} install --force-reinstall --no-deps .'
# Builds for CUDA bring the Triton they need.
TORCH_28 = f"{PIP} install 'torch>=2.8'"
MEND = 'reinstall the library that the message names'
# The toolboxes: distribution -> module.
TOOLBOXES = {'mmdet': 'mmdet', 'mmsegmentation': 'mmseg', 'mmpretrain': 'mmpretrain'}


class Found(NamedTuple):
    """What a check found.

    Attributes:
        status: 'ok', 'warn' or 'FAIL'.
        detail: What was found.
        fix: The command that mends it, '' if nothing has to be done.
    """

    status: str
    detail: str
    fix: str = ''


def installed_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f'{type(error).__name__}: {text[0] if text else "no message"}'


# The checks ---------------------------------------------------------------------------


def check_python() -> Found:
    version = platform.python_version()
    if sys.version_info < (3, 14):
        return Found(OK, f'{version} ({sys.executable})')
    detail = f'{version}: mmcv uses a function that Python 3.14 no longer has'
    return Found(WARN, detail, 'make clean setup PYTHON=python3.13')


def check_torch() -> Found:
    if importlib.util.find_spec('torch') is None:
        return Found(FAIL, 'not installed', f'{PIP} install torch==2.13.0')
    import torch

    torch.ones(2, 2) @ torch.ones(2, 2)
    return Found(OK, f'{torch.__version__} imports and computes')


def check_ops() -> Found:
    import torch

    from mmcls_involution.ops import BACKENDS, involution2d
    from mmcls_involution.ops.backends.contract import Problem

    # kernel 1x1 and one group: the output is the product
    x, weight = torch.rand(1, 4, 3, 5), torch.rand(1, 1, 1, 1, 3, 5)
    if not torch.allclose(involution2d(x, weight), x * weight[:, :, 0, 0]):
        detail = 'involution2d gives a wrong result on this machine: please report it'
        return Found(FAIL, detail, 'make test')
    reason = BACKENDS['native'].supports(Problem.typical('cpu', torch.float32))
    if reason is not None:
        return Found(WARN, f'slow on the CPU: {reason}', REINSTALL)
    detail = 'mmcls_involution.ops computes, by the C++ kernels'
    if torch.cuda.is_available():
        reason = BACKENDS['triton'].supports(Problem.typical('cuda', torch.float32))
        if reason is not None:
            return Found(WARN, f'slow on the GPU: {reason}', TORCH_28)
        detail += ', on GPUs by Triton kernels'
    return Found(OK, detail)


def check_version(distribution: str) -> Found:
    """Compares an installed version with compat.SUPPORTED."""
    lowest, highest = compat.SUPPORTED[distribution]
    need = f'>={lowest},<{highest}'
    installed = installed_version(distribution)
    install = f"{PIP} install '{distribution}{need}'"
    if distribution == 'mmcv':
        lite = installed_version('mmcv-lite')
        if installed and lite:
            detail = (
                f'mmcv {installed} and mmcv-lite {lite} are installed: each has '
                'written over files of the other'
            )
            return Found(FAIL, detail, ONE_MMCV)
        installed = installed or lite
        install = ONE_MMCV if installed else LITE
    if installed is None and distribution in TOOLBOXES:
        return Found(WARN, 'not installed: needed only for its own tasks', install)
    if installed is None:
        return Found(FAIL, 'not installed: models, configs and tools need it', install)
    try:
        from packaging.version import Version
    except ImportError:
        detail = f'{installed}; range {need} not checked: packaging is not installed'
        return Found(WARN, detail, f'{PIP} install packaging')
    if not Version(lowest) <= Version(installed) < Version(highest):
        return Found(FAIL, f'{installed} is installed, needed is {need}', install)
    return Found(OK, f'{installed} ({need})')


def check_numpy() -> Found:
    """numpy 2 and modules compiled for numpy 1; aliases that numpy removed."""
    version = installed_version('numpy')
    if version is None:
        detail = 'not installed: all but the ops need it'
        return Found(WARN, detail, f'{PIP} install numpy')
    import numpy as np

    for module in ('torch', 'scipy.ndimage', 'matplotlib.path', 'pycocotools._mask'):
        package = module.partition('.')[0]
        if importlib.util.find_spec(package) is None:
            continue
        try:
            loaded = importlib.import_module(module)
            if module == 'torch':
                loaded.from_numpy(np.zeros(1))
        except Exception as error:
            detail = f'{package} does not work with {version}: {first_line(error)}'
            fix = f'{PIP} install --upgrade --force-reinstall --no-deps {package}'
            return Found(FAIL, detail, fix)
    detail = f'{version}, compiled modules agree'
    if not (hasattr(np, 'float') and hasattr(np, 'in1d')):
        detail += (
            "; without its old aliases YouTube-VIS evaluation, mmcv's pixel_group and "
            "mmpretrain's retrieval do not work"
        )
    return Found(OK, detail)


def check_opencv() -> Found:
    builds = ('opencv-python', 'opencv-python-headless')
    versions = {build: installed_version(build) for build in builds}
    found = [build for build, version in versions.items() if version]
    if not found:
        detail = 'not installed: mmengine and mmcv need it'
        return Found(FAIL, detail, f'{PIP} install opencv-python')
    headless = (
        f'{PIP} uninstall --yes {" ".join(found)} && '
        f'{PIP} install --no-deps opencv-python-headless=={versions[found[0]]}'
    )
    try:
        import cv2
    except ImportError as error:
        return Found(FAIL, f'import cv2: {first_line(error)}', headless)
    if len(found) == 2:
        return Found(WARN, f'{" and ".join(found)} overwrite each other', headless)
    return Found(OK, f'{cv2.__version__} imports')


def check_torchvision() -> Found:
    version = installed_version('torchvision')
    import torch

    # torchvision 0.(n+15).p is made for torch 2.n.p
    minor, patch = torch.__version__.partition('+')[0].split('.')[1:3]
    install = f'{PIP} install --no-deps torchvision==0.{int(minor) + 15}.{patch}'
    if version is None:
        return Found(WARN, 'not installed: mmpretrain needs it', install)
    compat.declare_torchvision_ops()
    try:
        from torchvision import extension, transforms  # noqa: F401
    except Exception as error:
        detail = f'{version} does not import beside torch {torch.__version__}'
        install += ' --force-reinstall'
        return Found(FAIL, f'{detail}: {first_line(error)}', install)
    if extension._has_ops():
        return Found(OK, f'{version} fits torch {torch.__version__}')
    detail = (
        f'{version} is built for another torch than {torch.__version__}: its import is '
        'repaired; its compiled ops are not there, and torch takes their place'
    )
    return Found(OK, detail)


def check_mmcv_ops() -> Found:
    """Runs an op of mmcv on each device, and says what computes the others."""
    if not (installed_version('mmcv') or installed_version('mmcv-lite')):
        return Found(FAIL, 'mmcv is not installed', LITE)
    import torch

    compat.apply()
    try:
        from mmcv.ops import get_compiling_cuda_version, nms
    except ImportError as error:
        detail = first_line(error)
        if 'undefined symbol' in detail or 'DLL' in detail:
            detail = f'compiled for another torch than {torch.__version__}'
        return Found(FAIL, f'{detail}; mmdet and mmseg need them', ONE_MMCV)
    compiled = not mmcv_ops.is_provided()
    details = []
    for device in ('cpu', 'cuda') if torch.cuda.is_available() else ('cpu',):
        if device == 'cuda' and compiled:
            if get_compiling_cuda_version() == 'not available':
                return Found(WARN, 'compiled for the CPU alone', ONE_MMCV)
        boxes = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 8], [20, 20, 29, 29]])
        scores = torch.tensor([0.9, 0.8, 0.7])
        kept = nms(boxes.to(device), scores.to(device), 0.5)[1].tolist()
        if kept != [0, 2]:
            return Found(FAIL, f'nms on {device} kept {kept}, not [0, 2]', ONE_MMCV)
        ops: dict[str, dict[str, None]] = {}  # by lane, both passes under one name
        for op, lane in {} if compiled else mmcv_ops.lanes(device).items():
            ops.setdefault(lane, {})[re.sub('_(for|back)ward.*', '', op)] = None
        lanes = [f'{", ".join(names)} by {lane}' for lane, names in ops.items()]
        details.append(f'{device}: {"; ".join(lanes) or "compiled, nms runs"}')
    return Found(OK, '; '.join(details))


def check_cuda() -> Found:
    """Is the GPU, if there is one, used by torch?"""
    import torch

    built_for = torch.version.cuda or torch.version.hip
    if built_for is None:
        if not (shutil.which('nvidia-smi') or Path('/dev/nvidia0').exists()):
            return Found(OK, 'none; torch is built for CPU')
        return Found(
            WARN,
            'a GPU driver is here, but this torch is built for CPU',
            "make setup TORCH='torch==2.13.0 --index-url ...'  # see the selector at "
            'https://pytorch.org/get-started/locally/',
        )
    detail = f'torch is built for CUDA {built_for}'
    if not torch.cuda.is_available():
        return Found(WARN, f'{detail}, no GPU seen', 'nvidia-smi')
    (torch.ones(1, device='cuda') + 1).item()  # fails where torch has no kernel for it
    return Found(OK, f'{torch.cuda.get_device_name()}; {detail}')


def check_ftfy() -> Found:
    if installed_version('mmsegmentation') is None:
        return Found(OK, 'not needed: mmsegmentation is not installed')
    try:
        importlib.import_module('ftfy')
        importlib.import_module('regex')
    except ImportError as error:
        detail = f'mmsegmentation needs both: {first_line(error)}'
        return Found(FAIL, detail, f'{PIP} install ftfy regex')
    return Found(OK, 'there (mmsegmentation needs them)')


def check_resume() -> Found:
    """Loads, weights-only, a checkpoint of the kind MMEngine resumes from."""
    import torch
    from mmengine.logging import HistoryBuffer
    from mmengine.runner import CheckpointLoader

    compat.apply()
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder, 'probe.pth'))
        torch.save({'loss': HistoryBuffer([1.0, 3.0], [1, 1])}, file)
        loss = CheckpointLoader.load_checkpoint(file)['loss']
    if loss.mean() != 2:
        return Found(FAIL, 'a training checkpoint is read wrongly: please report it')
    return Found(OK, 'training checkpoints load weights-only')


def check_registry(distribution: str) -> Found:
    """Is RedNet found by the registry of a toolbox, plain and scoped?"""
    if installed_version(distribution) is None:
        return Found(WARN, f'{distribution} is not installed')
    importlib.import_module('mmcls_involution.models')
    models = importlib.import_module(f'{TOOLBOXES[distribution]}.registry').MODELS
    for type_name in ('RedNet', 'mmcls_involution.RedNet'):
        if models.get(type_name) is None:
            return Found(FAIL, f'{type_name} is not in the registry', REINSTALL)
    return Found(OK, 'found')


def check_mim() -> Found:
    folder = MIM / 'configs'
    if folder.is_dir():
        return Found(OK, str(folder))
    fix = f'{PIP} install --no-deps .  # in the clone; or with --editable'
    return Found(WARN, f'{folder} is missing', fix)


# The rows by name: a function and its arguments.
CHECKS = {
    'Python': (check_python,),
    'torch': (check_torch,),
    'involution': (check_ops,),
    **{f'{name} version': (check_version, name) for name in compat.SUPPORTED},
    'numpy': (check_numpy,),
    'OpenCV': (check_opencv,),
    'torchvision': (check_torchvision,),
    'mmcv ops': (check_mmcv_ops,),
    'GPU': (check_cuda,),
    'ftfy, regex': (check_ftfy,),
    'resume': (check_resume,),
    **{f'RedNet in {TOOLBOXES[name]}': (check_registry, name) for name in TOOLBOXES},
    'configs': (check_mim,),
}

# Running them -------------------------------------------------------------------------


def run_check(function: Callable[..., Found], *arguments: str) -> Found:
    """Runs a check; what it raises becomes a FAIL."""
    try:
        return function(*arguments)
    except (Exception, SystemExit) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name
        if missing in ('torch', 'mmengine'):  # which have rows of their own
            return Found(WARN, f'not checked: {missing} is not installed')
        return Found(FAIL, first_line(error), MEND)


def print_found(start: int) -> None:
    """Child process: writes a line for each check from `start` on."""
    for check in list(CHECKS.values())[start:]:
        print(ROW_MARK + json.dumps(run_check(*check)), flush=True)


def found_by_child() -> Iterator[Found]:
    """Runs the checks in child processes and yields what each found."""
    done = 0
    while done < len(CHECKS):
        program = f'from mmcls_involution import doctor; doctor.print_found({done})'
        with tempfile.TemporaryFile('w+', errors='replace') as stderr:
            process = subprocess.Popen(
                [sys.executable, '-W', 'ignore', '-c', program],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                errors='replace',
            )
            timer = threading.Timer(TIMEOUT_SECONDS, process.kill)
            ends = time.monotonic() + TIMEOUT_SECONDS
            timer.start()
            try:
                for line in process.stdout:
                    if ROW_MARK in line:
                        yield Found(*json.loads(line.partition(ROW_MARK)[2]))
                        done += 1
                process.wait()
            finally:
                timer.cancel()
                process.kill()
                process.wait()
            if done == len(CHECKS):
                return
            stderr.seek(0)
            said = stderr.read().strip().splitlines()
        done += 1
        if time.monotonic() >= ends:
            slow = (
                f'no answer after {TIMEOUT_SECONDS} s: the machine was busy, or hangs'
            )
            yield Found(FAIL, slow, 'run the doctor again when less else runs')
            continue
        code = process.returncode
        how = signal.Signals(-code).name if code < 0 else f'exit code {code}'
        last = f'; last words: {said[-1][:200]}' if said else ''
        yield Found(FAIL, f'the check ended the interpreter ({how}){last}', MEND)


def main() -> int:
    """Prints the table.

    Returns:
        1 if any row says FAIL, else 0.
    """
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    print(f'mmcls_involution {__version__} on {platform.platform()}')
    counts = dict.fromkeys((OK, WARN, FAIL), 0)
    for name, found in zip(CHECKS, found_by_child(), strict=True):
        counts[found.status] += 1
        print(f'{found.status:<5} {name:<24} {found.detail}', flush=True)
        if found.fix and found.status != OK:
            print(f'{"":<5} {"":<24} fix: {found.fix}')
    print(', '.join(f'{count} {status}' for status, count in counts.items()))
    return 1 if counts[FAIL] else 0


if __name__ == '__main__':
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
