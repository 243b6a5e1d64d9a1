"""tools/setup_env.py: its decisions, its early failures and its interruption.

Nothing is downloaded or compiled: pip, the compiler and mmcv's build are stood in
for where a test needs them to act.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import types
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / 'tools' / 'setup_env.py'

spec = importlib.util.spec_from_file_location('setup_env', SCRIPT)
setup_env = importlib.util.module_from_spec(spec)
spec.loader.exec_module(setup_env)


def make_script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\n{text}\n')
    path.chmod(0o755)
    return path


def make_wheel(path: Path, member: str = 'mmcv/_ext.cpython-311.so') -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr(member, 'x')
    return path


def install(site: Path, **versions: str) -> None:
    """Puts the traces of installed distributions into a site-packages folder."""
    for name, version in versions.items():
        info = site / f'{name}-{version}.dist-info'
        info.mkdir(parents=True)
        (info / 'INSTALLER').write_text('pip')


@pytest.fixture
def setup(tmp_path, monkeypatch):
    """A Setup in an empty folder whose pip calls are recorded, not made."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    instance = setup_env.Setup(tmp_path / '.venv', 'torch==2.13.0')
    instance.site.mkdir(parents=True)
    instance.calls = []
    instance.pip = lambda *arguments: instance.calls.append(
        [str(argument) for argument in arguments]
    )
    return instance


# Pins


def test_missing_pins_compares_exact_versions():
    pins = {'torch': '2.13.0', 'numpy': '2.4.6', 'six': '1.17.0'}
    installed = {'torch': '2.13.0+cpu', 'numpy': '2.4.5'}
    assert setup_env.missing_pins(pins, installed) == ['numpy==2.4.6', 'six==1.17.0']


@pytest.mark.parametrize(
    'platform, installed, missing',
    [('linux', {}, 1), ('linux', {'triton': '3.6.0'}, 0), ('darwin', {}, 0)],
)
def test_triton_of_a_cuda_torch_stays(monkeypatch, platform, installed, missing):
    monkeypatch.setattr(setup_env.sys, 'platform', platform)
    assert len(setup_env.missing_pins({'triton': '3.9.0'}, installed)) == missing


def test_headless_opencv_of_the_same_version_counts():
    pins = {'opencv-python': '5.0.0.93'}
    for version, missing in (('5.0.0.93', 0), ('4.11.0', 1)):
        installed = {'opencv-python-headless': version}
        assert len(setup_env.missing_pins(pins, installed)) == missing


def test_half_installed_distribution_is_found_and_removed(setup, capsys):
    install(setup.site, numpy='2.4.6', typing_extensions='4.16.0')
    (setup.site / 'torch-2.13.0.dist-info').mkdir()
    (setup.site / '~orch').mkdir()
    whole = {'numpy': '2.4.6', 'typing-extensions': '4.16.0'}
    assert setup.installed() == whole
    setup.clear_leftovers()
    assert 'torch-2.13.0 was half installed' in capsys.readouterr().out
    assert len(list(setup.site.iterdir())) == len(whole)


def test_only_missing_pins_are_installed(setup):
    install(setup.site, six='1.17.0')
    setup.install_pins({'six': '1.17.0', 'regex': '1'})
    setup.install_pins({'six': '1.17.0'})
    assert setup.calls == [['install', '--no-deps', 'regex==1']]


# torch and torchvision


@pytest.mark.parametrize('torch', ['', '  ', '--pre torch'])
def test_torch_without_requirement_is_refused(tmp_path, torch):
    with pytest.raises(setup_env.SetupError, match='names no requirement'):
        setup_env.Setup(tmp_path, torch)


def test_tested_torch_is_constrained_and_another_is_not(setup, tmp_path):
    with pytest.raises(setup_env.SetupError, match='installs no torch'):
        setup.install_torch()
    setup.calls.clear()
    install(setup.site, torch='2.13.0')
    setup.install_torch()
    setup.write_stamp(torch_request=None)
    other = setup_env.Setup(tmp_path / '.venv', 'torch==2.12.1 --index-url file:///x')
    other.pip = setup.pip
    other.install_torch()
    assert setup.calls[0][:3] == ['install', 'torch==2.13.0', '--constraint']
    assert setup.calls[1] == ['install', 'torch==2.12.1', '--index-url', 'file:///x']


