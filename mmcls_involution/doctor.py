"""Check this environment: ``python -m mmcls_involution.doctor``.

Prints one row for each thing that is known to break, with the command that mends
it, and exits with 1 if any row says FAIL. The checks import libraries that may be
missing or broken, so they run in a child process: one that kills the interpreter
becomes a row, and the rest goes on.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mmcls_involution import compat
from mmcls_involution.version import __version__

OK, WARN, FAIL = 'ok', 'warn', 'FAIL'
TIMEOUT_SECONDS = 300
ROW_MARK = '\x1erow '  # begins the child's own lines among what libraries print

# The name by which a shell finds this Python, else its path.
PYTHON = 'python' if shutil.which('python') == sys.executable else sys.executable
PIP = f'{shlex.quote(PYTHON)} -m pip'
# --no-cache-dir: pip's own cache of built wheels forgets which torch they fit.
BUILD_MMCV = (
    f"{PIP} install 'setuptools<82' wheel ninja psutil && {PIP} install --no-deps "
    '--no-build-isolation --no-cache-dir --force-reinstall mmcv==2.1.0'
)
# In the folder of this package's sources.
REINSTALL = f'{PIP} install --force-reinstall --no-deps .'
# Builds for CUDA bring the Triton they need.
TORCH_28 = f"{PIP} install 'torch>=2.8'"
MEND = 'make setup  # or mend what the message names'
# The toolboxes: distribution -> module.
TOOLBOXES = {'mmdet': 'mmdet', 'mmsegmentation': 'mmseg', 'mmpretrain': 'mmpretrain'}


class Row(NamedTuple):
    """What a check found.

    Attributes:
        status: 'ok', 'warn' or 'FAIL'.
        name: What was checked.
        detail: What was found.
        fix: The command that mends it, '' if nothing has to be done.
    """

    status: str
    name: str
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


def check_python() -> Row:
    version = platform.python_version()
    if sys.version_info[:2] == (3, 11):
        return Row(OK, 'Python', f'{version} ({sys.executable})')
    return Row(
        WARN, 'Python', f'{version}; tested with 3.11', 'make setup PYTHON=python3.11'
    )


def check_torch() -> Row:
    if importlib.util.find_spec('torch') is None:
        return Row(FAIL, 'torch', 'not installed', f'{PIP} install torch==2.13.0')
    import torch

    torch.ones(2, 2) @ torch.ones(2, 2)
    return Row(OK, 'torch', f'{torch.__version__} imports and computes')


def check_ops() -> Row:
    if importlib.util.find_spec('torch') is None:
        return Row(FAIL, 'involution', 'needs torch', f'{PIP} install torch==2.13.0')
    import torch

    from mmcls_involution.ops import BACKENDS, involution2d

    # kernel 1x1 and one group: the output is the product
    x, weight = torch.rand(1, 4, 3, 5), torch.rand(1, 1, 1, 1, 3, 5)
    if not torch.allclose(involution2d(x, weight), x * weight[:, :, 0, 0]):
        return Row(
            FAIL,
            'involution',
            'involution2d gives a wrong result on this machine: please report it',
            'make test',
        )
    reason = BACKENDS['native'].unusable('cpu', torch.float32)
    if reason is not None:
        return Row(WARN, 'involution', f'slow on the CPU: {reason}', REINSTALL)
    detail = 'mmcls_involution.ops computes, by the C++ kernels'
    if torch.cuda.is_available():
        reason = BACKENDS['triton'].unusable('cuda', torch.float32)
        if reason is not None:
            return Row(WARN, 'involution', f'slow on the GPU: {reason}', TORCH_28)
        detail += ', on GPUs by Triton kernels'
    return Row(OK, 'involution', detail)


def check_version(distribution: str) -> Row:
    """Compares an installed version with compat.SUPPORTED."""
    lowest, highest = compat.SUPPORTED[distribution]
    need = f'>={lowest},<{highest}'
    name = f'{distribution} version'
    installed = installed_version(distribution)
    if installed is None and distribution == 'mmcv':
        installed = installed_version('mmcv-lite')
    install = f"{PIP} install '{distribution}{need}'"
    if distribution == 'mmcv':
        install = BUILD_MMCV
    if installed is None and distribution in TOOLBOXES:
        return Row(WARN, name, 'not installed: needed only for its own tasks', install)
    if installed is None:
        return Row(
            FAIL, name, 'not installed: models, configs and tools need it', install
        )
    try:
        from packaging.version import Version
    except ImportError:
        return Row(
            WARN,
            name,
            f'{installed}; range {need} not checked: packaging is not installed',
            f'{PIP} install packaging',
        )
    if not Version(lowest) <= Version(installed) < Version(highest):
        return Row(FAIL, name, f'{installed} is installed, needed is {need}', install)
    return Row(OK, name, f'{installed} ({need})')


def check_numpy() -> Row:
    """numpy 2 and modules compiled for numpy 1; aliases that numpy removed."""
    name = 'numpy'
    version = installed_version('numpy')
    if version is None:
        return Row(
            WARN, name, 'not installed: all but the ops need it', f'{PIP} install numpy'
        )
    import numpy as np

    for module in ('torch', 'scipy.ndimage', 'matplotlib.path', 'pycocotools._mask'):
        if importlib.util.find_spec(module.partition('.')[0]) is None:
            continue
        distribution = module.partition('.')[0]
        try:
            loaded = importlib.import_module(module)
            if module == 'torch':
                loaded.from_numpy(np.zeros(1))
        except Exception as error:
            return Row(
                FAIL,
                name,
                f'{distribution} does not work with numpy {version}: '
                f'{first_line(error)}',
                f'{PIP} install --upgrade --force-reinstall --no-deps {distribution}',
            )
    detail = f'{version}, compiled modules agree'
    gone = [alias for alias in ('float', 'in1d') if not hasattr(np, alias)]
    if gone:
        detail += (
            '; it removed aliases that upstream still uses, so YouTube-VIS '
            "evaluation, mmcv's pixel_group and mmpretrain's retrieval do not work"
        )
    return Row(OK, name, detail)


def check_pkg_resources() -> Row:
    name = 'pkg_resources'
    version = installed_version('setuptools')
    if importlib.util.find_spec('pkg_resources') is not None:
        return Row(OK, name, f'there (setuptools {version})')
    return Row(
        WARN,
        name,
        f'missing (setuptools {version}): mmcv cannot be built. MMEngine at run time '
        'is repaired by mmcls_involution',
        f"{PIP} install 'setuptools<82'",
    )


def check_compiler() -> Row:
    name = 'C++ compiler'
    candidates = [os.environ.get('CXX', 'c++'), 'c++', 'g++', 'clang++', 'cl']
    compiler = next(filter(None, map(shutil.which, candidates)), None)
    if compiler is None:
        return Row(
            WARN, name, 'none found: only needed to build mmcv', 'sudo apt install g++'
        )
    return Row(OK, name, compiler)


def check_mmcv_ops() -> Row:
    """Runs a compiled op of mmcv and compares its result."""
    name = 'mmcv ops'
    users = [dist for dist in ('mmdet', 'mmsegmentation') if installed_version(dist)]
    if not (installed_version('mmcv') or installed_version('mmcv-lite')):
        return Row(FAIL, name, 'mmcv is not installed', BUILD_MMCV)
    import torch

    try:
        from mmcv.ops import nms
    except ImportError as error:
        if 'undefined symbol' in str(error) or 'DLL' in str(error):
            detail = f'built for another torch than {torch.__version__}'
        elif 'mmcv._ext' in str(error):
            detail = 'mmcv was installed without its compiled ops'
        else:
            detail = first_line(error)
        if not users:
            return Row(WARN, name, f'{detail}; classification works without')
        return Row(FAIL, name, f'{detail}; {" and ".join(users)} need them', BUILD_MMCV)
    boxes = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 8], [20, 20, 29, 29]])
    _, kept = nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5)
    if kept.tolist() != [0, 2]:
        return Row(FAIL, name, f'nms kept {kept.tolist()}, not [0, 2]', BUILD_MMCV)
    return Row(OK, name, f'run on CPU with torch {torch.__version__}')


def check_cuda() -> Row:
    """Is the GPU, if there is one, used by torch and by mmcv's ops?"""
    name = 'GPU'
    if importlib.util.find_spec('torch') is None:
        return Row(WARN, name, 'torch is not installed')
    import torch

    rebuild = 'make setup  # with nvcc of the same CUDA version installed'
    if torch.version.cuda is None and torch.version.hip is None:
        if shutil.which('nvidia-smi') or Path('/dev/nvidia0').exists():
            return Row(
                WARN,
                name,
                'a GPU driver is here, but this torch is built for CPU',
                "make setup TORCH='torch==2.13.0 --index-url ...'  # see the selector "
                'at https://pytorch.org/get-started/locally/',
            )
        return Row(OK, name, 'none; torch is built for CPU')
    built_for = torch.version.cuda or torch.version.hip
    if not torch.cuda.is_available():
        return Row(
            WARN,
            name,
            f'torch is built for CUDA {built_for}, no GPU seen',
            'nvidia-smi',
        )
    device = torch.cuda.get_device_name()
    (torch.ones(1, device='cuda') + 1).item()  # fails where torch has no kernel for it
    detail = f'{device}, torch built for CUDA {built_for}'
    if importlib.util.find_spec('mmcv') is not None:
        try:
            from mmcv.ops import get_compiling_cuda_version, nms
        except ImportError:
            return Row(OK, name, detail)  # the row of mmcv's ops says it
        mmcv_cuda = get_compiling_cuda_version()
        if mmcv_cuda == 'not available':
            return Row(WARN, name, f"{detail}; mmcv's ops are CPU only", rebuild)
        boxes = torch.tensor([[0.0, 0, 9, 9]], device='cuda')
        nms(boxes, torch.ones(1, device='cuda'), 0.5)
        detail += f', mmcv for CUDA {mmcv_cuda}'
    return Row(OK, name, detail)


