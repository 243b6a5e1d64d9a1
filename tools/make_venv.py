"""Make the virtual environment, or mend what an interrupted pip left in it.

`make setup` runs this first. It needs nothing but the standard library, and old
Pythons read it far enough to say that they are too old.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

OLDEST = (3, 10)


def check_python(version: tuple = sys.version_info) -> None:
    """Ends the process, with what to do, unless this Python can do the work."""
    if tuple(version[:2]) < OLDEST:
        sys.exit(
            f'Python 3.10 or newer is needed, but {sys.executable} is '
            f'{version[0]}.{version[1]}. Install one (your system, pyenv, conda and uv '
            'have it), then name it: make setup PYTHON=/path/to/python3.11'
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError as error:
        name = f'python{version[0]}.{version[1]}-venv'
        sys.exit(
            f'{sys.executable} cannot make virtual environments: {error}. On Debian '
            f'and Ubuntu: sudo apt install {name}; then run make setup again.'
        )


def works(folder: Path) -> bool:
    """Whether the folder has a Python that is new enough, and its pip."""
    python = str(folder / 'bin' / 'python')
    program = f'import sys, pip._internal; sys.exit(sys.version_info < {OLDEST})'
    try:
        return subprocess.call([python, '-c', program], stderr=subprocess.DEVNULL) == 0
    except OSError:
        return False


def make(folder: Path) -> None:
    """Makes the environment anew; leaves alone what never was one.

    venv makes empty folders first, then pyvenv.cfg, so only these folders, empty, can
    be its work where that file is missing: a program's prefix has the same names.
    """
    if folder.exists() and not (folder / 'pyvenv.cfg').exists():
        begun = {folder / name for name in ('bin', 'include', 'lib', 'lib64')}
        held = any(
            not entry.is_dir() or (entry.is_symlink() and entry != folder / 'lib64')
            for entry in folder.rglob('*')
        )
        if held or not begun.issuperset(folder.iterdir()):
            sys.exit(
                f'{folder} exists and has no pyvenv.cfg, so it is no virtual '
                'environment and is left alone. Name another folder, make setup '
                'VENV=.venv, or remove this one if nothing in it is needed.'
            )
    command = [sys.executable, '-m', 'venv', '--clear', str(folder)]
    if subprocess.call(command):
        sys.exit(f'{" ".join(command)} failed; mend what it says and run it again.')


def remove_halves(site: Path) -> None:
    """Removes what pip would take for installed though it is not whole.

    pip moves an old version to ``~ame`` before it deletes it, and writes RECORD and
    INSTALLER after the files of a new one.
    """
    halves = set()
    for left in site.glob('~*'):
        halves |= {left, *site.glob(f'?{left.name[1:].split("-")[0]}-*.dist-info')}
    for info in site.glob('*.dist-info'):
        if not ((info / 'RECORD').exists() and (info / 'INSTALLER').exists()):
            halves.add(info)
    for half in sorted(halves):
        print(f'removing {half.name}, which an interrupted pip left')
        shutil.rmtree(str(half)) if half.is_dir() else os.remove(str(half))


def main(folder: Path) -> None:
    check_python()
    if not works(folder):
        make(folder)
    for site in folder.glob('lib/python3*/site-packages'):
        remove_halves(site)


if __name__ == '__main__':
    main(Path(sys.argv[1]))