def test_changed_torch_request_replaces_the_installed_one(setup, tmp_path):
    install(setup.site, torch='2.13.0+cpu')
    setup.write_stamp(torch_request='torch==2.13.0', mmcv_built_for=['2.13.0+cpu', ''])
    setup.install_torch()
    assert setup.calls == []
    setup.torch, setup.torch_words = 'torch==2.12.1', ['torch==2.12.1']
    setup.install_torch()
    assert [call[0] for call in setup.calls] == ['uninstall', 'install']
    # the ops compiled for the former torch do not count any more
    assert setup.read_stamp()['mmcv_built_for'] is None


@pytest.mark.parametrize(
    ('torch', 'torchvision'),
    [('2.13.0+cpu', '0.28.0'), ('2.9.1', '0.24.1'), ('2.12.0+cu130', '0.27.0')],
)
def test_torchvision_matches_torch(setup, torch, torchvision):
    install(setup.site, torch=torch)
    setup.torch_options = ['--index-url', 'file:///x']
    setup.install_torchvision()
    wanted = ['install', '--no-deps', f'torchvision=={torchvision}']
    assert setup.calls == [[*wanted, '--index-url', 'file:///x']]


def test_unknown_torch_has_no_torchvision(setup):
    install(setup.site, torch='3.0.0')
    with pytest.raises(setup_env.SetupError, match='not a release of torch 2'):
        setup.install_torchvision()


def test_mmcv_source_is_unpacked_in_one_move(setup, tmp_path):
    def download(*arguments):
        folder = Path(arguments[arguments.index('--dest') + 1])
        (tmp_path / 'mmcv-2.1.0').mkdir()
        (tmp_path / 'mmcv-2.1.0' / 'setup.py').write_text('import this')
        with tarfile.open(folder / 'mmcv-2.1.0.tar.gz', 'w:gz') as archive:
            archive.add(tmp_path / 'mmcv-2.1.0', 'mmcv-2.1.0')

    setup.pip = download
    source = tmp_path / 'cache' / 'mmcv-2.1.0'
    source.parent.mkdir()
    setup.unpack_mmcv(source)
    assert [file.name for file in source.iterdir()] == ['setup.py']
    assert [folder.name for folder in source.parent.iterdir()] == ['mmcv-2.1.0']


# Early failures


@pytest.mark.parametrize('version', [(3, 10, 13), (3, 12, 1), (2, 7, 18)])
def test_wrong_python(version):
    with pytest.raises(setup_env.SetupError, match=r'3\.11 is needed.*make setup PYTH'):
        setup_env.check_python(version)


def test_missing_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv('PATH', str(tmp_path))
    monkeypatch.delenv('CXX', raising=False)
    with pytest.raises(setup_env.SetupError, match=r'c\+\+: not found.*sudo apt') as e:
        setup_env.find_compiler()
    assert len(str(e.value).splitlines()) == 1


@pytest.mark.parametrize(
    ('says', 'expected'),
    [
        ('probe.cpp:1: fatal error: Python.h: No such file', 'python3.11-dev'),
        ("error: unrecognized option '-std=c++17'", r'no C\+\+17 compiler works'),
    ],
)
def test_compiler_that_fails(monkeypatch, tmp_path, says, expected):
    compiler = make_script(tmp_path / 'cxx', f'echo "{says}" >&2; exit 1')
    monkeypatch.setenv('CXX', str(compiler))
    with pytest.raises(setup_env.SetupError, match=expected):
        setup_env.find_compiler()


@pytest.mark.skipif(shutil.which('c++') is None, reason='no C++ compiler here')
def test_working_compiler(monkeypatch):
    monkeypatch.delenv('CXX', raising=False)
    assert setup_env.find_compiler() == 'c++'


def test_disk_space_is_summed_over_a_file_system(monkeypatch, tmp_path):
    usage = types.SimpleNamespace(free=3.5 * setup_env.GIB)
    monkeypatch.setattr(setup_env.shutil, 'disk_usage', lambda path: usage)
    needs = {tmp_path / 'new' / 'venv': 3 * setup_env.GIB}
    setup_env.check_disk(needs)
    needs[tmp_path / 'cache'] = 1 * setup_env.GIB
    with pytest.raises(setup_env.SetupError, match=r'4\.0 GiB, 3\.5 GiB are free'):
        setup_env.check_disk(needs)