def check_torchvision() -> Row:
    name = 'torchvision'
    version = installed_version(name)
    if importlib.util.find_spec('torch') is None:
        return Row(WARN, name, 'torch is not installed')
    import torch

    # torchvision 0.(n+15).p is made for torch 2.n.p
    minor, patch = torch.__version__.partition('+')[0].split('.')[1:3]
    matching = f'torchvision==0.{int(minor) + 15}.{patch}'
    if version is None:
        return Row(
            WARN,
            name,
            'not installed: mmpretrain needs it',
            f'{PIP} install --no-deps {matching}',
        )

    compat.declare_torchvision_ops()
    try:
        from torchvision import extension, transforms  # noqa: F401
    except Exception as error:
        return Row(
            FAIL,
            name,
            f'{version} does not import beside torch {torch.__version__}: '
            f'{first_line(error)}',
            f'{PIP} install --no-deps --force-reinstall {matching}',
        )
    if extension._has_ops():
        return Row(OK, name, f'{version} fits torch {torch.__version__}')
    return Row(
        OK,
        name,
        f'{version} is built for another torch than {torch.__version__}: the import '
        'is repaired; its compiled ops are not there, and nothing here uses them',
    )


def check_resume() -> Row:
    """Loads, weights-only, a checkpoint of the kind MMEngine resumes from."""
    name = 'resume'
    if importlib.util.find_spec('mmengine') is None:
        return Row(WARN, name, 'mmengine is not installed')
    import torch
    from mmengine.logging import HistoryBuffer
    from mmengine.runner import CheckpointLoader

    compat.apply()
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder, 'probe.pth'))
        torch.save({'loss': HistoryBuffer([1.0, 3.0], [1, 1])}, file)
        loss = CheckpointLoader.load_checkpoint(file)['loss']
    if loss.mean() != 2:
        return Row(
            FAIL, name, 'a training checkpoint is read wrongly: please report it'
        )
    return Row(OK, name, 'training checkpoints load weights-only')


