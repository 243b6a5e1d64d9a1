"""Make the virtual environment of this repository (`make setup` runs this).

Needs nothing but the standard library, for it runs before anything is
installed. Every step looks at what is there before it acts, so a second run
takes a moment, an interrupted run goes on where it stopped, and no network is
used when nothing is missing.

mmcv has no wheel with compiled ops for current torch. It is built from source
in the user's cache directory ($XDG_CACHE_HOME or ~/.cache), in a folder named
after the torch, Python, device and platform it fits, and the finished wheel is
kept there for every later clone.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import urllib.parse
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / 'requirements'
PYTHON = (3, 11)
GIB = 2**30
# Measured on CPU: the environment takes 1.6 GiB, a build of mmcv 0.1 GiB; pip
# unpacks beside what it downloads. A CUDA torch with its libraries is larger.
DISK_VENV = 3 * GIB
DISK_VENV_CUDA = 12 * GIB
DISK_BUILD = 1 * GIB
# One compiler process of mmcv needs up to 2 GB.
MEMORY_PER_JOB = 2e9
# Measured: 77 files in 10 minutes with two jobs, -O2 -g0.
BUILD_JOB_MINUTES = 20
LOG_EVERY_SECONDS = 30


class SetupError(Exception):
    """A reason to stop; its text says what is wrong and what to do."""


class Stopped(BaseException):
    """A signal asked us to stop."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class CommandFailed(Exception):
    """A command ended with an error; keeps the last lines it printed."""

    def __init__(self, command: str, tail: list[str], log: Path) -> None:
        lines = ''.join(f'\n    {line[:200]}' for line in tail if line)
        super().__init__(f'{command} failed; its last lines:{lines}')
        self.log = log


# Showing progress and running commands ---------------------------------------


def clock(seconds: float) -> str:
    """Returns seconds as m:ss or h:mm:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'


class ProgressLine:
    """One line rewritten in place on a terminal, a line now and then in a log."""

    def __init__(self) -> None:
        self.terminal = sys.stdout.isatty()
        self.start = self.last = time.monotonic()
        self.drawn = False

    def show(self, text: str) -> None:
        now = time.monotonic()
        line = f'      {clock(now - self.start)} {text}'
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1
            print(f'\r{line[:width]:<{width}}', end='', flush=True)
            self.drawn = True
        elif now - self.last >= LOG_EVERY_SECONDS:
            print(line[:160], flush=True)
            self.last = now

    def close(self) -> None:
        if self.drawn:
            width = shutil.get_terminal_size().columns - 1
            print(f'\r{"":<{width}}\r', end='', flush=True)
            self.drawn = False


def lines_or_ticks(stream) -> Iterator[str | None]:
    """Yields each line of a pipe, and None after each second without one."""
    rest = b''
    while True:
        if not select.select([stream], [], [], 1)[0]:
            yield None
            continue
        chunk = os.read(stream.fileno(), 65536)
        if not chunk:
            break
        *lines, rest = (rest + chunk).split(b'\n')
        for line in lines:
            yield line.decode(errors='replace').rstrip()
    if rest:
        yield rest.decode(errors='replace').rstrip()


def stop_group(process: subprocess.Popen) -> None:
    """Ends a command and its children: asked first, then made to."""
    for signum, patience in ((signal.SIGINT, 10), (signal.SIGTERM, 5)):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signum)
            process.wait(patience)
            break
    with contextlib.suppress(ProcessLookupError):  # whoever ignored that
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run(
    command: list[str | Path],
    log: Path,
    describe: Callable[[str], str] = str.strip,
    keep_open: tuple[int, ...] = (),
    **popen_args,
) -> list[str]:
    """Runs a command with its output in a log file and one progress line.

    Args:
        command: The command and its arguments.
        log: File that the full output is appended to.
        describe: Makes the progress text from a line of output ('' each second
            without one); an empty text leaves the previous one.
        keep_open: File descriptors the command inherits. A lock held through
            them lasts until the command itself has ended, even if this process
            is killed.
        **popen_args: Passed to `subprocess.Popen`.

    Returns:
        The lines of output.

    Raises:
        CommandFailed: If the exit code is not 0.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    progress, text, output = ProgressLine(), '', []
    with log.open('a', encoding='utf-8') as log_file:
        print('$', shlex.join(map(str, command)), file=log_file, flush=True)
        process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=keep_open,
            **popen_args,
        )
        try:
            for line in lines_or_ticks(process.stdout):
                if line is not None:
                    print(line, file=log_file, flush=True)
                    output.append(line)
                text = describe(line or '') or text
                progress.show(text)
            process.wait()
        except BaseException:
            progress.close()
            stop_group(process)
            raise
        progress.close()
    if process.returncode:
        name = shlex.join(map(str, command))
        raise CommandFailed(name, output[-12:], log)
    return output