def test_folder_that_cannot_be_written(monkeypatch, tmp_path):
    monkeypatch.setattr(setup_env.os, 'access', lambda path, mode: False)
    with pytest.raises(setup_env.SetupError, match='cannot be written'):
        setup_env.check_disk({tmp_path / 'new': 1})


def test_error_of_the_system_is_one_message(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['setup_env', '--venv', '/dev/null/x/.venv'])
    monkeypatch.setattr(setup_env.signal, 'signal', lambda *_: None)
    assert setup_env.main() == 1
    assert 'set-up stopped: [Errno 20] Not a directory' in capsys.readouterr().err


def test_folder_that_is_no_environment_is_left_alone(tmp_path):
    folder = tmp_path / 'photos'
    folder.mkdir()
    (folder / 'cat.jpg').touch()
    with pytest.raises(setup_env.SetupError, match='is no virtual environment'):
        setup_env.Setup(folder, 'torch').make_venv()
    assert [entry.name for entry in folder.iterdir()] == ['cat.jpg']


def run_script(tmp_path: Path, **env: str) -> subprocess.Popen:
    """Starts the script in a clean folder, away from the user's pip settings."""
    env = {
        'HOME': str(tmp_path),
        'XDG_CACHE_HOME': str(tmp_path / 'cache'),
        'PATH': os.environ['PATH'],
        'PIP_CONFIG_FILE': os.devnull,
        **env,
    }
    return subprocess.Popen(
        [sys.executable, SCRIPT, '--venv', tmp_path / '.venv'],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # a parent may have been started with interrupts ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_script_stops_without_compiler_before_anything_is_made(tmp_path):
    process = run_script(tmp_path, CXX='no-such-compiler')
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 1
    assert 'set-up stopped: mmcv has to be compiled' in output
    assert 'Traceback' not in output
    assert not (tmp_path / '.venv').exists()


def test_script_without_index_and_script_interrupted(tmp_path):
    """One environment serves both, as making it takes seconds."""
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        url = f'http://127.0.0.1:{server.getsockname()[1]}/simple'
        # CXX=true passes for a compiler. Bound but not listening: refused
        process = run_script(tmp_path, CXX='true', PIP_INDEX_URL=url)
        output = process.communicate(timeout=120)[0]
        assert process.returncode == 1
        assert 'package index cannot be reached through pip' in output
        assert 'Traceback' not in output

        # Listening but silent: pip waits, and Ctrl-C comes
        server.listen()
        process = run_script(tmp_path, CXX='true', PIP_INDEX_URL=url)
        server.settimeout(60)
        connection, _ = server.accept()
        with connection:
            process.send_signal(signal.SIGINT)
            output = process.communicate(timeout=60)[0]
        assert process.returncode == 130
        assert 'set-up interrupted; nothing is lost' in output
        assert 'Traceback' not in output
        assert 'made anew' not in output


# The stamp


def test_stamp_knows_when_there_is_nothing_to_do(setup):
    assert not setup.is_finished()
    setup.python.parent.mkdir(parents=True)
    setup.python.touch()
    install(setup.site, torch='2.13.0+cpu', numpy='2.4.6', mmcls_involution='0.1.0')
    setup.write_stamp(**setup.state())
    assert setup.is_finished()
    install(setup.site, jupyter='1')
    assert setup.is_finished()
    shutil.rmtree(setup.site / 'numpy-2.4.6.dist-info')
    assert not setup.is_finished()
    install(setup.site, numpy='2.4.6')
    assert setup.is_finished()
    setup.torch = 'torch==2.12.1'
    assert not setup.is_finished()


def test_torn_stamp_is_no_stamp(setup):
    setup.stamp_file.write_text('{"torch_request": "to')
    assert setup.read_stamp() == {}


# mmcv


def test_progress_of_the_build(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(setup_env.time, 'monotonic', lambda: now[0])
    progress = setup_env.BuildProgress()
    assert progress('copying mmcv/ops/nms.py') == 'preparing'
    now[0] += 70
    text = 'compiled 7 of 77 files, about {} left'
    assert progress('[7/77] c++ -MMD -MF nms.o.d -O2 -g0') == text.format('11:40')
    now[0] += 10
    assert progress('a.cpp:90: warning: [12/77] no progress') == text.format('11:30')
    now[0] += 1000
    assert progress('') == text.format('0:00')


@pytest.mark.parametrize(
    ('seconds', 'text'), [(0, '0:00'), (75.9, '1:15'), (3661, '1:01:01')]
)
def test_clock(seconds, text):
    assert setup_env.clock(seconds) == text


def test_jobs_are_bounded_by_cpus_memory_and_the_user(monkeypatch):
    monkeypatch.delenv('MAX_JOBS', raising=False)
    monkeypatch.setattr(setup_env.os, 'sched_getaffinity', lambda pid: set(range(64)))
    monkeypatch.setattr(setup_env, 'MEMORY_PER_JOB', 1e15)
    assert setup_env.count_jobs() == 1
    monkeypatch.setattr(setup_env, 'MEMORY_PER_JOB', 1)
    assert setup_env.count_jobs() == 64
    monkeypatch.setenv('MAX_JOBS', '3')
    assert setup_env.count_jobs() == 3


@pytest.mark.parametrize(
    ('cuda', 'nvcc', 'tag'),
    [
        (None, '13.0', 'cpu'),
        ('13.0', None, 'cpu'),
        ('13.0', '12.8', 'cpu'),
        ('13.0', '13.1', 'cu130-9.0'),
    ],
)
def test_device_needs_cuda_torch_and_its_nvcc(monkeypatch, tmp_path, cuda, nvcc, tag):
    monkeypatch.setenv('CUDA_HOME', str(tmp_path))
    monkeypatch.setenv('PATH', '/bin')
    monkeypatch.delenv('TORCH_CUDA_ARCH_LIST', raising=False)
    script = tmp_path / 'bin' / 'nvcc'
    if nvcc:
        make_script(script, f'echo "tools, release {nvcc}, V{nvcc}"')
        assert setup_env.find_nvcc() == str(script)
    facts = {'hip': None, 'cuda': cuda, 'archs': ['9.0']}
    assert setup_env.device_tag(facts, str(script) if nvcc else '') == tag


def test_only_a_whole_wheel_with_ops_counts(tmp_path):
    name = 'mmcv-2.1.0-cp311-cp311-linux_x86_64.whl'
    assert setup_env.find_wheel(tmp_path) is None
    (tmp_path / name).write_bytes(b'torn')
    assert setup_env.find_wheel(tmp_path) is None
    make_wheel(tmp_path / name, 'mmcv/__init__.py')
    assert setup_env.find_wheel(tmp_path) is None
    make_wheel(tmp_path / name)
    assert setup_env.find_wheel(tmp_path) == tmp_path / name


def test_cached_wheel_makes_the_compiler_needless(setup, monkeypatch):
    monkeypatch.setenv('CXX', 'no-such-compiler')
    with pytest.raises(setup_env.SetupError, match='no-such-compiler'):
        setup.check_machine()
    key = setup_env.wheel_key('2.1.0', '2.13.0+cpu', 'cpu')
    make_wheel(setup_env.cache_dir() / key / 'mmcv-2.1.0-cp311.whl')
    setup.check_machine()


FACTS = {'version': '2.13.0', 'hip': None, 'cuda': None, 'archs': []}


@pytest.fixture
def build(setup, monkeypatch, tmp_path):
    """Runs build_mmcv with a script in place of Python and its setup.py."""
    folder = tmp_path / 'cache' / 'key'
    monkeypatch.setenv('CXX', 'true')

    def run(script: str) -> Path:
        (folder / 'mmcv-2.1.0' / 'dist').mkdir(parents=True, exist_ok=True)
        make_script(setup.python, script)
        with setup_env.lock(folder, 'nobody') as handle:
            return setup.build_mmcv(folder, 'cpu', FACTS, '', handle)

    run.folder = folder
    return run


def test_wheel_is_moved_into_place(build, tmp_path):
    made = make_wheel(tmp_path / 'made.whl')
    name = 'mmcv-2.1.0-cp311.whl'
    wheel = build(f'echo "[1/1] c++ $CFLAGS"; cp {made} dist/{name}')
    assert wheel == build.folder / name
    assert '[1/1] c++ -O2 -g0' in (build.folder / 'build.log').read_text()
    assert sorted(p.name for p in build.folder.iterdir()) == ['build.log', name]


@pytest.mark.parametrize(
    ('script', 'message'),
    [
        ('echo boom; exit 1', r'boom\nmmcv did not compile.*full log: .*build\.log'),
        ('echo "c++: Killed signal"; exit 1', 'MAX_JOBS=1 make setup'),
        ('echo "No space left on device"; exit 1', 'is full'),
        ('true', 'without its compiled ops'),
    ],
)
def test_failed_build_says_why_and_keeps_the_work(build, script, message):
    with pytest.raises(setup_env.SetupError, match=message):
        build(script)
    assert (build.folder / 'mmcv-2.1.0').is_dir()


def test_lock_waits_for_the_holder_and_for_its_child(tmp_path, capsys):
    order = []

    def second():
        with setup_env.lock(tmp_path, 'the first'):
            order.append('second')

    with setup_env.lock(tmp_path, 'nobody') as handle:
        child = subprocess.Popen(['sleep', '60'], pass_fds=(handle,))
    try:  # our handle is closed, the child's copy still holds the lock
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.3)
        order.append('first')
    finally:
        child.kill()
        child.wait()
    thread.join(10)
    assert order == ['first', 'second']
    assert 'waiting for the first' in capsys.readouterr().out


def test_interrupted_command_leaves_no_child(tmp_path):
    pid_file = tmp_path / 'pid'
    # a child of the command that ignores the interrupt the command dies of
    child = f"trap '' INT; echo $$ >{pid_file}; echo started; exec sleep 60"
    make_script(tmp_path / 'child', child)
    script = make_script(tmp_path / 'command', f'{tmp_path}/child & wait')

    def interrupt(line: str) -> str:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        setup_env.run([script], tmp_path / 'log', describe=interrupt)
    pid = int(pid_file.read_text())
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and is_running(pid):
        time.sleep(0.1)
    assert not is_running(pid)


def is_running(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return (
            Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
        )
    return False


@pytest.mark.parametrize('change', ['nothing', 'torch', 'nvcc', 'mmcv'])
def test_mmcv_is_installed_again_when_what_it_fits_changes(setup, monkeypatch, change):
    key = setup_env.wheel_key('2.1.0', '2.13.0', 'cpu')
    wheel = make_wheel(setup_env.cache_dir() / key / 'mmcv-2.1.0-cp311.whl')
    monkeypatch.setattr(setup, 'check_versions', lambda: None)
    monkeypatch.setattr(setup, 'torch_facts', lambda: FACTS)
    monkeypatch.setattr(setup_env, 'find_nvcc', lambda: '')
    install(setup.site, torch='2.13.0')
    setup.install_mmcv()
    expected = ['install', '--no-deps', '--force-reinstall', str(wheel)]
    assert setup.calls.pop() == expected
    if change != 'mmcv':
        install(setup.site, mmcv='2.1.0')
    if change == 'torch':
        setup.write_stamp(mmcv_built_for=None)
    if change == 'nvcc':
        monkeypatch.setattr(setup_env, 'find_nvcc', lambda: '/usr/bin/nvcc')
    setup.install_mmcv()
    assert setup.calls == ([] if change == 'nothing' else [expected])


# OpenCV


@pytest.mark.parametrize(
    ('says', 'exchanged'),
    [
        ('ImportError: libGL.so.1: cannot open shared object file', True),
        ('ImportError: numpy is broken', False),
    ],
)
def test_opencv_is_exchanged_where_libgl_is_missing(setup, capsys, says, exchanged):
    install(setup.site, opencv_python='5.0.0.93')
    make_script(setup.python, f'echo "{says}" >&2; exit 1')
    setup.mend_opencv()
    expected = [
        ['uninstall', '--yes', 'opencv-python'],
        ['install', '--no-deps', 'opencv-python-headless==5.0.0.93'],
    ]
    assert setup.calls == (expected if exchanged else [])
    assert ('no libGL.so.1' in capsys.readouterr().out) == exchanged