def check_opencv() -> Row:
    name = 'OpenCV'
    versions = {
        dist: installed_version(dist)
        for dist in ('opencv-python', 'opencv-python-headless')
        if installed_version(dist)
    }
    if not versions:
        return Row(
            FAIL,
            name,
            'not installed: mmengine and mmcv need it',
            f'{PIP} install opencv-python-headless',
        )
    version = next(iter(versions.values()))
    headless = (
        f'{PIP} uninstall --yes {" ".join(versions)} && '
        f'{PIP} install --no-deps opencv-python-headless=={version}'
    )
    try:
        import cv2
    except ImportError as error:
        return Row(FAIL, name, f'import cv2: {first_line(error)}', headless)
    if len(versions) == 2:
        return Row(
            WARN,
            name,
            'opencv-python and opencv-python-headless overwrite each other',
            headless,
        )
    return Row(OK, name, f'{cv2.__version__} imports')


def check_ftfy() -> Row:
    name = 'ftfy, regex'
    if installed_version('mmsegmentation') is None:
        return Row(OK, name, 'not needed: mmsegmentation is not installed')
    for module in ('ftfy', 'regex'):
        try:
            importlib.import_module(module)
        except ImportError as error:
            return Row(
                FAIL,
                name,
                f'mmsegmentation needs {module}: {first_line(error)}',
                f'{PIP} install ftfy regex',
            )
    return Row(OK, name, 'there (mmsegmentation needs them)')