@contextlib.contextmanager
def lock(folder: Path, waiting_for: str) -> Iterator[int]:
    """Holds the exclusive lock on a folder; waits while somebody else has it.

    Yields:
        The file descriptor that holds the lock.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        progress = ProgressLine()
        told = False
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told:
                    print(f'      waiting for {waiting_for}', flush=True)
                    told = True
                progress.show('waiting')
                time.sleep(0.5)
            except OSError:
                break  # a file system without locks
        progress.close()
        yield handle
    finally:
        os.close(handle)


# Pins and what is installed ---------------------------------------------------


def normalise(name: str) -> str:
    return re.sub(r'[-_.]+', '-', name).lower()


def read_pins(file: Path) -> dict[str, str]:
    """Returns {distribution: version} of the `name==version` lines of a file."""
    found = re.findall(r'^([\w.-]+)==(\S+)', file.read_text(), re.MULTILINE)
    return {normalise(name): version for name, version in found}


def installed_versions(site: Path) -> dict[str, str]:
    """Returns {distribution: version} of a site-packages folder.

    pip writes INSTALLER after the files of a distribution; one without it was
    interrupted halfway and does not count as installed.
    """
    versions = {}
    for info in site.glob('*.dist-info'):
        name, _, version = info.name[: -len('.dist-info')].partition('-')
        if (info / 'INSTALLER').exists():
            versions[normalise(name)] = version
    return versions


def missing_pins(pins: dict[str, str], installed: dict[str, str]) -> list[str]:
    """Returns the pins that are not installed at exactly that version."""
    missing = []
    for name, version in pins.items():
        have = installed.get(name)
        if name == 'opencv-python':
            # the headless build of the same version provides the same module
            have = installed.get('opencv-python-headless', have)
        if name == 'triton' and (have or sys.platform != 'linux'):
            continue  # a CUDA torch brings the one it needs; only Linux has any
        if have is None or have.partition('+')[0] != version:
            missing.append(f'{name}=={version}')
    return missing


def cache_dir() -> Path:
    base = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
    return Path(base) / 'mmcls_involution'


def fingerprint() -> str:
    """Returns a hash of everything that says what the environment must hold."""
    files = [*sorted(REQUIREMENTS.glob('*.txt')), ROOT / 'setup.py']
    files += [ROOT / 'pyproject.toml', ROOT / 'mmcls_involution' / 'version.py']
    files += [Path(__file__)]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


# Early checks -----------------------------------------------------------------


def check_python(version: tuple[int, ...] = sys.version_info[:3]) -> None:
    """Raises SetupError unless this is the tested Python with venv and pip."""
    if tuple(version[:2]) != PYTHON:
        raise SetupError(
            f'Python 3.11 is needed, but {sys.executable} is '
            f"{'.'.join(map(str, version))}. Install Python 3.11 (your system's "
            'packages, pyenv, conda or uv have it), then name it: '
            'make setup PYTHON=/path/to/python3.11'
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError as error:
        raise SetupError(
            f'This Python ({sys.executable}) cannot make virtual environments: '
            f'{error}. On Debian and Ubuntu: sudo apt install python3.11-venv'
        ) from error


def find_compiler() -> str:
    """Returns a C++ compiler that compiles C++17 with Python's headers.

    Raises:
        SetupError: If there is none; the text says what was tried.
    """
    program = '#include <Python.h>\n#include <optional>\nstd::optional<int> x{1};\n'
    include = sysconfig.get_paths()['include']
    named = os.environ.get('CXX')
    tried = []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, 'probe.cpp')
        source.write_text(program)
        for name in [named] if named else ['c++', 'g++', 'clang++']:
            command = shlex.split(name)
            if shutil.which(command[0]) is None:
                tried.append(f'{name}: not found')
                continue
            command += ['-std=c++17', '-fPIC', f'-I{include}', '-c', str(source)]
            result = subprocess.run(
                [*command, '-o', str(Path(folder, 'probe.o'))],
                capture_output=True,
                text=True,
                errors='replace',
            )
            if result.returncode == 0:
                return name
            error = next(
                (line for line in result.stderr.splitlines() if 'error' in line),
                f'exit code {result.returncode}',
            )
            tried.append(f'{name}: {error.strip()}')
    if any('Python.h' in reason for reason in tried):
        raise SetupError(
            f"The compiler works, but Python's headers are missing in {include} "
            f'({"; ".join(tried)}). On Debian and Ubuntu: '
            'sudo apt install python3.11-dev'
        )
    raise SetupError(
        'mmcv has to be compiled and no C++17 compiler works here '
        f'({"; ".join(tried)}). Install one (Debian and Ubuntu: sudo apt install '
        'g++; Fedora: sudo dnf install gcc-c++; macOS: xcode-select --install; '
        'conda: conda install cxx-compiler) or name one: CXX=/path/to/g++ make setup'
    )


def check_disk(needs: dict[Path, float]) -> None:
    """Raises SetupError if a folder cannot be written or has too little room.

    Args:
        needs: Bytes needed by folder; folders need not exist yet.
    """
    by_device: dict[int, list] = {}
    for folder, amount in needs.items():
        there = folder.absolute()
        while not there.exists():
            there = there.parent
        if not os.access(there, os.W_OK):
            raise SetupError(
                f'{folder} cannot be written. Name another place: make setup '
                'VENV=/other/disk/venv XDG_CACHE_HOME=/other/disk/cache'
            )
        entry = by_device.setdefault(there.stat().st_dev, [there, 0.0, []])
        entry[1] += amount
        entry[2].append(str(folder))
    for there, amount, folders in by_device.values():
        free = shutil.disk_usage(there).free
        if free < amount:
            raise SetupError(
                f'Not enough disk space: {" and ".join(folders)} need about '
                f'{amount / GIB:.1f} GiB, {free / GIB:.1f} GiB are free. Free some, '
                'or put them elsewhere: make setup VENV=/other/disk/venv '
                'XDG_CACHE_HOME=/other/disk/cache TMPDIR=/other/disk'
            )


# Building mmcv ----------------------------------------------------------------


def count_jobs() -> int:
    """Returns how many compiler processes fit this machine's CPUs and memory."""
    with contextlib.suppress(KeyError, ValueError):
        return max(1, int(os.environ['MAX_JOBS']))
    try:
        cpus = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        cpus = os.cpu_count() or 1
    memory = [float('inf')]
    with contextlib.suppress(OSError):
        text = Path('/proc/meminfo').read_text()
        match = re.search(r'^MemAvailable:\s+(\d+) kB', text, re.MULTILINE)
        if match:
            memory.append(int(match[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # a container's limit
        memory.append(int(Path('/sys/fs/cgroup/memory.max').read_text()))
    return int(max(1, min(cpus, min(memory) // MEMORY_PER_JOB)))


class BuildProgress:
    """Turns ninja's `[12/77] c++ ...` lines into a count with an estimate."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.count, self.end = '', 0.0

    def __call__(self, line: str) -> str:
        now = time.monotonic()
        match = re.match(r'\[(\d+)/(\d+)\] ', line)
        if match:
            done, total = int(match[1]), int(match[2])
            self.count = f'compiled {done} of {total} files'
            self.end = now + (now - self.start) / done * (total - done)
        if not self.count:
            return 'preparing'
        return f'{self.count}, about {clock(max(0, self.end - now))} left'


def find_nvcc() -> str:
    """Returns CUDA's compiler, where torch looks for it too; '' if there is none."""
    for home in (os.environ.get('CUDA_HOME'), os.environ.get('CUDA_PATH')):
        if home and shutil.which('nvcc', path=Path(home, 'bin')):
            return str(Path(home, 'bin', 'nvcc'))
    return (
        shutil.which('nvcc') or shutil.which('nvcc', path='/usr/local/cuda/bin') or ''
    )


def device_tag(torch_facts: dict, nvcc: str) -> str:
    """Returns what mmcv's ops are compiled for: cpu, rocm..., cu130-9.0 ...

    CUDA needs a CUDA torch and an nvcc of the same major version.
    """
    if torch_facts['hip']:
        return f'rocm{torch_facts["hip"]}'
    if not (torch_facts['cuda'] and nvcc):
        return 'cpu'
    report = subprocess.run([nvcc, '--version'], capture_output=True, text=True)
    release = re.search(r'release (\d+)\.', report.stdout)
    if not release or release[1] != torch_facts['cuda'].split('.')[0]:
        return 'cpu'
    archs = os.environ.get('TORCH_CUDA_ARCH_LIST') or ';'.join(torch_facts['archs'])
    suffix = '-' + re.sub(r'[^\w.]+', '-', archs) if archs else ''
    return f'cu{torch_facts["cuda"].replace(".", "")}{suffix}'


def wheel_key(mmcv: str, torch: str, device: str) -> str:
    platform = re.sub(r'[-.]', '_', sysconfig.get_platform())
    abi = f'cp{sys.version_info[0]}{sys.version_info[1]}'
    return f'mmcv-{mmcv}_torch-{torch}_{device}_{abi}_{platform}'


def find_wheel(folder: Path) -> Path | None:
    """Returns the finished mmcv wheel of a cache folder, if it is whole."""
    for wheel in folder.glob('mmcv-*.whl'):
        with contextlib.suppress(zipfile.BadZipFile, OSError):
            names = zipfile.ZipFile(wheel).namelist()
            if any(name.startswith('mmcv/_ext.') for name in names):
                return wheel
    return None


# The steps --------------------------------------------------------------------


class Setup:
    """The steps that make the environment; each does only what is missing."""

    def __init__(self, venv: Path, torch: str) -> None:
        self.venv = venv.absolute()
        self.torch = torch.strip()
        self.python = self.venv / 'bin' / 'python'
        self.site = self.venv / 'lib' / f'python{PYTHON[0]}.{PYTHON[1]}/site-packages'
        self.stamp_file = self.venv / 'setup.json'
        self.log = self.venv / 'setup.log'
        self.mmcv = read_pins(REQUIREMENTS / 'mmcv.txt')['mmcv']
        self.lock_handle: tuple[int, ...] = ()
        words = shlex.split(self.torch)
        if not words or words[0].startswith('-'):
            raise SetupError(
                f'TORCH={torch!r} names no requirement. Write for example '
                "TORCH='torch==2.13.0', with pip's options after it if you need any."
            )
        self.torch_words = words
        # every option a user may add (--index-url, --pre ...) also finds torchvision
        self.torch_options = words[1:]

    # The stamp: what was asked for, and what was there when it was done

    def read_stamp(self) -> dict:
        with contextlib.suppress(OSError, ValueError):
            stamp = json.loads(self.stamp_file.read_text())
            if isinstance(stamp, dict):
                return stamp
        return {}

    def write_stamp(self, **entries) -> None:
        temporary = self.stamp_file.with_suffix('.tmp')
        temporary.write_text(json.dumps({**self.read_stamp(), **entries}, indent=1))
        os.replace(temporary, self.stamp_file)

    def state(self) -> dict:
        """Returns what a finished environment records in its stamp."""
        pins = {}
        for file in REQUIREMENTS.glob('*.txt'):
            pins.update(read_pins(file))
        installed = installed_versions(self.site)
        headless = installed.get('opencv-python-headless')
        return {
            'torch_request': self.torch,
            'fingerprint': fingerprint(),
            'venv': str(self.venv),
            'versions': {name: installed.get(name) for name in sorted(pins)},
            'opencv-python-headless': headless,
            'package': installed.get('mmcls-involution'),
            'configs': (ROOT / 'mmcls_involution' / '.mim' / 'configs').exists(),
            'nvcc': find_nvcc(),
        }

    def is_finished(self) -> bool:
        if not self.python.exists():
            return False
        stamp, state = self.read_stamp(), self.state()
        return {key: stamp.get(key) for key in state} == state

    # Helpers

    def installed(self) -> dict[str, str]:
        return installed_versions(self.site)

    def pip(self, *arguments: str | Path) -> None:
        """Runs pip of the environment; its failures become SetupError."""
        command = [self.python, '-m', 'pip', '--disable-pip-version-check']
        # a user's `--user` setting would be refused inside an environment
        env = {**os.environ, 'PYTHONUNBUFFERED': '1', 'PIP_USER': '0'}
        try:
            run(
                [*command, *arguments],
                self.log,
                describe=lambda line: re.sub(r'^\s+', '', line)[:120],
                keep_open=self.lock_handle,
                env=env,
                cwd=self.venv,
            )
        except CommandFailed as error:
            text = str(error)
            if 'No space left on device' in text:
                reason = 'The disk is full. Free some space'
            elif re.search(
                '(?i)name resolution|connection|timed out|unreachable', text
            ):
                reason = 'The package index cannot be reached. Check the network'
            else:
                reason = 'pip failed. Mend what the last lines above name'
            raise SetupError(
                f'{error}\n{reason} (full log: {error.log}), then run '
                'make setup again: it goes on from here.'
            ) from error

    def install_pins(self, pins: dict[str, str]) -> None:
        missing = missing_pins(pins, self.installed())
        if missing:
            self.pip('install', '--no-deps', *missing)

    def cached_wheel_is_likely(self) -> bool:
        """Whether the cache has a wheel for the torch asked for or installed.

        Before torch is installed its exact version is not known, so a
        `torch==X` request is compared by its beginning; the build step looks
        exactly.
        """
        match = re.match(r'torch==([\w.+]+)', self.torch)
        torch = match[1] if match else self.installed().get('torch')
        if not torch:
            return False
        pattern = wheel_key(self.mmcv, f'{torch}*', '*')
        return any(find_wheel(folder) for folder in cache_dir().glob(pattern))

    # Steps, in order

    def check_machine(self) -> None:
        check_python()
        needs = {}
        if 'torch' not in self.installed():
            needs[self.venv] = DISK_VENV
        if not self.cached_wheel_is_likely():
            needs[cache_dir()] = DISK_BUILD
            print(f'      C++ compiler: {find_compiler()}')
        check_disk(needs)
        free = shutil.disk_usage(ROOT).free
        if needs and free < DISK_VENV_CUDA and sys.platform == 'linux':
            print(
                f'      {free / GIB:.0f} GiB are free: enough for a CPU torch, '
                f'a CUDA torch may need {DISK_VENV_CUDA / GIB:.0f} GiB'
            )

    def make_venv(self) -> None:
        if self.python.exists():
            probe = [str(self.python), '-c', 'import sys, pip; print(sys.version)']
            result = subprocess.run(probe, capture_output=True, text=True)
            if result.returncode == 0 and result.stdout.startswith('3.11.'):
                self.clear_leftovers()
                return
        if self.venv.exists():
            names = {entry.name for entry in self.venv.iterdir()}
            ours = {'bin', 'include', 'lib', 'lib64', 'setup.json', 'setup.log'}
            if 'pyvenv.cfg' not in names and not names <= ours:
                raise SetupError(
                    f'{self.venv} exists and is no virtual environment, so it is '
                    'left alone. Name another folder: make setup VENV=.venv'
                )
            print(f'      {self.venv} does not work: it is made anew')
        command = [sys.executable, '-m', 'venv', '--clear', self.venv]
        log = Path(tempfile.gettempdir(), f'mmcls_involution-venv-{os.getuid()}.log')
        try:
            run(command, log, describe=lambda line: '')
        except CommandFailed as error:
            raise SetupError(
                f'{error}\nPython could not make the virtual environment '
                f'{self.venv}. On Debian and Ubuntu: sudo apt install python3.11-venv'
            ) from error
        log.unlink()

    def clear_leftovers(self) -> None:
        """Removes what an interrupted pip left, which it would take for done."""
        for left in self.site.glob('~*'):
            shutil.rmtree(left, ignore_errors=True)
        for info in self.site.glob('*.dist-info'):
            if not (info / 'INSTALLER').exists():
                print(f'      {info.stem} was half installed: it is installed again')
                shutil.rmtree(info)

    def check_index(self) -> None:
        """Fetches one small package, unless everything is there already."""
        installed = self.installed()
        pins = {}
        for name in ('build.txt', 'runtime.txt', 'dev.txt'):
            pins.update(read_pins(REQUIREMENTS / name))
        have_torch = {'torch', 'torchvision'} <= set(installed)
        same_torch = self.read_stamp().get('torch_request') == self.torch
        have_mmcv = 'mmcv' in installed or self.cached_wheel_is_likely()
        if not missing_pins(pins, installed) and have_torch and have_mmcv:
            if same_torch:
                print('      nothing has to be downloaded')
                return
        # small, pure Python, and hardly in any local folder of wheels
        name, version = 'mat4py', pins['mat4py']
        with tempfile.TemporaryDirectory() as folder:
            command = [self.python, '-m', 'pip', '--disable-pip-version-check']
            command += ['download', '--no-deps', '--no-cache-dir', '--retries', '1']
            command += ['--timeout', '20', '--dest', folder, f'{name}=={version}']
            try:
                run(command, self.log, cwd=self.venv, keep_open=self.lock_handle)
            except CommandFailed as error:
                raise SetupError(
                    f'{error}\nThe package index cannot be reached '
                    'through pip. Check the network and proxy (HTTPS_PROXY), or point '
                    'pip at a mirror (PIP_INDEX_URL), then run make setup again.'
                ) from error

    def install_torch(self) -> None:
        asked = self.read_stamp().get('torch_request')
        if 'torch' in self.installed():
            if asked == self.torch:
                return
            if asked is not None:
                # pip would keep a build that satisfies the version
                self.pip('uninstall', '--yes', 'torch', 'torchvision')
        tested = read_pins(REQUIREMENTS / 'torch.txt')['torch']
        constraints = []
        if f'torch=={tested}' in self.torch_words:
            constraints = ['--constraint', REQUIREMENTS / 'torch.txt']
        self.pip('install', *self.torch_words, *constraints)
        if 'torch' not in self.installed():
            raise SetupError(f'TORCH={self.torch!r} installs no torch.')
        self.write_stamp(torch_request=self.torch, mmcv_built_for=None)

    def install_torchvision(self) -> None:
        """Installs the torchvision made for this torch.

        Without its dependencies: it names one exact torch, and must not
        replace the one that is there. torchvision 0.(n+15).p belongs to torch
        2.n.p.
        """
        torch = self.installed()['torch']
        tested = read_pins(REQUIREMENTS / 'torch.txt')
        if torch.partition('+')[0] == tested['torch']:
            wanted = tested['torchvision']
        else:
            match = re.match(r'2\.(\d+)\.(\d+)', torch)
            if not match:
                raise SetupError(
                    f'torch {torch} is not a release of torch 2, so the matching '
                    f'torchvision is unknown. Use torch {tested["torch"]}.'
                )
            wanted = f'0.{int(match[1]) + 15}.{match[2]}'
        if missing_pins({'torchvision': wanted}, self.installed()):
            requirement = f'torchvision=={wanted}'
            self.pip('install', '--no-deps', requirement, *self.torch_options)

    def install_build_tools(self) -> None:
        self.install_pins(read_pins(REQUIREMENTS / 'build.txt'))

    def torch_facts(self) -> dict:
        program = (
            'import json, torch\n'
            'gpus = range(torch.cuda.device_count())\n'
            'archs = {"%d.%d" % torch.cuda.get_device_capability(i) for i in gpus}\n'
            'print(json.dumps(dict(version=torch.__version__, hip=torch.version.hip,'
            ' cuda=torch.version.cuda, archs=sorted(archs))))'
        )
        try:
            lines = run([self.python, '-c', program], self.log, cwd=self.venv)
        except CommandFailed as error:
            raise SetupError(
                f'{error}\ntorch is installed but does not import. Remove '
                f'the environment (make clean VENV={self.venv}) and run make setup.'
            ) from error
        return json.loads(lines[-1])

    def check_versions(self) -> None:
        """Refuses a torch out of range before mmcv is compiled for it."""
        program = (
            'from mmcls_involution import compat\n'
            'compat.SUPPORTED = {"torch": compat.SUPPORTED["torch"]}\n'
            'compat.check_versions()'
        )
        try:
            run([self.python, '-c', program], self.log, cwd=ROOT)
        except CommandFailed as error:
            raise SetupError(
                f'{error}\nName another torch: make setup '
                f"TORCH='torch=={read_pins(REQUIREMENTS / 'torch.txt')['torch']}'"
            ) from error

    def install_mmcv(self) -> None:
        installed = self.installed()
        nvcc = find_nvcc()
        built_for = [installed['torch'], nvcc]
        if (
            installed.get('mmcv') == self.mmcv
            and self.read_stamp().get('mmcv_built_for') == built_for
        ):
            return
        self.check_versions()
        facts = self.torch_facts()
        device = device_tag(facts, nvcc)
        if facts['cuda'] and device == 'cpu':
            print(
                f'      torch is built for CUDA {facts["cuda"]}, but no nvcc of that '
                "version is here: mmcv's ops are built for CPU only, and detectors "
                'will not run on a GPU. Install that CUDA toolkit and run make setup '
                'again to change it'
            )
        folder = cache_dir() / wheel_key(self.mmcv, facts['version'], device)
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder, 'another set-up that builds the same wheel') as handle:
            wheel = find_wheel(folder)
            if wheel is None:
                wheel = self.build_mmcv(folder, device, facts, nvcc, handle)
            else:
                print(f'      from the cache: {folder}')
            if str(wheel) != self.mmcv_origin() or 'mmcv' not in installed:
                self.pip('install', '--no-deps', '--force-reinstall', wheel)
        self.write_stamp(mmcv_built_for=built_for)

    def mmcv_origin(self) -> str:
        """Returns the wheel file the installed mmcv came from, '' if unknown."""
        record = self.site / f'mmcv-{self.mmcv}.dist-info' / 'direct_url.json'
        with contextlib.suppress(OSError, ValueError, KeyError):
            url = json.loads(record.read_text())['url']
            return urllib.parse.unquote(urllib.parse.urlsplit(url).path)
        return ''

    def build_mmcv(
        self, folder: Path, device: str, facts: dict, nvcc: str, handle: int
    ) -> Path:
        """Builds mmcv with ops; what is compiled stays if it is interrupted."""
        compiler = find_compiler()
        jobs = count_jobs()
        source = folder / f'mmcv-{self.mmcv}'
        if not source.exists():
            self.unpack_mmcv(source)
        print(
            f'      compiling for {device} with {jobs} jobs; about '
            f'{max(1, round(BUILD_JOB_MINUTES / jobs))} minutes'
            f'{"" if device == "cpu" else " for CPU, several times that with CUDA"}; '
            'Ctrl-C loses nothing',
            flush=True,
        )
        env = {**os.environ, 'MMCV_WITH_OPS': '1', 'MAX_JOBS': str(jobs)}
        env.update(CXX=compiler, CFLAGS='-O2 -g0', PYTHONUNBUFFERED='1')
        env['PATH'] = f'{self.python.parent}{os.pathsep}{env["PATH"]}'  # ninja
        if device.startswith('cu'):
            env.update(FORCE_CUDA='1', CUDA_HOME=str(Path(nvcc).parents[1]))
            if facts['archs']:
                env.setdefault('TORCH_CUDA_ARCH_LIST', ';'.join(facts['archs']))
        elif device == 'cpu':
            # mmcv's setup.py goes for CUDA as soon as it sees a GPU
            env.update(FORCE_CUDA='0', CUDA_VISIBLE_DEVICES='')
        log = folder / 'build.log'
        try:
            run(
                [self.python, 'setup.py', 'bdist_wheel'],
                log,
                describe=BuildProgress(),
                keep_open=(handle, *self.lock_handle),
                cwd=source,
                env=env,
            )
        except CommandFailed as error:
            text = str(error)
            if 'No space left on device' in text:
                advice = f'The disk of {folder} is full. Free some space'
            elif re.search('Killed|out of memory|bad_alloc', text):
                advice = 'The machine ran out of memory. Use MAX_JOBS=1 make setup'
            else:
                advice = 'mmcv did not compile. Mend what the log names'
            raise SetupError(
                f'{error}\n{advice} (full log: {log}), then run make '
                'setup again: files that are compiled are kept.'
            ) from error
        built = find_wheel(source / 'dist')
        if built is None:
            raise SetupError(
                f'mmcv was built without its compiled ops. The log says why: {log}'
            )
        wheel = folder / built.name
        os.replace(built, wheel)
        shutil.rmtree(source, ignore_errors=True)
        return wheel

    def unpack_mmcv(self, source: Path) -> None:
        """Fetches mmcv's source distribution and unpacks it in one move."""
        with tempfile.TemporaryDirectory(dir=source.parent) as temporary:
            # --no-build-isolation: pip asks setup.py for its metadata, which
            # needs the pkg_resources of the setuptools installed here
            options = ['--no-deps', '--no-binary', 'mmcv', '--no-build-isolation']
            requirement = f'mmcv=={self.mmcv}'
            self.pip('download', *options, '--dest', temporary, requirement)
            archive = next(Path(temporary).glob('mmcv-*.tar.gz'))
            with tarfile.open(archive) as tar:
                # Python before 3.11.4 has no filter
                tar.extraction_filter = getattr(tarfile, 'data_filter', None)
                tar.extractall(temporary)
            os.replace(Path(temporary, source.name), source)

    def install_rest(self) -> None:
        self.install_pins(read_pins(REQUIREMENTS / 'runtime.txt'))
        self.install_pins(read_pins(REQUIREMENTS / 'dev.txt'))
        self.mend_opencv()

    def mend_opencv(self) -> None:
        """Exchanges OpenCV for its headless build where libGL is missing."""
        result = subprocess.run(
            [str(self.python), '-c', 'import cv2'],
            capture_output=True,
            text=True,
            cwd=self.venv,
        )
        library = re.search(r'(lib[\w+-]+\.so[\w.]*): cannot open', result.stderr)
        version = self.installed().get('opencv-python')
        if result.returncode == 0 or not library or version is None:
            return
        print(
            f'      this system has no {library[1]}, so opencv-python is exchanged '
            f'for opencv-python-headless {version}'
        )
        self.pip('uninstall', '--yes', 'opencv-python')
        self.pip('install', '--no-deps', f'opencv-python-headless=={version}')

    def install_package(self) -> None:
        # 10 seconds are saved where nothing that packaging reads has changed
        stamp = self.read_stamp()
        if (
            'mmcls-involution' in self.installed()
            and stamp.get('packaged') == fingerprint()
            and stamp.get('packaged_from') == str(ROOT)
            and (ROOT / 'mmcls_involution' / '.mim' / 'configs').exists()
        ):
            return
        options = ['--no-deps', '--no-build-isolation']
        self.pip('install', *options, '--editable', ROOT)
        self.write_stamp(packaged=fingerprint(), packaged_from=str(ROOT))

    def run_doctor(self) -> None:
        result = subprocess.run([str(self.python), '-m', 'mmcls_involution.doctor'])
        if result.returncode:
            raise SetupError(
                'The environment is installed, but the doctor found what is marked '
                'FAIL above. Do what it says, then run make setup again.'
            )

    def __call__(self) -> None:
        """Runs all steps; see the module's docstring."""
        self.venv.parent.mkdir(parents=True, exist_ok=True)
        with lock(self.venv.parent, 'another set-up of this folder') as handle:
            self.lock_handle = (handle,)
            if self.is_finished():
                print(f'set-up: {self.venv} is up to date')
                return
            steps = [
                ('check Python, compiler and disk (a second)', self.check_machine),
                (f'virtual environment {self.venv} (5 seconds)', self.make_venv),
                ('check the package index (2 seconds)', self.check_index),
                (f'{self.torch} (1 to 10 minutes)', self.install_torch),
                ('torchvision (10 seconds)', self.install_torchvision),
                ('build tools (5 seconds)', self.install_build_tools),
                (
                    f'mmcv {self.mmcv} with its ops (compiled once, 5 to 20 '
                    'minutes; from the cache 5 seconds)',
                    self.install_mmcv,
                ),
                (
                    'mmengine, mmdet, mmseg, mmpretrain ... (1 minute)',
                    self.install_rest,
                ),
                (
                    'mmcls_involution, editable (its kernels: 1 minute)',
                    self.install_package,
                ),
                ('doctor (20 seconds)', self.run_doctor),
            ]
            start = time.monotonic()
            for number, (title, step) in enumerate(steps, 1):
                print(f'[{number}/{len(steps)}] {title}', flush=True)
                step()
            self.write_stamp(**self.state())
            print(f'set-up: done in {clock(time.monotonic() - start)}: {self.venv}')


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--venv', type=Path, default=ROOT / '.venv')
    parser.add_argument(
        '--torch',
        default='torch==' + read_pins(REQUIREMENTS / 'torch.txt')['torch'],
        help='requirement of torch, with pip options after it if need be',
    )
    args = parser.parse_args()

    def stop(signum, frame):
        raise Stopped(signum)

    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, stop)
    try:
        check_python()
        Setup(args.venv, args.torch)()
    except SetupError as error:
        print(f'\nset-up stopped: {error}', file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f'\nset-up stopped: {error}. Mend that, then run make setup again: it '
            'goes on from here.',
            file=sys.stderr,
        )
        return 1
    except Stopped as stopped:
        print(
            '\nset-up interrupted; nothing is lost. `make setup` goes on from here.',
            file=sys.stderr,
        )
        return 128 + stopped.signum
    return 0


if __name__ == '__main__':
    sys.exit(main())