def check_registry(distribution: str) -> Row:
    """Is RedNet found by the registry of a toolbox, plain and scoped?"""
    module = TOOLBOXES[distribution]
    name = f'RedNet in {module}'
    if installed_version(distribution) is None:
        return Row(WARN, name, f'{distribution} is not installed')
    try:
        importlib.import_module('mmcls_involution.models')
        models = importlib.import_module(f'{module}.registry').MODELS
    except Exception as error:
        return Row(FAIL, name, first_line(error), MEND)
    for type_name in ('RedNet', 'mmcls_involution.RedNet'):
        if models.get(type_name) is None:
            return Row(
                FAIL,
                name,
                f'{type_name} is not in the registry',
                REINSTALL,
            )
    return Row(OK, name, 'found')


def check_mim() -> Row:
    name = 'configs'
    folder = Path(__file__).parent / '.mim' / 'configs'
    if folder.is_dir():
        return Row(OK, name, str(folder))
    return Row(
        WARN,
        name,
        f'{folder} is missing',
        f'{PIP} install --no-deps .  # in the clone; or with --editable',
    )


Check = tuple[Callable[..., Row], tuple[str, ...]]
CHECKS: list[Check] = [
    (check_python, ()),
    (check_torch, ()),
    (check_ops, ()),
    *[(check_version, (name,)) for name in compat.SUPPORTED],
    (check_numpy, ()),
    (check_opencv, ()),
    (check_torchvision, ()),
    (check_pkg_resources, ()),
    (check_compiler, ()),
    (check_mmcv_ops, ()),
    (check_cuda, ()),
    (check_ftfy, ()),
    (check_resume, ()),
    *[(check_registry, (name,)) for name in TOOLBOXES],
    (check_mim, ()),
]

# Running them -------------------------------------------------------------------------


def title(check: Check) -> str:
    function, arguments = check
    return ' '.join([function.__name__.removeprefix('check_'), *arguments])


def run_check(check: Check) -> Row:
    """Runs a check; what it raises becomes a FAIL."""
    function, arguments = check
    try:
        return function(*arguments)
    except (Exception, SystemExit) as error:
        return Row(
            FAIL,
            title(check),
            first_line(error),
            MEND,
        )


def print_rows(start: int) -> None:
    """Child process: writes a line for each check from `start` on."""
    for check in CHECKS[start:]:
        print(ROW_MARK + json.dumps(run_check(check)), flush=True)


def rows_of_child():
    """Runs the checks in child processes and yields their rows."""
    done = 0
    while done < len(CHECKS):
        program = f'from mmcls_involution import doctor; doctor.print_rows({done})'
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
            timer.start()
            try:
                for line in process.stdout:
                    if ROW_MARK in line:
                        yield Row(*json.loads(line.partition(ROW_MARK)[2]))
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
        code = process.returncode
        how = signal.Signals(-code).name if code < 0 else f'exit code {code}'
        yield Row(
            FAIL,
            title(CHECKS[done]),
            f'the check ended the interpreter ({how})'
            + (f'; last words: {said[-1][:200]}' if said else ''),
            'make setup  # or reinstall the library this row names',
        )
        done += 1


def main() -> int:
    """Prints the table.

    Returns:
        1 if any row says FAIL, else 0.
    """
    print(f'mmcls_involution {__version__} on {platform.platform()}')
    counts = dict.fromkeys((OK, WARN, FAIL), 0)
    for row in rows_of_child():
        counts[row.status] += 1
        print(f'{row.status:<5} {row.name:<24} {row.detail}', flush=True)
        if row.fix and row.status != OK:
            print(f'{"":<5} {"":<24} fix: {row.fix}')
    print(', '.join(f'{count} {status}' for status, count in counts.items()))
    return 1 if counts[FAIL] else 0


if __name__ == '__main__':
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
